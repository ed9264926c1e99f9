"""The gated feed-forward layer (GLU variants: Shazeer 2020, arXiv:2002.05202)."""
import jax

from pallas_kernels.gated_mlp import ACTIVATIONS
from tpllm import ops
from tpllm.model.config import ModelConfig
from tpllm.model.params import MlpParams
from tpllm.native.packed import PackedWeight
from tpllm.quant.linear import linear


def gated_mlp(x_BTD: jax.Array, params: MlpParams, config: ModelConfig) -> jax.Array:
    """``down(act(gate(x)) * up(x))``; [B, T, D] to [B, T, D]."""
    weights, biases = (params.gate, params.up, params.down), (params.gate_bias, params.up_bias, params.down_bias)
    if all(isinstance(weight, PackedWeight) for weight in weights):
        return ops.packed_gated_mlp(x_BTD, weights, biases, activation=config.activation)
    gate_BTF = linear(x_BTD, params.gate, params.gate_bias)
    up_BTF = linear(x_BTD, params.up, params.up_bias)
    return linear(ACTIVATIONS[config.activation](gate_BTF) * up_BTF, params.down, params.down_bias)
