"""What a step reads and computes, counted from the model: a GPU's compiler does not tell, a TPU's counts a loop once."""
import dataclasses

from sharding_rules.axes import BATCH
from tpllm.engine.roofline import num_matrix_values
from tpllm.model.config import ModelConfig
from tpllm.model.kv_cache import cache_bytes_per_token
from tpllm.model.params import bytes_per_device, named_leaves, param_specs
from tpllm.plan.setup import Setup


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one program on the device that has the most.

    Attributes:
        weight_bytes, kv_bytes: that are read.
        flops: multiplications and additions.
    """

    weight_bytes: float
    kv_bytes: float
    flops: float

    @property
    def num_bytes(self) -> float:
        """All that is read."""
        return self.weight_bytes + self.kv_bytes

    def seconds(self, *, bytes_per_s: float, flops: float) -> float:
        """The least that a device needs (Williams et al. 2009, doi:10.1145/1498765.1498785)."""
        return max(self.num_bytes / bytes_per_s, self.flops / flops)


def decode_work(setup: Setup) -> Work:
    """A decode step at all rows, each halfway between its prompt's end and the end of its context."""
    context = (setup.prompt_len + setup.shapes.max_model_len) // 2
    rows = setup.shapes.max_num_seqs / setup.config.partition.size(BATCH)
    return _work(setup, num_tokens=rows, seen=_seen(setup.config, context), kv_tokens=rows * _seen(setup.config, context))


def prefill_work(setup: Setup) -> Work:
    """A prompt of ``setup.prompt_len`` tokens alone on one data group: the sum over its chunks."""
    chunk, length, config = setup.shapes.prefill_chunk, setup.prompt_len, setup.config
    parts = []
    for first in range(0, length, chunk):
        count = min(chunk, length - first)
        parts.append(_work(setup, num_tokens=count, seen=_seen(config, first + count / 2), kv_tokens=_seen(config, first + count)))
    return Work(*(sum(getattr(part, field.name) for part in parts) for field in dataclasses.fields(Work)))


def _work(setup: Setup, *, num_tokens: float, seen: float, kv_tokens: float) -> Work:
    """``seen``: cached tokens that a query meets, in the mean of layers; ``kv_tokens``: those that are read."""
    config, partition = setup.config, setup.config.partition
    num_groups = partition.size(BATCH)
    devices_per_group = partition.mesh.size // num_groups
    product_flops = 2 * num_matrix_values(config) * num_tokens / devices_per_group
    attention_flops = 4 * config.num_heads * config.head_dim * config.num_layers * seen * num_tokens / devices_per_group
    return Work(weight_bytes=_weight_bytes(setup, num_tokens), flops=product_flops + attention_flops,
                kv_bytes=kv_tokens * cache_bytes_per_token(config, setup.cache_dtype) / devices_per_group)


def _weight_bytes(setup: Setup, num_tokens: float) -> float:
    """Bytes of the weights that so many tokens meet: of the experts as many as they choose, were it at random."""
    config, total = setup.config, 0.0
    specs = dict(named_leaves(param_specs(config)))
    for name, leaf in named_leaves(setup.params):
        spec = specs.get(name) or specs[name.rpartition(".")[0]]
        num_bytes = bytes_per_device(leaf)
        if name.split(".")[0] == "embed" and not config.ties_embeddings:
            continue
        if spec.stack is not None:
            num_bytes *= 1 - (1 - config.num_experts_per_token / config.num_experts) ** num_tokens
        total += num_bytes
    return total


def _seen(config: ModelConfig, context: float) -> float:
    return sum(min(context, window or context) for window in config.layer_windows) / config.num_layers
