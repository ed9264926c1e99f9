"""Prints how many threads XLA's pool has, and a digest of what every kernel gives; run as a script, with another number of threads each time."""
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from tests.native import cases
from tpllm.environment.threads import limit_threads
from tpllm.native import attention, library
from tpllm.weights import native_products as products
from tpllm.weights.native import Format

WEIGHTS = [(cases.Case(Format.F32, 700, 300), 1), (cases.Case(Format.BF16, 700, 300, x_dtype="bfloat16"), 40),
           (cases.k_quant(Format.Q6, num_outputs=700), 3), (cases.INT8_INPUTS[0], 5)]


def normal(*shape):
    """The same numbers each time."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def results():
    """Of each kernel: one row that threads share by blocks and segments, and many."""
    for case, num_rows in WEIGHTS:
        weight, _ = cases.make_weight(case)
        yield jax.jit(products.linear)(cases.make_input(case, num_rows), (weight,), (None,))
    gate, down = (cases.make_weight(cases.Case(Format.I8, *shape, scale_dtype="float32"))[0] for shape in ((500, 100), (100, 500)))
    for num_rows in (1, 50):
        x = normal(num_rows, 100)
        yield jax.jit(products.gated_mlp, static_argnames="activation")(x, (gate, gate, down), (None,) * 3, activation="silu")
    yield jax.jit(attention.rms_norm, static_argnames="eps")(normal(100, 1000), np.ones(1000, np.float32), None, eps=1e-6)
    yield jax.jit(attention.row_sums)(normal(100, 10000))
    yield jax.jit(products.lookup, static_argnums=2)(np.arange(100, dtype=np.int32), down, jnp.float32)
    for case in (cases.AttentionCase(starts=(2900,), max_len=3000), cases.AttentionCase(starts=(900, 30), num_tokens=80, max_len=1000)):
        yield jax.jit(attention.attention, static_argnames=("scale", "window", "softcap"))(**cases.make_attention(case), **case.how())


if __name__ == "__main__":
    limit_threads()
    digest = hashlib.sha256()
    for array in jax.tree.leaves(list(results())):
        digest.update(jax.device_get(array).tobytes())
    print(library.pool_size(), digest.hexdigest())
