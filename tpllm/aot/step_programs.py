"""The engine's own programs, lowered for a mesh whose devices need not exist: every argument is a shape, a dtype and a sharding."""
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sharding_rules.axes import BATCH
from tpllm import ops
from tpllm.engine.batch import pack_chunk
from tpllm.engine.executor import MAX_STEPS, empty_slots
from tpllm.engine.plan import StepPlan
from tpllm.engine.programs import jit_programs
from tpllm.engine.sampling_params import MAX_STOP_TOKEN_IDS
from tpllm.engine.shapes import EngineShapes
from tpllm.engine.slots import TARGET, Cache, SlotState
from tpllm.model.config import ALL_LAYERS, ModelConfig
from tpllm.model.kv_cache import KVCache, init_cache
from tpllm.model.params import DecoderParams
from tpllm.model.per_row import shardings_of

_PLATFORMS = {"gpu": "cuda"}  # a device's platform -> the lowering's, where they differ


def lower_decode(config: ModelConfig, shapes: EngineShapes, *, params: DecoderParams, cache_dtype: Any, num_eos_ids: int = 1) -> jax.stages.Lowered:
    """The decode program at all of ``shapes``' slots, as the engine runs it.

    Args:
        config: the model, fitted to a mesh.
        shapes: the engine's sizes.
        params: shapes, dtypes and shardings of the parameters, from ``abstract_params``.
        cache_dtype: of keys and values.
        num_eos_ids: how many end-of-sequence ids the model has.
    """
    cache, state = _abstract_rows(config, shapes, cache_dtype, num_eos_ids)
    decode = jit_programs(config, cache, state, max_steps=MAX_STEPS).decode
    with jax.set_mesh(config.partition.mesh):
        return decode.trace({TARGET: params}, cache, state, *_busy_slots(shapes), num_rows=shapes.max_num_seqs).lower(
            lowering_platforms=_lowering_platforms(config.partition.mesh))


def lower_prefill(config: ModelConfig, shapes: EngineShapes, *, params: DecoderParams, cache_dtype: Any, num_eos_ids: int = 1,
                  has_prompt_logprobs: bool = False) -> jax.stages.Lowered:
    """The program of a whole prefill chunk, as the engine runs it.

    Args:
        config, shapes, params, cache_dtype, num_eos_ids: see :func:`lower_decode`.
        has_prompt_logprobs: whether the prompt's tokens are scored too.
    """
    cache, state = _abstract_rows(config, shapes, cache_dtype, num_eos_ids)
    step = jit_programs(config, cache, state, max_steps=MAX_STEPS).step
    chunk = pack_chunk(StepPlan(pieces=(), owners=(), bucket=shapes.prefill_chunk), num_slots=shapes.max_num_seqs,
                       num_groups=config.partition.size(BATCH), is_ragged=shapes.has_invariant_kernels)
    with jax.set_mesh(config.partition.mesh):
        return step.trace({TARGET: params}, cache, state, chunk, *_busy_slots(shapes), scores_prompt=has_prompt_logprobs).lower(
            lowering_platforms=_lowering_platforms(config.partition.mesh))


def abstract_cache(config: ModelConfig, shapes: EngineShapes, dtype: Any) -> KVCache:
    """Shapes, dtype and shardings of a cache with pages for rows of full length, without its memory."""
    cache = jax.eval_shape(lambda: init_cache(config, shapes.max_num_seqs * shapes.pages_per_row, shapes.page_size, dtype))
    return jax.tree.map(lambda leaf: _placed(leaf, config.partition.sharding(ops.CACHE_AXES[:leaf.ndim], shape=leaf.shape, name="kv_cache")), cache)


def abstract_slots(config: ModelConfig, shapes: EngineShapes, *, num_stop_ids: int) -> SlotState:
    """Shapes, dtypes and shardings of the slots' state."""
    state = jax.eval_shape(lambda: empty_slots(config, shapes, num_stop_ids=num_stop_ids))
    return jax.tree.map(_placed, state, shardings_of(SlotState, config.partition))


def _abstract_rows(config: ModelConfig, shapes: EngineShapes, cache_dtype: Any, num_eos_ids: int) -> tuple[Cache, SlotState]:
    return Cache({TARGET: abstract_cache(config, shapes, cache_dtype)}), abstract_slots(config, shapes, num_stop_ids=MAX_STOP_TOKEN_IDS + num_eos_ids)


def _busy_slots(shapes: EngineShapes) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Every slot may take a step, and has all its pages."""
    table = np.arange(shapes.max_num_seqs * shapes.pages_per_row, dtype=np.int32).reshape(shapes.max_num_seqs, -1)
    return np.ones(shapes.max_num_seqs, np.int32), {ALL_LAYERS: table}


def _placed(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _lowering_platforms(mesh: Mesh) -> tuple[str]:
    platform = mesh.devices.flat[0].platform
    return (_PLATFORMS.get(platform, platform),)
