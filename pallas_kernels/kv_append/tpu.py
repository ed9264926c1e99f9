"""Appending to the KV cache of a TPU: the tiles that new entries lie in are fetched, changed and written back.

    tile = page[:, r R : r R + R],   R = 8 rows of 32-bit words: 8, 16 or 32 neighbouring entries of a page, of all KV heads
    word = (old word & ~mask) | (new word & mask),   mask: the bits of entries first .. end

A tile is the least that a DMA writes. While one group of tiles is changed, the next is on its way in and the last on its way out.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kv_append.reference import as_bits
from pallas_kernels.page_table import PageTable
from pallas_kernels.tiling import Device, choose_tiles

LANES, WORD_ROWS, WORD_BYTES = 128, 8, 4
DTYPES = ("bfloat16", "float32", "int8", "float8_e4m3fn")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of a group, which are in flight together."""

    group: int


CANDIDATES = tuple(map(Tiles, (16, 8, 4, 2, 1)))


def refusal(cache_PKSH: jax.Array) -> str | None:
    """Why the kernel cannot append to this cache; None where it can."""
    S, H = cache_PKSH.shape[2:]
    if str(cache_PKSH.dtype) not in DTYPES:
        return f"takes a cache of {', '.join(DTYPES)}, not {cache_PKSH.dtype}"
    if H % LANES:
        return f"takes a head dim that is a multiple of {LANES}, not {H}"
    R = entries_of_a_tile(cache_PKSH.dtype)
    return f"takes pages of a multiple of {R} tokens, not {S}" if S % R else None


def entries_of_a_tile(dtype) -> int:
    """Neighbouring entries of a page that are written together."""
    return WORD_ROWS * WORD_BYTES // jnp.dtype(dtype).itemsize


def on_chip_bytes(tiles: Tiles, *, num_caches: int, K: int, H: int) -> int:
    """Vector memory: two groups of old tiles, and two of new entries, a lone one of which takes as much."""
    return 2 * 2 * num_caches * tiles.group * K * WORD_ROWS * H * WORD_BYTES


def kv_append(caches: tuple[jax.Array, ...], new: tuple[jax.Array, ...], positions_BT: jax.Array, table: PageTable, *, device: Device,
              interpret: bool) -> tuple[jax.Array, ...]:
    """See :func:`pallas_kernels.kv_append.kv_append`; here the table is always given."""
    (B, T), (P, K, S, H), dtype = positions_BT.shape, caches[0].shape, caches[0].dtype
    R = entries_of_a_tile(dtype)
    needed = functools.partial(on_chip_bytes, num_caches=len(caches), K=K, H=H)
    tiles = choose_tiles("kv_append", device, (K, H, S, str(dtype), "decode" if T == 1 else "chunk"), CANDIDATES, needed)
    start_U, told_U4 = _cut_into_tiles(positions_BT, table, num_pages=P, page_size=S, entries=R)
    padding = -len(start_U) % tiles.group
    start_U, told_U4 = jnp.pad(start_U, (0, padding)), jnp.pad(told_U4, ((0, padding), (0, 0)))
    tokens_UR = start_U[:, None] if T == 1 else jnp.clip(start_U[:, None] - told_U4[:, 2:3] + jnp.arange(R), 0, B * T - 1)
    new_UKRH = [x.astype(dtype).reshape(B * T, K, H)[tokens_UR].swapaxes(1, 2) for x in new]
    return _kernel(told_U4, [_in_all_bits(x) for x in new_UKRH] if T == 1 else new_UKRH, caches, tiles, needed(tiles), interpret)


def _cut_into_tiles(positions_BT: jax.Array, table: PageTable, *, num_pages: int, page_size: int, entries: int) -> tuple[jax.Array, jax.Array]:
    """(first token [U], int32 [U, 4]) of the tiles that tokens of a call lie in: page, first entry of the tile in it, and the first and one past
    the last entry of the tile that is new; those are the same in a tile that no token is in."""
    (B, T), num_rows = positions_BT.shape, table.pages_RL.shape[0]
    pages_F, positions_F = table.pages_of(positions_BT, page_size).reshape(-1), positions_BT.reshape(-1)
    is_real_F = (pages_F >= 0) & (pages_F < num_pages)
    offsets_F = positions_F % page_size
    if T == 1:
        start_U, count_U = jnp.arange(B), is_real_F.astype(jnp.int32)
    else:
        tile_F = jnp.where(is_real_F, pages_F * (page_size // entries) + offsets_F // entries, -1)
        is_first_F = jnp.concatenate([jnp.ones(1, bool), tile_F[1:] != tile_F[:-1]])
        runs = num_rows + 1 if table.rows is not None and table.rows.ndim == 2 else B  # of neighbouring tokens of one row
        num_tiles = min(B * T, B * T // entries + 3 * runs)  # a run begins and ends within a tile, and padding follows it
        start_U = jnp.nonzero(is_first_F, size=num_tiles, fill_value=B * T)[0]
        count_U = jnp.concatenate([start_U[1:], jnp.array([B * T])]) - start_U
        start_U = jnp.minimum(start_U, B * T - 1)
        count_U = jnp.where(is_real_F[start_U], count_U, 0)
    first_U = offsets_F[start_U] % entries
    told = (pages_F[start_U], offsets_F[start_U] - first_U, first_U, first_U + count_U)
    return start_U, jnp.stack(told, axis=1).astype(jnp.int32)


def _in_all_bits(x_UK1H: jax.Array) -> jax.Array:
    """int32 [U, K, 1, H]: words in which an entry is each of those that a word holds."""
    bits = 8 * x_UK1H.dtype.itemsize
    words = jax.lax.bitcast_convert_type(as_bits(x_UK1H), f"uint{bits}").astype(jnp.uint32)
    words = functools.reduce(jnp.bitwise_or, (words << shift for shift in range(0, 8 * WORD_BYTES, bits)))
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def _kernel(told_U4, new, caches, tiles: Tiles, vector_bytes: int, interpret: bool) -> tuple[jax.Array, ...]:
    (U, K, N, H), R, num_caches = new[0].shape, entries_of_a_tile(caches[0].dtype), len(caches)
    in_place = [pl.BlockSpec(memory_space=pl.ANY)] * num_caches
    if not interpret:  # XLA would bring a cache that fits into vector memory there and back, all of it
        caches = [pltpu.with_memory_space_constraint(cache, pltpu.HBM) for cache in caches]
    written = pl.pallas_call(
        functools.partial(_body, group=tiles.group, num_caches=num_caches), name="kv_append",
        out_shape=[jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in caches],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(U // tiles.group,),
            in_specs=[*[pl.BlockSpec((tiles.group, K, N, H), lambda step, _: (step, 0, 0, 0))] * num_caches, *in_place], out_specs=in_place,
            scratch_shapes=[*[pltpu.VMEM((2, tiles.group, K, R, H), cache.dtype) for cache in caches], pltpu.SemaphoreType.DMA((2, 2, num_caches))]),
        input_output_aliases={1 + num_caches + i: i for i in range(num_caches)},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=vector_bytes + 8 * 2**20),
        interpret=pltpu.InterpretParams() if interpret else False)(told_U4.reshape(-1), *new, *caches)
    return tuple(jax.lax.optimization_barrier(written))  # without it libtpu refuses a program that ends with the kernel


class _Moves:
    """Groups of tiles between the caches and vector memory, by step."""

    def __init__(self, told, group: int, caches, buffers, semaphores):
        self.told, self.group, self.caches, self.buffers, self.semaphores = told, group, caches, buffers, semaphores

    def for_each_tile(self, step, act) -> None:
        """``act`` of each tile that has new entries: its number in the group, page, first entry, and which of its entries are new."""
        @pl.loop(0, self.group)
        def _tile(index):
            page, offset, first, end = (self.told[(step * self.group + index) * 4 + i] for i in range(4))
            pl.when(first < end)(lambda: act(index, page, offset, first, end))

    def fetch(self, step, act) -> None:
        """Only tiles that keep some of their entries."""
        def move(index, page, offset, first, end):
            copies = [pltpu.make_async_copy(there, here, self.semaphores.at[0, step % 2, i])
                      for i, (there, here) in enumerate(self._ends(step, index, page, offset))]

            @pl.when((first > 0) | (end < self.buffers[0].shape[3]))
            def _():
                for copy in copies:
                    act(copy)
        self.for_each_tile(step, move)

    def store(self, step, act) -> None:
        """Every tile."""
        def move(index, page, offset, *_):
            for i, (there, here) in enumerate(self._ends(step, index, page, offset)):
                act(pltpu.make_async_copy(here, there, self.semaphores.at[1, step % 2, i]))
        self.for_each_tile(step, move)

    def _ends(self, step, index, page, offset):
        entries = self.buffers[0].shape[3]
        rows = pl.ds(pl.multiple_of(offset, entries), entries)
        return [(cache.at[page, :, rows], buffer.at[step % 2, index]) for cache, buffer in zip(self.caches, self.buffers, strict=True)]


def _start(copy) -> None:
    copy.start()


def _wait(copy) -> None:
    copy.wait()


def _body(told, *refs, group: int, num_caches: int):
    new, caches, buffers = refs[:num_caches], refs[2 * num_caches:3 * num_caches], refs[3 * num_caches:4 * num_caches]
    moves = _Moves(told, group, caches, buffers, refs[-1])
    step, num_steps = pl.program_id(0), pl.num_programs(0)
    pl.when(step == 0)(lambda: moves.fetch(step, _start))
    pl.when(step > 0)(lambda: moves.store(step - 1, _wait))  # the next tiles come to where those were
    pl.when(step + 1 < num_steps)(lambda: moves.fetch(step + 1, _start))
    moves.fetch(step, _wait)

    def change(index, _page, _offset, first, end):
        for entries, buffer in zip(new, buffers, strict=True):
            old, words = (pltpu.bitcast(x, jnp.int32) for x in (buffer[step % 2, index], entries[index]))
            mask = _mask(first, end, buffer.dtype.itemsize, old.shape[1:])[None]
            buffer[step % 2, index] = pltpu.bitcast((old & ~mask) | (words & mask), buffer.dtype)
    moves.for_each_tile(step, change)
    moves.store(step, _start)
    pl.when(step + 1 == num_steps)(lambda: moves.store(step, _wait))


def _mask(first, end, itemsize: int, shape: tuple[int, int]):
    """int32 [8, H]: the bits of a tile's words that belong to entries first .. end - 1."""
    num_parts, bits = WORD_BYTES // itemsize, 8 * itemsize
    entry = jax.lax.broadcasted_iota(jnp.int32, shape, 0) * num_parts
    mask = jnp.zeros(shape, jnp.int32)
    for part in range(num_parts):
        of_part = np.array((2**bits - 1) << (bits * part), np.uint32).view(np.int32).item()
        mask |= jnp.where((entry + part >= first) & (entry + part < end), of_part, 0)
    return mask
