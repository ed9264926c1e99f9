"""The command line: quick to start, and one line for every error of the user's."""
import dataclasses
import io
import json
import subprocess
import sys
import types

import pytest

from tests.jobs.fake_llm import FakeLLM
from tests.jobs.small_job import all_rows, rows_text
from tpllm import __version__
from tpllm.cli.main import main
from tpllm.engine.sampling_params import SamplingParams


@pytest.fixture
def job_file(tmp_path, monkeypatch):
    """A job file in the working directory, with paths relative to it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(rows_text(5, bad=(2,)))
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "job.yaml"
    path.write_text("model: fake\ninput: rows.jsonl\noutput: out\n")
    return str(path)


def error_line(capsys) -> str:
    """The one line on standard error."""
    out, err = capsys.readouterr()
    assert out == ""
    line, = err.splitlines()
    assert line.startswith("tpllm: error: ")
    return line


def exit_code(*words: str, make_llm=FakeLLM) -> int:
    try:
        return main(words, make_llm=make_llm)
    except SystemExit as stop:
        return stop.code


def test_run_runs_a_job_and_says_where_its_rows_are(job_file, tmp_path, capsys):
    assert exit_code("run", job_file) == 0
    assert len(all_rows(tmp_path / "out")) == 4
    assert "complete: 5 rows in out (5 new); 1 failed: see out/part-*.errors.jsonl" in capsys.readouterr().err
    assert exit_code("run", job_file) == 0
    assert "complete: 5 rows in out (nothing was left to do)" in capsys.readouterr().err


def test_run_takes_overrides_of_any_key(job_file, tmp_path):
    assert exit_code("run", job_file, "--sampling.max-tokens", "3", "--output=other", "--engine.max-num-seqs", "2") == 0
    assert all(len(completion["token_ids"]) == 3 for row in all_rows(tmp_path / "other") for completion in row["outputs"])


ROWS = ("run", "-i", "rows.jsonl", "-o", "new", "-m", "fake")


def test_a_job_needs_no_file_and_the_same_command_its_folder_or_its_file_goes_on_with_it(job_file, tmp_path, capsys):
    words = [*ROWS, "--temp", "0", "--max-tokens", "3", "--stop", "x", "--stop", "\n", "--n", "2", "--logprobs", "1", "--engine.max-num-seqs", "2",
             "--rows_per_part=2"]
    assert exit_code(*words) == 0
    manifest = json.loads((tmp_path / "new" / "manifest.json").read_text())
    assert manifest["job"] == {"model": "fake", "output_format": "jsonl", "mesh": "auto", "dtype": "auto", "seed": 0, "rows_per_part": 2,
                               "engine": {"max_num_seqs": 2},
                               "sampling": {"temperature": 0, "max_tokens": 3, "stop": ["x", "\n"], "n": 2, "logprobs": 1}}
    (tmp_path / "new" / "part-00001.jsonl").unlink()
    assert exit_code(*words) == 0
    assert "(2 new)" in capsys.readouterr().err
    for again in (words, ["run", "new"], ["run", str(tmp_path / "new"), "--dry-run"]):
        (tmp_path / "folder" / "job.yaml").write_text(json.dumps({**manifest["job"], "input": "rows.jsonl", "output": "new"}))
        assert exit_code(*again) == 0
    assert exit_code("run", job_file, make_llm=None) == 0
    out, err = capsys.readouterr()
    assert err.count("complete: 5 rows in new (nothing was left to do)") == 3
    assert "nothing is left to do" in out
    assert exit_code("run", "new", "--max-tokens", "4") == 2
    assert "sampling.max_tokens was 3 and is now 4" in error_line(capsys)


def test_a_job_goes_on_from_its_folder_in_any_working_directory_also_a_shards(job_file, tmp_path, monkeypatch):
    assert exit_code(*ROWS, "--shard", "1/2", "--rows-per-part", "2") == 0
    (tmp_path / "new" / "shard-00001-of-00002" / "part-00001.jsonl").unlink()
    monkeypatch.chdir(tmp_path / "new" / "shard-00001-of-00002")
    assert exit_code("run", ".") == 0
    assert len(all_rows(tmp_path / "new" / "shard-00001-of-00002")) == 1


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SamplingParams) if field.name not in ("seed", "output_kind")])
def test_every_sampling_parameter_is_an_option_of_a_job_and_its_seed_is_the_jobs_own(job_file, tmp_path, field):
    values = {"logit_bias": "{3: 1}", "allowed_token_ids": "[1, 2]", "stop_token_ids": "[1]", "bad_words": "x", "stop": "x"}
    flag = "--" + field.replace("_", "-")
    words = [flag] if field in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize") else [flag, values.get(field, "1")]
    assert exit_code(*ROWS, *words, "--seed", "7") == 0
    job = json.loads((tmp_path / "new" / "manifest.json").read_text())["job"]
    assert (list(job["sampling"]), job["seed"]) == ([field], 7)


def test_inputs_may_be_several_and_model_options_are_those_of_the_engine(job_file, tmp_path):
    (tmp_path / "more.jsonl").write_text('{"prompt": "more"}\n')
    words = ["run", "-i", "rows.jsonl", "more.jsonl", "-o", "new", "-m", "fake", "--revision", "1234567", "--quantization", "int8"]
    assert exit_code(*words) == 0
    manifest = json.loads((tmp_path / "new" / "manifest.json").read_text())
    assert manifest["input"]["num_rows"] == 6
    assert manifest["job"]["engine"] == {"quantization": "int8", "revision": "1234567"}


@pytest.mark.parametrize(("words", "message"), [
    (["--sampling.max-tokns", "3"], "did you mean '--sampling.max-tokens'"),
    (["--sampling.temperature", "-1"], "temperature is -1"),
    (["--sampling.top-p", "1.5"], "top_p is 1.5"),
    (["--sampling.n", "1000"], "n is 1000; it must be a whole number from 1 to 128"),
    (["--sampling.logprobs", "99"], "logprobs is 99; it must be a whole number from 0 to 20"),
    (["--engine.max-num-seq", "3"], "did you mean 'engine.max_num_seqs'"),
    (["--input", "none.jsonl"], "cannot read the input none.jsonl"),
    (["--output", "rows.jsonl"], "cannot write to the output folder rows.jsonl"),
])
def test_a_job_that_cannot_run_is_one_line_and_code_2(job_file, capsys, words, message):
    assert exit_code("run", job_file, *words) == 2
    assert message in error_line(capsys)


def test_a_duplicate_custom_id_is_one_line_with_both_rows(job_file, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"custom_id": "a", "prompt": "x"}\n{"custom_id": "a", "prompt": "y"}\n')
    assert exit_code("run", job_file) == 2
    assert "custom_id 'a' is on row 0 (rows.jsonl line 1) and on row 1 (rows.jsonl line 2)" in error_line(capsys)


@pytest.mark.parametrize(("words", "message"), [
    ([], "the following arguments are required: COMMAND"),
    (["generat"], "argument COMMAND: unknown value 'generat'; did you mean 'generate'? known: generate, chat, run, job, "),
    (["--verbos", "generate"], "unknown option '--verbos'; did you mean '--verbose'? see tpllm --help"),
    (["run"], "model and input and output are missing; give --model ..., or a job file"),
    (["run", "-i", "x.jsonl", "-o", "out", "--temprature", "0"], "unknown option '--temprature'; did you mean '--temperature'? see tpllm run --help"),
    (["run", "-i", "x.jsonl", "-o", "out", "-m", "fake", "--top-p", "0"], "top_p is 0"),
    (["run", "prompts.jsonl"], "prompts.jsonl holds rows and is no job file; give it as the input: -i prompts.jsonl -o OUTPUT -m MODEL"),
    (["run", "."], ". holds no job: there is no manifest.json in it; give a job file, or the output folder of a job"),
    (["job", "retry", "none"], "none holds no job"),
    (["run", "none.yaml"], "cannot read the job file none.yaml"),
    (["generate", "-p", "x"], "no model is named; name one as the first argument or with --model"),
    (["generate", "fake", "-m", "other", "-p", "x"], "two models are named, 'fake' and 'other' (--model); name one"),
    (["generate", "fake", "--max-token", "3"], "unknown option '--max-token'; did you mean '--max-tokens'? see tpllm generate --help"),
    (["generate", "--modle=fake"], "unknown option '--modle'; did you mean '--model'? see tpllm generate --help"),
    (["generate", "fake", "-p", "x", "-c", "4096"], "unknown option '-c'; see tpllm generate --help"),
    (["generate", "fake", "-p", "x", "word"], "unknown argument 'word'; see tpllm generate --help"),
    (["generate", "fake", "-p", "x", "-t", "0"], "argument -t/--threads: '0' is no whole number of at least 1; see tpllm generate --help"),
    (["generate", "fake", "-p", ""], "the prompt is empty"),
    (["generate", "fake", "--prompt-file", "none.txt"], "cannot read the prompt from none.txt: No such file or directory; give a file"),
    (["generate", "fake", "-p", "x", "--prompt-file", "y"], "argument --prompt-file: not allowed with argument -p/--prompt"),
    (["generate", "fake", "-p", "x", "--raw", "--system", "Be brief."], "--system and --template-kwargs are for the chat template"),
    (["generate", "fake", "-p", "x", "--template-kwargs", "[1]"], "--template-kwargs is '[1]'; give a JSON object"),
    (["generate", "fake", "-p", "x", "--top-p", "0"], "top_p is 0"),
    (["generate", "fake", "-p", "x", "--temperature", "hot"], "temperature is 'hot'"),
    (["generate", "fake", "-p", "x", "--n", "2"], "unknown option '--n'"),
    (["job", "status", "out", "--verfy"], "unknown option '--verfy'; did you mean '--verify'? see tpllm job status --help"),
    (["completion", "bsh"], "argument shell: unknown value 'bsh'; did you mean 'bash'? known: bash"),
    (["rm", "demo"], "model 'demo' is a part of tpllm and cannot be removed"),
    (["inspect", "demo", "--quantization", "int-4"], "quantization is 'int-4'; did you mean 'int4'?"),
    (["inspect", "dmo"], "there is no such folder or file; did you mean 'demo'? give a folder, a GGUF file, a hub id"),
    (["--cpu-devices", "0", "inspect", "demo"], "--cpu-devices is 0"),
    (["--cpu-devices", "many", "inspect", "demo"], "--cpu-devices"),
    (["bench", "latncy"], "unknown value 'latncy'; did you mean 'latency'? known: latency, throughput, serve-sim, quality; see tpllm bench --help"),
])
def test_a_command_that_cannot_run_is_one_line_and_code_2(capsys, words, message):
    assert exit_code(*words) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize("words", [["generate", "--model", "fake"], ["chat", "--model", "fake"]])
def test_standard_input_that_is_no_text_is_one_line_and_code_2(capsys, monkeypatch, words):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a \xff\n"), "utf-8"))
    assert exit_code(*words) == 2
    assert "from standard input: 'utf-8' codec can't decode byte 0xff" in error_line(capsys)


def test_an_error_that_is_ours_is_not_hidden(job_file):
    class Broken(FakeLLM):
        def __init__(self, *_, max_num_seqs=4, **__):
            raise ValueError("a fault of the program")
    with pytest.raises(ValueError, match="a fault of the program"):
        main(["run", job_file], make_llm=Broken)


def test_bench_gives_its_words_to_the_benchmark(monkeypatch, capsys):
    seen = []
    bench = types.ModuleType("tpllm.bench.latency", "Latency.")
    bench.add_arguments = lambda parser: parser.add_argument("--shape")
    bench.run = lambda args: seen.append(args.shape)
    monkeypatch.setitem(sys.modules, "tpllm.bench.latency", bench)
    assert exit_code("bench", "latency", "--shape", "tinyllama-1.1b") == 0
    assert seen == ["tinyllama-1.1b"]
    assert exit_code("bench", "latency", "--shap") == 2
    assert "unknown option '--shap'; did you mean '--shape'? see tpllm bench latency --help" in error_line(capsys)


@pytest.mark.parametrize("words", [
    ["--help"], ["run", "--help"], ["generate", "--help"], ["chat", "--help"], ["inspect", "--help"], ["bench", "--help"], ["list", "--help"],
    ["fetch", "--help"], ["rm", "--help"], ["doctor", "--help"], ["--version"], ["generate", "-V"]])
def test_help_loads_no_jax(words):
    script = f"import sys\nfrom tpllm.cli.main import main\ntry:\n main({words!r})\nexcept SystemExit as stop:\n assert stop.code == 0\n" \
             "assert not {'jax', 'numpy', 'torch', 'rich'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage: tpllm" in done.stdout or __version__ in done.stdout


def test_inspect_as_json_counts_what_is_on_each_device(capsys):
    reports = []
    for mesh in ("tp=1", "tp=2"):
        assert exit_code("inspect", "demo", "--mesh", mesh, "--json") == 0
        reports.append(json.loads(capsys.readouterr().out))
    one, two = reports
    assert one["dtype"] == "bfloat16"
    assert one["num_parameters"] * 2 == one["weight_bytes_per_device"]
    assert one["config"] == two["config"]
    for whole, half in zip(one["parameters"], two["parameters"], strict=True):
        is_cut = "tp" in half["sharding"]
        assert whole["bytes_per_device"] == half["bytes_per_device"] * (2 if is_cut else 1)
        assert is_cut == any(axis in ("heads", "kv_heads", "mlp", "vocab") for axis in half["axes"])
    config = one["config"]
    kv_bytes = 2 * config["num_layers"] * config["num_kv_heads"] * config["head_dim"]
    assert one["kv_bytes_per_token_per_device"] == {"float32": 4 * kv_bytes, "bfloat16": 2 * kv_bytes, "float16": 2 * kv_bytes}
    assert two["kv_bytes_per_token_per_device"]["float32"] == 2 * kv_bytes


def test_inspect_as_text_shows_one_line_for_all_layers_of_a_parameter(capsys):
    assert exit_code("inspect", "demo", "--mesh", "tp=2") == 0
    out = capsys.readouterr().out
    line, = [line for line in out.splitlines() if line.startswith("layers.*.attn.q ")]
    assert line.split()[-4:-1] == ["embed", "tp", "-"]
    assert "mesh tp=2 (cpu)" in out
    assert "KV cache: bytes a token a device:" in out


@pytest.mark.parametrize(("words", "message"), [
    (["none-such-folder"], "none-such-folder"),
    (["demo", "--mesh", "tp=512"], "needs 512 devices"),
    (["demo", "--mesh", "xy=2"], "unknown axis 'xy'"),
    (["demo", "--dtype", "float8"], "dtype is 'float8'"),
])
def test_inspect_refuses_in_one_line(capsys, words, message):
    assert exit_code("inspect", *words) == 2
    assert message in error_line(capsys)


def test_cpu_devices_makes_virtual_devices_for_a_mesh():
    words = ["inspect", "demo", "--mesh", "tp=2", "--cpu-devices", "2"]
    script = f"import sys\nfrom tpllm.cli.main import main\nsys.exit(main({words!r}))"
    environment = {"PATH": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "mesh tp=2 (cpu)" in done.stdout
