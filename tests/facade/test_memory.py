"""However an LLM goes, its memory goes with it: by JAX's own list of live arrays, and by the operating system's numbers."""
import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys
import weakref

import jax
import pytest

import tpllm
from tests.support.checkpoint_files import tensors_of, write_folder
from tpllm import LLM, SamplingParams
from tpllm.checkpoint.source import DEMO_FOLDER
from tpllm.errors import ConfigError, TpllmError

LONG = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
PROMPTS = ["import os\n", "def f(", "class A"]
MIB = 2**20


def make(mesh="tp=2"):
    return LLM("demo", mesh=mesh, max_num_seqs=2, max_model_len=64, prefill_chunk_size=16)


def live_bytes():
    return sum(array.nbytes for array in jax.live_arrays())


def texts(results):
    """All the text of some deltas or outputs, in one piece: where a stream is cut depends on timing."""
    return "".join(one.text if hasattr(one, "text") else one.outputs[0].text for one in results)


@pytest.fixture
def baseline():
    """Bytes of the arrays that other tests hold."""
    gc.collect()
    return live_bytes()


def test_deleting_the_last_reference_frees_the_arrays(baseline):
    llm = make()
    llm.generate(PROMPTS, LONG)
    assert live_bytes() > baseline + 5_000_000
    del llm
    assert live_bytes() == baseline


def test_what_a_deleted_llm_held_is_gone_before_the_collector_runs(baseline, monkeypatch):
    llm, seen = make(), []
    arrays = [weakref.ref(leaf) for leaf in jax.tree.leaves((llm.params, llm.engine.runner.executor.cache))]
    monkeypatch.setattr("tpllm.llm.gc.collect", lambda: seen.append(sum(array() is not None for array in arrays)))
    del llm
    assert seen == [0], "buffers that JAX borrowed from numpy go with that collection, or with none"


def test_rebinding_frees_the_one_before(baseline):
    llm = make()
    of_one = live_bytes() - baseline
    for _ in range(3):
        llm = make()
        llm.generate(PROMPTS[0], LONG)
        assert live_bytes() - baseline <= of_one * 1.05  # its results in flight
    llm.close()
    assert live_bytes() == baseline


def test_closing_frees_whoever_holds_the_object(baseline):
    llm = make()
    kept_by_a_notebook = {1: llm, "_": [llm]}
    llm.close()
    assert live_bytes() == baseline
    assert all(held for held in kept_by_a_notebook.values())


def test_a_repr_keeps_nothing_alive(baseline):
    llm = make()
    shown = [repr(llm), llm._repr_html_(), llm._description]
    del llm
    assert live_bytes() == baseline
    assert all(shown)


def test_the_end_of_a_with_block_frees_and_so_does_an_error_in_it(baseline):
    with make() as llm:
        llm.generate(PROMPTS, LONG)
    assert live_bytes() == baseline
    with pytest.raises(TpllmError) as caught, make() as llm:
        llm.generate("", LONG)
    assert live_bytes() == baseline, "while the traceback and the name still hold it"
    assert caught.tb is not None
    assert llm is not None


def test_an_llm_in_a_reference_cycle_is_freed_by_the_collector(baseline):
    llm = make()
    llm.itself = [llm]
    llm.generate(PROMPTS, LONG)
    del llm
    gc.collect()
    assert live_bytes() == baseline


@pytest.mark.parametrize("begin", [lambda llm: llm.generate_iter(PROMPTS, LONG), lambda llm: llm.stream(PROMPTS[0], LONG)],
                         ids=["generate_iter", "stream"])
def test_an_iterator_left_half_way_holds_its_llm_until_it_goes_itself(baseline, begin):
    llm = make()
    whole = texts(begin(llm))
    iterator = begin(llm)
    first = texts([next(iterator)])
    del llm
    assert live_bytes() > baseline + 5_000_000
    assert first + texts(iterator) == whole, "whoever holds it can read on"
    del iterator
    assert live_bytes() == baseline


def test_a_loop_that_was_left_holds_nothing(baseline):
    llm = make()
    for _ in llm.generate_iter(PROMPTS, LONG):
        break
    for _ in llm.stream(PROMPTS[0], LONG):
        break
    del llm
    assert live_bytes() == baseline


def test_an_iterator_of_a_closed_llm_holds_no_memory_and_says_so(baseline):
    llm = make()
    iterator = llm.generate_iter(PROMPTS, LONG)
    next(iterator)
    llm.close()
    assert live_bytes() == baseline
    with pytest.raises(ConfigError, match="closed"):
        list(iterator)


def test_parameters_taken_from_a_deleted_llm_live_on_and_those_of_a_closed_one_do_not(baseline):
    llm = make()
    params, config = llm.params, llm.config
    before = llm.generate(PROMPTS, LONG)
    del llm
    assert live_bytes() == baseline + sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    with LLM.from_params(config, params, tpllm.load_model("demo", config.partition.mesh)[2], max_num_seqs=2, max_model_len=64,
                         prefill_chunk_size=16) as again:
        assert [one.outputs for one in again.generate(PROMPTS, LONG)] == [one.outputs for one in before]
    llm = make()
    taken = llm.params
    llm.close()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(taken))


def test_parameters_that_were_given_stay_their_owners(baseline):
    config, params, _ = tpllm.load_model("demo", "tp=2")
    of_params = live_bytes() - baseline
    options = {"max_num_seqs": 2, "max_model_len": 64, "prefill_chunk_size": 16}
    first, second = (LLM.from_params(config, params, **options) for _ in range(2))
    first.close()
    assert len(second.generate({"prompt_token_ids": [1, 2, 3]}, LONG)[0].outputs[0].token_ids) == 40
    del second
    assert live_bytes() == baseline + of_params
    LLM.from_params(config, params, **options).close()
    del params
    gc.collect()
    assert live_bytes() == baseline


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_error_after_the_weights_were_loaded_frees_them(baseline, monkeypatch, error):
    def fail(*_):
        assert live_bytes() > baseline + 5_000_000
        raise error
    monkeypatch.setattr("tpllm.engine.executor.init_cache", fail)
    with pytest.raises(error) as caught:
        make()
    assert live_bytes() == baseline, "while the traceback still holds the frames"
    assert caught.tb is not None


HF_CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 2,
             "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
             "tie_word_embeddings": False}
PROGRAM = """
import gc, json, sys
import jax
import numpy as np
from tpllm import LLM, SamplingParams, load_model
from tpllm.model.params import init_params

PROMPT, LONG = {"prompt_token_ids": [1, 2, 3]}, SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
config = load_model(sys.argv[1], "tp=2")[0]

def make():
    if sys.argv[2] == "folder":
        return LLM(sys.argv[1], dtype="float32", mesh="tp=2", max_num_seqs=2)
    return LLM.from_params(config, init_params(config, 0), max_num_seqs=2)

def used():
    llm = make()
    llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=2))
    return llm

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

for _ in range(2):  # what comes once, code and thread pools, belongs to the baseline; what the first one's compiling left behind does not
    used().close()
    gc.collect()
before, found = status("VmRSS"), {}

def note(name):
    found[name] = status("VmRSS") - before

llm = None
for i in range(3):
    llm = used()
    note(f"holding {i}")
peak = status("VmHWM") - before
del llm
note("after rebinding")
short = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
for i in range(2):  # a program that still runs holds what it reads
    llm = used()
    iterator = llm.generate_iter([PROMPT] * 2, [short, LONG])
    next(iterator)
    assert not llm._engine._in_flight[-1][0].output.token.is_ready()
    del iterator, llm
    note(f"after deleting a busy one {i}")
    llm = used()
    iterator = llm.stream(PROMPT, LONG)
    next(iterator)
    llm.close()
    note(f"after closing under a stream {i}")
try:
    with used() as llm:
        raise RuntimeError
except RuntimeError as error:
    kept = error
note("after an error")
llm = used()
llm.itself = llm
del llm
gc.collect()
note("after a cycle")
llm = used()
params, nbytes = llm.params, sum(leaf.nbytes for leaf in jax.tree.leaves(llm.params))
del llm
note("holding params")
assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params.layers[0]))
del params
gc.collect()
note("after params")
print(json.dumps({"weights": nbytes, "peak": peak, "found": found}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("source", ["folder", "params"])
def test_the_operating_system_gets_the_memory_back_and_rebinding_does_not_pile_up(tmp_path, source):
    write_folder(tmp_path, HF_CONFIG, tensors_of(HF_CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_FOLDER / name, tmp_path)
    # Blocks of 64 KiB and more are mapped one by one and go back when freed; by default glibc learns to keep ever larger ones on its heap.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
                   "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path), source], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    weights = report["weights"]
    print(weights / MIB, {name: round(value / MIB) for name, value in report["found"].items()}, report["peak"] / MIB)
    assert 100 * MIB < weights < 200 * MIB
    for name, value in report["found"].items():
        if name.startswith("holding"):
            assert 0.9 * weights < value < 1.25 * weights + 16 * MIB, name
        else:
            assert value < 0.15 * weights + 16 * MIB, name
    assert report["peak"] < 2.5 * weights + 32 * MIB, "the new one and the one before, and no more"
