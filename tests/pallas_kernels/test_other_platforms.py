"""A platform that no kernel is made for, as another PJRT plug-in would bring it: here it is the CPU's client under another name."""
import collections
import json
import os
import subprocess
import sys

from tpllm import LLM, SamplingParams

PROMPT, NUM_TOKENS = "def add(a, b):", 8
RUN = f"""
import json, logging
import jax
from jax._src import xla_bridge
from jaxlib import _jax

def called(name):
    return property(lambda self: name)

_jax.Client.platform = _jax.Client._raw_platform = _jax.Device.platform = called("pretend")
_jax.Device.device_kind = called("Pretend 1")
xla_bridge.register_backend_factory("pretend", xla_bridge.make_cpu_client, priority=500, fail_quietly=False)
messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("pallas_kernels").addHandler(handler)
logging.getLogger("pallas_kernels").setLevel(logging.INFO)
branch = jax.jit(lambda: jax.lax.platform_dependent(cpu=lambda: 0, default=lambda: 1))()

from tpllm import LLM, SamplingParams
from tpllm.ops import uses_native
with LLM("demo", dtype="float32") as llm:
    partition = llm.config.partition
    for _ in range(2):
        out = llm.generate({PROMPT!r}, SamplingParams(temperature=0.0, max_tokens={NUM_TOKENS}))[0].outputs[0]
print(json.dumps({{"platform": partition.platform, "default": jax.default_backend(), "is_default_branch": int(branch), "tokens": out.token_ids,
                  "uses_native": uses_native(partition), "messages": messages}}))
"""


def test_a_model_runs_on_the_references_there_and_the_log_says_so_once_for_each_op():
    environment = {**os.environ, "JAX_PLATFORMS": "pretend", "TPLLM_CACHE_DIR": "off"}
    done = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["platform"], found["default"], found["is_default_branch"], found["uses_native"]) == ("pretend", "pretend", 1, False)
    with LLM("demo", mesh="tp=1", dtype="float32") as llm:
        expected = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS))[0].outputs[0].token_ids
    assert found["tokens"] == list(expected)
    said = collections.Counter(message.partition(":")[0] for message in found["messages"])
    assert said, "nothing was logged"
    assert set(said.values()) == {1}, found["messages"]
    assert all("on Pretend 1: reference" in message for message in found["messages"])
