"""What the device keeps between programs: the state of each slot's row, declared once, and the cache."""
import jax
import jax.numpy as jnp
from flax import struct

from tpllm.model.kv_cache import KVCache
from tpllm.model.logit_adjustments import Adjustments, History
from tpllm.model.per_row import Row, pack_row, per_row, rows_of
from tpllm.model.sampling import SamplingRows

TARGET = "target"  # the model whose tokens are drawn


@struct.dataclass
class SlotState:
    """What the device knows of B slots.

    Attributes:
        token: int32 [B], the last token, not yet in the cache.
        position: int32 [B], its position.
        is_alive: bool [B], whether the row decodes.
        remaining: int32 [B], tokens the row may still get.
        prompt_len: int32 [B].
        sampling: the rows' sampling parameters.
        history: what the rows have generated.
    """

    token: jax.Array = per_row(jnp.int32, pack=lambda row: row.completion[-1] if row.completion else row.prompt[-1])
    position: jax.Array = per_row(jnp.int32, pack=lambda row: len(row.prompt) + len(row.completion) - 1)
    is_alive: jax.Array = per_row(jnp.bool_, pack=lambda row: row.is_alive)
    remaining: jax.Array = per_row(jnp.int32, pack=lambda row: row.max_new_tokens - len(row.completion))
    prompt_len: jax.Array = per_row(jnp.int32, empty=1, pack=lambda row: len(row.prompt))
    sampling: SamplingRows = rows_of(SamplingRows)
    history: History = rows_of(History)


@struct.dataclass
class Cache:
    """What programs keep of the rows' contexts.

    Attributes:
        pages: the keys and values of each model, by its name: arrays [P, ...]. One page id means the same part of the same row in all of them.
        per_row: state of each model that a row has once, whatever its length, as recurrent layers do: arrays [B, ...]; none today.
    """

    pages: dict[str, KVCache]
    per_row: dict[str, jax.Array] = struct.field(default_factory=dict)


def pack_slot(row: Row, **sizes: int) -> SlotState:
    """The state of one slot [1]. A row that adjusts nothing has no adjustments and no history: its slot's stay what they are, unused."""
    return pack_row(SlotState, row, leave_out=() if row.params.adjusts_logits else (Adjustments, History), **sizes)
