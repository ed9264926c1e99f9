"""The public op: which implementation runs."""
import functools

import jax

from pallas_kernels.implementations import REFERENCE, needed_devices, pick, with_gradient_of
from pallas_kernels.kv_append import tpu
from pallas_kernels.kv_append.reference import kv_append_reference
from pallas_kernels.page_table import PageTable, one_page_a_row
from pallas_kernels.tiling import Device


def kv_append(caches: tuple[jax.Array, ...], new: tuple[jax.Array, ...], positions_BT: jax.Array, *, device: Device,
              table: PageTable | None = None, implementation: str | None = None, interpret: bool = False) -> tuple[jax.Array, ...]:
    """The arrays of one layer's cache with new entries in them, in place where they are donated; see :func:`kv_append_reference`.

    Args:
        caches: arrays [P, K, S, H] of one shape and dtype.
        new: as many of [B, T, K, H]; cast to the dtype of the caches.
        positions_BT, table: see there. A kernel wants positions that go up by one from token to token of a row, and no page that two rows write to.
        device: what it is compiled for.
        implementation: ``"mosaic_tpu"`` or ``"reference"``; None for the best known on this device.
        interpret: whether a kernel is interpreted, on a CPU.

    Raises:
        ValueError: the named implementation cannot do what is asked.
    """
    needed = needed_devices("mosaic_tpu", device, interpret)
    refusal = f"needs {needed}, not {device.kind or device.platform!r}" if needed else tpu.refusal(caches[0])
    chosen = pick("kv_append", device, implementation, {"mosaic_tpu": refusal})

    def reference(caches, new, positions_BT, table):
        return tuple(kv_append_reference(cache, entries, positions_BT, table) for cache, entries in zip(caches, new, strict=True))
    if chosen == REFERENCE:
        return reference(caches, new, positions_BT, table)
    table = one_page_a_row(positions_BT.shape[0]) if table is None else table
    run = functools.partial(tpu.kv_append, device=device, interpret=interpret)
    return with_gradient_of(reference, run)(caches, new, positions_BT, table)
