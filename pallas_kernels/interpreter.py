"""Pallas kernels run on a CPU, for tests."""
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu


def gpu_interpreter(interpret: bool) -> Any:
    """What ``plgpu.kernel`` takes for ``interpret``: an interpreter that starts with memory full of NaNs, or None."""
    if not interpret:
        return None
    params = getattr(plgpu, "InterpretParams", None) or getattr(plgpu, "InterpretGPUParams", None)
    if params is None:  # jax 0.10
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as params  # noqa: N813
    return params()
