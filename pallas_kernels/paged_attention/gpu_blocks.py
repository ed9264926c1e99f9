"""What Mosaic GPU kernels of paged attention have in common: blocks of pages come by TMA, some of them ahead, and are added to sums one by one.

The running maximum is a whole power of two, so that rescaling by it is exact: a row has the same bits however its parts are added up, in a decode
step or among the tokens of other rows.
"""
import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.reference import LOG2_E
from pallas_kernels.paged_attention.runs import BlockedCall
from pallas_kernels.registers import load_registers, store_registers

QUERY_ROWS = 64  # of a product of a warp group
COLUMNS = 64  # of the head dim, that one product with values makes
MASKED, NOTHING = -1e30, -0.5e30  # a score that is not seen; the maximum of none, beside which a masked score is nothing
MATRIX, ROWS, KEYS = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)  # of a product; of a number a row, a column


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call(BlockedCall):
    """What is fixed when a kernel is built. ``split``: blocks of a part of the sequence; ``columns``: of the values, that a block of threads sums."""

    stages: int
    group: int
    head_dim: int
    split: int
    cache_dtype: jnp.dtype
    columns: int
    interpret: bool

    @property
    def has_codes(self) -> bool:
        return self.cache_dtype.itemsize == 1


class Cache:
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
        codes = load(self.call, self.smem[f"{name}_smem"].at[stage], MATRIX)
        if self.call.cache_dtype != jnp.int8:
            codes = codes.astype(jnp.float32)
        block[...] = codes.astype(self.call.dtype)
        plgpu.commit_smem()
        return block, stage

    def scales(self, name: str, stage):
        """[block] of the keys or values in a stage; None where there are none."""
        return load(self.call, self.smem[f"{name}_scales_smem"].at[stage], KEYS) if self.call.has_codes else None


def attend(call: Call, cache: Cache, blocks, seen, q_smem, positions_smem):
    """(maximum [M], sum [M], sums of values [M, 64] for each 64 of the head dim) of one part of the sequence."""
    oldest, newest = seen
    shape = (QUERY_ROWS, call.block)
    query_positions = jax.lax.broadcast_in_dim(load(call, positions_smem, ROWS), shape, (0,))

    def visit(index, state):
        top, total, accs = state
        next_pages = cache.pages(index + call.stages)
        k_block, stage = cache.wait("k", index)
        scores = _product(call, q_smem, k_block, is_transposed=True)
        scores = _capped(call, scores, cache.scales("k", stage))
        key_positions = index * call.block + _counted(call, shape, 1)
        is_seen = key_positions <= query_positions
        if call.window is not None:
            is_seen &= key_positions > query_positions - call.window
        scores = jnp.where(is_seen, scores, MASKED)
        cache.refill("k", index, next_pages)
        new_top = jnp.maximum(top, jnp.round(scores.max(axis=1)))
        probs = jnp.exp2(scores - jax.lax.broadcast_in_dim(new_top, shape, (0,)))
        shrink = two_to(top - new_top)
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

    return jax.lax.fori_loop(*blocks, visit, nothing(call))


def _capped(call: Call, scores, key_scales):
    """Scores in powers of two."""
    if key_scales is not None:
        scores = scores * jax.lax.broadcast_in_dim(key_scales, scores.shape, (1,))
    if call.softcap is None:
        return scores * (call.scale * LOG2_E)
    # tanh of the scores over the cap. The GPU's own is good to 11 bits, of which a large cap makes much.
    tanh = 1.0 - 2.0 / (1.0 + jnp.exp2(scores * (2 * LOG2_E * call.scale / call.softcap)))
    return tanh * (call.softcap * LOG2_E)


def _clear(call: Call, v_block, first, seen):
    """Zero the values that no query of the run sees: what another row left there may be NaN, and 0 * NaN is NaN."""
    oldest, newest = seen
    positions = first + _counted(call, v_block.shape, 0)
    values = v_block[...]
    v_block[...] = jnp.where((positions >= oldest) & (positions <= newest), values, jnp.zeros_like(values))
    plgpu.commit_smem()


def _product(call: Call, a, b, is_transposed: bool = False):
    """``a @ b`` or ``a @ b.T``, in float32. The interpreter knows no products with registers or of a transposed matrix."""
    if call.interpret:
        a, b = (x.astype(jnp.float32) if isinstance(x, jax.Array) else x[...].astype(jnp.float32) for x in (a, b))
        return jax.lax.dot_general(a, b, (((1,), (int(is_transposed),)), ((), ())))
    b = b.transpose((1, 0)) if is_transposed else b

    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]
    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def nothing(call: Call):
    """What :func:`attend` begins with."""
    accs = tuple(_laid_out(call, jnp.zeros((QUERY_ROWS, COLUMNS), jnp.float32), MATRIX) for _ in range(call.columns // COLUMNS))
    return _laid_out(call, jnp.full(QUERY_ROWS, NOTHING), ROWS), _laid_out(call, jnp.zeros(QUERY_ROWS), ROWS), accs


def _counted(call: Call, shape, axis: int) -> jax.Array:
    """0, 1, 2, ... along an axis of a matrix."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis) if call.interpret else plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)


def load(call: Call, ref, layout) -> jax.Array:
    return ref[...] if call.interpret else load_registers(ref, layout)


def store(call: Call, ref, value: jax.Array) -> None:
    if call.interpret:
        ref[...] = value
    else:
        store_registers(ref, value)


def _laid_out(call: Call, x: jax.Array, layout) -> jax.Array:
    """``x``, spread over the threads like this; the interpreter knows of no threads."""
    return x if call.interpret else plgpu.layout_cast(x, layout)


def added(state, part):
    """The sums of both, counted from the greater maximum."""
    top = jnp.maximum(state[0], part[0])
    weights = [two_to(x[0] - top) for x in (state, part)]
    total = state[1] * weights[0] + part[1] * weights[1]
    weights = [jax.lax.broadcast_in_dim(x, (QUERY_ROWS, COLUMNS), (0,)) for x in weights]
    return top, total, tuple(old * weights[0] + new * weights[1] for old, new in zip(state[2], part[2], strict=True))


def two_to(power: jax.Array) -> jax.Array:
    """2 to a whole number that is not positive, exactly; 0 where that is no normal number."""
    exponent = jnp.maximum(power, -127.0).astype(jnp.int32) + 127
    return jax.lax.bitcast_convert_type(jax.lax.shift_left(exponent, 23), jnp.float32)
