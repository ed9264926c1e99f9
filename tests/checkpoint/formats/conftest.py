"""Fixtures of the format tests: files, and the float32 matrices that come out of them."""
import json
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from safetensors.numpy import save_file

from tpllm.checkpoint.formats import find_format
from tpllm.checkpoint.index import read_index
from tpllm.checkpoint.read import TensorReader
from tpllm.checkpoint.stored import StoredMatrix
from tpllm.weights.scheme import dequantize


def read_matrix(matrix: StoredMatrix, *, step: int = 7) -> np.ndarray:
    """float32 [N, K] with input k in column k; rows are read some at a time."""
    N, K = matrix.shape
    with TensorReader(1) as reader:
        read_rows = matrix.open(reader)
        parts = [read_rows(first, min(first + step, N)) for first in range(0, N, step)]
    if matrix.scheme is None:
        assert all(isinstance(part, np.ndarray) and part.dtype == np.float32 for part in parts)
        return np.concatenate(parts)
    for part in parts:
        assert part.codes.dtype == matrix.scheme.code_dtype
        assert part.scales.dtype == matrix.scheme.scale_dtype
        assert part.scales.shape == (len(part.codes), matrix.scheme.num_groups(K))
        assert (None if part.mins is None else part.mins.dtype) == matrix.scheme.min_dtype
    rows = np.concatenate([dequantize(part, matrix.scheme) for part in parts])
    if matrix.order is not None:
        assert matrix.order.dtype == np.int32
        rows[:, matrix.order] = rows.copy()
    return rows


@pytest.fixture
def read() -> Callable[..., np.ndarray]:
    """``read(matrix, step=7)`` is the float32 matrix."""
    return read_matrix


@pytest.fixture
def find_in() -> Callable:
    """``find_in(folder)`` is (its format, its tensors)."""
    def find(folder):
        tensors, _ = read_index(folder)
        return find_format(json.loads((folder / "config.json").read_text()), tensors), tensors
    return find


@pytest.fixture
def write_module(tmp_path) -> Callable:
    """``write_module(parts, config, module="m", plain={})`` writes a file of one module, and is its format."""
    def write(parts: Mapping[str, np.ndarray], config, *, module: str = "m", plain: Mapping[str, np.ndarray] | None = None):
        tensors = {f"{module}.{part}": np.ascontiguousarray(value) for part, value in parts.items()} | dict(plain or {})
        save_file(tensors, tmp_path / "model.safetensors")
        tensors, _ = read_index(tmp_path)
        return find_format({"quantization_config": config} if config is not None else {}, tensors)
    return write
