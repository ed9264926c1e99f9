"""Paged attention of a TPU: a core goes from run to run and from block to block, and fetches the next block's pages while it computes with one.

The pages that a run's block takes stand in the block table, which is in scalar memory; each is copied with all KV heads at once. The last block of a
run is computed while the first of the next run is on its way.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention import MASKED, soft_cap
from pallas_kernels.page_table import PageTable
from pallas_kernels.paged_attention.runs import BlockedCall, Runs, cut_into_runs
from pallas_kernels.precision import matmul_precision
from pallas_kernels.tiling import Device, choose_tiles

LANES, MIN_ROWS = 128, 16  # of a tile in vector memory, of 16-bit queries
RUN_ROWS = 64  # query rows of a KV head that a run of several tokens has
TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")
QUERY_DTYPES = ("bfloat16", "float32")
CACHE_DTYPES = (*QUERY_DTYPES, "int8", "float8_e4m3fn")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Cached tokens of a block."""

    block: int


CANDIDATES = tuple(map(Tiles, (512, 256, 128)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call(BlockedCall):
    """What is fixed when a kernel is built. ``heads``: KV heads that a core has; ``rows``: query rows of each."""

    heads: int
    rows: int


def refusal(q_BTNH: jax.Array, k_PKSH: jax.Array, _) -> str | None:
    """Why the kernel cannot attend to this cache; None where it can."""
    H, S = k_PKSH.shape[3], k_PKSH.shape[2]
    if str(q_BTNH.dtype) not in QUERY_DTYPES:
        return f"takes queries of {' or '.join(QUERY_DTYPES)}, not {q_BTNH.dtype}"
    if str(k_PKSH.dtype) not in CACHE_DTYPES:
        return f"takes a cache of {', '.join(CACHE_DTYPES)}, not {k_PKSH.dtype}"
    if H % LANES or H > 256:
        return f"takes a head dim of 128 or 256, not {H}"
    if S not in (16, 32, 64) and S % LANES:
        return f"takes pages of 16, 32 or 64 tokens, or a multiple of {LANES}, not {S}"
    return None


def on_chip_bytes(call: Call, H: int, cache_itemsize: int) -> int:
    """Vector memory of a core: two blocks of keys and of values, the sums, what the body holds of a head, queries and results twice."""
    caches = 2 * 2 * call.block * call.heads * (H * cache_itemsize + 4)
    state = call.heads * call.rows * (H + 2 * LANES) * 4
    body = 4 * (2 * call.block * H + 4 * call.rows * call.block)
    return caches + state + body + 2 * 2 * call.heads * call.rows * H * 4 + call.rows * LANES * 8


@functools.partial(jax.jit, static_argnames=("scale", "window", "softcap", "device", "interpret", "tiles"))  # lowered once for all layers
def paged_attention(q_BTNH: jax.Array, k_PKSH: jax.Array, v_PKSH: jax.Array, positions_BT: jax.Array, *, scales, table: PageTable,
                    sinks_N: jax.Array | None, scale: float, window: int | None, softcap: float | None, device: Device,
                    interpret: bool, tiles: Tiles | None = None) -> jax.Array:
    """See :func:`paged_attention_reference`; here the table is always given. ``tiles``: None for the best known."""
    (B, T, N, H), (K, S) = q_BTNH.shape, k_PKSH.shape[1:3]
    G = N // K
    longest = 1 if T == 1 else max(1, RUN_ROWS // G)
    rows = pl.cdiv(longest * G, MIN_ROWS) * MIN_ROWS
    cores = 2 if device.kind in TWO_CORES and K % 2 == 0 else 1
    call = Call(block=0, page_size=S, heads=K // cores, rows=rows, scale=scale, softcap=softcap, window=window, dtype=q_BTNH.dtype)
    candidates = [candidate for candidate in CANDIDATES if candidate.block % S == 0 or S % candidate.block == 0]
    key = (K, G, H, S, str(k_PKSH.dtype), "decode" if T == 1 else "ragged")
    tiles = tiles or choose_tiles("paged_attention", device, key, candidates,
                                  lambda tiles: on_chip_bytes(dataclasses.replace(call, block=tiles.block), H, k_PKSH.dtype.itemsize))
    call = dataclasses.replace(call, block=tiles.block)
    runs = cut_into_runs(positions_BT, table, longest=longest, window=window)
    tokens_UQ = jnp.minimum(runs.start[:, None] + jnp.arange(longest), B * T - 1)
    q_UKMH = _by_runs(q_BTNH.reshape(B * T, K, G, H), tokens_UQ, rows)
    positions_UQ = jnp.where(jnp.arange(longest) < runs.count[:, None], positions_BT.reshape(-1)[tokens_UQ], -1)
    positions_UM1 = jnp.pad(jnp.repeat(positions_UQ, G, axis=1), ((0, 0), (0, rows - longest * G)), constant_values=-1)[..., None]
    sinks = () if sinks_N is None else (jnp.pad(jnp.tile(sinks_N.astype(jnp.float32).reshape(K, G), (1, longest)),
                                                ((0, 0), (0, rows - longest * G)))[..., None],)
    out_UKMH = _kernel(call, _told(runs, call), table.pages_RL, (q_UKMH, positions_UM1, *sinks), (k_PKSH, v_PKSH, *(scales or ())), cores, interpret)
    out_UKQGH = out_UKMH[:, :, :longest * G].reshape(-1, K, longest, G, H)
    return _by_tokens(out_UKQGH, runs, B * T).reshape(B, T, N, H)


def _by_runs(q_FKGH: jax.Array, tokens_UQ: jax.Array, rows: int) -> jax.Array:
    """[U, K, rows, H], the tokens' query heads one after the other."""
    _, K, G, H = q_FKGH.shape
    U, Q = tokens_UQ.shape
    q_UQKGH = q_FKGH[:, None] if Q == 1 else q_FKGH[tokens_UQ]
    q_UKMH = q_UQKGH.transpose(0, 2, 1, 3, 4).reshape(U, K, Q * G, H)
    return jnp.pad(q_UKMH, ((0, 0), (0, 0), (0, rows - Q * G), (0, 0)))


def _by_tokens(out_UKQGH: jax.Array, runs: Runs, num_tokens: int) -> jax.Array:
    """[F, K, G, H]."""
    if out_UKQGH.shape[2] == 1:
        return out_UKQGH[:, :, 0]
    run_F = jnp.searchsorted(runs.start, jnp.arange(num_tokens), side="right", method="compare_all") - 1
    return out_UKQGH[run_F, :, jnp.arange(num_tokens) - runs.start[run_F]]


def _told(runs: Runs, call: Call) -> jax.Array:
    """int32 [6 * U]: of each run row, oldest, newest, first and last block, and the next run that has blocks (U for none)."""
    spans_U2, U = runs.blocks(call.block), runs.start.shape[0]
    has_blocks_U = spans_U2[:, 0] < spans_U2[:, 1]
    index_U = jnp.where(has_blocks_U, jnp.arange(U), U)
    next_U = jnp.concatenate([jax.lax.cummin(index_U, reverse=True)[1:], jnp.array([U])])
    return jnp.stack([runs.row, runs.oldest, runs.newest, spans_U2[:, 0], spans_U2[:, 1], next_U], axis=1).astype(jnp.int32).reshape(-1)


def _kernel(call: Call, told, pages_RL, inputs, caches, cores: int, interpret: bool):
    (U, K, M, H), heads, pieces = inputs[0].shape, call.heads, call.pieces
    has_scales = len(caches) == 4
    buffers = [pltpu.VMEM((2, pieces, heads, call.block // pieces, H), cache.dtype) for cache in caches[:2]]
    buffers += [pltpu.VMEM((2, pieces, heads, call.block // pieces), jnp.float32) for _ in caches[2:]]
    of_run = pl.BlockSpec((None, heads, M, H), lambda core, run, *_: (run, core, 0, 0))
    in_specs = [of_run, pl.BlockSpec((None, M, 1), lambda core, run, *_: (run, 0, 0))]
    in_specs += [pl.BlockSpec((heads, M, 1), lambda core, run, *_: (core, 0, 0))] * (len(inputs) - 2)
    if not interpret:  # XLA would bring a cache that fits into vector memory there, all of it
        caches = [*(pltpu.with_memory_space_constraint(cache, pltpu.HBM) for cache in caches[:2]), *caches[2:]]
    body = functools.partial(_body, call=call, has_scales=has_scales, has_sinks=len(inputs) == 3, num_parts=pages_RL.shape[1])
    return pl.pallas_call(
        body, out_shape=jax.ShapeDtypeStruct((U, K, M, H), call.dtype), name="paged_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(cores, U), in_specs=[*in_specs, *[pl.BlockSpec(memory_space=pl.ANY)] * len(caches)], out_specs=of_run,
            scratch_shapes=[*buffers, *[pltpu.VMEM((heads, M, LANES), jnp.float32)] * 2, pltpu.VMEM((heads, M, H), jnp.float32),
                            pltpu.SMEM((1,), jnp.int32), pltpu.SemaphoreType.DMA((2, len(caches)))]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"),
                                             vmem_limit_bytes=on_chip_bytes(call, H, caches[0].dtype.itemsize) + 8 * 2**20),
        interpret=pltpu.InterpretParams() if interpret else False)(told, pages_RL.reshape(-1), *inputs, *caches)


class _Blocks:
    """Blocks of the cache on their way into vector memory, by run and number."""

    def __init__(self, call: Call, told, table, num_parts: int, caches, buffers, semaphores):
        self.call, self.told, self.table, self.num_parts = call, told, table, num_parts
        self.caches, self.buffers, self.semaphores = caches, buffers, semaphores

    def start(self, run, index, stage) -> None:
        self._for_each_page(run, index, stage, lambda copy: copy.start())

    def wait(self, run, index, stage) -> None:
        self._for_each_page(run, index, stage, lambda copy: copy.wait())

    def _for_each_page(self, run, index, stage, act) -> None:
        """Only pages that a token of the run sees are read."""
        call, size = self.call, self.call.page_size
        row, oldest, newest = (self.told[run * 6 + i] for i in range(3))
        heads = pl.ds(pl.program_id(0) * call.heads, call.heads)

        def copy(piece, part, offset):
            page = jnp.maximum(self.table[row * self.num_parts + jnp.minimum(part, self.num_parts - 1)], 0)
            for i, (cache, buffer) in enumerate(zip(self.caches, self.buffers, strict=True)):
                act(pltpu.make_async_copy(cache.at[page, heads, offset], buffer.at[stage, piece], self.semaphores.at[stage, i]))
        if call.pieces == 1:
            offset = pl.multiple_of(jax.lax.rem(index * call.block, size), call.block)
            copy(0, jax.lax.div(index * call.block, size), pl.ds(offset, call.block) if size > call.block else slice(None))
            return
        first = jnp.maximum(jax.lax.div(oldest, size) - index * call.pieces, 0)
        end = jnp.minimum(jax.lax.div(newest, size) + 1 - index * call.pieces, call.pieces)

        @pl.loop(first, end)
        def _page(piece):
            copy(piece, index * call.pieces + piece, slice(None))


def _body(told, table, q, positions, *refs, call, has_scales, has_sinks, num_parts):
    refs, num_caches = list(refs), 4 if has_scales else 2
    sinks = refs.pop(0) if has_sinks else None
    caches, out, buffers = refs[:num_caches], refs[num_caches], refs[num_caches + 1:2 * num_caches + 1]
    top, total, acc, count, semaphores = refs[2 * num_caches + 1:]
    run, num_runs = pl.program_id(1), pl.num_programs(1)
    blocks = _Blocks(call, told, table, num_parts, caches, buffers, semaphores)
    _, oldest, newest, first, end, next_run = (told[run * 6 + i] for i in range(6))

    def start_run(index):
        @pl.when(index < num_runs)
        def _():
            blocks.start(index, told[index * 6 + 3], jax.lax.rem(count[0], 2))

    @pl.when(run == 0)
    def _():
        count[0] = 0
        start_run(jnp.where(first < end, 0, next_run))

    acc[...] = jnp.zeros_like(acc)
    total[...] = jnp.full_like(total, 0.0 if sinks is None else 1.0)
    top[...] = jnp.full_like(top, MASKED) if sinks is None else jnp.broadcast_to(sinks[...], top.shape)

    @pl.loop(first, end)
    def _block(index):
        stage = jax.lax.rem(count[0], 2)
        count[0] += 1

        @pl.when(index + 1 < end)
        def _():
            blocks.start(run, index + 1, 1 - stage)

        @pl.when(index + 1 == end)
        def _():
            start_run(next_run)
        blocks.wait(run, index, stage)
        start = index * call.block

        @pl.when((start + call.block > newest + 1) | (start < oldest))
        def _():
            _clear(buffers[1], stage, start, oldest, newest)
        _attend(call, start, q, positions[...], [buffer.at[stage] for buffer in buffers], (top, total, acc))

    for head in range(call.heads):
        out[head] = (acc[head] / jnp.maximum(total[head, :, :1], 1e-30)).astype(out.dtype)


def _clear(values, stage, start, oldest, newest):
    """Zero the values that no query of the run sees: what another row left there may be NaN, and 0 * NaN is NaN."""
    _, pieces, heads, size, H = values.shape
    for piece in range(pieces):
        positions = start + piece * size + jax.lax.broadcasted_iota(jnp.int32, (size, H), 0)
        is_seen = (positions >= oldest) & (positions <= newest)
        for head in range(heads):
            kept = jnp.where(is_seen, values[stage, piece, head].astype(jnp.float32), 0.0)
            values[stage, piece, head] = kept.astype(values.dtype)


def _attend(call: Call, start, q, positions_M1, buffers, state):
    """Add a block to the sums of all heads."""
    top, total, acc = state
    precision = matmul_precision(call.dtype)
    shape = (call.rows, call.block)
    key_positions = start + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    is_seen = key_positions <= positions_M1
    if call.window is not None:
        is_seen &= key_positions > positions_M1 - call.window
    k_scales, v_scales = (_side_by_side(buffer) for buffer in buffers[2:]) if len(buffers) == 4 else (None, None)
    for head in range(call.heads):
        keys, values = (_dequantized(buffer[:, head], call.dtype) for buffer in buffers[:2])
        scores = jax.lax.dot_general(q[head], keys, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
        scores = scores * call.scale if k_scales is None else scores * (k_scales[head:head + 1] * call.scale)
        scores = jnp.where(is_seen, soft_cap(scores, call.softcap), MASKED)
        old_top = top[head, :, :1]
        new_top = jnp.maximum(old_top, scores.max(axis=1, keepdims=True))
        probs = jnp.where(is_seen, jnp.exp(scores - new_top), 0.0)
        shrink = jnp.exp(old_top - new_top)
        total[head] = jnp.broadcast_to(total[head, :, :1] * shrink + probs.sum(axis=1, keepdims=True), total.shape[1:])
        top[head] = jnp.broadcast_to(new_top, top.shape[1:])
        if v_scales is not None:
            probs = jnp.where(is_seen, probs * v_scales[head:head + 1], 0.0)
        added = jax.lax.dot_general(probs.astype(call.dtype), values, (((1,), (0,)), ((), ())), precision=precision,
                                    preferred_element_type=jnp.float32)
        acc[head] = acc[head] * shrink + added


def _dequantized(pages, dtype):
    """[block, H] of pages [n, S, H]."""
    if pages.dtype.itemsize == 1:
        pages = pages.astype(jnp.float32)
    return pages.reshape(-1, pages.shape[-1]).astype(dtype)


def _side_by_side(scales):
    """[heads, block] of the scales of pages [n, heads, S]."""
    pages = scales[...]
    return pages[0] if pages.shape[0] == 1 else jnp.concatenate([pages[i] for i in range(pages.shape[0])], axis=1)
