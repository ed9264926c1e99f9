"""Fitting a model to a mesh: repeated KV heads, padded vocabulary, and what stays replicated."""
import dataclasses

from jax.sharding import Mesh

from sharding_rules import Partition, Rules, ShardingError
from sharding_rules.axes import EXPERTS, HEADS, KV_HEADS, VOCAB
from tpllm.errors import log
from tpllm.model.config import ModelConfig
from tpllm.model.params import param_shardings


def fit_to_mesh(config: ModelConfig, mesh: Mesh, rules: Rules) -> ModelConfig:
    """``config`` with its partition, and the storage that the partition asks for.

    KV heads that their mesh axis does not divide are repeated until it does. Attention heads that it does not divide leave attention
    replicated, said once in the log. A vocabulary that it does not divide is padded.

    Raises:
        ShardingError: any other dim that its mesh axis does not divide; it names the parameter. Or an axis for experts where there are none.
    """
    if not config.num_experts and Partition(mesh, rules).size(EXPERTS) > 1:
        raise ShardingError(f"the mesh has an axis of {Partition(mesh, rules).size(EXPERTS)} for experts, and the model has none; leave ep out")
    num_shards = Partition(mesh, rules).size(HEADS)
    if config.num_heads % num_shards:
        log.warning("attention is replicated: its %d heads cannot be cut into %d equal shards; a mesh whose tp divides %d shards it",
                    config.num_heads, num_shards, config.num_heads)
        rules, num_shards = rules.without(HEADS, KV_HEADS), 1
    partition = Partition(mesh, rules)
    fitted = dataclasses.replace(config, partition=partition, kv_repeat=kv_repeat(config.num_heads, config.num_kv_heads, num_shards),
                                 padded_vocab_size=-(-config.vocab_size // partition.size(VOCAB)) * partition.size(VOCAB))
    param_shardings(fitted)
    return fitted


def kv_repeat(num_heads: int, num_kv_heads: int, num_shards: int) -> int:
    """How often to store each KV head so that ``num_shards`` (a divisor of ``num_heads``) shards own the heads their queries read."""
    group = num_heads // num_kv_heads
    return next(repeat for repeat in range(1, group + 1) if num_kv_heads * repeat % num_shards == 0)


def largest_tensor_axis(config: ModelConfig, num_devices: int) -> int:
    """The most devices, up to ``num_devices``, over which heads and MLP of ``config`` can be cut evenly."""
    sizes = (config.num_heads, config.intermediate_size, config.expert_size, config.shared_expert_size)
    return next(tp for tp in range(num_devices, 0, -1) if all(size % tp == 0 for size in sizes))
