"""Loads a model by its name: configuration, parameters and tokenizer on a mesh. Saves it as a store that loads again."""
import collections
import dataclasses
import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from sharding_rules import DATA_TENSOR, Partition, Rules, make_mesh, parse_mesh
from tpllm.checkpoint.entries import ParamEntry, find_entries
from tpllm.checkpoint.folder import Checkpoint
from tpllm.checkpoint.load import load_params, stored_schemes
from tpllm.checkpoint.memory import check_memory, needed_bytes
from tpllm.checkpoint.new_folder import new_folder
from tpllm.checkpoint.safetensors import TensorEntry
from tpllm.checkpoint.save import copied_files, unquantized_config
from tpllm.checkpoint.store import write_store
from tpllm.environment.compile_cache import enable_compile_cache
from tpllm.errors import ConfigError, log, short
from tpllm.model.config import ModelConfig
from tpllm.model.params import DecoderParams
from tpllm.model.partition import fit_to_mesh, largest_tensor_axis
from tpllm.model_files import AS_THEY_ARE, ModelFiles
from tpllm.ops import uses_native
from tpllm.tokenizer import Tokenizer
from tpllm.tokenizer.generation_defaults import GenerationDefaults
from tpllm.weights.policy import AS_STORED, Policy, Quantization, parse_policy
from tpllm.weights.storage import Storage

DTYPES = ("float32", "bfloat16", "float16")
ALIASES = {"float": "float32", "half": "float16", "double": "float64"}
"""The names that torch has for dtypes."""
COMPUTED_IN = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The dtype to compute in, for each dtype of a tensor."""
FORMATS = ("awq", "awq_marlin", "gptq", "gptq_marlin", "bitsandbytes", "compressed-tensors", "auto-round", "gguf", "mxfp4")
"""Of quantized checkpoints, as vLLM calls them: they are found without being named."""
SMALL_CACHES = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn), "fp8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn)}


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model whose files are open and whose place on the mesh is known, but whose weights are not loaded.

    Attributes:
        checkpoint: its files.
        config: fitted to the mesh.
        tokenizer: its tokenizer; None where it was not to be read.
        generation: what its files say of generating, with a tokenizer and without one.
        dtype: of activations, and of weights that are not quantized.
        policy: how matrices are quantized while they are loaded.
        files: what was asked for.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    tokenizer: Tokenizer | None
    generation: GenerationDefaults
    dtype: np.dtype
    policy: Policy = AS_STORED
    files: ModelFiles = AS_THEY_ARE

    def fingerprint(self) -> dict[str, Any]:
        """What tells it from any other model, as JSON; see :meth:`.Checkpoint.fingerprint`."""
        return {**self.checkpoint.fingerprint(), **self.files.fingerprint()}

    @functools.cached_property
    def entries(self) -> dict[str, ParamEntry]:
        """Where each parameter lies in the checkpoint."""
        return find_entries(self.checkpoint, self.config)

    def storage(self, *, packed: bool) -> Storage:
        """How the matrices will be kept."""
        storage = Storage.on(self.config.partition, self.dtype, self.policy, stored=stored_schemes(self.entries, self.config))
        return storage if packed else dataclasses.replace(storage, device=None)


def load_model(model: str, mesh: str | Mapping[str, int] | Mesh = "auto", *, rules: Rules | None = None, dtype: str = "auto",
               quantization: Quantization = None, packed: bool = False, revision: str | None = None) -> tuple[ModelConfig, DecoderParams, Tokenizer]:
    """Load a model for use with ``init_cache`` and ``forward``.

    Args:
        model: a folder in Hugging Face layout, a GGUF file, a hub id, or a name such as ``"demo"``.
        mesh: ``"auto"``, ``"tp=4"``, ``{"dp": 2, "tp": 4}`` or a ``jax.sharding.Mesh``.
        rules: how logical axes map to mesh axes; by default tensor parallel over ``tp``, rows over ``dp``.
        dtype: of weights and activations: ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        quantization: as for :class:`tpllm.LLM`.
        packed: whether matrices are packed for kernels, as ``LLM`` has them: on a CPU all, for the native ones, on an accelerator those that are
            quantized; without it they are plain arrays, or :class:`~tpllm.weights.xla.XlaWeight`, which XLA computes with.
        revision: of a hub id.

    Returns:
        (config, params, tokenizer); ``config`` is fitted to the mesh.

    Raises:
        TpllmError: a model that cannot be opened, does not fit the memory or the mesh.
    """
    opened = open_model(model, mesh, rules=rules, dtype=dtype, quantization=quantization, packed=packed, files=ModelFiles(revision=revision))
    return opened.config, load_weights(opened, packed=packed), opened.tokenizer


def open_model(model: str, mesh: str | Mapping[str, int] | Mesh = "auto", *, rules: Rules | None = None, dtype: str = "auto",
               quantization: Quantization = None, packed: bool = True, files: ModelFiles = AS_THEY_ARE) -> OpenedModel:
    """As :func:`load_model`, up to the weights; its tokenizer's files need not be there where they are skipped."""
    enable_compile_cache()
    is_format = quantization in FORMATS if isinstance(quantization, str) else False
    policy = AS_STORED if is_format else parse_policy(quantization)
    checkpoint, tokenizer, generation = files.open(model)
    if is_format and checkpoint.weights is None:
        raise ConfigError(f"quantization is {quantization!r}, the name of a checkpoint's format, but {model!r} holds plain weights; leave it out, or "
                          "use one that quantizes while loading, such as 'int8' or 'int4'")
    config = fit_to_mesh(checkpoint.config, choose_mesh(mesh, checkpoint.config), DATA_TENSOR if rules is None else rules)
    chosen = choose_dtype(dtype, checkpoint.hf_config, config.partition, packed=packed, tensors=checkpoint.tensors)
    return OpenedModel(checkpoint, config, tokenizer, generation, chosen, policy, files)


def load_weights(opened: OpenedModel, *, cache_bytes_per_device: int = 0, packed: bool = True) -> DecoderParams:
    """The parameters of an opened model, once they and a KV cache of that size are known to fit; ``packed`` as for :func:`load_model`.

    Raises:
        MemoryNeedError: they do not.
    """
    storage = opened.storage(packed=packed)
    needed, staging = needed_bytes(opened.config, dtype=opened.dtype, cache_bytes_per_device=cache_bytes_per_device, storage=storage)
    check_memory(needed, staging_bytes=staging)
    return load_params(opened.checkpoint, opened.config, dtype=opened.dtype, storage=storage, entries=opened.entries)


def choose_mesh(mesh: str | Mapping[str, int] | Mesh, config: ModelConfig) -> Mesh:
    """The mesh a user asked for; ``"auto"`` is as many local devices on ``tp`` as cut heads and MLP evenly."""
    if isinstance(mesh, Mesh):
        return mesh
    if mesh != "auto":
        return make_mesh(parse_mesh(mesh))
    num_devices = len(jax.local_devices())
    tp = largest_tensor_axis(config, num_devices)
    if tp < num_devices:
        log.warning("mesh auto: %d of %d devices, the most that cut %d heads and an MLP of %d evenly", tp, num_devices, config.num_heads,
                    config.intermediate_size)
    return make_mesh({"tp": tp})


def choose_dtype(dtype: str, hf_config: Mapping[str, Any], partition: Partition, *, packed: bool = True,
                 tensors: Mapping[str, TensorEntry] = MappingProxyType({})) -> np.dtype:
    """The dtype of weights and activations. ``"auto"`` is the checkpoint's own (:func:`stored_dtype`), and float32 on a CPU where the weights are not
    packed for native kernels: XLA reads 16-bit ones there at a twentieth of the memory's speed."""
    if dtype == "auto":
        dtype = "float32" if partition.platform == "cpu" and not (packed and uses_native(partition)) else stored_dtype(hf_config, tensors)
    return _known_dtype("dtype", dtype)


def stored_dtype(hf_config: Mapping[str, Any], tensors: Mapping[str, TensorEntry] = MappingProxyType({})) -> str:
    """A dtype to compute in: the one that config.json gives the weights; else, and where that is none to compute in, the one that most values of
    the weights have, float32 for float64. It is bfloat16 where neither says one."""
    named = hf_config.get("dtype") or hf_config.get("torch_dtype")
    name = ALIASES.get(named.removeprefix("torch."), named.removeprefix("torch.")) if isinstance(named, str) else None
    if name in DTYPES:
        return name
    sizes = collections.Counter()
    for entry in tensors.values():
        if entry.dtype in COMPUTED_IN:
            sizes[COMPUTED_IN[entry.dtype]] += entry.num_bytes
    found = "float32" if name == "float64" else sizes.most_common(1)[0][0] if sizes else "bfloat16"
    if named:
        log.warning("config.json: dtype is %s, which is not computed in; the model is computed in %s (dtype=... takes another of %s)", short(named),
                    found, ", ".join(DTYPES))
    return found


def choose_cache_dtype(kv_cache_dtype: str, weight_dtype: np.dtype) -> np.dtype:
    """The dtype of keys and values; ``"auto"`` is that of the weights, ``"fp8"`` float8_e4m3fn."""
    if kv_cache_dtype in SMALL_CACHES:
        return SMALL_CACHES[kv_cache_dtype]
    return weight_dtype if kv_cache_dtype == "auto" else _known_dtype("kv_cache_dtype", kv_cache_dtype, (*DTYPES, *SMALL_CACHES))


def _known_dtype(name: str, dtype: Any, known: Sequence[str] = DTYPES) -> np.dtype:
    """Of a name, torch's included, or of a dtype of torch, numpy or JAX."""
    text = getattr(dtype, "__name__", None) or str(dtype).removeprefix("torch.")
    if ALIASES.get(text, text) not in known:
        raise ConfigError(f"{name} is {dtype!r}; it must be one of auto, {', '.join(known)}")
    return np.dtype(ALIASES.get(text, text))


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
    opened = open_model(model, mesh, dtype="float32" if dtype == "auto" else dtype, quantization=quantization, packed=False,
                        files=ModelFiles(revision=revision))
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
