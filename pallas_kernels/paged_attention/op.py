"""The public op: which implementation runs."""
import functools

import jax

from pallas_kernels.implementations import REFERENCE, needed_devices, pick, with_gradient_of
from pallas_kernels.page_table import PageTable, one_page_a_row
from pallas_kernels.paged_attention import gpu, tpu
from pallas_kernels.paged_attention.reference import paged_attention_reference
from pallas_kernels.tiling import Device

KERNELS = {"mosaic_gpu": gpu, "mosaic_tpu": tpu}


def paged_attention(q_BTNH: jax.Array, k_PKSH: jax.Array, v_PKSH: jax.Array, positions_BT: jax.Array, *, device: Device,
                    scales: tuple[jax.Array, jax.Array] | None = None, table: PageTable | None = None, scale: float,
                    window: int | None = None, softcap: float | None = None, sinks_N: jax.Array | None = None,
                    implementation: str | None = None, interpret: bool = False) -> jax.Array:
    """Causal attention of queries to the cached keys of their own row; see :func:`paged_attention_reference` for the arguments and the result.

    A row's result depends, to the bit, neither on the other rows of the call nor, on a GPU, on how many of its tokens are in it.

    Args:
        device: what it is compiled for.
        implementation: ``"mosaic_gpu"``, ``"mosaic_tpu"`` or ``"reference"``; None for the best known on this device.
        interpret: whether a kernel is interpreted, on a CPU.

    Raises:
        ValueError: the named implementation cannot do what is asked.
    """
    refusals = {name: refusal(name, q_BTNH, k_PKSH, device, scales, interpret) for name in KERNELS}
    chosen = pick("paged_attention", device, implementation, refusals)
    how = {"scale": scale, "window": window, "softcap": softcap}
    arrays = {"q_BTNH": q_BTNH, "k_PKSH": k_PKSH, "v_PKSH": v_PKSH, "positions_BT": positions_BT, "scales": scales, "table": table,
              "sinks_N": sinks_N}
    if chosen == REFERENCE:
        return paged_attention_reference(**arrays, **how)
    arrays["table"] = one_page_a_row(q_BTNH.shape[0]) if table is None else table
    run = functools.partial(KERNELS[chosen].paged_attention, **how, device=device, interpret=interpret)
    return with_gradient_of(lambda arrays: paged_attention_reference(**arrays, **how), lambda arrays: run(**arrays))(arrays)


def refusal(name: str, q_BTNH: jax.Array, k_PKSH: jax.Array, device: Device, scales, interpret: bool) -> str | None:
    """Why a kernel cannot do what is asked; None where it can."""
    if needed := needed_devices(name, device, interpret):
        return f"needs {needed}, not {device.kind or device.platform!r}"
    if (scales is None) != (k_PKSH.dtype.itemsize > 1):
        return f"takes scales with a cache of 8 bits and only with it, not with {k_PKSH.dtype}"
    return KERNELS[name].refusal(q_BTNH, k_PKSH, scales)

