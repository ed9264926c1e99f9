"""The feed-forward layer, with a gate (GLU variants: Shazeer 2020, arXiv:2002.05202) or without."""
import jax
import jax.numpy as jnp

from pallas_kernels.gated_mlp import ACTIVATIONS, gated
from tpllm import weight_ops
from tpllm.kernel_weights import KernelWeight
from tpllm.model.config import ModelConfig
from tpllm.model.params import MlpParams
from tpllm.native.packed import PackedWeight
from tpllm.quant.linear import linear


def mlp(x_BTD: jax.Array, params: MlpParams, config: ModelConfig) -> jax.Array:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` where there is no gate; [B, T, D] to [B, T, D]."""
    if params.gate is None:
        up_BTF = linear(x_BTD, params.up, params.up_bias, dtype=jnp.float32)
        return linear(ACTIVATIONS[config.activation](up_BTF).astype(x_BTD.dtype), params.down, params.down_bias)
    weights, biases = (params.gate, params.up, params.down), (params.gate_bias, params.up_bias, params.down_bias)
    is_packed = {type(weight) for weight in weights} in ({PackedWeight}, {KernelWeight})
    if is_packed and all(weight.order is None and not weight.num_outliers for weight in weights) and (
            isinstance(params.gate, PackedWeight) or params.gate.layout == params.up.layout):
        return weight_ops.packed_gated_mlp(x_BTD, weights, biases, activation=config.activation)
    gate_BTF = linear(x_BTD, params.gate, params.gate_bias)
    up_BTF = linear(x_BTD, params.up, params.up_bias)
    return linear(gated(gate_BTF, up_BTF, config.activation), params.down, params.down_bias)
