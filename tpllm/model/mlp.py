"""The gated feed-forward layer (GLU variants: Shazeer 2020, arXiv:2002.05202)."""
import functools

import jax

from tpllm.model.config import ModelConfig
from tpllm.model.params import MlpParams
from tpllm.quant.linear import linear

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def gated_mlp(x_BTD: jax.Array, params: MlpParams, config: ModelConfig) -> jax.Array:
    """``down(act(gate(x)) * up(x))``; [B, T, D] to [B, T, D]."""
    gate_BTF = linear(x_BTD, params.gate, params.gate_bias)
    up_BTF = linear(x_BTD, params.up, params.up_bias)
    return linear(_ACTIVATIONS[config.activation](gate_BTF) * up_BTF, params.down, params.down_bias)
