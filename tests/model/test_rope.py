"""Rotary embedding: each rule against its formula in float64, and what a rotation keeps."""
import math

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rope import rope_reference
from tpllm.model.config import RopeConfig
from tpllm.model.rope import rope_tables, static_inv_freq

H, THETA = 16, 10000.0
PLAIN = np.array([THETA ** (-2 * i / H) for i in range(H // 2)])


def wavelength_rule(low, high):
    """The blend of llama3, one dim at a time, by wavelength."""
    original, factor, out = 256, 4.0, []
    for freq in PLAIN:
        wavelength = 2 * math.pi / freq
        if wavelength < original / high:
            out.append(freq)
        elif wavelength > original / low:
            out.append(freq / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append((1 - smooth) * freq / factor + smooth * freq)
    return np.array(out)


@pytest.mark.parametrize(("rope", "expected"), [
    (RopeConfig(theta=THETA), PLAIN),
    (RopeConfig(kind="linear", theta=THETA, factor=2.5), PLAIN / 2.5),
    (RopeConfig(kind="llama3", theta=THETA, factor=4.0, original_max_position=256), wavelength_rule(1.0, 4.0)),
    (RopeConfig(kind="llama3", theta=THETA, factor=4.0, original_max_position=256, low_freq_factor=2.0, high_freq_factor=9.0),
     wavelength_rule(2.0, 9.0)),
], ids=["default", "linear", "llama3", "llama3-other-bounds"])
def test_frequencies_follow_the_formula(rope, expected):
    inv_freq, scale = static_inv_freq(H, rope)
    np.testing.assert_allclose(inv_freq, expected, rtol=1e-6)
    assert scale == 1.0


def test_yarn_keeps_fast_dims_divides_slow_ones_and_scales_cos_and_sin():
    rope = RopeConfig(kind="yarn", theta=THETA, factor=8.0, original_max_position=4096)
    inv_freq, scale = static_inv_freq(H, rope)
    rotations = 4096 * PLAIN / (2 * math.pi)
    np.testing.assert_allclose(inv_freq[rotations > 32 * 4], PLAIN[rotations > 32 * 4], rtol=1e-6)
    np.testing.assert_allclose(inv_freq[rotations < 1 / 4], PLAIN[rotations < 1 / 4] / 8, rtol=1e-6)
    assert (np.diff(inv_freq / PLAIN) <= 1e-6).all()
    assert scale == pytest.approx(0.1 * math.log(8.0) + 1)


@pytest.mark.parametrize(("fields", "scale"), [
    ({"attention_factor": 1.25}, 1.25), ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
    ({"mscale": 0.7, "mscale_all_dim": 1.2}, (0.07 * math.log(8) + 1) / (0.12 * math.log(8) + 1)), ({"mscale": 0.7}, 0.1 * math.log(8) + 1)])
def test_yarn_takes_its_factor_on_cos_and_sin_as_given(fields, scale):
    assert static_inv_freq(H, RopeConfig(kind="yarn", factor=8.0, original_max_position=64, **fields))[1] == pytest.approx(scale)


def test_dynamic_rope_gives_a_token_the_frequencies_of_its_own_row_at_its_own_length():
    rope = RopeConfig(kind="dynamic", theta=THETA, factor=3.0, original_max_position=32)
    positions = np.array([[5, 6, 7], [30, 31, 32], [98, 99, -1]], np.int32)
    cos, sin = rope_tables(positions, np.array([8, 20, 60], np.int32), head_dim=H, rope=rope)
    for b, t in np.ndindex(2, 3):
        length = max(32, [8, 20, 60][b], positions[b, t] + 1)
        base = THETA * (3.0 * length / 32 - 2.0) ** (H / (H - 2))
        angles = positions[b, t] * np.array([base ** (-2 * i / H) for i in range(H // 2)])
        np.testing.assert_allclose(np.asarray(cos)[b, t], np.cos(np.tile(angles, 2)), atol=1e-5)
        np.testing.assert_allclose(np.asarray(sin)[b, t], np.sin(np.tile(angles, 2)), atol=1e-5)
    alone, _ = rope_tables(positions[2:], np.array([60], np.int32), head_dim=H, rope=rope)
    assert np.asarray(alone)[0].tobytes() == np.asarray(cos)[2].tobytes()


def test_longrope_chooses_the_factors_of_a_token_by_its_own_row_at_its_own_length():
    short, long = tuple(1 + 0.1 * i for i in range(6)), tuple(2 + 3.0 * i for i in range(6))
    rope = RopeConfig(kind="longrope", theta=THETA, factor=4.0, original_max_position=32, partial_rotary_factor=0.75, short_factors=short,
                      long_factors=long)
    positions = np.array([[5, 6, 7], [30, 31, 32], [5, 6, -1]], np.int32)
    cos, sin = rope_tables(positions, np.array([32, 20, 33], np.int32), head_dim=H, rope=rope)
    plain = np.array([THETA ** (-2 * i / 12) for i in range(6)])
    scale = math.sqrt(1 + math.log(4) / math.log(32))
    for (b, t), is_long in np.ndenumerate([[False] * 3, [False, False, True], [True] * 3]):
        angles = positions[b, t] * np.tile(plain / np.array(long if is_long else short), 2)
        np.testing.assert_allclose(np.asarray(cos)[b, t], scale * np.cos(angles), atol=1e-5)
        np.testing.assert_allclose(np.asarray(sin)[b, t], scale * np.sin(angles), atol=1e-5)
    alone, _ = rope_tables(positions[2:], np.array([33], np.int32), head_dim=H, rope=rope)
    assert np.asarray(alone)[0].tobytes() == np.asarray(cos)[2].tobytes()


def test_a_layer_without_rope_rotates_nothing():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 3, H)), jnp.float32)
    rope = rope_tables(np.array([[3, 4]], np.int32), np.array([5], np.int32), head_dim=H, rope=None)
    assert rope[0].shape == (1, 2, 0)
    assert (np.asarray(rope_reference(x, *rope)) == np.asarray(x)).all()


def test_a_rotation_keeps_lengths_and_scores_depend_on_distance_only():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 1, H)), jnp.float32)
    def scores(first, second):
        cos, sin = rope_tables(np.array([[first, second]], np.int32), np.array([1], np.int32), head_dim=H, rope=RopeConfig())
        turned = np.asarray(rope_reference(x, cos, sin), np.float64)[0, :, 0]
        np.testing.assert_allclose((turned**2).sum(-1), (np.asarray(x, np.float64)[0, :, 0]**2).sum(-1), rtol=1e-5)
        return turned[0] @ turned[1]
    assert scores(3, 10) == pytest.approx(scores(40, 47), abs=1e-4)
    assert scores(3, 10) != pytest.approx(scores(3, 11), abs=1e-2)


def test_a_position_turns_each_pair_of_dims_forward_by_its_angle():
    x = np.random.default_rng(2).normal(size=(1, 3, 2, H))
    cos, sin = rope_tables(np.array([[0, 1, 5]], np.int32), np.array([6], np.int32), head_dim=H, rope=RopeConfig())
    angles = np.array([0, 1, 5])[:, None, None] * PLAIN
    turned = (x[0, ..., :H // 2] + 1j * x[0, ..., H // 2:]) * np.exp(1j * angles)
    np.testing.assert_allclose(np.asarray(rope_reference(jnp.asarray(x, jnp.float32), cos, sin))[0],
                               np.concatenate([turned.real, turned.imag], -1), atol=1e-5)


def test_rotation_in_bfloat16_is_that_of_float32_rounded_once():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 2, H)), jnp.bfloat16)
    cos, sin = rope_tables(np.array([[0, 7, 90]], np.int32), np.array([91], np.int32), head_dim=H, rope=RopeConfig())
    out = rope_reference(x, cos, sin)
    assert out.dtype == jnp.bfloat16
    assert (np.asarray(out) == np.asarray(rope_reference(x.astype(jnp.float32), cos, sin).astype(jnp.bfloat16))).all()
