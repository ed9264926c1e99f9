"""What a device can do at most: how fast it reads its memory, and how much it computes (Williams et al. 2009, doi:10.1145/1498765.1498785)."""
import dataclasses
import math

from tpllm.model.config import ModelConfig
from tpllm.model.kv_cache import cache_bytes_per_token
from tpllm.model.params import DecoderParams, bytes_per_device, named_leaves, param_specs

# Bytes a second of memory and dense bfloat16 operations a second, from the vendors' data sheets.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": (1.555e12, 312e12), "NVIDIA A100-SXM4-80GB": (2.039e12, 312e12), "NVIDIA L4": (0.3e12, 121e12),
    "NVIDIA H100 PCIe": (2.0e12, 756e12), "NVIDIA H100 80GB HBM3": (3.35e12, 989e12), "NVIDIA H200": (4.8e12, 989e12),
    "TPU v4": (1.228e12, 275e12), "TPU v5 lite": (0.819e12, 197e12), "TPU v5p": (2.765e12, 459e12), "TPU v5": (2.765e12, 459e12),
    "TPU v6 lite": (1.64e12, 918e12),
}


@dataclasses.dataclass(frozen=True)
class ProgramCosts:
    """What programs of a model read and compute, all devices together.

    Attributes:
        weight_bytes: that one pass reads.
        token_bytes: of keys and values of one token of a row.
        token_flops: operations of one token, two for each weight it meets; attention itself is not counted.
        peak_bytes_per_s, peak_flops: of all devices; None where the device is not known.
    """

    weight_bytes: int
    token_bytes: float
    token_flops: float
    peak_bytes_per_s: float | None = None
    peak_flops: float | None = None


def find_costs(config: ModelConfig, params: DecoderParams, cache_dtype) -> ProgramCosts:
    """The costs of a model on its mesh."""
    devices = config.partition.mesh.devices.flat
    read = params if params.head is None else dataclasses.replace(params, embed=None)  # of an embedding that is no head a token reads one row
    peaks = [PEAKS.get(device.device_kind) for device in devices]
    known = (sum(peak[0] for peak in peaks), sum(peak[1] for peak in peaks)) if None not in peaks else (None, None)
    return ProgramCosts(bytes_per_device(read) * len(devices), cache_bytes_per_token(config, cache_dtype), 2 * num_matrix_values(config), *known)


def num_matrix_values(config: ModelConfig) -> float:
    """The weights that a token is multiplied with: those of its own experts, and of the embedding only where it is the head."""
    total = 0.0
    for name, spec in named_leaves(param_specs(config)):
        if len(spec.shape) > 1 and (name != "embed" or config.ties_embeddings):
            total += math.prod(spec.shape) * (1 if spec.stack is None else config.num_experts_per_token / config.num_experts)
    return total
