"""A prompt of 32 768 tokens on the native kernels: memory grows with its length, not with its square."""
import json
import pathlib
import subprocess
import sys

import pytest

from tpllm import native

PROGRAM = """
import json, sys
import jax
import numpy as np
from sharding_rules import DATA_TENSOR, make_mesh
from tpllm import LLM, SamplingParams
from tpllm.bench.shapes import random_params
from tpllm.model.config import ModelConfig
from tpllm.model.partition import fit_to_mesh
from tpllm.weights.storage import NATIVE, Storage

length = int(sys.argv[1])
config = ModelConfig(vocab_size=512, hidden_size=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, intermediate_size=512,
                     max_position=65536)
config = fit_to_mesh(config, make_mesh({"tp": 1}), DATA_TENSOR)
params = random_params(config, Storage(np.dtype(jax.numpy.bfloat16), device=NATIVE))
llm = LLM.from_params(config, params, max_model_len=length + 512, max_num_seqs=1)

def peak():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

def prefill(count):
    ids = np.random.default_rng(0).integers(0, 512, count).tolist()
    [output] = llm.generate([{"prompt_token_ids": ids}], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 2, output.outputs[0].error

prefill(600)
before = peak()
prefill(length)
cache = llm._engine.runner.executor.cache
print(json.dumps({"before": before, "grown": peak() - before, "cache": sum(leaf.nbytes for leaf in jax.tree.leaves(cache))}))
"""
MIB = 2**20


@pytest.mark.slow
@pytest.mark.skipif(not native.is_available(), reason="the native library is not built here")
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_the_peak_of_a_prefill_grows_with_its_length():
    grown = {}
    for length in (8192, 32768):
        done = subprocess.run([sys.executable, "-c", PROGRAM, str(length)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        grown[length] = json.loads(done.stdout)
    print(grown)
    # Beyond weights and cache, what a prompt needs is its ids on the host and a chunk's arrays; scores of T x S would be 8 GiB.
    assert grown[32768]["grown"] < 4 * max(grown[8192]["grown"], 8 * MIB) + 16 * MIB
    assert grown[32768]["cache"] == pytest.approx(4 * grown[8192]["cache"], rel=0.1)
