"""The library itself: that it is there, what turns it off, its instruction sets and threads, and that no mistake ends the process."""
import functools
import hashlib
import logging
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rms_norm import rms_norm_reference
from sharding_rules import ONE_DEVICE
from tests.native.cases import Case, make_weight
from tpllm import ops
from tpllm.errors import ConfigError
from tpllm.native import library
from tpllm.weights.native import Format

ROOT = pathlib.Path(__file__).parents[2]
CPU_DEVICES = "--xla_force_host_platform_device_count=8"


def run(*arguments, **environment):
    """A script in a process of its own, with one device: (exit code, output, errors)."""
    inherited = {name: value.replace(CPU_DEVICES, "") for name, value in os.environ.items() if name != "NPROC"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**inherited, "PYTHONPATH": str(ROOT), **environment})
    return done.returncode, done.stdout, done.stderr


def test_where_there_is_a_compiler_there_is_a_library():
    if os.environ.get("TPLLM_NATIVE") == "0":
        pytest.skip("TPLLM_NATIVE=0 turns it off")
    if not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("there is no C++ compiler")
    assert library.is_available(), f"there is a compiler, but no library at {library.PATH}: run `make native`"


def test_the_best_instruction_set_is_used_unless_another_is_named(native_library):
    names = library.instruction_sets()
    assert names[-1] in ("portable", "neon")
    assert library.instruction_set() == os.environ.get("TPLLM_ISA", names[0])
    for name in names:
        with library.use_instruction_set(name):
            assert library.instruction_set() == name
    assert library.instruction_set() == os.environ.get("TPLLM_ISA", names[0])
    with pytest.raises(ConfigError, match=f"mmx.*{names[0]}"), library.use_instruction_set("mmx"):
        pass


def test_an_unknown_instruction_set_in_the_environment_is_refused_with_those_there_are(native_library):
    code, _, errors = run("-c", "from tpllm.native import library; library.load_library()", TPLLM_ISA="mmx")
    assert code == 1
    assert f"ConfigError: TPLLM_ISA is 'mmx'; this processor runs {', '.join(library.instruction_sets())}" in errors


def test_an_instruction_set_in_the_environment_is_used(native_library):
    name = library.instruction_sets()[-1]
    assert run("-c", "from tpllm.native import library; print(library.instruction_set())", TPLLM_ISA=name)[1].strip() == name


def test_turned_off_xla_computes_everything_and_the_log_says_so_once():
    script = """if True:
        import logging
        logging.basicConfig(level=logging.INFO, format="%(name)s %(levelname)s %(message)s")
        import jax.numpy as jnp
        from sharding_rules import ONE_DEVICE
        from tpllm import LLM, native, ops
        assert not native.is_available() and native.instruction_set() is None and not ops.uses_native(ONE_DEVICE)
        with LLM("demo", mesh="tp=1", max_num_seqs=2, max_model_len=64) as llm:
            print(llm.generate("import os", None)[0].outputs[0].token_ids[0])
    """
    code, output, errors = run("-c", script, TPLLM_NATIVE="0")
    assert code == 0, errors
    assert output.strip().isdecimal()
    assert [line for line in errors.splitlines() if "native kernels" in line] == [
        "tpllm INFO native kernels: turned off by TPLLM_NATIVE=0; XLA computes everything"]


def test_a_missing_library_is_warned_of_once_and_xla_computes(monkeypatch, caplog, tmp_path):
    monkeypatch.delenv("TPLLM_NATIVE", raising=False)
    monkeypatch.setattr(library, "PATH", tmp_path / "none.so")
    monkeypatch.setattr(library, "load_library", functools.cache(library.load_library.__wrapped__))
    with caplog.at_level(logging.INFO, logger="tpllm"):
        assert not library.is_available()
        assert library.instruction_set() is None
        assert library.instruction_sets() == ()
        normed = ops.rms_norm(jnp.arange(6.0).reshape(1, 1, 6), jnp.ones(6), eps=1e-5, partition=ONE_DEVICE)
    np.testing.assert_array_equal(normed, rms_norm_reference(jnp.arange(6.0).reshape(1, 1, 6), jnp.ones(6), eps=1e-5))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "compiler" in caplog.text


DAMAGE = {
    "zero bytes": lambda whole: b"", "text": lambda whole: b"not a library\n", "cut in half": lambda whole: whole[:len(whole) // 2],
    "cut after its header": lambda whole: whole[:4096], "one bit": lambda whole: whole[:len(whole) // 3] + b"\xff" + whole[len(whole) // 3 + 1:],
    "zeros from the middle on": lambda whole: whole[:len(whole) // 2] + bytes(len(whole) - len(whole) // 2), "longer": lambda whole: whole + b"\0"}


def test_a_damaged_library_is_never_opened_and_warned_of_once(native_library, monkeypatch, caplog, tmp_path):
    monkeypatch.delenv("TPLLM_NATIVE", raising=False)
    whole, record = library.PATH.read_bytes(), library.PATH.with_name("_kernels.so.sha256").read_text()
    monkeypatch.setattr(library.ctypes, "CDLL", lambda path: pytest.fail("it was opened"))
    records = dict.fromkeys(DAMAGE, record) | {"no checksum": None, "another checksum": record[:-2] + "x\n", "no numbers": "", "binary": "\0\1"}
    for case, text in records.items():
        path = tmp_path / case / "_kernels.so"
        path.parent.mkdir()
        path.write_bytes(DAMAGE.get(case, lambda whole: whole)(whole))
        if text is not None:
            path.with_name("_kernels.so.sha256").write_text(text)
        monkeypatch.setattr(library, "PATH", path)
        monkeypatch.setattr(library, "load_library", functools.cache(library.load_library.__wrapped__))
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="tpllm"):
            assert not library.is_available()
            assert library.instruction_set() is None
        (line,) = caplog.records
        assert (line.levelname, str(path) in line.getMessage(), "XLA computes everything" in line.getMessage()) == ("WARNING", True, True), case
    os.mkfifo(tmp_path / "pipe.so.sha256")
    assert "has no size" in library.find_fault(_written(tmp_path / "pipe.so", whole))  # it does not wait for a writer
    (tmp_path / "folder.so").mkdir()
    assert "is no file" in library.find_fault(_with_record(tmp_path / "folder.so", record))
    assert library.find_fault(_with_record(_written(tmp_path / "intact.so", whole), record)) is None


def test_a_whole_file_that_cannot_be_opened_is_warned_of_too(monkeypatch, caplog, tmp_path):
    monkeypatch.delenv("TPLLM_NATIVE", raising=False)
    text = b"a whole file, and no library"
    path = _with_record(_written(tmp_path / "_kernels.so", text), f"{len(text)} {hashlib.sha256(text).hexdigest()}\n")
    monkeypatch.setattr(library, "PATH", path)
    monkeypatch.setattr(library, "load_library", functools.cache(library.load_library.__wrapped__))
    with caplog.at_level(logging.INFO, logger="tpllm"):
        assert not library.is_available()
    assert "cannot be opened" in caplog.text


def _written(path, data):
    path.write_bytes(data)
    return path


def _with_record(path, text):
    path.with_name(path.name + ".sha256").write_text(text)
    return path


def digest(num_threads):
    code, output, errors = run("tests/native/digest_of_the_kernels.py", TPLLM_NUM_THREADS=str(num_threads), JAX_ENABLE_COMPILATION_CACHE="0")
    assert code == 0, errors
    return output.split()


def test_the_number_of_threads_is_that_of_the_environment_and_does_not_change_a_bit(native_library):
    results = {num_threads: digest(num_threads) for num_threads in (1, 2, 3)}
    assert [int(size) for size, _ in results.values()] == list(results)
    assert len({bits for _, bits in results.values()}) == 1


WEIGHT = Case(Format.I8, 40, 64, scale_dtype="float32")
FORMAT, OUTPUTS, INPUTS, GROUP, SUPER_GROUP, _, _, SCALES, MINS, SUPER_SCALES, SUPER_MINS, BIAS = range(12)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize("changes", [
    {FORMAT: 99}, {FORMAT: -1}, {FORMAT: 0}, {OUTPUTS: -5}, {OUTPUTS: 65}, {OUTPUTS: 2**59}, {OUTPUTS: 2**62}, {INPUTS: 0}, {INPUTS: -1},
    {INPUTS: 65}, {INPUTS: 2**60}, {GROUP: -1}, {GROUP: 1}, {GROUP: 32}, {GROUP: 48}, {MINS: 1}, {SUPER_SCALES: 1}, {SUPER_MINS: 1}, {BIAS: 1},
], ids=str)
@pytest.mark.parametrize("target", ["linear", "lookup", "gated_mlp"])
def test_a_weight_described_larger_than_its_arrays_or_as_nothing_known_is_an_error(target, changes, native_library):
    weight, _ = make_weight(WEIGHT)
    attributes = np.array(weight.attributes(), np.int64)
    attributes[list(changes)] = list(changes.values())
    first, results, more = {"linear": (jnp.ones((2, 64)), [floats(2, 40)], {}), "lookup": (jnp.zeros(2, jnp.int32), floats(2, 64), {}),
                            "gated_mlp": (jnp.ones((2, 64)), [floats(2, 64)], {"activation": np.int64(0)})}[target]
    times = 3 if target == "gated_mlp" else 1
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        library.call(target, results, first, *list(weight.arrays().values()) * times, weights=np.tile(attributes, times), **more)


@pytest.mark.parametrize(("target", "results", "arguments", "attributes"), [
    ("linear", [floats(2, 39)], [jnp.ones((2, 64))], {}),
    ("linear", [floats(3, 40)], [jnp.ones((2, 64))], {}),
    ("linear", [floats(2, 40), floats(2, 40)], [jnp.ones((2, 64))], {}),
    ("linear", [jax.ShapeDtypeStruct((2, 40), jnp.int32)], [jnp.ones((2, 64))], {}),
    ("linear", [floats(2, 40)], [jnp.ones((2, 63))], {}),
    ("linear", [floats(2, 40)], [jnp.ones(64)], {}),
    ("linear", [floats(2, 40)], [jnp.ones((2, 64), jnp.int32)], {}),
    ("lookup", floats(3, 64), [jnp.zeros(2, jnp.int32)], {}),
    ("lookup", floats(2, 65), [jnp.zeros(2, jnp.int32)], {}),
    ("lookup", floats(128), [jnp.zeros(2, jnp.int32)], {}),
    ("lookup", floats(2, 64), [jnp.zeros(2, jnp.float32)], {}),
    ("gated_mlp", [floats(2, 64)], [jnp.ones((2, 64))], {"activation": np.int64(0)}),
    ("linear", [floats(2, 40)], [jnp.ones((2, 64))], {"weights": np.zeros(0, np.int64)}),
    ("linear", [floats(2, 40)], [jnp.ones((2, 64))], {"weights": np.zeros(12, np.int64)}),
    ("linear", [floats(2, 40)], [jnp.ones((2, 64))], {"weights": np.ones(11, np.int64)}),
])
def test_results_and_inputs_of_other_shapes_are_an_error(target, results, arguments, attributes, native_library):
    weight, _ = make_weight(WEIGHT)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        library.call(target, results, *arguments, *weight.arrays().values(), **{"weights": np.array(weight.attributes(), np.int64)} | attributes)


@pytest.mark.parametrize(("target", "results", "arguments", "attributes"), [
    ("rms_norm", [floats(2, 7)], [jnp.ones((2, 8)), jnp.ones(8)], {"eps": np.float32(1)}),
    ("rms_norm", [floats(2, 8)], [jnp.ones((2, 8)), jnp.ones(9)], {"eps": np.float32(1)}),
    ("rms_norm", [floats(8)], [jnp.ones(8), jnp.ones(8)], {"eps": np.float32(1)}),
    ("rms_norm", [floats(2, 8)] * 2, [jnp.ones((2, 8)), jnp.ones(8), jnp.ones((1, 8))], {"eps": np.float32(1)}),
    ("rms_norm", [floats(2, 8)] * 2, [jnp.ones((2, 8)), jnp.ones(8), jnp.ones((2, 8), jnp.bfloat16)], {"eps": np.float32(1)}),
    ("rms_norm", [floats(2, 8)], [jnp.ones((2, 8)), jnp.ones(8)], {}),
    ("row_sums", floats(3), [jnp.ones((2, 8))], {}),
    ("row_sums", floats(2), [jnp.ones((2, 8), jnp.bfloat16)], {}),
    ("attention", [floats(1, 1, 2, 8)], [jnp.ones((1, 1, 2, 8))] * 3, {}),
])
def test_other_kernels_called_with_other_shapes_are_an_error(target, results, arguments, attributes, native_library):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        library.call(target, results, *arguments, **attributes)


def cast(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(("target", "results", "x"), [
    ("linear", [cast(jnp.int8, 2, 40)], jnp.ones((2, 64))), ("linear", [cast(jnp.uint8, 2, 40)], jnp.ones((2, 64))),
    ("linear", [floats(2, 40)], jnp.ones((2, 64), jnp.int8)), ("lookup", cast(jnp.int8, 2, 64), jnp.zeros(2, jnp.int32)),
])
def test_inputs_and_results_that_are_no_floats_are_an_error(target, results, x, native_library):
    weight, _ = make_weight(WEIGHT)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        library.call(target, results, x, *weight.arrays().values(), weights=np.array(weight.attributes(), np.int64))


@pytest.mark.parametrize(("results", "arguments"), [
    ([cast(jnp.int8, 2, 8)], [jnp.ones((2, 8)), jnp.ones(8)]),
    ([cast(jnp.int8, 2, 8)], [jnp.ones((2, 8), jnp.int8), jnp.ones(8)]),
    ([floats(2, 8)], [jnp.ones((2, 8)), jnp.ones(8), jnp.ones((2, 8))]),
])
def test_a_norm_that_is_no_float_or_lacks_a_result_is_an_error(results, arguments, native_library):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        library.call("rms_norm", results, *arguments, eps=np.float32(1))


@pytest.mark.parametrize(("q_dtype", "cache_dtypes"), [
    ("int8", ("float32", "float32")), ("float32", ("float32", "bfloat16")), ("float32", ("float32", "float32", "float32", "float32")),
    ("float32", ("int8", "int8", "float16", "float16")), ("float32", ("int8", "int8")), ("float32", ("int32", "int32")),
])
def test_queries_and_caches_of_other_dtypes_are_an_error(q_dtype, cache_dtypes, native_library):
    shapes = ((1, 2, 64, 8),) * 2 + ((1, 2, 64),) * 2
    cache = [jnp.zeros(shape, dtype) for shape, dtype in zip(shapes, cache_dtypes, strict=False)]
    q, position = jnp.ones((1, 1, 2, 8), q_dtype), jnp.zeros((1, 1), jnp.int32)
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, *cache)]
    arguments = (q, q, q, jnp.ones((1, 1, 8)), jnp.ones((1, 1, 8)), position, jnp.zeros(0, jnp.int32), *cache)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        library.call("attention", results, *arguments, aliases={7 + i: 1 + i for i in range(len(cache))}, scale=np.float32(1),
                     softcap=np.float32(0), window=np.int64(0))


@pytest.mark.parametrize("changes", [{GROUP: 16}, {MINS: 1, GROUP: 0}, {6: 1, 0: 6}, {6: 1, GROUP: 32}, {0: 7}, {0: 8}], ids=str)
def test_formats_and_groups_that_no_kernel_takes_are_an_error(changes, native_library):
    weight, _ = make_weight(WEIGHT)
    attributes = np.array(weight.attributes(), np.int64)
    attributes[list(changes)] = list(changes.values())
    extra = [jnp.ones((2, 4, 32))] * (1 + changes.get(MINS, 0))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        library.call("linear", [floats(2, 40)], jnp.ones((2, 64)), jnp.zeros(8192, jnp.uint8), *extra, weights=attributes)
