"""Tasks of the worker that runs torch: sides of contests, and ceilings."""
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from benchmarks.gpu import prepared
from benchmarks.gpu.prepared import measure

WARM_UP_CALLS = 3
__all__ = ["SIDES", "copy_bandwidth", "drop", "matmul_seconds", "measure", "prepare", "versions"]


def versions() -> dict[str, Any]:
    """Of torch and of what it brings; JSON-able."""
    return {"torch": torch.__version__, "torch_cuda": torch.version.cuda, "torch_cudnn": torch.backends.cudnn.version()}


def device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait(_: Any) -> None:
    """Until the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def prepare(key: str, side: str, sizes: dict[str, Any], target_bytes: int) -> dict[str, Any]:
    """As the task of this name of the JAX worker; on a GPU the calls of a program are one CUDA graph."""
    began = time.perf_counter()
    inputs, call, notes = SIDES[side](**sizes)
    with torch.inference_mode():
        first = inputs()
        count = prepared.num_sets(tensor_bytes(first), target_bytes)
        sets = [first, *(inputs() for _ in range(count - 1))]
        out = call(*first)
        start, graph_note = _program(lambda: [call(*one) for one in sets])
        prepared.keep(key, prepared.Program(start, wait, num_calls=count))
    return {"num_bytes": tensor_bytes((*first, out)), "num_sets": count, "compile_s": time.perf_counter() - began, **graph_note, **notes}


def drop() -> None:
    """Let go of every program, and give its memory back."""
    prepared.drop()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tensor_bytes(tensors: Any) -> int:
    """Of some tensors."""
    return sum(one.numel() * one.element_size() for one in tensors)


def _program(run: Callable[[], Any]) -> tuple[Callable[[], Any], dict[str, Any]]:
    """(starts the calls, what is to be said of that)."""
    if not torch.cuda.is_available():
        return run, {}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = run()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return run, {"graph": f"none: {str(error).splitlines()[0]}"}

    def replay() -> Any:
        graph.replay()
        return kept
    return replay, {"graph": "CUDA graph"}


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    """Random numbers."""
    return (torch.randn(*shape, device=device()) * scale).to(dtype)


def sdpa(*, backend: str, B: int, T: int, N: int, K: int, H: int) -> tuple[Callable, Callable, dict[str, Any]]:
    """``scaled_dot_product_attention`` by one of its backends; with grouped queries where it has them, else heads are repeated before."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    chosen = getattr(SDPBackend, backend)

    def inputs(num_kv: int = K):
        return normal(B, N, T, H), normal(B, num_kv, T, H), normal(B, num_kv, T, H)

    def call(q, k, v):
        with sdpa_kernel(chosen):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != N)
    try:
        call(*inputs())
    except RuntimeError:
        return (lambda: inputs(N)), call, {"note": "keys and values repeated"}
    return inputs, call, {}


def dense(*, M: int, N: int, K: int) -> tuple[Callable, Callable, dict[str, Any]]:
    """``torch.matmul`` with the weight as checkpoints hold it: cuBLAS."""
    return (lambda: (normal(M, K), normal(N, K, scale=1 / math.sqrt(K)))), (lambda x, w: torch.matmul(x, w.T)), {}


def scaled_mm(*, M: int, N: int, K: int, by_row: bool = False) -> tuple[Callable, Callable, dict[str, Any]]:
    """``torch._scaled_mm`` of e4m3, one scale a tensor, or a row."""
    def inputs():
        shapes = ((M, 1), (1, N)) if by_row else ((), ())
        return (normal(M, K, dtype=torch.float8_e4m3fn), normal(N, K, dtype=torch.float8_e4m3fn),
                *(torch.ones(shape, device=device(), dtype=torch.float32) for shape in shapes))
    return inputs, (lambda x, w, a, b: torch._scaled_mm(x, w.T, scale_a=a, scale_b=b, out_dtype=torch.bfloat16, use_fast_accum=True)), {}


SIDES = {builder.__name__: builder for builder in (sdpa, dense, scaled_mm)}


def copy_bandwidth(num_bytes: int, num_samples: int) -> dict[str, Any]:
    """Bytes a second of copying a tensor, samples; read and written ones counted."""
    source = torch.ones(num_bytes // 4, dtype=torch.int32, device=device())
    target = torch.empty_like(source)
    prepared.keep("copy", prepared.Program(lambda: target.copy_(source), wait, num_calls=1))
    seconds = measure("copy", num_samples, 0.05)
    drop()
    return {"copy_bytes_per_s": [2 * num_bytes / one for one in seconds]}


def matmul_seconds(dtype: str, size: int, num_samples: int) -> list[float]:
    """Samples of a square product, the second factor as checkpoints hold it."""
    with torch.inference_mode():
        if dtype == "bfloat16":
            inputs, call, _ = dense(M=size, N=size, K=size)
        elif dtype == "float8_e4m3fn":
            inputs, call, _ = scaled_mm(M=size, N=size, K=size)
        else:
            def inputs():
                return tuple(torch.randint(-127, 128, (size, size), device=device(), dtype=torch.int8) for _ in range(2))

            def call(x, w):
                return torch._int_mm(x, w.T)
        arrays = inputs()
        prepared.keep("matmul", prepared.Program(lambda: call(*arrays), wait, num_calls=1))
        seconds = measure("matmul", num_samples, 0.05)
    drop()
    return seconds
