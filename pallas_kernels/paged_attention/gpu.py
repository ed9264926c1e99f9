"""Paged attention of a Hopper GPU in Mosaic GPU: one warp group attends with up to 64 query rows (tokens of a run x query heads of a KV head).

Decode is split along the sequence: each part writes its sums, :func:`_combine` adds them up. With more tokens a block of threads goes through all
parts and adds them up itself, in the same order.
"""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.reference import LOG2_E
from pallas_kernels.interpreter import gpu_interpreter
from pallas_kernels.page_table import PageTable
from pallas_kernels.paged_attention import gpu_blocks
from pallas_kernels.paged_attention.gpu_blocks import COLUMNS, NOTHING, QUERY_ROWS, ROWS, Cache, Call, added, attend, load, nothing, two_to
from pallas_kernels.paged_attention.runs import Runs, cut_into_runs
from pallas_kernels.tiling import Device, choose_tiles

MAX_COLUMNS = 128  # of the head dim, that a block of threads can sum twice
SWIZZLE = 128  # bytes of a row of what products read
MIN_SPLIT, MAX_SPLITS = 1024, 16


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Cached tokens of a block, and how many blocks of keys and of values are on the chip at a time."""

    block: int
    stages: int


CANDIDATES = (Tiles(64, 2), Tiles(64, 3), Tiles(128, 2), Tiles(64, 4), Tiles(32, 4), Tiles(32, 2))


def refusal(q_BTNH: jax.Array, k_PKSH: jax.Array, scales) -> str | None:
    """Why the kernel cannot attend to this cache; None where it can."""
    N, H = q_BTNH.shape[2:]
    K, S = k_PKSH.shape[1:3]
    if str(q_BTNH.dtype) not in ("bfloat16", "float16"):
        return f"takes queries of bfloat16 or float16, not {q_BTNH.dtype}"
    if str(k_PKSH.dtype) not in ("bfloat16", "float16", "int8", "float8_e4m3fn"):
        return f"takes a cache of bfloat16, float16, int8 or float8_e4m3fn, not {k_PKSH.dtype}"
    if H % 64 or not 64 <= H <= 256:
        return f"takes a head dim of 64, 128, 192 or 256, not {H}"
    if N // K > QUERY_ROWS:
        return f"takes at most {QUERY_ROWS} query heads for each KV head, not {N // K}"
    smallest = 16 if scales is None else 32
    if S < smallest or S % smallest or (S % 64 and 128 % S):
        return f"takes pages of {', '.join(str(s) for s in (16, 32, 64) if s >= smallest)} tokens or a multiple of 64, not {S}"
    return None


def on_chip_bytes(tiles: Tiles, H: int, cache_itemsize: int) -> int:
    """Shared memory of a block of threads: queries, blocks of the cache, those two that are dequantized, and what goes out."""
    codes = 2 * tiles.block * H * 2 if cache_itemsize == 1 else 0
    out = QUERY_ROWS * (max(H * 2, COLUMNS * 4) + 8)
    return QUERY_ROWS * (H * 2 + 4) + 2 * tiles.stages * tiles.block * (H * cache_itemsize + 4) + codes + out + 4096


def tiling(q_BTNH: jax.Array, k_PKSH: jax.Array, device: Device) -> tuple:
    """The arguments of :func:`choose_tiles`; the number of rows is none of them, for a row's bits may not depend on it."""
    (_, T, N, H), (_, K, S, _) = q_BTNH.shape, k_PKSH.shape
    candidates = [tiles for tiles in CANDIDATES if tiles.block % S == 0 or S % tiles.block == 0]
    key = (K, N // K, H, S, str(k_PKSH.dtype), "decode" if T == 1 else "ragged")
    return "paged_attention", device, key, candidates, lambda tiles: on_chip_bytes(tiles, H, k_PKSH.dtype.itemsize)


@functools.partial(jax.jit, static_argnames=("scale", "window", "softcap", "device", "interpret", "tiles"))  # lowered once for all layers
def paged_attention(q_BTNH: jax.Array, k_PKSH: jax.Array, v_PKSH: jax.Array, positions_BT: jax.Array, *, scales, table: PageTable,
                    sinks_N: jax.Array | None, scale: float, window: int | None, softcap: float | None, device: Device,
                    interpret: bool, tiles: Tiles | None = None) -> jax.Array:
    """See :func:`paged_attention_reference`; here the table is always given. ``tiles``: None for the best known."""
    (B, T, N, H), (_, K, S, _), L = q_BTNH.shape, k_PKSH.shape, table.pages_RL.shape[1]
    group = N // K
    tiles = tiles or choose_tiles(*tiling(q_BTNH, k_PKSH, device))
    dtype = jnp.dtype(k_PKSH.dtype if k_PKSH.dtype.itemsize == 2 else q_BTNH.dtype)
    split = pl.cdiv(max(MIN_SPLIT, pl.cdiv(L * S, MAX_SPLITS)), 128) * 128
    call = Call(block=tiles.block, stages=tiles.stages, page_size=S, group=group, head_dim=H, split=split // tiles.block, scale=scale, window=window,
                softcap=softcap, dtype=dtype, cache_dtype=jnp.dtype(k_PKSH.dtype), columns=H if T == 1 else math.gcd(H, MAX_COLUMNS),
                interpret=interpret)
    runs = cut_into_runs(positions_BT, table, longest=1 if T == 1 else QUERY_ROWS // group, window=window)
    padding = ((0, 0), (0, QUERY_ROWS), (0, 0))  # the last run's queries are read with what lies behind them
    q_KMH = jnp.pad(q_BTNH.reshape(B * T, K, group, H).transpose(1, 0, 2, 3).reshape(K, B * T * group, H).astype(dtype), padding)
    positions_M = jnp.pad(jnp.repeat(positions_BT.reshape(-1), group), (0, QUERY_ROWS), constant_values=-1)
    arrays = (table.pages_RL, q_KMH, positions_M, k_PKSH, v_PKSH, *(scales or ()))
    sinks_KG = None if sinks_N is None else sinks_N.astype(jnp.float32).reshape(K, group) * LOG2_E
    run = _decode if T == 1 else _ragged
    return run(call, runs, arrays, sinks_KG, pl.cdiv(L * S, split)).reshape(B, T, N, H).astype(q_BTNH.dtype)


def _decode(call: Call, runs: Runs, arrays, sinks_KG, num_splits: int) -> jax.Array:
    """[F, K, G, H], float32: one token a run, each part of the sequence by a block of threads of its own."""
    U, K, G, H = runs.start.shape[0], arrays[1].shape[0], call.group, call.head_dim
    outs = [jax.ShapeDtypeStruct((num_splits, U, K, G, H), jnp.float32), jax.ShapeDtypeStruct((2, num_splits, U, K, QUERY_ROWS), jnp.float32)]
    parts, stats = _kernel(_decode_body, call, outs, grid=(num_splits, K, U), names=("split", "head", "run"),
                           out_dtype=jnp.float32)(_told(runs, call), *arrays)
    spans_U2, first_S1 = runs.blocks(call.block), jnp.arange(num_splits)[:, None] * call.split
    is_used_SU = (first_S1 < spans_U2[:, 1]) & (first_S1 + call.split > spans_U2[:, 0])
    return _combine(parts, stats[..., :G], is_used_SU, sinks_KG)


def _ragged(call: Call, runs: Runs, arrays, sinks_KG, _: int) -> jax.Array:
    """[F, K, G, H]: runs of several tokens, each by one block of threads for all parts of the sequence."""
    K, G, H = arrays[1].shape[0], call.group, call.head_dim
    num_tokens = (arrays[1].shape[1] - QUERY_ROWS) // G
    sinks = () if sinks_KG is None else (jnp.tile(sinks_KG, (1, pl.cdiv(QUERY_ROWS, G)))[:, :QUERY_ROWS],)  # of each query row
    outs = jax.ShapeDtypeStruct((num_tokens, K, G, H), call.dtype)
    return _kernel(_ragged_body, call, outs, grid=(H // call.columns, K, runs.start.shape[0]), names=("columns", "head", "run"),
                   out_dtype=call.dtype)(_told(runs, call), *arrays, *sinks)


def _combine(parts_SUKGH: jax.Array, stats_2SUKG: jax.Array, is_used_SU: jax.Array, sinks_KG: jax.Array | None) -> jax.Array:
    """[U, K, G, H]: the parts' sums of e^score v over their sums of e^score, each counted from its own maximum."""
    is_used_SU11 = is_used_SU[:, :, None, None]
    top_SUKG, sum_SUKG = jnp.where(is_used_SU11, stats_2SUKG[0], NOTHING), jnp.where(is_used_SU11, stats_2SUKG[1], 0.0)
    top_UKG = top_SUKG.max(axis=0)
    if sinks_KG is not None:
        top_UKG = jnp.maximum(top_UKG, jnp.round(sinks_KG))
    acc, total = 0.0, 0.0
    for s in range(parts_SUKGH.shape[0]):  # one after the other: of a sum, XLA would choose the order by the number of rows
        weight_UKG = two_to(top_SUKG[s] - top_UKG)
        acc = acc + jnp.where(is_used_SU11[s, ..., None], parts_SUKGH[s], 0.0) * weight_UKG[..., None]
        total = total + sum_SUKG[s] * weight_UKG
    if sinks_KG is not None:
        total = total + jnp.exp2(sinks_KG - top_UKG)
    return acc / jnp.maximum(total, 1e-30)[..., None]


def _told(runs: Runs, call: Call) -> jax.Array:
    """int32 [U, 7]: what a block of threads reads of its run."""
    return jnp.concatenate([jnp.stack([runs.start, runs.count, runs.row, runs.oldest, runs.newest], axis=1), runs.blocks(call.block)], axis=1)


def _kernel(body, call: Call, outs, *, grid, names, out_dtype):
    H, block, stages, columns = call.head_dim, call.block, call.stages, call.columns
    arrivals = call.pieces * (2 if call.has_codes else 1)
    tiled = {"transforms": (plgpu.TilingTransform((8, SWIZZLE // 2)), plgpu.SwizzleTransform(SWIZZLE))}  # what products read, of 16 bits
    of_cache = {} if call.has_codes else tiled
    scratch = {"q_smem": plgpu.SMEM((QUERY_ROWS, H), call.dtype, **tiled), "positions_smem": plgpu.SMEM((QUERY_ROWS,), jnp.int32),
               "k_smem": plgpu.SMEM((stages, block, H), call.cache_dtype, **of_cache),
               "v_smem": plgpu.SMEM((stages, block, columns), call.cache_dtype, **of_cache),
               "out_smem": plgpu.SMEM((QUERY_ROWS, COLUMNS if out_dtype == jnp.float32 else columns), out_dtype),
               "stats_smem": plgpu.SMEM((2, QUERY_ROWS), jnp.float32),
               "q_ready": plgpu.Barrier(num_arrivals=2), "k_ready": plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
               "v_ready": plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)}
    if call.has_codes:
        scratch |= {f"{x}_scales_smem": plgpu.SMEM((stages, block), jnp.float32) for x in "kv"}
        scratch |= {f"{x}16_smem": plgpu.SMEM((block, width), call.dtype, **tiled) for x, width in (("k", H), ("v", columns))}
    return plgpu.kernel(functools.partial(body, call=call), out_type=outs, grid=grid, grid_names=names, scratch_types=scratch,
                        kernel_name="paged_attention" + body.__name__.removesuffix("_body"),
                        interpret=gpu_interpreter(call.interpret),
                        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane))


def _decode_body(told, table, q, positions, k, v, *rest, call, q_smem, positions_smem, out_smem, stats_smem, q_ready, **smem):
    *scales, parts, stats = rest
    split, head, run = (jax.lax.axis_index(name) for name in ("split", "head", "run"))
    start, _, row, oldest, newest, first, end = (told[run, i] for i in range(7))
    first, end = jnp.maximum(first, split * call.split), jnp.minimum(end, (split + 1) * call.split)

    @pl.when(first < end)
    def _():
        cache = Cache(call, table, row, head, 0, (oldest, newest), (k, v, *scales), smem)
        cache.start(first, end)
        _read_queries(q.at[head], positions, start * call.group, q_smem, positions_smem, q_ready)
        top, total, accs = attend(call, cache, (first, end), (oldest, newest), q_smem, positions_smem)
        stats_smem[0], stats_smem[1] = top, total
        plgpu.commit_smem()
        for i in range(2):
            plgpu.copy_smem_to_gmem(stats_smem.at[i], stats.at[i, split, run, head])
        for i, acc in enumerate(accs):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            gpu_blocks.store(call, out_smem, acc)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, call.group)], parts.at[split, run, head, :, pl.ds(i * COLUMNS, COLUMNS)])
        plgpu.wait_smem_to_gmem(0)


def _ragged_body(told, table, q, positions, k, v, *rest, call, q_smem, positions_smem, out_smem, q_ready, **smem):
    *rest, out_gmem = rest
    scales, sinks = (rest[:2], rest[2:]) if call.has_codes else ([], rest)
    columns, head, run = (jax.lax.axis_index(name) for name in ("columns", "head", "run"))
    start, count, row, oldest, newest, first, end = (told[run, i] for i in range(7))

    @pl.when(count > 0)
    def _():
        cache = Cache(call, table, row, head, columns * call.columns, (oldest, newest), (k, v, *scales), smem)
        cache.start(first, end)
        _read_queries(q.at[head], positions, start * call.group, q_smem, positions_smem, q_ready)

        def add_part(part, state):
            blocks = jnp.maximum(first, part * call.split), jnp.minimum(end, (part + 1) * call.split)
            return added(state, attend(call, cache, blocks, (oldest, newest), q_smem, positions_smem))
        state = jax.lax.fori_loop(first // call.split, (end + call.split - 1) // call.split, add_part, nothing(call))
        if sinks:
            sink = load(call, sinks[0].at[head], ROWS)
            state = added(state, (jnp.round(sink), jnp.exp2(sink - jnp.round(sink)), nothing(call)[2]))
        for i, acc in enumerate(state[2]):
            out = acc / jax.lax.broadcast_in_dim(jnp.maximum(state[1], 1e-30), acc.shape, (0,))
            gpu_blocks.store(call, out_smem.at[:, pl.ds(i * COLUMNS, COLUMNS)], out.astype(call.dtype))
        plgpu.commit_smem()

        @pl.loop(0, count)
        def _token(t):  # the rows behind belong to another run
            there = out_gmem.at[start + t, head, :, pl.ds(columns * call.columns, call.columns)]
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(t * call.group, call.group)], there)
        plgpu.wait_smem_to_gmem(0)


def _read_queries(q_MH, positions_M, first, q_smem, positions_smem, ready):
    plgpu.copy_gmem_to_smem(q_MH.at[pl.ds(first, QUERY_ROWS)], q_smem, ready)
    plgpu.copy_gmem_to_smem(positions_M.at[pl.ds(first, QUERY_ROWS)], positions_smem, ready)
    plgpu.barrier_wait(ready)
