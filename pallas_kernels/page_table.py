"""Where the tokens of a row lie in a paged KV cache (Kwon et al. 2023, arXiv:2309.06180).

    token at position s of row r  ->  entry s % S of page pages[r, s // S],   S tokens a page

A padded cache is the same with one page a row.
"""
import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class PageTable:
    """The pages of R rows, and which of those rows the tokens of a call belong to.

    Attributes:
        pages_RL: int32 page of each L-th part of a row; negative where the row has none yet.
        rows: int32 [B], the row of each batch row; [B, T], the row of each token, where those of one row are neighbours; or None where batch
            row b is row b.
    """

    pages_RL: jax.Array  # noqa: N815
    rows: jax.Array | None = None

    def pages_of(self, positions_BT: jax.Array, page_size: int) -> jax.Array:
        """[B, T] page of the token at each position; negative where there is none."""
        R, L = self.pages_RL.shape
        rows_BT = self._rows_BT(*positions_BT.shape)
        parts_BT, is_real_BT = positions_BT // page_size, (positions_BT >= 0) & (rows_BT >= 0) & (rows_BT < R)
        is_real_BT &= parts_BT < L
        pages_BT = self.pages_RL[jnp.where(is_real_BT, rows_BT, 0), jnp.where(is_real_BT, parts_BT, 0)]
        return jnp.where(is_real_BT, pages_BT, -1)

    def by_token(self, num_tokens: int) -> "PageTable":
        """The table of a call in which every token is a batch row of its own, [B * T, 1]."""
        num_rows = self.pages_RL.shape[0] if self.rows is None else self.rows.shape[0]
        return PageTable(self.pages_RL, self._rows_BT(num_rows, num_tokens).reshape(-1))

    def _rows_BT(self, num_rows: int, num_tokens: int) -> jax.Array:
        rows = jnp.arange(num_rows) if self.rows is None else self.rows
        return jnp.broadcast_to(rows if rows.ndim == 2 else rows[:, None], (num_rows, num_tokens))


def one_page_a_row(num_rows: int, rows: jax.Array | None = None) -> PageTable:
    """The table of a padded cache, in which row r is page r."""
    return PageTable(jnp.arange(num_rows, dtype=jnp.int32)[:, None], rows)
