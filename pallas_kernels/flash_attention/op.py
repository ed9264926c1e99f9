"""The public op: which implementation runs, and its gradient."""
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import implementations
from pallas_kernels.flash_attention import gpu, tpu
from pallas_kernels.flash_attention.blocked import flash_attention_blocked, flash_attention_gradients
from pallas_kernels.flash_attention.reference import flash_attention_reference
from pallas_kernels.flash_attention.spans import make_spans
from pallas_kernels.tiling import Device

OP = "flash_attention"
MIN_HEAD_DIM, MAX_HEAD_DIM, HEAD_DIM_STEP = 64, 256, 16
MAX_CUDNN_HEAD_DIM = 128


def flash_attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, positions_BT: jax.Array, *, scale: float, device: Device,
                    window: int | None = None, softcap: float | None = None, sinks_N: jax.Array | None = None,
                    key_positions_BS: jax.Array | None = None, segments_BT: jax.Array | None = None, key_segments_BS: jax.Array | None = None,
                    returns_lse: bool = False, implementation: str | None = None,
                    interpret: bool = False) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of every token to itself and the tokens before it; arguments and results as of :func:`flash_attention_reference`.

    Memory beside arguments and results is linear in the tokens, in the gradient too, but for the reference and cuDNN's.

    Args:
        device: what the op is compiled for.
        implementation: ``"mosaic_gpu"`` (Hopper; bfloat16, float16), ``"mosaic_tpu"`` (bfloat16, float32), both for head dims from 64 to 256 in
            steps of 16; ``"blocked"``, plain ``jax.numpy`` for any device; ``"cudnn"``, where positions are 0, 1, … with padding behind, which
            is not checked; ``"reference"``. None for the kernel of the device where it can do what is asked, else the reference.
        interpret: whether a kernel runs in Pallas's interpreter.

    Raises:
        ValueError: the named implementation cannot do what is asked, or shapes or window make no sense.
    """
    _check(q_BTNH, k_BSKH, v_BSKH, window, segments_BT, key_positions_BS, key_segments_BS)
    head_dim, dtype = q_BTNH.shape[-1], str(q_BTNH.dtype)
    refusals = {name: _common_refusal(q_BTNH, k_BSKH, v_BSKH, scale) or kernel.refusal(device) or _size_refusal(head_dim, dtype, kernel.DTYPES)
                for name, kernel in (("mosaic_gpu", gpu), ("mosaic_tpu", tpu))}
    if implementation is not None:
        own_keys = key_positions_BS is None and segments_BT is None
        refusals |= {"blocked": None, "cudnn": _cudnn_refusal(device, head_dim, dtype, is_plain=own_keys and softcap is None and sinks_N is None
                                                              and not returns_lse)}
    chosen = implementations.pick(OP, device, implementation, refusals)
    if chosen == "cudnn":
        return _cudnn(q_BTNH, k_BSKH, v_BSKH, positions_BT, scale=scale, window=window)
    if chosen == implementations.REFERENCE:
        return flash_attention_reference(q_BTNH, k_BSKH, v_BSKH, positions_BT, scale=scale, window=window, softcap=softcap, sinks_N=sinks_N,
                                         key_positions_BS=key_positions_BS, segments_BT=segments_BT, key_segments_BS=key_segments_BS,
                                         returns_lse=returns_lse)
    forward = flash_attention_blocked if chosen == "blocked" else functools.partial(
        gpu.flash_attention_gpu if chosen == "mosaic_gpu" else tpu.flash_attention_tpu, device=device, interpret=interpret)
    spans = make_spans(positions_BT, key_positions_BS, window=window, segments_BT=segments_BT, key_segments_BS=key_segments_BS)
    results = _differentiable(forward, scale, softcap)(q_BTNH, k_BSKH, v_BSKH, spans, sinks_N)
    return results if returns_lse else results[0]


def _differentiable(forward, scale: float, softcap: float | None):
    """``forward`` with the gradient that computes the probabilities again, block by block."""
    how = {"scale": scale, "softcap": softcap}
    run = jax.custom_vjp(functools.partial(forward, **how))

    def run_and_keep(*arrays):
        results = forward(*arrays, **how)
        return results, (arrays, results)

    def gradients(kept, gradients):
        d_q, d_k, d_v, d_sinks = flash_attention_gradients(*kept[0], kept[1], gradients, **how)
        return d_q, d_k, d_v, None, d_sinks
    run.defvjp(run_and_keep, gradients)
    return run


def _check(q_BTNH, k_BSKH, v_BSKH, window, segments_BT, key_positions_BS, key_segments_BS) -> None:
    (B, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    if k_BSKH.shape != v_BSKH.shape or (k_BSKH.shape[0], k_BSKH.shape[3]) != (B, H) or N % K:
        raise ValueError(f"{OP}: queries {q_BTNH.shape}, keys {k_BSKH.shape} and values {v_BSKH.shape} do not go together; "
                         "wanted are [B, T, N, H] and twice [B, S, K, H] with N a multiple of K")
    if key_positions_BS is None and S != T:
        raise ValueError(f"{OP}: {T} queries and {S} keys; give the keys' own key_positions_BS")
    if key_positions_BS is not None and segments_BT is not None and key_segments_BS is None and S != T:
        raise ValueError(f"{OP}: {T} queries and {S} keys in segments; give the keys' own key_segments_BS")
    if window is not None and window < 1:
        raise ValueError(f"{OP}: a window of {window} tokens; it is at least 1, the token itself, or None for all")


def _common_refusal(q_BTNH, k_BSKH, v_BSKH, scale: float) -> str | None:
    dtypes = {str(x.dtype) for x in (q_BTNH, k_BSKH, v_BSKH)}
    if len(dtypes) > 1:
        return f"takes queries, keys and values of one dtype, and these are {', '.join(sorted(dtypes))}"
    return None if scale > 0 else f"takes a positive scale, and this one is {scale}"


def _size_refusal(head_dim: int, dtype: str, dtypes: Sequence[str]) -> str | None:
    if dtype not in dtypes:
        return f"takes {' and '.join(dtypes)}, and the arrays are {dtype}"
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM or head_dim % HEAD_DIM_STEP:
        return f"takes head dims from {MIN_HEAD_DIM} to {MAX_HEAD_DIM} that are multiples of {HEAD_DIM_STEP}, and this one is {head_dim}"
    return None


def _cudnn_refusal(device: Device, head_dim: int, dtype: str, *, is_plain: bool) -> str | None:
    if device.platform != "gpu":
        return f"needs an NVIDIA GPU, and this is {device.kind or device.platform}"
    if dtype not in gpu.DTYPES:
        return f"takes {' and '.join(gpu.DTYPES)}, and the arrays are {dtype}"
    if head_dim > MAX_CUDNN_HEAD_DIM or head_dim % 8:
        return f"takes head dims up to {MAX_CUDNN_HEAD_DIM} that are multiples of 8, and this one is {head_dim}"
    return None if is_plain else "takes neither soft cap nor sinks, segments, positions of keys or returns_lse"


def _cudnn(q_BTNH, k_BSKH, v_BSKH, positions_BT, *, scale: float, window: int | None) -> jax.Array:
    lengths_B = (positions_BT >= 0).sum(1, dtype=jnp.int32)
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, scale=scale, is_causal=True, query_seq_lengths=lengths_B,
                                        key_value_seq_lengths=lengths_B, local_window_size=None if window is None else (window - 1, 0),
                                        implementation="cudnn")
