"""What is planned: a model, its numbers' formats, a topology, and the work."""
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sharding_rules import DATA_TENSOR, make_mesh, parse_mesh
from tpllm.bench.shapes import SHAPES, find_shape
from tpllm.checkpoint.entries import find_entries
from tpllm.checkpoint.folder import Checkpoint, config_without_weights, open_checkpoint
from tpllm.checkpoint.load import stored_schemes
from tpllm.engine.shapes import EngineShapes, choose_shapes
from tpllm.errors import ConfigError
from tpllm.loading import choose_cache_dtype, choose_dtype
from tpllm.model.config import ModelConfig
from tpllm.model.params import DecoderParams, abstract_params
from tpllm.model.partition import fit_to_mesh, largest_tensor_axis
from tpllm.plan.devices import find_devices
from tpllm.weights.policy import Quantization, parse_policy
from tpllm.weights.storage import Storage

DEFAULT_CONTEXT = 4096


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What a user asks for.

    Attributes:
        model: a shape's name, or what ``LLM`` takes; a folder needs no weights in it.
        topology: ``"h200:8"``, ``"v5e:4x4"``, ``"cpu:8"``.
        mesh: ``"tp=8"`` or a mapping; ``"auto"`` is as much ``tp`` as the model allows.
        dtype, quantization, kv_cache_dtype: as ``LLM`` takes them.
        num_seqs: rows at once.
        context_len: tokens of each, prompt and completion; None for 4096, or the model's where that is less.
        prompt_len: tokens of the prompt whose time to first token is estimated; None for a quarter of the context.
        prefill_chunk: as ``prefill_chunk_size`` of ``LLM``.
    """

    model: str
    topology: str
    mesh: str | Mapping[str, int] = "auto"
    dtype: str = "auto"
    quantization: Quantization = None
    kv_cache_dtype: str = "auto"
    num_seqs: int = 8
    context_len: int | None = None
    prompt_len: int | None = None
    prefill_chunk: int | None = None


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model on a mesh of devices that need not be there.

    Attributes:
        options: what was asked for.
        config: fitted to the mesh.
        devices: of the whole topology.
        shapes: of the engine.
        dtype, cache_dtype: of activations; of keys and values.
        storage: how matrices are kept.
    """

    options: PlanOptions
    config: ModelConfig
    devices: tuple[jax.Device, ...]
    shapes: EngineShapes
    dtype: np.dtype
    cache_dtype: np.dtype
    storage: Storage

    @functools.cached_property
    def params(self) -> DecoderParams:
        """Shapes, dtypes and shardings of the parameters."""
        return abstract_params(self.config, self.dtype, self.storage)

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt whose time to first token is estimated."""
        return self.options.prompt_len or max(1, self.shapes.max_model_len // 4)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model before it has a mesh."""

    config: ModelConfig
    hf_config: Mapping[str, Any]
    checkpoint: Checkpoint | None = None


def open_subject(model: str) -> Subject:
    """The configuration of a shape or a model; weights are not read, and need not be there.

    Raises:
        TpllmError: neither a shape nor a model.
    """
    if model in SHAPES:
        return Subject(find_shape(model), {})
    if (described := config_without_weights(model)) is not None:
        return Subject(described[1], described[0])
    checkpoint = open_checkpoint(model)
    return Subject(checkpoint.config, checkpoint.hf_config, checkpoint)


def prepare(options: PlanOptions, subject: Subject | None = None) -> Setup:
    """The setup of what a user asks for.

    Raises:
        TpllmError: a model, topology, mesh or number that cannot be.
    """
    subject = open_subject(options.model) if subject is None else subject
    devices = find_devices(options.topology)
    sizes = {"tp": largest_tensor_axis(subject.config, len(devices))} if options.mesh == "auto" else parse_mesh(options.mesh)
    config = fit_to_mesh(subject.config, make_mesh(sizes, devices), DATA_TENSOR)
    dtype = choose_dtype(options.dtype, subject.hf_config, config.partition, tensors={} if subject.checkpoint is None else subject.checkpoint.tensors)
    stored = {} if subject.checkpoint is None else stored_schemes(find_entries(subject.checkpoint, config), config)
    storage = Storage.on(config.partition, dtype, parse_policy(options.quantization), stored=stored)
    context = min(DEFAULT_CONTEXT, config.max_position) if options.context_len is None else options.context_len
    shapes = choose_shapes(config, max_model_len=context, max_num_seqs=options.num_seqs, prefill_chunk_size=options.prefill_chunk,
                           batch_invariant=True, has_invariant_kernels=storage.is_native)
    if options.prompt_len is not None and not 1 <= options.prompt_len < context:
        raise ConfigError(f"prompt_len is {options.prompt_len}; it must be at least 1 and below the context of {context}")
    return Setup(options, config, tuple(devices), shapes, dtype, choose_cache_dtype(options.kv_cache_dtype, dtype), storage)
