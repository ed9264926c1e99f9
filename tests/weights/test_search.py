"""Searched scales: codes rounded with them are nearer than with scales that span the groups."""
import numpy as np
import pytest

from tpllm.weights.search import BLOCK, asymmetric_scales, symmetric_scales


def groups(seed, shape, spread=0.0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape, np.float32) + spread * rng.standard_normal((*shape[:2], 1), np.float32)).astype(np.float32)


def squared(values, scales, mins, least, most):
    scales, mins = scales[..., None], mins[..., None]
    codes = np.clip(np.rint(np.divide(values + mins, scales, out=np.zeros_like(values), where=scales != 0)), least, most)
    return ((codes * scales - mins - values)**2).sum(-1)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("num_rows", [1, 7, 2 * BLOCK // 256 + 3])
def test_symmetric_scales_are_nearer_than_those_that_span_the_group(group, num_rows):
    values = groups(1, (num_rows, 8, group))
    peak = np.take_along_axis(values, np.abs(values).argmax(-1)[..., None], -1)[..., 0]
    scales = symmetric_scales(values)
    assert scales.shape == values.shape[:2]
    found, plain = squared(values, scales, 0 * scales, -8, 7), squared(values, peak / -8, 0 * peak, -8, 7)
    assert (found <= plain * 1.0001).all()
    assert found.sum() < 0.97 * plain.sum()


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_asymmetric_scales_are_nearer_and_mins_never_negative(spread):
    values = groups(2, (67, 40, 32), spread)
    lowest = np.minimum(values.min(-1), 0)
    scales, mins = asymmetric_scales(values)
    assert (mins >= 0).all()
    assert (scales >= 0).all()
    step = (np.maximum(values.max(-1), 0) - lowest) / 15
    found, plain = squared(values, scales, mins, 0, 15), squared(values, step, -lowest, 0, 15)
    assert (found <= plain * 1.0001).all()
    assert found.sum() < 0.97 * plain.sum()


def test_lines_are_found_again():
    codes = np.stack([np.random.default_rng(seed).permutation(np.arange(32) % 16) for seed in range(6)]).astype(np.float32)[None]
    scale, down = np.float32([[0.5, 1, 3, 1e-3, 7, 2]]), np.float32([[0, 4, 1, 2e-3, 50, 30]])
    scales, mins = asymmetric_scales(codes * scale[..., None] - down[..., None])
    np.testing.assert_allclose(scales, scale, rtol=1e-4)
    np.testing.assert_allclose(mins, down, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.abs(symmetric_scales((codes - 8) * scale[..., None])), scale, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e-30])
def test_constant_groups(value):
    values = np.full((2, 3, 32), value, np.float32)
    scales = symmetric_scales(values)
    np.testing.assert_allclose(squared(values, scales, 0 * scales, -8, 7), 0, atol=1e-12)
    np.testing.assert_allclose(squared(values, *asymmetric_scales(values), 0, 15), 0, atol=1e-12)


def test_no_rows_give_no_scales():
    assert symmetric_scales(np.zeros((0, 4, 32), np.float32)).shape == (0, 4)
    assert asymmetric_scales(np.zeros((0, 4, 32), np.float32))[1].shape == (0, 4)
