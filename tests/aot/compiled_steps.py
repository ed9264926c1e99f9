"""The two models and the accelerators they are compiled for; every program is compiled once."""
import dataclasses
import functools

import pytest

from sharding_rules import DATA_TENSOR
from tpllm.aot.report import ProgramFacts, compile_lowered
from tpllm.aot.step_programs import lower_decode, lower_prefill
from tpllm.aot.topologies import accelerator_mesh
from tpllm.bench.shapes import find_shape
from tpllm.engine.shapes import EngineShapes
from tpllm.model.config import ModelConfig
from tpllm.model.params import abstract_params
from tpllm.model.partition import fit_to_mesh

SHAPES = EngineShapes(max_num_seqs=16, max_model_len=4096, prefill_chunk=512)
DTYPE = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Case:
    """One program of one model for one accelerator."""

    model: str
    tp: int
    accelerator: str
    step: str

    @property
    def config(self) -> ModelConfig:
        """The model on the accelerator's mesh."""
        return fitted(self.model, self.tp, self.accelerator)

    @property
    def num_tokens(self) -> int:
        """Tokens of one call."""
        return SHAPES.max_num_seqs if self.step == "decode" else SHAPES.prefill_chunk

    @property
    def num_sampled_rows(self) -> int:
        return SHAPES.max_num_seqs


def parameters(*models: tuple[str, int, str]) -> list:
    """Both steps of some models, each of (name, tp, accelerator), as parameters of a test."""
    cases = [Case(*model, step) for model in models for step in ("decode", "prefill")]
    return [pytest.param(case, id=f"{case.model}-{case.accelerator}-{case.step}") for case in cases]


@functools.cache
def fitted(model: str, tp: int, accelerator: str) -> ModelConfig:
    """The model on the accelerator's mesh."""
    return fit_to_mesh(find_shape(model), accelerator_mesh(accelerator, {"tp": tp}), DATA_TENSOR)


@functools.cache
def compiled(case: Case) -> ProgramFacts:
    """What the accelerator's compiler makes of the engine's program."""
    lower = lower_decode if case.step == "decode" else lower_prefill
    return compile_lowered(lower(case.config, SHAPES, params=abstract_params(case.config, DTYPE), cache_dtype=DTYPE))
