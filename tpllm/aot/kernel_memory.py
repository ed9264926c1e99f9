"""How the memory of a kernel grows, from the compilers of accelerators that need not be there."""
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.tiling import device_of
from tpllm.aot.report import compile_all
from tpllm.aot.topologies import describe_devices

LENGTHS = tuple(1024 * 2**i for i in range(8))  # 1k to 128k


def temporary_bytes(lower: Callable[[int], jax.stages.Lowered], lengths: Sequence[int] = LENGTHS) -> dict[int, int]:
    """Length -> bytes that a device needs beside arguments and results, as its compiler says.

    Args:
        lower: gives the lowered program for one length.
        lengths: what to ask for.

    Raises:
        MemoryNeedError: a program does not fit into the device.
    """
    return {length: program.temporary_bytes for length, program in zip(lengths, compile_all([lower(length) for length in lengths]), strict=True)}


def lower_flash_attention(accelerator: str, length: int, *, num_heads: int = 32, num_kv_heads: int = 8, head_dim: int = 128,
                          implementation: str | None = None, differentiates: bool = False) -> jax.stages.Lowered:
    """Causal attention of one row of bfloat16 on one device; for :func:`temporary_bytes`.

    Args:
        accelerator: as for ``describe_devices``: ``"h200:1"``, ``"v5e:2x2"``.
        length: tokens of the row.
        num_heads, num_kv_heads, head_dim: of the model.
        implementation: see ``flash_attention``.
        differentiates: whether the gradients of queries, keys and values are computed.

    Raises:
        ConfigError: see ``describe_devices``.
    """
    target = describe_devices(accelerator)[0]
    mesh = jax.sharding.Mesh([target], "x", axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())

    def attend(q_BTNH, k_BTKH, v_BTKH, positions_BT):
        return flash_attention(q_BTNH, k_BTKH, v_BTKH, positions_BT, scale=head_dim**-0.5, device=device_of(target), implementation=implementation)

    def gradients(q_BTNH, k_BTKH, v_BTKH, positions_BT):
        return jax.grad(lambda *qkv: attend(*qkv, positions_BT).astype(jnp.float32).sum(), (0, 1, 2))(q_BTNH, k_BTKH, v_BTKH)
    shapes = [((1, length, heads, head_dim), jnp.bfloat16) for heads in (num_heads, num_kv_heads, num_kv_heads)] + [((1, length), jnp.int32)]
    with jax.set_mesh(mesh):
        return jax.jit(gradients if differentiates else attend).lower(*(jax.ShapeDtypeStruct(*x, sharding=sharding) for x in shapes))
