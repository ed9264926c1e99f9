"""Rotary position embedding: frequencies for every extension of the context, and the rotation itself.

Angles are ``position * inv_freq``; a head dim is rotated in two halves (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), the layout of
Hugging Face checkpoints.
"""
import math

import jax
import jax.numpy as jnp
import numpy as np

from tpllm.model.config import RopeConfig


def rope_tables(positions_BT: jax.Array, prompt_lens: jax.Array, *, head_dim: int, rope: RopeConfig | None) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for every token.

    Args:
        positions_BT: int32 absolute positions.
        prompt_lens: int32 prompt length of each row, [B], or of each token's row, [B, T]; only ``dynamic`` and ``longrope`` read it: a token at
            position p uses the frequencies of a sequence of max(prompt length, p + 1) tokens, whatever else is in the batch; those of earlier
            tokens in the cache stay.
        head_dim: H, even.
        rope: the rule, or None for no rotation.

    Returns:
        cos_BTR, sin_BTR: float32, for the R dims of a head that are rotated; both halves of R hold the same values.
    """
    if rope is None:
        return (jnp.zeros((*positions_BT.shape, 0)),) * 2
    rotary_dim, scale = rope.rotary_dim(head_dim), 1.0
    lengths_BT = jnp.maximum(prompt_lens.reshape(positions_BT.shape[0], -1), positions_BT + 1)
    if rope.kind == "dynamic":
        inv_freq = _dynamic_inv_freq(lengths_BT, rotary_dim, rope)
    elif rope.kind == "longrope":
        inv_freq, scale = _longrope_inv_freq(lengths_BT, rotary_dim, rope), _longrope_attention_factor(rope)
    else:
        inv_freq, scale = static_inv_freq(rotary_dim, rope)
    angles = positions_BT[..., None].astype(jnp.float32) * inv_freq
    angles_BTR = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles_BTR) * scale, jnp.sin(angles_BTR) * scale


def static_inv_freq(rotary_dim: int, rope: RopeConfig) -> tuple[np.ndarray, float]:
    """(inverse frequencies [R/2] float32, factor on cos and sin) of every kind but ``dynamic`` and ``longrope``."""
    inv_freq = 1.0 / rope.theta ** (np.arange(0, rotary_dim, 2) / rotary_dim)
    scale = 1.0
    if rope.kind == "linear":  # position interpolation (Chen et al. 2023, arXiv:2306.15595)
        inv_freq = inv_freq / rope.factor
    elif rope.kind == "llama3":
        inv_freq = _llama3_inv_freq(inv_freq, rope)
    elif rope.kind == "yarn":
        inv_freq, scale = _yarn_inv_freq(inv_freq, rotary_dim, rope), _yarn_attention_factor(rope)
    return inv_freq.astype(np.float32), scale


def _dynamic_inv_freq(lengths_BT: jax.Array, rotary_dim: int, rope: RopeConfig) -> jax.Array:
    """[B, T, R/2]: NTK scaling with the base growing with the sequence once it is longer than the trained context."""
    lengths = jnp.maximum(lengths_BT, rope.original_max_position).astype(jnp.float32)
    growth = rope.factor * lengths / rope.original_max_position - (rope.factor - 1)
    base_BT1 = (rope.theta * growth ** (rotary_dim / (rotary_dim - 2)))[..., None]
    return 1.0 / base_BT1 ** (jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)


def _longrope_inv_freq(lengths_BT: jax.Array, rotary_dim: int, rope: RopeConfig) -> jax.Array:
    """[B, T, R/2]: LongRoPE (Ding et al. 2024, arXiv:2402.13753): each frequency divided by its own factor, of one set for sequences within the
    trained context and of another for longer ones."""
    inv_freq = 1.0 / rope.theta ** (np.arange(0, rotary_dim, 2) / rotary_dim)
    short, long = ((inv_freq / np.array(factors)).astype(np.float32) for factors in (rope.short_factors, rope.long_factors))
    return jnp.where((lengths_BT > rope.original_max_position)[..., None], long, short)


def _longrope_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position))


def _llama3_inv_freq(inv_freq: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Llama 3.1: low frequencies divided by ``factor``, high ones kept, a linear blend between."""
    rotations = rope.original_max_position * inv_freq / (2 * math.pi)
    blend = np.clip((rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return (1 - blend) * inv_freq / rope.factor + blend * inv_freq


def _yarn_inv_freq(inv_freq: np.ndarray, rotary_dim: int, rope: RopeConfig) -> np.ndarray:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): as llama3 with the blend linear in the dim's index."""
    def dim_of(rotations: float) -> float:
        return rotary_dim * math.log(rope.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))
    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    ramp = np.clip((np.arange(rotary_dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return inv_freq / rope.factor * ramp + inv_freq * (1 - ramp)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
