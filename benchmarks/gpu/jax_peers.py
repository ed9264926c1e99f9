"""Sides of contests that run in JAX on the kernels of others: cuDNN, what is bundled with JAX, and tokamax.

One that is not installed is absent.
"""
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.gpu.jax_sides import Side, attention_scale, flash_inputs, mlp_ours, norm_ours, normal, outputs_dot

# Attention of a prompt.

def flash_jax(*, implementation: str, **sizes: int) -> Side:
    """``jax.nn.dot_product_attention``."""
    def call(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=attention_scale(sizes), implementation=implementation)
    return Side(lambda key: flash_inputs(key, **sizes), call)


def flash_bundled_triton(**sizes: int) -> Side:
    """``jax.experimental.pallas.ops.gpu.attention``; heads are repeated before, as it has no grouped queries."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    def inputs(key):
        q, k, v = flash_inputs(key, **sizes)
        return q, *(jnp.repeat(x, sizes["N"] // sizes["K"], axis=2) for x in (k, v))
    return Side(inputs, lambda q, k, v: mha(q, k, v, None, sm_scale=attention_scale(sizes), causal=True), notes={"note": "keys and values repeated"})


def flash_bundled_mosaic(*, block_q: int, block_kv: int, **sizes: int) -> Side:
    """``jax.experimental.pallas.ops.gpu.attention_mgpu``, which does not scale, and of jax 0.11.2 computes in float16 alone."""
    from jax.experimental.pallas.ops.gpu.attention_mgpu import TuningConfig, attention
    config = TuningConfig(block_q=block_q, block_kv=block_kv, max_concurrent_steps=2, causal=True)
    notes = {"note": f"{block_q} x {block_kv}, float16, no scale"}
    return Side(lambda key: tuple(x.astype(jnp.float16) for x in flash_inputs(key, **sizes)), lambda q, k, v: attention(q, k, v, config), notes=notes)


def flash_tokamax(*, implementation: str | None = None, **sizes: int) -> Side:
    """``tokamax.dot_product_attention``; None is its own choice."""
    import tokamax

    def call(q, k, v):
        return tokamax.dot_product_attention(q, k, v, is_causal=True, scale=attention_scale(sizes), implementation=implementation)
    return Side(lambda key: flash_inputs(key, **sizes), call, notes={"note": f"tokamax {tokamax.__version__}"})


# Decoding over pages.

def paged_bundled(*, B: int, S: int, page: int, N: int, K: int, H: int, k_splits: int, pages_per_compute_block: int) -> Side:
    """``jax.experimental.pallas.ops.gpu.paged_attention``."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention
    L = S // page
    tables_BL = jax.random.permutation(jax.random.key(7), B * L).reshape(B, L).astype(jnp.int32)
    lengths_B = jnp.full(B, S, jnp.int32)

    def inputs(key):
        q_key, k_key, v_key = jax.random.split(key, 3)
        return normal(q_key, (B, N, H)), *(normal(one, (K, B * L, page, H)) for one in (k_key, v_key)), tables_BL, lengths_B

    def call(q, k, v, tables, lengths):
        return paged_attention(q, k, v, tables, lengths, k_splits=k_splits, pages_per_compute_block=pages_per_compute_block)
    return Side(inputs, call, notes={"note": f"{k_splits} splits, {pages_per_compute_block} pages a block"})


# Products.

def dense_bundled_mosaic(*, M: int, N: int, K: int, tile_m: int, tile_n: int, tile_k: int) -> Side:
    """``jax.experimental.pallas.ops.gpu.hopper_matmul_mgpu``, whose weight is [K, N]."""
    from jax.experimental.pallas.ops.gpu.hopper_matmul_mgpu import TuningConfig, matmul
    config = TuningConfig(tile_m=tile_m, tile_n=tile_n, tile_k=tile_k, max_concurrent_steps=4)

    def inputs(key):
        a_key, b_key = jax.random.split(key)
        return normal(a_key, (M, K)), normal(b_key, (K, N), scale=1 / math.sqrt(K))
    return Side(inputs, lambda a, b: matmul(a, b, None, config), notes={"note": f"tiles {tile_m} x {tile_n} x {tile_k}"})


# The fused ones.

def norm_tokamax(*, M: int, D: int) -> Side:
    """``tokamax.layer_norm`` without the mean, after XLA's sum."""
    import tokamax

    def call(x, residual, weight):
        total = x + residual
        return tokamax.layer_norm(total, weight, None, epsilon=1e-5, subtract_mean=False), total
    return Side(norm_ours(M=M, D=D).inputs, call, notes={"note": f"tokamax {tokamax.__version__}"})


def mlp_tokamax(*, M: int, D: int, F: int) -> Side:
    """``tokamax.gated_linear_unit``, whose weights are [D, F], and XLA's product after it."""
    import tokamax

    def inputs(key):
        x, gate, up, down = mlp_ours(M=M, D=D, F=F).inputs(key)
        return x, gate.T, up.T, down

    def call(x, gate, up, down):
        return outputs_dot(tokamax.gated_linear_unit(x, (gate, up), activation=jax.nn.silu), down).astype(x.dtype)
    return Side(inputs, call, notes={"note": f"tokamax {tokamax.__version__}"})


PEERS: dict[str, Callable[..., Side]] = {builder.__name__: builder for builder in (
    flash_jax, flash_bundled_triton, flash_bundled_mosaic, flash_tokamax, paged_bundled, dense_bundled_mosaic, norm_tokamax, mlp_tokamax)}
