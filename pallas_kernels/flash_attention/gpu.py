"""Attention on NVIDIA Hopper, in Mosaic GPU.

A block of three warp groups computes two tiles of queries of one head. The third warp group brings keys and values into a ring in shared memory
(TMA); the first two multiply (wgmma) and keep an online softmax in registers. They take turns on the tensor cores: while one multiplies, the other
exponentiates (Shah et al. 2024, arXiv:2407.08608). The product with block j's values and that of the queries with block j + 1's keys are
issued together. Only blocks of keys that some query sees are visited, and only those that some query does not wholly see are masked.

Softmax is computed in base 2. ``max`` starts at a finite number and masked scores are -inf, so a block that is wholly masked changes nothing.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import warp_groups
from pallas_kernels.flash_attention.reference import LOG2_E, MASKED
from pallas_kernels.flash_attention.spans import Spans, pad
from pallas_kernels.interpreter import gpu_interpreter
from pallas_kernels.tiling import Device, choose_tiles

NUM_CONSUMERS = 2
PRODUCER = NUM_CONSUMERS
DTYPES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class GpuTiles:
    """How attention is cut.

    Attributes:
        block_q: queries of one warp group; a multiple of 64.
        block_k: keys and values of one step; a multiple of 64.
        num_stages: steps in the ring.
    """

    block_q: int
    block_k: int
    num_stages: int


def candidates(head_dim: int) -> tuple[GpuTiles, ...]:
    """Tiles whose accumulators fit into the registers of a warp group, the best known first."""
    wide = (GpuTiles(64, 128, 2), GpuTiles(64, 128, 3), GpuTiles(64, 128, 4))
    narrow = (GpuTiles(64, 64, 2), GpuTiles(64, 64, 3), GpuTiles(64, 64, 4))
    return wide + narrow if head_dim <= 128 else narrow + wide[:1]


def on_chip_bytes(tiles: GpuTiles, head_dim: int) -> int:
    """Shared memory of a block, for dtypes of 16 bits."""
    ring = 2 * tiles.num_stages * tiles.block_k * head_dim * 2
    queries = NUM_CONSUMERS * tiles.block_q * (head_dim * 2 + 4)
    return ring + queries + 4096  # barriers, and what the compiler takes for reductions and alignment


def refusal(device: Device) -> str | None:
    """Why the kernel does not run there, or None."""
    return None if device.has_mosaic_gpu else f"needs an NVIDIA Hopper GPU (compute capability 9.0), and this is {device.kind or device.platform}"


def flash_attention_gpu(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, spans: Spans, sinks_N: jax.Array | None, *, scale: float,
                        softcap: float | None, device: Device, tiles: GpuTiles | None = None,
                        interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BNT) of ``flash_attention_reference``.

    Args:
        q_BTNH, k_BSKH, v_BSKH, sinks_N, scale, softcap: see there.
        spans: which keys each query sees.
        device: see :func:`refusal`.
        tiles: None for the best known.
        interpret: whether to run in the interpreter.
    """
    (_, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    if tiles is None:
        tiles = choose_tiles("flash_attention", device, (H, str(q_BTNH.dtype)), candidates(H), functools.partial(on_chip_bytes, head_dim=H))
    tile_q = NUM_CONSUMERS * tiles.block_q
    num_tiles, num_blocks = pl.cdiv(T, tile_q), pl.cdiv(S, tiles.block_k)
    padded_T, padded_S = num_tiles * tile_q, num_blocks * tiles.block_k
    q_BTNH, k_BSKH, v_BSKH = pad(q_BTNH, tile_q, 1), pad(k_BSKH, tiles.block_k, 1), pad(v_BSKH, tiles.block_k, 1)
    spans = spans.pad(padded_T, padded_S)
    blocks_BQ4 = spans.blocks(tile_q, tiles.block_k)
    sinks_N = jnp.full((N,), MASKED, jnp.float32) if sinks_N is None else sinks_N.astype(jnp.float32)
    out_BTNH, lse_BNT = _kernel(
        functools.partial(_attend, tiles=tiles, heads_per_kv=N // K, scale=scale, softcap=softcap, groups=warp_groups.pick(interpret)),
        q_BTNH, padded_S, tiles=tiles, interpret=interpret)(
            q_BTNH, k_BSKH, v_BSKH, spans.low_BT, spans.high_BT, spans.ranks_BS, blocks_BQ4, sinks_N)
    return out_BTNH[:, :T], lse_BNT[:, :, :T]


def _kernel(body, q_BTNH, num_keys: int, *, tiles: GpuTiles, interpret: bool):
    B, T, N, H = q_BTNH.shape
    rows = functools.partial(warp_groups.tiled_smem, dtype=q_BTNH.dtype)
    ring = rows((tiles.num_stages, tiles.block_k, H))
    filled = plgpu.Barrier(num_barriers=tiles.num_stages)
    emptied = plgpu.Barrier(num_arrivals=NUM_CONSUMERS, num_barriers=tiles.num_stages)
    return plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)),
        scratch_types={
            "q_smem": rows((NUM_CONSUMERS, tiles.block_q, H)), "k_smem": ring, "v_smem": ring,
            "lse_smem": plgpu.SMEM((NUM_CONSUMERS, tiles.block_q), jnp.float32),
            "q_filled": plgpu.Barrier(num_barriers=NUM_CONSUMERS), "k_filled": filled, "v_filled": filled, "k_emptied": emptied, "v_emptied": emptied,
            "turns": plgpu.Barrier(num_barriers=NUM_CONSUMERS),
        },
        grid=(N, T // (NUM_CONSUMERS * tiles.block_q), B), grid_names=("head", "tile", "row"), num_threads=NUM_CONSUMERS + 1, thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=gpu_interpreter(interpret), kernel_name="flash_attention")


def _attend(q_ref, k_ref, v_ref, low_ref, high_ref, ranks_ref, blocks_ref, sinks_ref, out_ref, lse_ref, *, tiles: GpuTiles, heads_per_kv: int,
            scale: float, softcap: float | None, groups, q_smem, k_smem, v_smem, lse_smem, q_filled, k_filled, v_filled, k_emptied, v_emptied, turns):
    """One block of the grid: two tiles of queries of one head."""
    num_tiles = out_ref.shape[1] // (NUM_CONSUMERS * tiles.block_q)
    row, head, group = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("group")
    tile = num_tiles - 1 - lax.axis_index("tile")  # under a causal mask the last has most to do, so it goes first
    first, full_first, full_end, end = (blocks_ref[row, tile, i] for i in range(4))

    @pl.when(group == PRODUCER)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        _produce(q_ref.at[row, :, head], k_ref.at[row, :, lax.div(head, heads_per_kv)], v_ref.at[row, :, lax.div(head, heads_per_kv)],
                 tile=tile, first=first, end=end, tiles=tiles, q_smem=q_smem, k_smem=k_smem, v_smem=v_smem, q_filled=q_filled, k_filled=k_filled,
                 v_filled=v_filled, k_emptied=k_emptied, v_emptied=v_emptied)

    @pl.when(group < PRODUCER)
    def _():
        plgpu.set_max_registers(232, action="increase")
        rows = pl.ds((tile * NUM_CONSUMERS + group) * tiles.block_q, tiles.block_q)
        span = tuple(groups.load(ref, (row, rows), groups.ROWS) for ref in (low_ref, high_ref))
        mask = functools.partial(_mask, ranks_ref.at[row], span=span, block_k=tiles.block_k, groups=groups)
        out, lse = _consume(group, sinks_ref[head] * LOG2_E, mask, first=first, full_first=full_first, full_end=full_end, end=end, tiles=tiles,
                            scale=scale, softcap=softcap, groups=groups, q_smem=q_smem.at[group], k_smem=k_smem, v_smem=v_smem,
                            q_filled=q_filled.at[group], k_filled=k_filled, v_filled=v_filled, k_emptied=k_emptied, v_emptied=v_emptied, turns=turns)
        q_smem[group] = out.astype(q_smem.dtype)
        lse_smem[group] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[group], out_ref.at[row, rows, head])
        plgpu.copy_smem_to_gmem(lse_smem.at[group], lse_ref.at[row, head, rows])
        plgpu.wait_smem_to_gmem(0)


def _produce(q_ref, k_ref, v_ref, *, tile, first, end, tiles: GpuTiles, q_smem, k_smem, v_smem, q_filled, k_filled, v_filled, k_emptied, v_emptied):
    """Bring the queries, then blocks of keys and values as the ring has room for them."""
    for group in range(NUM_CONSUMERS):
        rows = pl.ds((tile * NUM_CONSUMERS + group) * tiles.block_q, tiles.block_q)
        plgpu.copy_gmem_to_smem(q_ref.at[rows], q_smem.at[group], q_filled.at[group])

    def bring(step, _):
        slot = lax.rem(step, tiles.num_stages)
        keys = pl.ds((first + step) * tiles.block_k, tiles.block_k)
        for ref, smem, filled, emptied in ((k_ref, k_smem, k_filled, k_emptied), (v_ref, v_smem, v_filled, v_emptied)):
            pl.when(step >= tiles.num_stages)(functools.partial(plgpu.barrier_wait, emptied.at[slot]))
            plgpu.copy_gmem_to_smem(ref.at[keys], smem.at[slot], filled.at[slot])
    lax.fori_loop(0, end - first, bring, None)

    @pl.when(end - first > tiles.num_stages)  # one that has waited for a barrier waits for all of its phases
    def _():
        for i in range(tiles.num_stages):
            for emptied in (k_emptied, v_emptied):
                plgpu.barrier_wait(emptied.at[lax.rem(end - first + i, tiles.num_stages)])


def _consume(group, sink, mask, *, first, full_first, full_end, end, tiles: GpuTiles, scale, softcap, groups, q_smem, k_smem, v_smem, q_filled,
             k_filled, v_filled, k_emptied, v_emptied, turns):
    """(out, lse) of one warp group's queries."""
    (block_q, H), num_steps = q_smem.shape, end - first

    def multiply(acc, probs, step):
        """(acc + probs v_step, q k_(step + 1))"""
        slot, next_slot = (lax.rem(x, tiles.num_stages) for x in (step, step + 1))
        plgpu.barrier_wait(v_filled.at[slot])
        plgpu.barrier_wait(k_filled.at[next_slot])
        plgpu.barrier_wait(turns.at[group])
        acc, scores = groups.two_products(acc, probs, v_smem.at[slot], q_smem, k_smem.at[next_slot],
                                          issued=lambda: plgpu.barrier_arrive(turns.at[1 - group]))
        plgpu.barrier_arrive(v_emptied.at[slot])
        plgpu.barrier_arrive(k_emptied.at[next_slot])
        return acc, scores

    def soften(scores, step, state):
        """(probs, state) after one more block of scores."""
        max_q, sum_q, acc = state
        factor = scale * LOG2_E
        if softcap is not None:
            scores, factor = jnp.tanh(scores * (scale / softcap)), softcap * LOG2_E
        block = first + step
        scores = lax.cond((block >= full_first) & (block < full_end), lambda: scores, lambda: mask(scores, block))
        new_max_q = jnp.maximum(max_q, scores.max(axis=1) * factor)
        shrink_q = jnp.exp2(max_q - new_max_q)
        probs = jnp.exp2(scores * factor - groups.spread(new_max_q, scores.shape, 0))
        sum_q = sum_q * shrink_q + probs.sum(axis=1)
        return probs.astype(q_smem.dtype), (new_max_q, sum_q, acc * groups.spread(shrink_q, acc.shape, 0))

    def visit(step, carry):
        scores, state = carry
        probs, (max_q, sum_q, acc) = soften(scores, step, state)
        acc, scores = multiply(acc, probs, step)
        return scores, (max_q, sum_q, acc)

    max_q = groups.full((block_q,), jnp.maximum(sink, MASKED), groups.ROWS)
    sum_q = groups.full((block_q,), jnp.where(sink > MASKED, 1.0, 0.0), groups.ROWS)
    plgpu.barrier_wait(q_filled)
    plgpu.barrier_wait(k_filled.at[0])
    scores = groups.product(q_smem, k_smem.at[0])
    plgpu.barrier_arrive(k_emptied.at[0])
    pl.when((group == 1) & (num_steps > 1))(functools.partial(plgpu.barrier_arrive, turns.at[0]))
    scores, state = lax.fori_loop(0, num_steps - 1, visit, (scores, (max_q, sum_q, groups.full((block_q, H), 0.0, groups.MATRIX))))
    probs, (max_q, sum_q, acc) = soften(scores, num_steps - 1, state)
    slot = lax.rem(num_steps - 1, tiles.num_stages)
    plgpu.barrier_wait(v_filled.at[slot])
    acc = groups.add_product(acc, probs, v_smem.at[slot])
    plgpu.barrier_arrive(v_emptied.at[slot])
    pl.when((group == 0) & (num_steps > 1))(functools.partial(plgpu.barrier_wait, turns.at[0]))  # the other's last, which nobody awaited
    has_keys_q = sum_q > 0
    safe_sum_q = jnp.where(has_keys_q, sum_q, 1.0)
    lse_q = jnp.where(has_keys_q, (max_q + jnp.log2(safe_sum_q)) / LOG2_E, MASKED)
    return acc * groups.spread(1 / safe_sum_q, acc.shape, 0), lse_q


def _mask(ranks_ref, scores, block, *, span, block_k: int, groups):
    """-inf where a query does not see a key."""
    ranks = groups.spread(groups.load(ranks_ref, (pl.ds(block * block_k, block_k),), groups.COLUMNS), scores.shape, 1)
    low, high = (groups.spread(x, scores.shape, 0) for x in span)
    return jnp.where((ranks >= low) & (ranks <= high), scores, -jnp.inf)
