"""Paged attention of a Hopper GPU in Mosaic GPU: one warp group attends with up to 64 query rows (tokens of a run x query heads of a KV head).

Blocks of pages come by TMA, some of them ahead. Decode is split along the sequence: each part writes its sums, :func:`_combine` adds them up. With
more tokens a block of threads goes through all parts and adds them up itself, in the same order.

The running maximum is a whole power of two, so that rescaling by it is exact: a row has the same bits however its parts are added up, in a decode
step or among the tokens of other rows.
"""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.interpreter import gpu_interpreter
from pallas_kernels.page_table import PageTable
from pallas_kernels.paged_attention.runs import Runs, cut_into_runs
from pallas_kernels.tiling import Device, choose_tiles

DEVICES = "a Hopper GPU"
QUERY_ROWS = 64  # of a product of a warp group
COLUMNS, MAX_COLUMNS = 64, 128  # of the head dim: those one product with values makes, and those a block of threads can sum twice
MASKED, NOTHING = -1e30, -0.5e30  # a score that is not seen; the maximum of none, beside which a masked score is nothing
MATRIX, ROWS, KEYS = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)  # of a product; of a number a row, a column
SWIZZLE = 128
LOG2_E = math.log2(math.e)
MIN_SPLIT, MAX_SPLITS = 1024, 16


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Cached tokens of a block, and how many blocks of keys and of values are on the chip at a time."""

    block: int
    stages: int


CANDIDATES = (Tiles(64, 2), Tiles(64, 3), Tiles(128, 2), Tiles(64, 4), Tiles(32, 4), Tiles(32, 2))


@dataclasses.dataclass(frozen=True)
class Call:
    """What is fixed when a kernel is built. ``split``: blocks of a part of the sequence; ``columns``: of the values, that a block of threads sums."""

    block: int
    stages: int
    page_size: int
    group: int
    head_dim: int
    split: int
    scale: float
    softcap: float | None
    window: int | None
    dtype: jnp.dtype
    cache_dtype: jnp.dtype
    columns: int
    interpret: bool

    @property
    def has_codes(self) -> bool:
        return self.cache_dtype.itemsize == 1

    @property
    def pieces(self) -> int:
        """Pages of a block."""
        return max(1, self.block // self.page_size)


def runs_on(device: Device) -> bool:
    """Whether the kernel runs there."""
    return device.has_mosaic_gpu


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


def paged_attention(q_BTNH: jax.Array, k_PKSH: jax.Array, v_PKSH: jax.Array, positions_BT: jax.Array, *, scales, table: PageTable,
                    sinks_N: jax.Array | None, scale: float, window: int | None, softcap: float | None, device: Device,
                    interpret: bool) -> jax.Array:
    """See :func:`paged_attention_reference`; here the table is always given."""
    (B, T, N, H), (_, K, S, _), L = q_BTNH.shape, k_PKSH.shape, table.pages_RL.shape[1]
    group = N // K
    tiles = choose_tiles("paged_attention", device, (K, group, H, S, str(k_PKSH.dtype), int(T == 1)),
                         [t for t in CANDIDATES if t.block % S == 0 or S % t.block == 0],
                         lambda tiles: on_chip_bytes(tiles, H, k_PKSH.dtype.itemsize))
    dtype = jnp.dtype(k_PKSH.dtype if k_PKSH.dtype.itemsize == 2 else q_BTNH.dtype)
    split = pl.cdiv(max(MIN_SPLIT, pl.cdiv(L * S, MAX_SPLITS)), 128) * 128
    call = Call(tiles.block, tiles.stages, S, group, H, split // tiles.block, scale, softcap, window, dtype, jnp.dtype(k_PKSH.dtype),
                H if T == 1 else math.gcd(H, MAX_COLUMNS), interpret)
    runs = cut_into_runs(positions_BT, table, longest=1 if T == 1 else QUERY_ROWS // group, window=window)
    padding = ((0, 0), (0, QUERY_ROWS), (0, 0))  # the last run's queries are read with what lies behind them
    q_KMH = jnp.pad(q_BTNH.reshape(B * T, K, group, H).transpose(1, 0, 2, 3).reshape(K, B * T * group, H).astype(dtype), padding)
    positions_M = jnp.pad(jnp.repeat(positions_BT.reshape(-1), group), (0, QUERY_ROWS), constant_values=-1)
    arrays = (table.pages_RL, q_KMH, positions_M, k_PKSH, v_PKSH, *(scales or ()))
    sinks_KG = None if sinks_N is None else sinks_N.astype(jnp.float32).reshape(K, group) * LOG2_E
    attend = _decode if T == 1 else _ragged
    return attend(call, runs, arrays, sinks_KG, pl.cdiv(L * S, split)).reshape(B, T, N, H).astype(q_BTNH.dtype)


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
        weight_UKG = _two_to(top_SUKG[s] - top_UKG)
        acc = acc + jnp.where(is_used_SU11[s, ..., None], parts_SUKGH[s], 0.0) * weight_UKG[..., None]
        total = total + sum_SUKG[s] * weight_UKG
    if sinks_KG is not None:
        total = total + jnp.exp2(sinks_KG - top_UKG)
    return acc / jnp.maximum(total, 1e-30)[..., None]


def _two_to(power: jax.Array) -> jax.Array:
    """2 to a whole number that is not positive, exactly; 0 where that is no normal number."""
    exponent = jnp.maximum(power, -127.0).astype(jnp.int32) + 127
    return jax.lax.bitcast_convert_type(jax.lax.shift_left(exponent, 23), jnp.float32)


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
                        compiler_params=plgpu.CompilerParams(approx_math=True))


def _decode_body(told, table, q, positions, k, v, *rest, call, q_smem, positions_smem, out_smem, stats_smem, q_ready, **smem):
    *scales, parts, stats = rest
    split, head, run = (jax.lax.axis_index(name) for name in ("split", "head", "run"))
    start, _, row, oldest, newest, first, end = (told[run, i] for i in range(7))
    first, end = jnp.maximum(first, split * call.split), jnp.minimum(end, (split + 1) * call.split)

    @pl.when(first < end)
    def _():
        cache = _Cache(call, table, row, head, 0, (oldest, newest), (k, v, *scales), smem)
        cache.start(first, end)
        _read_queries(q.at[head], positions, start * call.group, q_smem, positions_smem, q_ready)
        top, total, accs = _attend(call, cache, (first, end), (oldest, newest), q_smem, positions_smem)
        stats_smem[0], stats_smem[1] = top, total
        plgpu.commit_smem()
        for i in range(2):
            plgpu.copy_smem_to_gmem(stats_smem.at[i], stats.at[i, split, run, head])
        for i, acc in enumerate(accs):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[...] = acc
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, call.group)], parts.at[split, run, head, :, pl.ds(i * COLUMNS, COLUMNS)])
        plgpu.wait_smem_to_gmem(0)


def _ragged_body(told, table, q, positions, k, v, *rest, call, q_smem, positions_smem, out_smem, stats_smem, q_ready, **smem):
    del stats_smem
    *rest, out_gmem = rest
    scales, sinks = (rest[:2], rest[2:]) if call.has_codes else ([], rest)
    columns, head, run = (jax.lax.axis_index(name) for name in ("columns", "head", "run"))
    start, count, row, oldest, newest, first, end = (told[run, i] for i in range(7))

    @pl.when(count > 0)
    def _():
        cache = _Cache(call, table, row, head, columns * call.columns, (oldest, newest), (k, v, *scales), smem)
        cache.start(first, end)
        _read_queries(q.at[head], positions, start * call.group, q_smem, positions_smem, q_ready)

        def add_part(part, state):
            blocks = jnp.maximum(first, part * call.split), jnp.minimum(end, (part + 1) * call.split)
            return _added(state, _attend(call, cache, blocks, (oldest, newest), q_smem, positions_smem))
        state = jax.lax.fori_loop(first // call.split, (end + call.split - 1) // call.split, add_part, _nothing(call))
        if sinks:
            sink = _load(call, sinks[0].at[head], ROWS)
            state = _added(state, (jnp.round(sink), jnp.exp2(sink - jnp.round(sink)), _nothing(call)[2]))
        for i, acc in enumerate(state[2]):
            out = acc / jax.lax.broadcast_in_dim(jnp.maximum(state[1], 1e-30), acc.shape, (0,))
            out_smem[:, pl.ds(i * COLUMNS, COLUMNS)] = out.astype(call.dtype)
        plgpu.commit_smem()

        @pl.loop(0, count)
        def _token(t):  # the rows behind belong to another run
            there = out_gmem.at[start + t, head, :, pl.ds(columns * call.columns, call.columns)]
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(t * call.group, call.group)], there)
        plgpu.wait_smem_to_gmem(0)


def _nothing(call: Call):
    """What :func:`_attend` begins with."""
    accs = tuple(_laid_out(call, jnp.zeros((QUERY_ROWS, COLUMNS), jnp.float32), MATRIX) for _ in range(call.columns // COLUMNS))
    return _laid_out(call, jnp.full(QUERY_ROWS, NOTHING), ROWS), _laid_out(call, jnp.zeros(QUERY_ROWS), ROWS), accs


def _counted(call: Call, shape, axis: int) -> jax.Array:
    """0, 1, 2, ... along an axis of a matrix."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis) if call.interpret else plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)


def _load(call: Call, ref, layout) -> jax.Array:
    return ref[...] if call.interpret else plgpu.load(ref, (), layout=layout, optimized=False)


def _laid_out(call: Call, x: jax.Array, layout) -> jax.Array:
    """``x``, spread over the threads like this; the interpreter knows of no threads."""
    return x if call.interpret else plgpu.layout_cast(x, layout)


def _added(state, part):
    """The sums of both, counted from the greater maximum."""
    top = jnp.maximum(state[0], part[0])
    weights = [_two_to(x[0] - top) for x in (state, part)]
    total = state[1] * weights[0] + part[1] * weights[1]
    weights = [jax.lax.broadcast_in_dim(x, (QUERY_ROWS, COLUMNS), (0,)) for x in weights]
    return top, total, tuple(old * weights[0] + new * weights[1] for old, new in zip(state[2], part[2], strict=True))


def _read_queries(q_MH, positions_M, first, q_smem, positions_smem, ready):
    plgpu.copy_gmem_to_smem(q_MH.at[pl.ds(first, QUERY_ROWS)], q_smem, ready)
    plgpu.copy_gmem_to_smem(positions_M.at[pl.ds(first, QUERY_ROWS)], positions_smem, ready)
    plgpu.barrier_wait(ready)


class _Cache:
    """The blocks of one row and KV head, on their way into shared memory; a stage holds a block's keys or values."""

    def __init__(self, call: Call, table, row, head, first_column, seen, arrays, smem):
        self.call, self.table, self.row, self.head = call, table, row, head
        self.seen_parts = [jnp.minimum(jax.lax.div(position, call.page_size), table.shape[1] - 1) for position in seen]
        self.columns = {"k": pl.ds(0, call.head_dim), "v": pl.ds(first_column, call.columns)}
        self.sources = {"k": arrays[0::2], "v": arrays[1::2]}
        self.smem = smem

    def start(self, first, end) -> None:
        """Fetch the first blocks, as many as there are stages."""
        self.first, self.end = first, end
        for i in range(self.call.stages):
            @pl.when(first + i < end)
            def _(index=first + i):
                pages = self.pages(index)
                for name in "kv":
                    self.fetch(name, index, pages)

    def stage(self, index):
        return jax.lax.rem(index - self.first, self.call.stages)

    def pages(self, index) -> list:
        """Where a block lies; asked for well before it is fetched, for the table is in the GPU's memory."""
        call = self.call
        parts = [index * call.block // call.page_size] if call.pieces == 1 else [index * call.pieces + i for i in range(call.pieces)]
        return [jnp.maximum(self.table[self.row, jnp.clip(part, *self.seen_parts)], 0) for part in parts]  # no others are read

    def fetch(self, name: str, index, pages) -> None:
        call, stage = self.call, self.stage(index)
        piece = call.block // call.pieces
        offset = jax.lax.rem(index * call.block, call.page_size) if call.pieces == 1 else 0
        ready = self.smem[f"{name}_ready"].at[stage]
        for i, page in enumerate(pages):
            there, here = (page, self.head, pl.ds(offset, piece)), (stage, pl.ds(i * piece, piece))
            source, *scales = self.sources[name]
            plgpu.copy_gmem_to_smem(source.at[(*there, self.columns[name])], self.smem[f"{name}_smem"].at[here], ready)
            for scale in scales:
                plgpu.copy_gmem_to_smem(scale.at[there], self.smem[f"{name}_scales_smem"].at[here], ready)

    def refill(self, name: str, index, pages) -> None:
        """Fetch what comes next into the stage that ``index`` was read from."""
        @pl.when(index + self.call.stages < self.end)
        def _():
            self.fetch(name, index + self.call.stages, pages)

    def wait(self, name: str, index):
        """(the block's keys or values in shared memory, its stage), when they have come."""
        stage = self.stage(index)
        plgpu.barrier_wait(self.smem[f"{name}_ready"].at[stage])
        if not self.call.has_codes:
            return self.smem[f"{name}_smem"].at[stage], stage
        block = self.smem[f"{name}16_smem"]
        codes = _load(self.call, self.smem[f"{name}_smem"].at[stage], MATRIX)
        if self.call.cache_dtype != jnp.int8:
            codes = codes.astype(jnp.float32)
        block[...] = codes.astype(self.call.dtype)
        plgpu.commit_smem()
        return block, stage

    def scales(self, name: str, stage):
        """[1, block], which spread over the queries; None where there are none."""
        return _load(self.call, self.smem[f"{name}_scales_smem"].at[stage], KEYS) if self.call.has_codes else None


def _attend(call: Call, cache: _Cache, blocks, seen, q_smem, positions_smem):
    """(maximum [M], sum [M], sums of values [M, 64] for each 64 of the head dim) of one part of the sequence."""
    oldest, newest = seen
    shape = (QUERY_ROWS, call.block)
    query_positions = jax.lax.broadcast_in_dim(_load(call, positions_smem, ROWS), shape, (0,))

    def visit(index, state):
        top, total, accs = state
        next_pages = cache.pages(index + call.stages)
        k_block, stage = cache.wait("k", index)
        scores = _product(call, q_smem, plgpu.transpose_ref(k_block, (1, 0)) if not call.interpret else k_block, is_transposed=True)
        scores = _capped(call, scores, cache.scales("k", stage))
        key_positions = index * call.block + _counted(call, shape, 1)
        is_seen = key_positions <= query_positions
        if call.window is not None:
            is_seen &= key_positions > query_positions - call.window
        scores = jnp.where(is_seen, scores, MASKED)
        cache.refill("k", index, next_pages)
        new_top = jnp.maximum(top, jnp.round(scores.max(axis=1)))
        probs = jnp.exp2(scores - jax.lax.broadcast_in_dim(new_top, shape, (0,)))
        shrink = _two_to(top - new_top)
        total = total * shrink + probs.sum(axis=1)
        v_block, stage = cache.wait("v", index)
        if call.has_codes:
            probs = jnp.where(is_seen, probs * jax.lax.broadcast_in_dim(cache.scales("v", stage), shape, (1,)), 0.0)

        @pl.when(((index + 1) * call.block > newest + 1) | (index * call.block < oldest))
        def _():
            _clear(call, v_block, index * call.block, seen)
        weights, shrink_MH = probs.astype(call.dtype), jax.lax.broadcast_in_dim(shrink, (QUERY_ROWS, COLUMNS), (0,))
        accs = tuple(acc * shrink_MH + _product(call, weights, v_block.at[:, pl.ds(i * COLUMNS, COLUMNS)]) for i, acc in enumerate(accs))
        cache.refill("v", index, next_pages)
        return new_top, total, accs

    return jax.lax.fori_loop(*blocks, visit, _nothing(call))


def _capped(call: Call, scores, key_scales):
    """Scores in powers of two."""
    if key_scales is not None:
        scores = scores * jax.lax.broadcast_in_dim(key_scales, scores.shape, (1,))
    if call.softcap is None:
        return scores * (call.scale * LOG2_E)
    return jnp.tanh(scores * (call.scale / call.softcap)) * (call.softcap * LOG2_E)


def _clear(call: Call, v_block, first, seen):
    """Zero the values that no query of the run sees: what another row left there may be NaN, and 0 * NaN is NaN."""
    oldest, newest = seen
    positions = first + _counted(call, v_block.shape, 0)
    values = v_block[...]
    v_block[...] = jnp.where((positions >= oldest) & (positions <= newest), values, jnp.zeros_like(values))
    plgpu.commit_smem()


def _product(call: Call, a, b, is_transposed: bool = False):
    """``a @ b`` in float32, of a warp group. The interpreter knows no product with registers or of a transposed matrix."""
    if call.interpret:
        a, b = (x[...].astype(jnp.float32) if hasattr(x, "at") and not isinstance(x, jax.Array) else x.astype(jnp.float32) for x in (a, b))
        return jax.lax.dot_general(a, b, (((1,), (1 if is_transposed else 0,)), ((), ())))

    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]
    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))
