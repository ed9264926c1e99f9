"""What the digests need of the tree beside ``tpllm.LLM``, ``load_model``, ``SamplingParams`` and the command line.

Names that a refactoring may move are looked up here and nowhere else, so that one file has to follow it. Where a helper of the tests is meant,
:func:`test_support` finds it in ``tests/`` or in ``tests/support/``.
"""
from __future__ import annotations

import dataclasses
import importlib
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEMO_FOLDER = ROOT / "tpllm" / "demo"
COMMAND = (sys.executable, "-m", "tpllm.cli.main")


def test_support(name: str) -> Any:
    """A module of the tests' helpers, such as ``tiny_models``."""
    try:
        return importlib.import_module(f"tests.support.{name}")
    except ImportError:  # a tree from before tests/support
        if str(ROOT / "tests") not in sys.path:
            sys.path.append(str(ROOT / "tests"))  # last: tests/sharding_rules is not the package
        return importlib.import_module(name)


def instruction_sets() -> tuple[str, ...]:
    """What ``TPLLM_ISA`` may be on this machine; empty without native kernels."""
    from tpllm.native import library
    return library.instruction_sets()


def is_kernel_weight(leaf: Any) -> bool:
    """Whether a matrix is laid out for kernels, and can be read by a product only."""
    return not isinstance(leaf, jax.Array) and not hasattr(leaf, "dequantize")


def dequantized(leaf: Any) -> jax.Array:
    """float32 [N, K] of a quantized matrix that XLA computes with; columns as they are stored."""
    return leaf.dequantize(jnp.float32)


def product(x_BK: jax.Array, leaf: Any) -> jax.Array:
    """float32 [B, N]: rows times a matrix of any kind."""
    try:
        from tpllm.weights.linear import linear
    except ImportError:  # a tree from before tpllm/weights
        from tpllm.quant.linear import linear
    return linear(x_BK, leaf)


_dequantized, _product = jax.jit(dequantized), jax.jit(product)


def dense_values(leaf: Any) -> np.ndarray:
    """The float32 values that a parameter stands for, inputs in their order. A matrix for kernels is multiplied by the identity: with
    ``quantizes_input`` that is what its product makes of ones, else its very values."""
    if isinstance(leaf, jax.Array):
        return np.asarray(leaf).astype(np.float32)
    if is_kernel_weight(leaf):
        return np.asarray(_product(jnp.eye(leaf.shape[1], dtype=jnp.float32), leaf)).T
    values = np.array(_dequantized(leaf))
    if leaf.order is not None:
        values[:, np.asarray(leaf.order)] = values.copy()
    return values


def named_parameters(params: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every parameter of a tree with its dotted name, as in ``layers.0.attn.q``; absent ones are left out."""
    if params is None:
        return
    if hasattr(params, "shape"):
        yield name, params
        return
    if isinstance(params, tuple | list):
        found = list(enumerate(params))
    else:
        found = [(field.name, getattr(params, field.name)) for field in dataclasses.fields(params)]
    for key, value in found:
        yield from named_parameters(value, f"{name}.{key}" if name else str(key))
