"""What a model family is to the loader: how its config.json reads, and what its weights are called."""
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from tpllm.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of checkpoints that share architecture names and weight names.

    Attributes:
        name: as in docs and errors.
        architectures: the ``architectures`` values of config.json that it covers.
        config_from_hf: config.json, as a dict, to a :class:`.ModelConfig`.
        weight_names: our parameter name -> the checkpoint's, ``{i}`` standing for the layer.
    """

    name: str
    architectures: tuple[str, ...]
    config_from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    weight_names: Mapping[str, str]

    def checkpoint_name(self, parameter: str) -> str:
        """The checkpoint's name of a parameter such as ``layers.3.attn.q``."""
        parts = parameter.split(".")
        if parts[0] != "layers":
            return self.weight_names[parameter]
        return self.weight_names[".".join(["layers", "{i}", *parts[2:]])].format(i=parts[1])
