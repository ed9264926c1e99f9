"""The feed-forward layer, with a gate (GLU variants: Shazeer 2020, arXiv:2002.05202) or without."""
import jax
import jax.numpy as jnp

from pallas_kernels.gated_mlp import ACTIVATIONS
from tpllm.model.config import ModelConfig
from tpllm.model.params import MlpParams
from tpllm.weights.linear import gated_mlp, linear


def mlp(x_BTD: jax.Array, params: MlpParams, config: ModelConfig) -> jax.Array:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` where there is no gate; [B, T, D] to [B, T, D]."""
    if params.gate is None:
        up_BTF = linear(x_BTD, params.up, params.up_bias, dtype=jnp.float32)
        return linear(ACTIVATIONS[config.activation](up_BTF).astype(x_BTD.dtype), params.down, params.down_bias)
    biases = (params.gate_bias, params.up_bias, params.down_bias)
    return gated_mlp(x_BTD, (params.gate, params.up, params.down), biases, activation=config.activation)
