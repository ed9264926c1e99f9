"""A job file says exactly one thing, or is refused with the key, its line, and what to write instead."""
import dataclasses
import json
from collections.abc import Mapping

import pytest

from tpllm.engine.sampling_params import SamplingParams
from tpllm.errors import JobError, SamplingError
from tpllm.jobs.config import JobConfig, load_job
from tpllm.jobs.runner import check_engine_options, llm_class

JOB = "model: demo\ninput: in.jsonl\noutput: out\n"


@pytest.fixture
def load(tmp_path):
    def load(text, *overrides):
        path = tmp_path / "job.yaml"
        path.write_text(text)
        return load_job(path, overrides)
    return load


def test_the_defaults_are_those_of_the_dataclass(load):
    assert load(JOB) == JobConfig(model="demo", input="in.jsonl", output="out")


def test_every_key_is_read(load):
    job = load(JOB + "mesh: {tp: 4}\ndtype: float32\nseed: 7\nrows_per_part: 9\nshard: 1/3\nengine: {max_num_seqs: 2}\nsampling: {min_p: 1e-3}\n"
               "allow_environment_change: true\n")
    assert job == JobConfig(model="demo", input="in.jsonl", output="out", mesh={"tp": 4}, dtype="float32", seed=7, rows_per_part=9, shard="1/3",
                            engine={"max_num_seqs": 2}, sampling={"min_p": 0.001}, allow_environment_change=True)


@pytest.mark.parametrize(("words", "key", "value"), [
    (["--sampling.max-tokens", "32"], "sampling", {"temperature": 0, "max_tokens": 32}),
    (["--sampling.max_tokens=32"], "sampling", {"temperature": 0, "max_tokens": 32}),
    (["--sampling.stop-token-ids", "[1, 2]"], "sampling", {"temperature": 0, "stop_token_ids": [1, 2]}),
    (["--sampling", "{top_k: 3}"], "sampling", {"top_k": 3}),
    (["--engine.max-num-seqs", "4"], "engine", {"max_num_seqs": 4}),
    (["--model", "7"], "model", "7"),
    (["--mesh", "dp=2,tp=4"], "mesh", "dp=2,tp=4"),
    (["--mesh.tp", "2"], "mesh", {"tp": 2}),
    (["--seed=-1"], "seed", -1),
    (["--rows-per-part", "1", "--rows-per-part", "2"], "rows_per_part", 2),
    (["--shard", "2/3"], "shard", "2/3"),
    (["--allow-environment-change"], "allow_environment_change", True),
    (["--allow-environment-change", "false"], "allow_environment_change", False),
])
def test_the_command_line_sets_any_key(load, words, key, value):
    assert getattr(load(JOB + "sampling: {temperature: 0}\n", *words), key) == value


@pytest.mark.parametrize(("text", "message"), [
    (JOB + "modle: x\n", r"job.yaml line 4: unknown key 'modle'; did you mean 'model'\?"),
    (JOB + "sampling:\n  top_p: 1\n  max_tokns: 3\n", r"line 6: unknown key 'sampling.max_tokns'; did you mean 'sampling.max_tokens'\?"),
    (JOB + "zzzzzz: 1\n", r"unknown key 'zzzzzz'; known: model, input"),
    (JOB + "model: other\n", r"line 4: model is given twice; the first is on line 1"),
    (JOB + "sampling: {top_k: 1, top_k: 2}\n", r"sampling.top_k is given twice"),
    (JOB + "sampling: {top_k: 1\n", r"not valid YAML"),
    ("- a\n", r"a job file is a mapping"),
    ("", r"a job file is a mapping"),
    ("model: demo\noutput: out\n", r"input is missing; add 'input: ...' or give --input"),
    ("model:\noutput: out\n", r"model and input are missing"),
    (JOB + "rows_per_part: 0\n", r"rows_per_part is 0; it must be from 1"),
    (JOB + "rows_per_part: many\n", r"rows_per_part is 'many'; it must be a whole number"),
    (JOB + "rows_per_part: true\n", r"rows_per_part is True; it must be a whole number"),
    (JOB + "rows_per_part: 4.5\n", r"rows_per_part is 4.5; it must be a whole number"),
    (JOB + "seed: '7'\n", r"seed is '7'; it must be a whole number"),
    (JOB + "seed: .inf\n", r"seed is inf; it must be a whole number"),
    (JOB + "seed: 18446744073709551616\n", r"seed is 18446744073709551616; it must be from -9223372036854775808 to 18446744073709551615"),
    (JOB + "engine: 3\n", r"engine is 3; it must be a mapping"),
    (JOB + "mesh: 3\n", r"mesh is 3; it must be text such as"),
    (JOB + "allow_environment_change: 1\n", r"must be true or false"),
    (JOB.replace("demo", "''"), r"model is empty"),
    (JOB.replace("demo", "12"), r"model is 12; it must be text"),
    (JOB + "? [a]\n: 1\n", r"a key must be text"),
    (JOB + "when: !!python/object:os.system {}\n", r"."),
])
def test_a_bad_file_is_refused_with_what_is_wrong(load, text, message):
    with pytest.raises(JobError, match=message):
        load(text)


@pytest.mark.parametrize(("words", "message"), [
    (["--sampling.max-tokns", "3"], r"'--sampling.max-tokns'; did you mean '--sampling.max-tokens'\?"),
    (["--rows-per-prt", "3"], r"did you mean '--rows-per-part'"),
    (["--seed"], r"--seed has no value"),
    (["seed", "3"], r"'seed' is not an override"),
    (["--model.x", "3"], r"model is 'demo', which has no keys below it"),
    (["--sampling.stop-token-ids", "[1"], r"not valid YAML"),
])
def test_a_bad_override_is_refused(load, words, message):
    with pytest.raises(JobError, match=message):
        load(JOB, *words)


@pytest.mark.parametrize("values", ["temperature: -1", "top_p: 1.5", "n: 1000", "logprobs: 21", "temperature: hot"])
def test_a_sampling_value_out_of_range_is_refused_with_the_file(load, values):
    with pytest.raises(SamplingError, match=r"job.yaml: sampling: .* is "):
        load(JOB + "sampling: {" + values + "}\n")


def test_every_sampling_parameter_is_a_key(load):
    names = [field.name for field in dataclasses.fields(SamplingParams) if field.name != "output_kind"]  # a row is written when it is finished
    defaults = {name: getattr(SamplingParams(), name) for name in names}
    defaults["stop_token_ids"] = list(defaults["stop_token_ids"])
    assert sorted(load(JOB + f"sampling: {json.dumps(defaults)}\n").sampling) == sorted(names)


def test_a_missing_job_file_is_named(tmp_path):
    with pytest.raises(JobError, match=r"cannot read the job file .*none.yaml: No such file"):
        load_job(tmp_path / "none.yaml")


def test_a_job_cannot_give_up_that_its_rows_do_not_depend_on_their_batch(load):
    with pytest.raises(JobError, match=r"engine\.batch_invariant cannot be set in a job.*leave it out"):
        check_engine_options(load(JOB + "engine: {batch_invariant: false}\n"), lambda model, *, batch_invariant=True: None)


def test_a_token_of_the_hubs_does_not_get_into_a_manifest(load):
    with pytest.raises(JobError, match=r"unknown key 'engine\.hf_token'"):
        check_engine_options(load(JOB + "engine: {hf_token: secret}\n"), lambda model, *, hf_token=None, seed=0: None)


def test_more_log_probabilities_than_the_engine_reports_are_refused_with_the_file(load):
    with pytest.raises(SamplingError, match=r"job.yaml: sampling: logprobs is -1; .* made with max_logprobs=-1"):
        load(JOB + "sampling: {logprobs: -1}\n")
    assert load(JOB + "sampling: {logprobs: -1}\nengine: {max_logprobs: -1}\n").sampling == {"logprobs": -1}


def test_whole_floats_are_whole_numbers_wherever_one_is_asked_for(load):
    job = load(JOB + "seed: 1e3\nrows_per_part: 4.0\nsampling: {max_tokens: 3.0, top_k: 5e1, temperature: 1.0, stop_token_ids: [2.0], logit_bias: "
               "{5.0: 1.5}}\n", "--sampling.n", "2.0")
    assert (job.seed, job.rows_per_part) == (1000, 4)
    assert job.sampling == {"max_tokens": 3, "top_k": 50, "temperature": 1.0, "stop_token_ids": [2], "logit_bias": {5: 1.5}, "n": 2}
    whole = [job.seed, job.rows_per_part, *(job.sampling[key] for key in ("max_tokens", "top_k", "n")), *job.sampling["stop_token_ids"]]
    assert {type(value) for value in [*whole, *job.sampling["logit_bias"]]} == {int}
    assert type(job.sampling["temperature"]) is float
    with pytest.raises(SamplingError, match=r"max_tokens is 3.5; it must be a whole number"):
        load(JOB + "sampling: {max_tokens: 3.5}\n")


def make_typed(model, *, max_num_seqs: int | None = None, memory_share: float | None = None, enable_prefix_caching: bool = True,
               preemption: str = "auto", quantization: str | Mapping[str, str | None] | None = None, page_size: int | None = None):
    raise AssertionError


@pytest.mark.parametrize(("engine", "message"), [
    ("enable_prefix_caching: 'false'", r"engine.enable_prefix_caching is 'false'; it must be true or false"),
    ("enable_prefix_caching: 0", r"engine.enable_prefix_caching is 0; it must be true or false"),
    ("max_num_seqs: true", r"engine.max_num_seqs is True; it must be a whole number, or left out"),
    ("max_num_seqs: '4'", r"engine.max_num_seqs is '4'; it must be a whole number"),
    ("max_num_seqs: 4.5", r"engine.max_num_seqs is 4.5; it must be a whole number"),
    ("memory_share: yes", r"engine.memory_share is True; it must be a number"),
    ("memory_share: '0.5'", r"engine.memory_share is '0.5'; it must be a number"),
    ("preemption: no", r"engine.preemption is False; it must be text"),
    ("quantization: 4", r"engine.quantization is 4; it must be text or a mapping, or left out"),
])
def test_an_engine_value_of_another_type_is_refused_and_never_taken_for_true_or_one(load, engine, message):
    with pytest.raises(JobError, match=message):
        check_engine_options(load(JOB + f"engine: {{{engine}}}\n"), make_typed)


def test_engine_values_of_the_right_types_are_taken(load):
    text = "engine: {max_num_seqs: 4.0, memory_share: 1, enable_prefix_caching: no, page_size: null, quantization: {a: b}}\n"
    job = check_engine_options(load(JOB + text), make_typed)
    assert job.engine == {"max_num_seqs": 4, "memory_share": 1, "enable_prefix_caching": False, "page_size": None, "quantization": {"a": "b"}}
    assert type(job.engine["max_num_seqs"]) is int
    with pytest.raises(JobError, match=r"engine.enable_prefix_caching is 'no'"):
        check_engine_options(load(JOB + "engine: {enable_prefix_caching: 'no', max_num_seqs: 2}\n"), llm_class())


def test_engine_keys_are_those_of_the_constructor(load):
    def make_llm(model, *, mesh="auto", max_num_seqs=8, seed=0):
        raise AssertionError
    check_engine_options(load(JOB + "engine: {max_num_seqs: 2}\n"), make_llm)
    with pytest.raises(JobError, match=r"unknown key 'engine.max_num_seq'; did you mean 'engine.max_num_seqs'\? known: max_num_seqs"):
        check_engine_options(load(JOB + "engine: {max_num_seq: 2}\n"), make_llm)
    with pytest.raises(JobError, match=r"unknown key 'engine.seed'"):
        check_engine_options(load(JOB + "engine: {seed: 2}\n"), make_llm)
