"""Which keys a query sees, as kernels are told it: an interval of key ranks for each query, and for each tile of queries the blocks to visit.

    query t sees key s   <=>   low[t] <= rank[s] <= high[t]

A rank is a position, or where texts are packed ``segment * stride + position``; padding has rank -1, and an empty interval. So windows, segments,
padding and keys of earlier chunks are all the same to a kernel, and what it is told takes memory linear in the tokens.
"""
import jax
import jax.numpy as jnp
from flax import struct

NEVER = jnp.iinfo(jnp.int32).max


@struct.dataclass
class Spans:
    """Intervals of visible ranks.

    Attributes:
        low_BT, high_BT: int32, first and last rank that a query sees; a query of padding has (NEVER, -1).
        ranks_BS: int32 of the keys; -1 where a key is seen by none.
    """

    low_BT: jax.Array  # noqa: N815
    high_BT: jax.Array  # noqa: N815
    ranks_BS: jax.Array  # noqa: N815

    def pad(self, num_queries: int, num_keys: int) -> "Spans":
        """The spans with padding behind them, up to these numbers."""
        rows, columns = ((0, 0), (0, num_queries - self.low_BT.shape[1])), ((0, 0), (0, num_keys - self.ranks_BS.shape[1]))
        return Spans(jnp.pad(self.low_BT, rows, constant_values=NEVER), jnp.pad(self.high_BT, rows, constant_values=-1),
                     jnp.pad(self.ranks_BS, columns, constant_values=-1))

    def blocks(self, block_q: int, block_k: int) -> jax.Array:
        """int32 [B, T / block_q, 4]: of each tile of queries (first, full_first, full_end, end) in blocks of keys.

        No query of the tile sees a key outside of the blocks [first, end), which are one at least; every query of it sees every key of
        [full_first, full_end), which lies within. Where neighbours' ranks ascend these are the tightest; for any other order they are true and wider.
        """
        B = self.low_BT.shape[0]
        low_BQq, high_BQq = (x.reshape(B, -1, block_q) for x in (self.low_BT, self.high_BT))
        ranks_BJk = self.ranks_BS.reshape(B, -1, block_k)
        is_real_BQq, is_key_BJk = high_BQq >= low_BQq, ranks_BJk >= 0
        lowest_BQ = jnp.where(is_real_BQq, low_BQq, NEVER).min(-1)
        highest_BQ = jnp.where(is_real_BQq, high_BQq, -1).max(-1)
        least_BJ, most_BJ = jnp.where(is_key_BJk, ranks_BJk, NEVER).min(-1), ranks_BJk.max(-1)
        num_blocks = most_BJ.shape[1]
        first_BQ = jnp.minimum(_first(most_BJ[:, None] >= lowest_BQ[..., None]), num_blocks - 1)
        end_BQ = jnp.maximum(_last(least_BJ[:, None] <= highest_BQ[..., None]) + 1, first_BQ + 1)  # a tile of padding is written too
        most_if_full_BJ = jnp.where(is_key_BJk.all(-1), most_BJ, NEVER)
        full_end_BQ = _first(most_if_full_BJ[:, None] > high_BQq.min(-1)[..., None])
        full_first_BQ = jnp.clip(_last(least_BJ[:, None] < low_BQq.max(-1)[..., None]) + 1, first_BQ, end_BQ)
        return jnp.stack([first_BQ, full_first_BQ, jnp.clip(full_end_BQ, full_first_BQ, end_BQ), end_BQ], axis=-1)


def make_spans(positions_BT: jax.Array, key_positions_BS: jax.Array | None, *, window: int | None, segments_BT: jax.Array | None,
               key_segments_BS: jax.Array | None) -> Spans:
    """The spans of ``flash_attention_reference``'s arguments; segments times the largest position must stay below 2**31."""
    key_positions_BS = positions_BT if key_positions_BS is None else key_positions_BS
    low_BT = jnp.zeros_like(positions_BT) if window is None else jnp.maximum(positions_BT - window + 1, 0)
    high_BT, ranks_BS = positions_BT, key_positions_BS
    if segments_BT is not None:
        stride = jnp.maximum(positions_BT.max(), key_positions_BS.max()) + 1
        start_BT = segments_BT * stride
        low_BT, high_BT = low_BT + start_BT, high_BT + start_BT
        ranks_BS = ranks_BS + (segments_BT if key_segments_BS is None else key_segments_BS) * stride
    is_real_BT = positions_BT >= 0
    return Spans(jnp.where(is_real_BT, low_BT, NEVER), jnp.where(is_real_BT, high_BT, -1), jnp.where(key_positions_BS >= 0, ranks_BS, -1))


def pad(x: jax.Array, multiple: int, dim: int) -> jax.Array:
    """With zeros behind, up to a multiple in one dim."""
    missing = -x.shape[dim] % multiple
    return jnp.pad(x, [(0, missing if i == dim else 0) for i in range(x.ndim)]) if missing else x


def _first(is_so_BQJ: jax.Array) -> jax.Array:
    """[B, Q] int32: the first of each row of flags; their number where there is none."""
    J = is_so_BQJ.shape[-1]
    return jnp.where(is_so_BQJ, jnp.arange(J, dtype=jnp.int32), J).min(-1)


def _last(is_so_BQJ: jax.Array) -> jax.Array:
    """[B, Q] int32: the last of each row of flags; -1 where there is none."""
    return jnp.where(is_so_BQJ, jnp.arange(is_so_BQJ.shape[-1], dtype=jnp.int32), -1).max(-1)
