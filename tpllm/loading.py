"""From the name of a model to its configuration, parameters and tokenizer on a mesh."""
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sharding_rules import DATA_TENSOR, Partition, Rules, make_mesh, parse_mesh
from tpllm.checkpoint import Checkpoint, check_memory, load_params, needed_bytes, open_checkpoint, refuse_quantized
from tpllm.environment import enable_compile_cache
from tpllm.errors import ConfigError
from tpllm.model.config import ModelConfig
from tpllm.model.params import DecoderParams
from tpllm.model.partition import fit_to_mesh, largest_tensor_axis
from tpllm.ops import uses_native
from tpllm.quant.schemes import Scheme, find_scheme
from tpllm.quant.storage import Storage
from tpllm.tokenizer import Tokenizer

log = logging.getLogger("tpllm")

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model whose files are open and whose place on the mesh is known, but whose weights are not loaded.

    Attributes:
        checkpoint: its files.
        config: fitted to the mesh.
        tokenizer: its tokenizer.
        dtype: of activations, and of weights that are not quantized.
        scheme: how matrices are quantized while they are loaded, or None.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    tokenizer: Tokenizer
    dtype: np.dtype
    scheme: Scheme | None = None

    def storage(self, *, is_packed: bool) -> Storage:
        """How the matrices will be kept."""
        return Storage(self.dtype, self.scheme, is_packed=is_packed)


def load_model(model: str, mesh: str | Mapping[str, int] | Mesh = "auto", *, rules: Rules | None = None, dtype: str = "auto",
               quantization: str | None = None, packed: bool = False, revision: str | None = None) -> tuple[ModelConfig, DecoderParams, Tokenizer]:
    """Load a model for use with ``init_cache`` and ``forward``.

    Args:
        model: a folder in Hugging Face layout, a hub id, or ``"demo"``.
        mesh: ``"auto"``, ``"tp=4"``, ``{"dp": 2, "tp": 4}`` or a ``jax.sharding.Mesh``.
        rules: how logical axes map to mesh axes; by default tensor parallel over ``tp``, rows over ``dp``.
        dtype: of weights and activations: ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        quantization: as for :class:`tpllm.LLM`.
        packed: whether matrices are packed for the native kernels of a CPU, as ``LLM`` has them there; without it they are plain arrays, or
            :class:`~tpllm.quant.quantized_tensor.QuantizedTensor`, which XLA computes with. It makes no difference on other devices.
        revision: of a hub id.

    Returns:
        (config, params, tokenizer); ``config`` is fitted to the mesh.

    Raises:
        TpllmError: a model that cannot be opened, does not fit the memory or the mesh.
    """
    opened = open_model(model, mesh, rules=rules, dtype=dtype, quantization=quantization, packed=packed, revision=revision)
    return opened.config, load_weights(opened, packed=packed), opened.tokenizer


def open_model(model: str, mesh: str | Mapping[str, int] | Mesh = "auto", *, rules: Rules | None = None, dtype: str = "auto",
               quantization: str | None = None, packed: bool = True, revision: str | None = None) -> OpenedModel:
    """As :func:`load_model`, up to the weights."""
    enable_compile_cache()
    scheme = find_scheme(quantization)
    checkpoint = open_checkpoint(model, revision=revision)
    refuse_quantized(checkpoint)
    config = fit_to_mesh(checkpoint.config, choose_mesh(mesh, checkpoint.config), DATA_TENSOR if rules is None else rules)
    return OpenedModel(checkpoint, config, Tokenizer.from_folder(checkpoint.folder),
                       choose_dtype(dtype, checkpoint.hf_config, config.partition, packed=packed), scheme)


def load_weights(opened: OpenedModel, *, cache_bytes_per_device: int = 0, packed: bool = True) -> DecoderParams:
    """The parameters of an opened model, once they and a KV cache of that size are known to fit; ``packed`` as for :func:`load_model`.

    Raises:
        MemoryNeedError: they do not.
    """
    storage = opened.storage(is_packed=packed and uses_native(opened.config.partition))
    needed, staging = needed_bytes(opened.config, dtype=opened.dtype, cache_bytes_per_device=cache_bytes_per_device, storage=storage)
    check_memory(needed, staging_bytes=staging)
    return load_params(opened.checkpoint, opened.config, dtype=opened.dtype, storage=storage)


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


def choose_dtype(dtype: str, hf_config: Mapping[str, Any], partition: Partition, *, packed: bool = True) -> np.dtype:
    """The dtype of weights and activations. ``"auto"`` is the checkpoint's own, and float32 on a CPU where the weights are not packed for native
    kernels: XLA reads 16-bit ones there at a twentieth of the memory's speed."""
    if dtype == "auto":
        stored = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "bfloat16")
        dtype = "float32" if partition.platform == "cpu" and not (packed and uses_native(partition)) else stored
    return _known_dtype("dtype", dtype)


def choose_cache_dtype(kv_cache_dtype: str, weight_dtype: np.dtype) -> np.dtype:
    """The dtype of keys and values; ``"auto"`` is that of the weights."""
    return weight_dtype if kv_cache_dtype == "auto" else _known_dtype("kv_cache_dtype", kv_cache_dtype)


def _known_dtype(name: str, dtype: str) -> np.dtype:
    if dtype not in DTYPES:
        raise ConfigError(f"{name} is {dtype!r}; it must be one of auto, {', '.join(DTYPES)}")
    return np.dtype(dtype)
