"""tpllm: language-model inference on JAX/XLA, sharded over any mesh.

The facade is imported on first use, so that ``import tpllm`` costs nothing. Only the versions of Python and jax are
looked at, before anything that another one could break.
"""
from tpllm import versions

versions.check()

__version__ = "0.1.0"

_WHERE = {
    "LLM": "tpllm.llm", "AsyncLLM": "tpllm.async_llm", "SamplingParams": "tpllm.engine.sampling_params", "RequestOutput": "tpllm.engine.outputs",
    "CompletionOutput": "tpllm.engine.outputs", "load_model": "tpllm.loading", "init_cache": "tpllm.model.kv_cache",
    "forward": "tpllm.model.decoder",
    "TextPrompt": "tpllm.inputs", "TokensPrompt": "tpllm.inputs", "RequestOutputKind": "tpllm.engine.sampling_params",
}
__all__ = ["LLM", "AsyncLLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__", "forward", "init_cache", "load_model"]

TYPE_CHECKING = False  # typing and importlib take longer than all else here, and the command line has to begin at once
if TYPE_CHECKING:
    from tpllm.async_llm import AsyncLLM
    from tpllm.engine.outputs import CompletionOutput, RequestOutput
    from tpllm.engine.sampling_params import SamplingParams
    from tpllm.llm import LLM
    from tpllm.loading import load_model
    from tpllm.model.decoder import forward
    from tpllm.model.kv_cache import init_cache


def __getattr__(name: str):
    import importlib
    if name not in _WHERE:
        from tpllm.names import missing
        from tpllm.names.vllm import TYPES
        raise AttributeError(missing(name, of="module 'tpllm'", known=_WHERE, table=TYPES))
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
