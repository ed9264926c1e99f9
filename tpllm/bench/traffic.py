"""What decoding has to read: weights once a step, and the valid part of the KV cache once a row."""
import dataclasses

from tpllm.engine.roofline import find_costs
from tpllm.model.config import ModelConfig
from tpllm.model.params import DecoderParams, bytes_per_device


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes on all local devices together, replicas included: each device reads its own.

    Attributes:
        weight_bytes: of all parameters.
        weight_bytes_read: of those a decode step reads.
        kv_bytes_valid: of the keys and values that the rows of one step attend to, halfway through decoding.
        batch_size: rows of a step, which gives each a token.
    """

    weight_bytes: int
    weight_bytes_read: int
    kv_bytes_valid: int
    batch_size: int

    @property
    def bytes_per_step(self) -> int:
        """What one decode step reads."""
        return self.weight_bytes_read + self.kv_bytes_valid

    @property
    def bytes_per_token(self) -> float:
        """What one generated token reads."""
        return self.bytes_per_step / self.batch_size


def decode_traffic(config: ModelConfig, params: DecoderParams, *, kv_dtype, batch_size: int, prompt_len: int, output_len: int) -> Traffic:
    """The traffic of decoding ``output_len`` tokens after a prompt.

    Args:
        config: the model, fitted to its mesh.
        params: its parameters on the mesh.
        kv_dtype: of the cache.
        batch_size: rows of a step.
        prompt_len, output_len: tokens of each row.
    """
    costs, num_tokens = find_costs(config, params, kv_dtype), sum(valid_tokens(prompt_len, output_len, window) for window in config.layer_windows)
    return Traffic(weight_bytes=bytes_per_device(params) * config.partition.mesh.size, weight_bytes_read=costs.weight_bytes, batch_size=batch_size,
                   kv_bytes_valid=round(costs.token_bytes / config.num_layers * batch_size * num_tokens))


def valid_tokens(prompt_len: int, output_len: int, window: int | None) -> float:
    """Cached tokens that a query sees, on average over the steps of a decode.

    The prefill gives the first token; step i of the output_len - 1 others (from 0) sees prompt_len + i + 1, the window at most.
    """
    seen = [min(prompt_len + step + 1, window or prompt_len + step + 1) for step in range(output_len - 1)]
    return sum(seen) / len(seen)
