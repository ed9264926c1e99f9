"""The tensors of one module of a checkpoint, checked as they are asked for."""
import dataclasses
import math
from collections.abc import Mapping

from tpllm.checkpoint.safetensors import TensorEntry
from tpllm.errors import CheckpointError

FLOATS = ("F16", "BF16", "F32")
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Module:
    """A module's tensors.

    Attributes:
        name: such as ``model.layers.0.mlp.up_proj``.
        parts: what follows the name and a dot -> tensor.
    """

    name: str
    parts: Mapping[str, TensorEntry]

    def need(self, part: str, dtypes: tuple[str, ...], *shapes: Shape) -> TensorEntry:
        """A tensor of one of some dtypes and of one of some shapes.

        Raises:
            CheckpointError: it is missing, or is neither; the message has both.
        """
        entry, wanted = self.parts.get(part), f"{' or '.join(dtypes)} of shape {' or '.join(map(str, shapes))}"
        if entry is None:
            path = next(iter(self.parts.values())).path
            raise CheckpointError(f"{path.parent}: tensor {self.name}.{part} ({wanted}) is missing, while {self.name}.{min(self.parts)} is there; "
                                  "download or convert the checkpoint again")
        if entry.dtype not in dtypes or entry.shape not in shapes:
            raise CheckpointError(f"{entry.path}: tensor {entry.name!r} is {entry.dtype} of shape {entry.shape}; it must be {wanted}, by "
                                  "config.json's sizes and quantization_config: correct that, or take the checkpoint as it was published")
        return entry

    def has_any(self, *parts: str) -> bool:
        """Whether at least one of some tensors is there."""
        return any(part in self.parts for part in parts)

    def bits_per_weight(self, shape: Shape) -> float:
        """What all tensors but the bias take for a matrix of some shape."""
        return 8 * sum(entry.num_bytes for part, entry in self.parts.items() if part != "bias") / max(1, math.prod(shape))

    def names(self) -> tuple[str, ...]:
        """Of all tensors but the bias."""
        return tuple(entry.name for part, entry in self.parts.items() if part != "bias")


def group_by_module(tensors: Mapping[str, TensorEntry]) -> dict[str, Module]:
    """Every module that has tensors, by its name."""
    parts: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in tensors.items():
        module, _, part = name.rpartition(".")
        parts.setdefault(module, {})[part] = entry
    return {name: Module(name, entries) for name, entries in parts.items()}
