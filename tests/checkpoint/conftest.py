"""Fixtures of the checkpoint tests."""
import pathlib
from collections.abc import Callable

import numpy as np
import pytest

from tests.support.checkpoint_files import HF_CONFIG, tensors_of, write_folder


@pytest.fixture
def make_checkpoint(tmp_path) -> Callable[..., tuple[pathlib.Path, dict[str, np.ndarray]]]:
    """``make(stored="F32", num_shards=1, **config changes)`` writes a folder; returns it and its tensors."""
    def make(stored: str = "F32", *, num_shards: int = 1, **changes):
        hf_config = {**HF_CONFIG, **changes}
        tensors = tensors_of(hf_config, stored)
        write_folder(tmp_path / "model", hf_config, tensors, num_shards=num_shards)
        return tmp_path / "model", tensors
    return make
