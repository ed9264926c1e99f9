"""Quantized matrices as a checkpoint holds them: what the loader knows of a format."""
import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np

from tpllm.checkpoint.read import TensorReader
from tpllm.weights.scheme import QuantizedRows, Scheme

RowReader = Callable[[int, int], QuantizedRows | np.ndarray]
"""Gives rows [first, last) of a matrix, quantized as its scheme says, or float32 [n, K] where it has none; several threads call it."""


@dataclasses.dataclass(frozen=True, eq=False)
class StoredMatrix:
    """One quantized matrix of a checkpoint; other parameters that are no tensor's rows as they are, vectors too, are read by it as well.

    Attributes:
        names: of the tensors it is made of, for the list of those that nothing reads.
        shape: (N, K), or (N,) of a vector.
        scheme: how rows are kept; None where no scheme holds what the file has, so that they come dequantized: float32 [n, K].
        bits_per_weight: what it takes in the file, scales included.
        order: int32 [K], the input that each column of the rows belongs to, where a file sorted them by group (GPTQ's activation order:
            Frantar et al. 2022, arXiv:2210.17323); None where column k is input k.
        open: reads what all rows need (small scales, or all of a matrix that the file holds transposed), which lives as long as the result. It raises
            ``CheckpointError`` where the file cannot be read, or holds values that cannot be.
        kind: what the file keeps it as, for ``tpllm inspect``: by default the scheme's name or ``"dequantized"``; or a dtype of floats.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    scheme: Scheme | None
    bits_per_weight: float
    order: np.ndarray | None
    open: Callable[[TensorReader], RowReader]
    kind: str = ""

    def __post_init__(self) -> None:
        if not self.kind:
            object.__setattr__(self, "kind", "dequantized" if self.scheme is None else self.scheme.name)


class CheckpointFormat(Protocol):
    """What a checkpoint's quantization_config, or its file type, says of its weights.

    Attributes:
        name: for messages and ``tpllm inspect``, such as ``"gptq"``.
    """

    name: str

    def find(self, weight: str, shape: tuple[int, ...]) -> StoredMatrix | None:
        """The matrix behind a weight.

        Args:
            weight: the name a plain checkpoint would give it, such as ``model.layers.0.mlp.up_proj.weight``.
            shape: of the whole tensor, as the configuration has it.

        Returns:
            None where it is not quantized (an ignored module, a norm, a bias): then the plain tensor of that name counts.

        Raises:
            CheckpointError: a part missing, of the wrong shape or dtype, or a variant that is not read; it names the tensor and the fix.
        """
