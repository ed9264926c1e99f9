"""What a model family is to the loader: how its config.json reads, and what its weights are called."""
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sharding_rules import ONE_DEVICE
from tpllm.model.config import ModelConfig
from tpllm.model.params import named_leaves, param_specs
from tpllm.model.stacks import Stack


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where the rows of all experts' matrices lie in one tensor [E, inputs, columns]: each is a column, for the tensor multiplies from the right.
    Biases lie in one [E, columns].

    Attributes:
        first: the column of an expert's first row.
        every: columns from one row to the next.
    """

    first: int = 0
    every: int = 1


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of checkpoints that share architecture names and weight names.

    Attributes:
        name: as in docs and errors.
        architectures: the ``architectures`` values of config.json that it covers.
        read_config: config.json, as a dict that has every key of ``defaults``, to a :class:`.ModelConfig`.
        weight_names: our parameter name -> the checkpoint's, ``{i}`` standing for the layer. With ``{e}``, for the expert, a parameter is made of as
            many tensors; without, one tensor [experts, rows, columns] holds all. Parameters of one name there are the rows of one fused tensor, in
            this order.
        model_type: the ``model_type`` of its config.json.
        defaults: what each key that is read means where config.json leaves it out: what transformers' config class says.
        aliases: other names of keys, which win where both are there.
        columns: of parameters whose rows are columns of a tensor of all experts, by our name. Several may have one tensor.
    """

    name: str
    architectures: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    weight_names: Mapping[str, str]
    model_type: str = dataclasses.field(kw_only=True)
    defaults: Mapping[str, Any] = dataclasses.field(kw_only=True)
    aliases: Mapping[str, str] = dataclasses.field(kw_only=True, default_factory=dict)
    columns: Mapping[str, Columns] = dataclasses.field(kw_only=True, default_factory=dict)

    def config_from_hf(self, hf: Mapping[str, Any]) -> ModelConfig:
        """The model that a config.json describes.

        Raises:
            ConfigError: a field that is impossible, or asks for what is not supported; it names the field.
        """
        renamed = {ours: hf[theirs] for theirs, ours in self.aliases.items() if theirs in hf}
        return self.read_config({**self.defaults, **hf, **renamed})

    def renamed(self, weight_names: Mapping[str, str]) -> "Family":
        """The family of checkpoints that have a tensor of [out, in] for each parameter."""
        return dataclasses.replace(self, weight_names=weight_names, columns={})

    def columns_of(self, parameter: str) -> Columns | None:
        """See ``columns``; None where rows are rows."""
        return self.columns.get(_pattern(parameter))

    def checkpoint_name(self, parameter: str, expert: int = 0) -> str:
        """The checkpoint's name of a parameter such as ``layers.3.attn.q``, or of an expert's part of it."""
        parts = parameter.split(".")
        return self.weight_names[_pattern(parameter)].format(i=parts[1] if parts[0] == "layers" else "", e=expert)

    def checkpoint_names(self, parameter: str, stack: Stack | None) -> tuple[str, ...]:
        """The names of all tensors that a parameter is made of: one, or as many as matrices are stacked in it."""
        has_each = stack is not None and "{e}" in self.weight_names[_pattern(parameter)]
        return tuple(self.checkpoint_name(parameter, expert) for expert in range(stack.num if has_each else 1))

    def row_range(self, parameter: str, config: ModelConfig) -> tuple[int, int, int] | None:
        """(first row, one past the last, rows of the whole tensor) of a parameter in a fused tensor, without repeated KV heads; None where it has a
        tensor of its own."""
        pattern = _pattern(parameter)
        parts = [name for name, stored in self.weight_names.items() if stored == self.weight_names[pattern]]
        if len(parts) == 1 or pattern in self.columns:
            return None
        one_layer = dataclasses.replace(config, num_layers=1, kv_repeat=1, partition=ONE_DEVICE)
        num_rows = {_pattern(name): spec.shape[0] for name, spec in named_leaves(param_specs(one_layer))}
        parts = [name for name in parts if name in num_rows]  # a model without a norm may give its name to another
        if len(parts) == 1:
            return None
        first = sum(num_rows[name] for name in parts[:parts.index(pattern)])
        return first, first + num_rows[pattern], sum(num_rows[name] for name in parts)


def _pattern(parameter: str) -> str:
    parts = parameter.split(".")
    if parts[0] == "layers":
        parts[1] = "{i}"
    return ".".join(parts)
