"""The most memory a load takes, measured by the operating system in a process of its own."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.support.checkpoint_files import tensors_of, write_folder

MIB = 2**20
HF_CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4,
             "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
PROGRAM = """
import gc, json, sys
import jax
from sharding_rules import TENSOR, make_mesh
from tpllm.checkpoint.folder import open_checkpoint
from tpllm.checkpoint.load import load_params
from tpllm.checkpoint.memory import needed_bytes
from tpllm.model.partition import fit_to_mesh

def load(model):
    checkpoint = open_checkpoint(model)
    config = fit_to_mesh(checkpoint.config, make_mesh({"tp": int(sys.argv[2])}), TENSOR)
    return config, load_params(checkpoint, config, dtype=sys.argv[3])

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

demo = load("demo")  # what comes once, code and thread pools, belongs to the baseline; kept, so that its memory is not used again
before = status("VmRSS")
config, params = load(sys.argv[1])
peak = status("VmHWM")  # getrusage would tell the parent's, which it inherits
needed, largest = needed_bytes(config, dtype=sys.argv[3], cache_bytes_per_device=0)
for array in jax.tree.leaves(params):
    array.delete()
gc.collect()  # jax lets go of buffers that it borrowed when Python collects
print(json.dumps({"peak": peak - before, "weights": sum(needed.values()), "largest": largest, "after": status("VmRSS") - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(("num_devices", "dtype"), [(1, "float32"), (4, "float32"), (4, "bfloat16")])
def test_the_peak_of_a_load_is_the_weights_and_one_tensor_and_closing_gives_them_back(tmp_path, num_devices, dtype):
    write_folder(tmp_path / "model", HF_CONFIG, tensors_of(HF_CONFIG, "BF16"), num_shards=2)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "model"), str(num_devices), dtype], env=environment,
                          capture_output=True, text=True, check=True)
    measured = {key: value / MIB for key, value in json.loads(done.stdout).items()}
    print(measured)
    assert measured["weights"] > (280 if dtype == "float32" else 140)
    assert measured["weights"] * 0.98 < measured["peak"] <= measured["weights"] + measured["largest"] + 16
    assert measured["after"] < 0.1 * measured["weights"] + 16
