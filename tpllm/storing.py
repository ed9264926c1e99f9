"""Saving a loaded model to an orbax store."""
import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from tpllm.checkpoint.new_folder import new_folder
from tpllm.checkpoint.save import copied_files, unquantized_config
from tpllm.checkpoint.store import write_store
from tpllm.errors import ConfigError
from tpllm.loading import load_weights, open_model, stored_dtype
from tpllm.weights.policy import Quantization


def save_store(model: str, out: str | Path, *, quantization: Quantization = None, mesh: str | Mapping[str, int] | Mesh = "tp=1", dtype: str = "auto",
               revision: str | None = None) -> Path:
    """Load a model and save it as an orbax store, which ``LLM`` and ``load_model`` open on any mesh without quantizing again.

    Args:
        model: as ``LLM`` takes it, quantized checkpoints included; no GGUF file, since the store takes the tokenizer's files along.
        out: the new folder, which must not be there; it appears whole or not at all.
        quantization: as ``LLM`` takes it.
        mesh: to load on; each of its hosts writes its own part.
        dtype: of what is not quantized; ``"auto"`` is the checkpoint's own.
        revision: of a hub id.

    Returns:
        ``out``.

    Raises:
        TpllmError: a model that cannot be opened, a folder that is there, or a disk that is too small.
    """
    opened = open_model(model, mesh, dtype="float32" if dtype == "auto" else dtype, quantization=quantization, packed=False, revision=revision)
    checkpoint = opened.checkpoint
    if checkpoint.gguf is not None:
        raise ConfigError(f"{checkpoint.folder} is a GGUF file, whose tokenizer has no files to take along; store the checkpoint it was made of")
    if dtype == "auto":
        opened = dataclasses.replace(opened, dtype=jax.numpy.dtype(stored_dtype(checkpoint.hf_config, checkpoint.tensors)))
    params = load_weights(opened, packed=False)
    source = {**checkpoint.fingerprint(), "quantization": dict(quantization) if isinstance(quantization, Mapping) else quantization}
    config = unquantized_config(checkpoint) | {"dtype": str(opened.dtype)}
    out = Path(out)
    with new_folder(out.absolute(), num_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(params))) as folder:
        write_store(folder, params, opened.config, source=source)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for path in copied_files(checkpoint.folder):
            shutil.copy(path, folder / path.name)
    return out
