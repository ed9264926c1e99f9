"""Greedy decoding with no cache and no batch: the slow, obvious loop that the engine is tested against."""
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sharding_rules.axes import BATCH
from tpllm.model.config import ModelConfig
from tpllm.model.decoder import forward, unembed
from tpllm.model.params import DecoderParams

LENGTH_MULTIPLE = 128  # prefixes are padded to a multiple, so that runs of similar length share one compiled program


def greedy(params: DecoderParams, config: ModelConfig, prompt_ids: Sequence[int], *, num_steps: int) -> list[int]:
    """The ``num_steps`` most likely tokens after a prompt, each from a forward pass over the whole prefix.

    Args:
        params, config: the model, fitted to its mesh or without one.
        prompt_ids: token ids, at least one.
        num_steps: tokens to choose; nothing ends the loop earlier.
    """
    length = -(-(len(prompt_ids) + num_steps) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    tokens_T = np.zeros(length, np.int32)
    tokens_T[:len(prompt_ids)] = prompt_ids
    for position in range(len(prompt_ids), len(prompt_ids) + num_steps):
        tokens_T[position] = int(_next_token(params, tokens_T, position, len(prompt_ids), config=config))
    return tokens_T[len(prompt_ids):len(prompt_ids) + num_steps].tolist()


@functools.partial(jax.jit, static_argnames=("config",))
def _next_token(params: DecoderParams, tokens_T: jax.Array, length: jax.Array, prompt_len: jax.Array, *, config: ModelConfig) -> jax.Array:
    """The best token after the first ``length`` of ``tokens_T``; the row is repeated where a data axis needs more than one."""
    num_rows = config.partition.size(BATCH)
    positions_T = jnp.where(jnp.arange(tokens_T.size) < length, jnp.arange(tokens_T.size), -1)
    tokens_BT, positions_BT = (jnp.broadcast_to(x, (num_rows, x.size)) for x in (tokens_T, positions_T))
    hidden_BTD, _ = forward(params, tokens_BT, positions_BT, None, config, prompt_lens=jnp.full(num_rows, prompt_len), output="hidden")
    return jnp.argmax(unembed(params, hidden_BTD[:, length - 1], config)[0])
