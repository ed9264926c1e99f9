"""Attention on TPUs, in Pallas.

The grid goes over rows, heads, tiles of queries and, innermost, blocks of keys; max, sum and accumulator of the online softmax stay in vector memory
from block to block. A block that no query of the tile sees is neither brought nor computed: the index map stands still there. Only blocks that
some query does not wholly see are masked.

Softmax is computed in base 2. ``max`` starts at a finite number and masked scores are -inf, so a block that is wholly masked changes nothing.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention.reference import LOG2_E, MASKED
from pallas_kernels.flash_attention.spans import Spans, pad
from pallas_kernels.precision import matmul_precision
from pallas_kernels.tiling import Device, choose_tiles

LANES = 128
DTYPES = ("bfloat16", "float32")
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class TpuTiles:
    """How attention is cut.

    Attributes:
        block_q: queries of a tile; a multiple of 128.
        block_k: keys and values of one step; a multiple of 128.
    """

    block_q: int
    block_k: int


def candidates(num_queries: int, num_keys: int) -> tuple[TpuTiles, ...]:
    """Tiles no longer than the arrays need, the best known first."""
    most_q, most_k = (LANES * pl.cdiv(x, LANES) for x in (num_queries, num_keys))
    sizes = ((512, 1024), (1024, 1024), (1024, 512), (512, 512), (512, 256), (256, 512), (256, 256), (128, 128))
    return tuple(dict.fromkeys(TpuTiles(min(q, most_q), min(k, most_k)) for q, k in sizes))


def on_chip_bytes(tiles: TpuTiles, head_dim: int, itemsize: int) -> int:
    """Vector memory: what is brought twice, the state, and three matrices of scores."""
    lanes = LANES * pl.cdiv(head_dim, LANES)
    moved = 2 * lanes * itemsize * 2 * (tiles.block_q + tiles.block_k)
    state = 4 * tiles.block_q * (lanes + 4 * LANES)
    return moved + state + 3 * 4 * tiles.block_q * tiles.block_k + 2 * MIB


def refusal(device: Device) -> str | None:
    """Why the kernel does not run there, or None."""
    return None if device.platform == "tpu" else f"needs a TPU, and this is {device.kind or device.platform}"


def flash_attention_tpu(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, spans: Spans, sinks_N: jax.Array | None, *, scale: float,
                        softcap: float | None, device: Device, tiles: TpuTiles | None = None,
                        interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BNT) of ``flash_attention_reference``.

    Args:
        q_BTNH, k_BSKH, v_BSKH, sinks_N, scale, softcap: see there.
        spans: which keys each query sees.
        device: see :func:`refusal`.
        tiles: None for the best known.
        interpret: whether to run in the interpreter.
    """
    (B, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    needs = functools.partial(on_chip_bytes, head_dim=H, itemsize=q_BTNH.dtype.itemsize)
    if tiles is None:
        tiles = choose_tiles("flash_attention", device, (H, str(q_BTNH.dtype)), candidates(T, S), needs)
    num_tiles, num_blocks = pl.cdiv(T, tiles.block_q), pl.cdiv(S, tiles.block_k)
    padded_T, padded_S = num_tiles * tiles.block_q, num_blocks * tiles.block_k
    sizes = (tiles.block_q, tiles.block_k, tiles.block_k)
    q_BNTH, k_BKSH, v_BKSH = (pad(x.transpose(0, 2, 1, 3), size, 2) for x, size in zip((q_BTNH, k_BSKH, v_BSKH), sizes, strict=True))
    spans = spans.pad(padded_T, padded_S)
    sinks_N = jnp.full((N,), MASKED, jnp.float32) if sinks_N is None else sinks_N.astype(jnp.float32)
    limit = None if device.on_chip_bytes is None else min(device.on_chip_bytes, 2 * needs(tiles))
    out_BNTH, lse_BN1T = pl.pallas_call(
        functools.partial(_attend, scale=scale, softcap=softcap),
        out_shape=(jax.ShapeDtypeStruct(q_BNTH.shape, q_BNTH.dtype), jax.ShapeDtypeStruct((B, N, 1, padded_T), jnp.float32)),
        grid_spec=_grid((B, N, num_tiles, num_blocks), H, N // K, tiles), name="flash_attention",
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=limit),
        interpret=pltpu.InterpretParams() if interpret else False,
    )(spans.blocks(tiles.block_q, tiles.block_k).reshape(-1), sinks_N, q_BNTH, k_BKSH, v_BKSH,
      jnp.stack([spans.low_BT, spans.high_BT], axis=1), spans.ranks_BS[:, None])
    return out_BNTH[:, :, :T].transpose(0, 2, 1, 3), lse_BN1T[:, :, 0, :T]


def _grid(grid: tuple[int, ...], head_dim: int, heads_per_kv: int, tiles: TpuTiles) -> pltpu.PrefetchScalarGridSpec:
    num_tiles = grid[2]

    def visited(row, tile, block, blocks_ref):
        first, _, _, end = _edges(blocks_ref, row, num_tiles, tile)
        return jnp.clip(block, first, end - 1)
    kv = pl.BlockSpec((None, None, tiles.block_k, head_dim),
                      lambda row, head, tile, block, blocks_ref, _: (row, lax.div(head, heads_per_kv), visited(row, tile, block, blocks_ref), 0))
    queries = pl.BlockSpec((None, None, tiles.block_q, head_dim), lambda row, head, tile, *_: (row, head, tile, 0))
    spans = pl.BlockSpec((None, 2, tiles.block_q), lambda row, head, tile, *_: (row, 0, tile))
    ranks = pl.BlockSpec((None, 1, tiles.block_k),
                         lambda row, head, tile, block, blocks_ref, _: (row, 0, visited(row, tile, block, blocks_ref)))
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2, grid=grid, in_specs=(queries, kv, kv, spans, ranks),
        out_specs=(queries, pl.BlockSpec((None, None, 1, tiles.block_q), lambda row, head, tile, *_: (row, head, 0, tile))),
        scratch_shapes=(*(pltpu.VMEM((tiles.block_q, LANES), dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32, jnp.float32)),
                        pltpu.VMEM((tiles.block_q, head_dim), jnp.float32)))


def _edges(blocks_ref, row, num_tiles: int, tile):
    """(first, full_first, full_end, end) of ``Spans.blocks``."""
    start = 4 * (row * num_tiles + tile)
    return tuple(blocks_ref[start + i] for i in range(4))


def _attend(blocks_ref, sinks_ref, q_ref, k_ref, v_ref, span_ref, ranks_ref, out_ref, lse_ref, low_ref, high_ref, max_ref, sum_ref, acc_ref, *,
            scale: float, softcap: float | None):
    """One block of keys for one tile of queries. Per-query state fills all lanes."""
    block = pl.program_id(3)
    first, full_first, full_end, end = _edges(blocks_ref, pl.program_id(0), pl.num_programs(2), pl.program_id(2))
    is_full = (block >= full_first) & (block < full_end)

    @pl.when(block == first)
    def _():
        sink = sinks_ref[pl.program_id(1)] * LOG2_E
        low_ref[...], high_ref[...] = _column(span_ref[0:1]), _column(span_ref[1:2])
        max_ref[...] = jnp.full(max_ref.shape, jnp.maximum(sink, MASKED))
        sum_ref[...] = jnp.full(sum_ref.shape, jnp.where(sink > MASKED, 1.0, 0.0))
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def visit(is_masked: bool):
        factor = scale * LOG2_E
        precision = matmul_precision(q_ref.dtype)
        scores = lax.dot_general(q_ref[...], k_ref[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32, precision=precision)
        if softcap is not None:
            scores, factor = jnp.tanh(scores * (scale / softcap)), softcap * LOG2_E
        if is_masked:
            ranks = ranks_ref[...]
            is_seen = (ranks >= _lanes(low_ref[...], scores.shape[1])) & (ranks <= _lanes(high_ref[...], scores.shape[1]))
            scores = jnp.where(is_seen, scores, -jnp.inf)
        old_max = max_ref[...]
        new_max = jnp.maximum(old_max, scores.max(axis=1, keepdims=True) * factor)
        shrink = jnp.exp2(old_max - new_max)
        probs = jnp.exp2(scores * factor - _lanes(new_max, scores.shape[1]))
        max_ref[...], sum_ref[...] = new_max, sum_ref[...] * shrink + probs.sum(axis=1, keepdims=True)
        added = jnp.dot(probs.astype(v_ref.dtype), v_ref[...], preferred_element_type=jnp.float32, precision=precision)
        acc_ref[...] = acc_ref[...] * _lanes(shrink, acc_ref.shape[1]) + added

    pl.when((block >= first) & (block < end) & is_full)(functools.partial(visit, is_masked=False))
    pl.when((block >= first) & (block < end) & ~is_full)(functools.partial(visit, is_masked=True))

    @pl.when(block == end - 1)
    def _():
        sums = sum_ref[...]
        safe = jnp.where(sums > 0, sums, 1.0)
        out_ref[...] = (acc_ref[...] * _lanes(1 / safe, acc_ref.shape[1])).astype(out_ref.dtype)
        lse = jnp.where(sums > 0, (max_ref[...] + jnp.log2(safe)) / LOG2_E, MASKED)
        lse_ref[...] = lse.T[:1]


def _column(row_1q: jax.Array) -> jax.Array:
    """[q, LANES]: each number in all lanes of its row."""
    return jnp.broadcast_to(row_1q, (LANES, row_1q.shape[1])).T


def _lanes(x_q128: jax.Array, width: int) -> jax.Array:
    """Per-query numbers in ``width`` lanes."""
    return jnp.concatenate([x_q128] * pl.cdiv(width, LANES), axis=1)[:, :width]
