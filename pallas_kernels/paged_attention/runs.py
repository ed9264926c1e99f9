"""Which tokens of a call a kernel computes together, and which cached tokens it reads for them.

A *run* is a few tokens of one row, neighbours in the call. Runs cut the call's tokens, padding too, without gaps: their tokens share what is read
of the row's pages.
"""
import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels.page_table import PageTable

NEVER = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockedCall:
    """What is fixed when a kernel is built, whatever the device; it reads the cache in blocks.

    Attributes:
        block: cached tokens of a block.
        page_size: tokens of a page.
        scale, window, softcap: see ``paged_attention_reference``.
        dtype: of products.
    """

    block: int
    page_size: int
    scale: float
    softcap: float | None
    window: int | None
    dtype: jnp.dtype

    @property
    def pieces(self) -> int:
        """Pages of a block."""
        return max(1, self.block // self.page_size)


@struct.dataclass
class Runs:
    """U runs over the F tokens of a call, in order; what is left of U holds no token.

    Attributes:
        start, count: int32 [U], first token and number of tokens.
        row: int32 [U], the row of the table.
        oldest, newest: int32 [U], the first and last position that a token of the run sees; oldest is beyond newest where none sees any.
    """

    start: jax.Array
    count: jax.Array
    row: jax.Array
    oldest: jax.Array
    newest: jax.Array

    def blocks(self, block: int) -> jax.Array:
        """int32 [U, 2]: the first block of cached tokens that a run sees, and one past the last."""
        sees_U = self.oldest <= self.newest
        return jnp.stack([jnp.where(sees_U, self.oldest // block, 0), jnp.where(sees_U, self.newest // block + 1, 0)], axis=1)


def cut_into_runs(positions_BT: jax.Array, table: PageTable, *, longest: int, window: int | None) -> Runs:
    """The runs of a call.

    Args:
        positions_BT: int32, negative for padding.
        table: where the rows' tokens lie; its ``rows`` say which tokens are of one row.
        longest: tokens of a run.
        window: how many latest positions a token sees; None for all.
    """
    B, T = positions_BT.shape
    positions_F, rows = positions_BT.reshape(-1), jnp.arange(B) if table.rows is None else table.rows
    if rows.ndim == 2 and T > 1:
        start, count = _cut_where_rows_change(rows.reshape(-1), longest, min(B * T, B * T // longest + B * (table.pages_RL.shape[0] + 1)))
        row = rows.reshape(-1)[jnp.minimum(start, B * T - 1)]
    else:
        per_row = -(-T // longest)
        first_t = jnp.arange(per_row) * longest
        start = (jnp.arange(B)[:, None] * T + first_t).reshape(-1)
        count = jnp.broadcast_to(jnp.minimum(longest, T - first_t), (B, per_row)).reshape(-1)
        row = jnp.repeat(rows.reshape(B), per_row)
    tokens_UQ = start[:, None] + jnp.arange(min(longest, B * T))
    positions_UQ = jnp.where(tokens_UQ < (start + count)[:, None], positions_F[jnp.minimum(tokens_UQ, B * T - 1)], -1)
    newest = positions_UQ.max(axis=1)
    oldest = jnp.where(newest >= 0, 0, NEVER)
    if window is not None:
        oldest = jnp.maximum(oldest, jnp.where(positions_UQ >= 0, positions_UQ, NEVER).min(axis=1) - window + 1)
    return Runs(*(x.astype(jnp.int32) for x in (start, count, row, oldest, newest)))


def _cut_where_rows_change(rows_F: jax.Array, longest: int, num_runs: int) -> tuple[jax.Array, jax.Array]:
    """(start, count): a run ends where the row does, or after ``longest`` tokens."""
    F = rows_F.shape[0]
    index_F = jnp.arange(F)
    is_new_F = jnp.concatenate([jnp.ones(1, bool), rows_F[1:] != rows_F[:-1]])
    row_start_F = jax.lax.cummax(jnp.where(is_new_F, index_F, 0))
    start_U = jnp.nonzero((index_F - row_start_F) % longest == 0, size=num_runs, fill_value=F)[0]
    return start_U, jnp.concatenate([start_U[1:], jnp.array([F])]) - start_U
