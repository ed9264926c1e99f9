"""``LLM``: the facade that composes everything."""
import contextlib
import dataclasses
import gc
import secrets
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from sharding_rules import Rules, mesh_text
from tpllm.completing import Completing
from tpllm.engine.description import Description, describe, kernels_of
from tpllm.engine.engine import Engine
from tpllm.engine.metrics import Snapshot
from tpllm.engine.options import EngineOptions, build_engine
from tpllm.engine.runner import Runner
from tpllm.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from tpllm.engine.shapes import EngineShapes, least_cache_bytes
from tpllm.engine.slots import TARGET
from tpllm.environment.compile_cache import enable_compile_cache
from tpllm.environment.software import describe_environment
from tpllm.errors import ConfigError
from tpllm.loading import choose_cache_dtype, load_weights, open_model
from tpllm.metrics_reader import Metric, metrics_of
from tpllm.model.config import ModelConfig
from tpllm.model.params import DecoderParams
from tpllm.model_files import ModelFiles
from tpllm.names import Renamed, missing, takes, translated
from tpllm.names.vllm import ARGUMENTS, METHODS
from tpllm.ops import uses_native
from tpllm.tokenizer import Tokenizer
from tpllm.tokenizer.generation_defaults import GenerationDefaults
from tpllm.weights.linear import weight_of
from tpllm.weights.policy import Quantization


class LLM(Completing):
    """A model, its KV cache and an engine over them.

    The memory of both goes back with ``close()``, at the end of a ``with`` block, or with the last reference. ``llm = LLM(...)`` a second time
    makes the new one before the old one goes: where there is no room for both, close the old one first. Notebooks hold more references than
    they show: ``Out`` and ``_`` keep what a cell ends with, ``sys.last_traceback`` what an error passed through, and a half-read
    ``generate_iter`` or ``stream`` its LLM. ``close()`` frees the memory whoever holds the object.

    Threads may share one: each call's rows are computed beside those of the others, step by step.

    vLLM's names of the arguments work as well (``tensor_parallel_size``, ``block_size``). One that changes no result here is taken with a line in
    the log, and one of something that is not there is refused with what to use.

    Args:
        model: a folder in Hugging Face layout, a GGUF file, a hub id (``"owner/name"``, of GGUF files ``"owner/name:Q4_K_M"``, with ``hf.co/``
            before it or without), or ``"demo"``.
        mesh: ``"auto"`` (every local device on the tensor axis, as far as the heads allow), ``"tp=4"``, ``"dp=2,tp=4"``, a mapping, or a
            ``jax.sharding.Mesh``.
        rules: how logical axes map to mesh axes; by default tensor parallel over ``tp``, rows over ``dp``.
        dtype: ``"auto"`` (the checkpoint's own), ``"float32"``, ``"bfloat16"``, ``"float16"``, or such a dtype of torch, numpy or JAX: of
            activations, and of weights that are not quantized.
        quantization: how matrices are quantized while they are loaded: ``"int8"`` (one scale an output), ``"w8a8"`` (activations too),
            ``"llm.int8"`` (all but the 16 largest of a row), ``"fp8"``,
            ``"fp8-e5m2"``, ``"int4"`` (one scale for 32 inputs), ``"int4-g64"``, ``"int4-g128"``, ``"q4_k"``, ``"none"``, or one of them for each
            pattern of parameter names, as in ``{"*.mlp.*": "int4", "*": "none"}``. None keeps what the checkpoint holds, as does the name of the
            format that it is in.
        kv_cache_dtype: of keys and values: the same choices, of which ``"auto"`` follows ``dtype``, or ``"int8"`` or ``"fp8"`` (e4m3), with one
            float32 scale for each head and token.
        max_model_len: tokens a row can hold, prompt and completion together; None for the model's context, at most 4096.
        max_num_seqs: rows computed together; None for 8 on CPU and 32 elsewhere.
        prefill_chunk_size: most prompt tokens computed at once, a power of two; None for 512 (128 on a CPU without native kernels).
        page_size: tokens of a page of the KV cache: 16, 32, 64 or 128; None for 32.
        kv_cache_tokens: tokens that the KV cache has room for, of all rows together; None for as many as ``memory_share`` allows.
        memory_share: of the memory that the weights leave free on a device, how much the KV cache gets: above 0, at most 1. None for 0.9, and on a
            CPU for what ``max_num_seqs`` rows of ``max_model_len`` need, at most half of the free memory.
        gpu_memory_utilization: instead of ``memory_share``: of all the memory that JAX has on a device, how much this process may use, weights
            and KV cache together; on a CPU of the machine's.
        enable_prefix_caching: whether rows share the keys and values of what their prompts have in common.
        preemption: what becomes of a row whose pages are needed by those before it: ``"recompute"`` computes its keys and values again,
            ``"swap"`` keeps them on the host, ``"auto"`` recomputes where that gives the same bits.
        batch_invariant: give a row the same tokens whatever shares its batch. Native CPU kernels always do; elsewhere decode always computes
            ``max_num_seqs`` rows for it, and False computes only as many as are busy.
        max_logprobs: most log probabilities that a request may ask for of each token; -1 for the whole vocabulary.
        seed: chooses the randomness of requests that bring no seed; None draws it.
        revision: of a hub id.
        tokenizer: a folder, GGUF file or hub id whose tokenizer is taken instead of the model's; ``tokenizer_revision`` of a hub id.
        skip_tokenizer_init: do without the tokenizer, whose files need not be there: prompts are token ids only, and outputs have no text.
        chat_template: Jinja text, or the path of a file, instead of the model's.
        hf_overrides: values that replace those of config.json; of a dict within it each by its key.
        hf_token: for models that are not open to everybody; None for the one that the hub's client knows.
        download_dir: where models of the hub are kept; None for its client's cache.
        generation_config: where ``default_sampling`` comes from: ``"auto"`` is the model's generation_config.json, ``"vllm"`` nothing, else a folder.
        override_generation_config: values that go before it, such as ``{"temperature": 0.5, "max_new_tokens": 100}``.

    Raises:
        TpllmError: a model that cannot be opened, or does not fit the memory or the mesh.
        ValueError: a mesh that cannot be built.
    """

    _engine: Engine | None = None  # none before it is made, none once it is closed
    _description: Description | None = None
    _owns_params = False
    _quantization: Quantization = None

    @takes(ARGUMENTS, error=ConfigError)
    def __init__(self, model: str, *, mesh: str | Mapping[str, int] | Mesh = "auto", rules: Rules | None = None, dtype: str = "auto",
                 quantization: Quantization = None, kv_cache_dtype: str = "auto", max_model_len: int | None = None, max_num_seqs: int | None = None,
                 prefill_chunk_size: int | None = None, page_size: int | None = None, kv_cache_tokens: int | None = None,
                 memory_share: float | None = None, gpu_memory_utilization: float | None = None, enable_prefix_caching: bool | None = True,
                 preemption: str = "auto", batch_invariant: bool = True, max_logprobs: int = MAX_LOGPROBS, seed: int | None = 0,
                 revision: str | None = None, tokenizer: str | None = None, tokenizer_revision: str | None = None, skip_tokenizer_init: bool = False,
                 chat_template: str | None = None, hf_overrides: Mapping[str, Any] | None = None, hf_token: str | bool | None = None,
                 download_dir: str | None = None, generation_config: str = "auto", override_generation_config: Mapping[str, Any] | None = None):
        started = time.perf_counter()
        options = EngineOptions(max_model_len=max_model_len, max_num_seqs=max_num_seqs, prefill_chunk_size=prefill_chunk_size, page_size=page_size,
                                kv_cache_tokens=kv_cache_tokens, memory_share=memory_share, gpu_memory_utilization=gpu_memory_utilization,
                                enable_prefix_caching=enable_prefix_caching is not False, preemption=preemption, batch_invariant=batch_invariant,
                                max_logprobs=max_logprobs)
        files = ModelFiles(revision=revision, tokenizer=tokenizer, tokenizer_revision=tokenizer_revision, skip_tokenizer_init=skip_tokenizer_init,
                           chat_template=chat_template, hf_overrides=hf_overrides, hf_token=hf_token, download_dir=download_dir,
                           generation_config=generation_config, override_generation_config=override_generation_config)
        opened = open_model(model, mesh, rules=rules, dtype=dtype, quantization=quantization, files=files)
        shapes = options.shapes(opened.config, has_invariant_kernels=uses_native(opened.config.partition))
        cache_dtype = choose_cache_dtype(kv_cache_dtype, opened.dtype)
        self._model_fingerprint, self._quantization = opened.fingerprint(), quantization
        params = load_weights(opened, cache_bytes_per_device=least_cache_bytes(opened.config, shapes, cache_dtype, kv_cache_tokens=kv_cache_tokens))
        try:
            self._start(opened.config, params, opened.tokenizer, options=options, shapes=shapes, cache_dtype=cache_dtype, seed=seed,
                        model=str(model), family=opened.checkpoint.family.name, generation=opened.generation, started=started)
        except BaseException:  # a notebook keeps its traceback, and that keeps this frame
            for leaf in jax.tree.leaves(params):
                leaf.delete()
            gc.collect()
            raise
        self._owns_params = True

    @classmethod
    def from_params(cls, config: ModelConfig, params: DecoderParams, tokenizer: Tokenizer | None = None, *, kv_cache_dtype: str = "auto",
                    seed: int = 0, **engine: Any) -> "LLM":
        """An engine over parameters that are already on their mesh, such as ``load_model`` or ``init_params`` gives.

        Without a tokenizer prompts must be token ids, and outputs have no text. The parameters stay the caller's: ``close()`` lets go of them
        but does not delete them. ``engine`` takes the options from ``max_model_len`` to ``max_logprobs`` of the class.
        """
        if config.partition.mesh is None:
            raise ConfigError("from_params needs a config that is fitted to a mesh; use fit_to_mesh(config, mesh, rules)")
        known = {field.name: field.default for field in dataclasses.fields(EngineOptions)}
        options = EngineOptions(**translated(engine, known=known, table=ARGUMENTS, error=ConfigError))
        enable_compile_cache()
        llm = cls.__new__(cls)
        llm._model_fingerprint = {}
        llm._start(config, params, tokenizer, options=options, shapes=options.shapes(config, has_invariant_kernels=weight_of(params.embed).is_native),
                   cache_dtype=choose_cache_dtype(kv_cache_dtype, params.dtype), seed=seed)
        return llm

    def _start(self, config: ModelConfig, params: DecoderParams, tokenizer: Tokenizer | None, *, options: EngineOptions, shapes: EngineShapes,
               cache_dtype, seed: int, model: str | None = None, family: str | None = None, generation: GenerationDefaults | None = None,
               started: float | None = None) -> None:
        seed = secrets.randbits(63) if seed is None else seed
        self.config, self.shapes, self.seed, self._tokenizer = config, shapes, seed, tokenizer
        self._generation = generation or (tokenizer.generation if tokenizer else GenerationDefaults())
        engine = build_engine(config, params, tokenizer, options=options, shapes=shapes, cache_dtype=cache_dtype, seed=seed,
                              eos_ids=self._generation.eos_token_ids)
        self._description = describe(config, params, shapes=shapes, num_pages=engine.runner.num_pages, cache_dtype=cache_dtype, model=model,
                                     family=family, load_s=None if started is None else time.perf_counter() - started)
        self._engine = engine

    def warm_up(self, *, has_prompt_logprobs: bool = False) -> None:
        """Compile every program now; afterwards nothing compiles."""
        self.engine.warm_up(has_prompt_logprobs=has_prompt_logprobs)

    def metrics(self) -> Snapshot:
        """What the engine is doing and has done; ``metrics().to_prometheus()`` is the text that Prometheus scrapes."""
        engine, model = self.engine, self._description
        with contextlib.nullcontext() if engine.is_in_turn else engine.turn():  # what is called within a step may look, too
            return engine.metrics.snapshot(engine.scheduler, kernels=model.kernels, quantization=model.quantization, load_s=model.load_s)

    def get_metrics(self) -> list[Metric]:
        """The same under vLLM's names, such as ``vllm:generation_tokens``: a list of :mod:`tpllm.metrics_reader`'s."""
        return metrics_of(self.metrics())

    def reset_prefix_cache(self) -> None:
        """Forget the keys and values of earlier prompts; rows that run keep theirs."""
        self.engine.reset_prefix_cache()

    def close(self) -> None:
        """Give the memory of parameters and cache back at once; ``params`` taken from it before are deleted too. Closing twice is fine."""
        engine = self._engine
        if engine is not None:
            engine.close()
            _wait_for(engine.runner)
            if not self._owns_params:
                engine.runner.executor.params = {}  # the caller's: let go of, not deleted
            engine.runner.close()
            self._engine = None  # last: after an interrupt it can be closed again
            gc.collect()  # JAX gives buffers that it borrowed from numpy back only then

    def __del__(self):
        if sys is not None and not sys.is_finalizing():  # at exit modules are None, and the memory goes anyway
            if self._engine is not None:
                _wait_for(self._engine.runner)
            self.__dict__.clear()  # params that somebody else holds live on
            gc.collect()

    def __repr__(self) -> str:
        return super().__repr__() if self._description is None else self._description.to_text(is_open=self._engine is not None)

    def _repr_html_(self) -> str | None:
        return None if self._description is None else self._description.to_html(is_open=self._engine is not None)

    def __getattr__(self, name: str) -> Any:
        """What vLLM calls otherwise; what is not there is told what to use."""
        meaning = METHODS.get(name)
        if isinstance(meaning, Renamed):
            return getattr(self, meaning.ours)
        raise AttributeError(missing(name, of="LLM", known=[one for one in dir(type(self)) if not one.startswith("_")], table=METHODS))

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        if self._tokenizer is None:
            raise ConfigError("this LLM has no tokenizer; leave skip_tokenizer_init out, or pass one to from_params, or use token ids")
        return self._tokenizer

    @property
    def params(self) -> DecoderParams:
        """The parameters on the mesh."""
        return self.engine.runner.executor.params[TARGET]

    @property
    def default_sampling(self) -> dict[str, Any]:
        """The sampling parameters that the model's generation_config.json recommends, as far as :class:`SamplingParams` has them."""
        known = {field.name for field in dataclasses.fields(SamplingParams)}
        return {name: value for name, value in self._generation.sampling.items() if name in known}

    def fingerprint(self) -> dict[str, Any]:
        """Everything a result depends on besides the request: model, software, hardware, mesh and shapes. JSON-able."""
        runner, shapes = self.engine.runner, dataclasses.asdict(self.shapes)
        del shapes["max_logprobs"]  # it changes what is told of tokens, and no token
        device = self.config.partition.mesh.devices.flat[0]
        return {"model": self._model_fingerprint, "environment": describe_environment(device.platform, device.device_kind),
                "mesh": mesh_text(self.config.partition.mesh), "rules": dict(self.config.partition.rules.entries),
                "shapes": shapes, "dtype": str(self.params.dtype), "kv_cache_dtype": str(runner.cache_dtype),
                "quantization": self._quantization, "kernels": kernels_of(self.params)}

    @property
    def engine(self) -> Engine:
        """The engine, for those who queue requests and step it themselves; raises ``ConfigError`` once this is closed."""
        if self._engine is None:
            raise ConfigError("this LLM is closed; make a new one")
        return self._engine


def _wait_for(runner: Runner) -> None:
    """Wait for the programs in flight: one that still reads the parameters would give them back later, when nobody collects any more."""
    with contextlib.suppress(Exception):  # of a program whose result nobody wants
        runner.executor.wait()
