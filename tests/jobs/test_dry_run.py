"""A dry run finds what a run would find, foretells its time from the job's own rows, and writes nothing."""
import dataclasses
import json
import os
import pathlib
from types import SimpleNamespace

import pytest

from tests.jobs.fake_llm import FakeLLM
from tests.jobs.small_job import all_errors, rows_text
from tpllm.cli.main import main
from tpllm.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from tpllm.engine.sampling_params import SamplingParams
from tpllm.errors import JobError, TokenizerError
from tpllm.jobs.config import JobConfig
from tpllm.jobs.dry_run.run import check_writable, dry_run
from tpllm.jobs.dry_run.speed import SampleRow, measure_speed
from tpllm.jobs.dry_run.text import describe
from tpllm.jobs.outputs.lock import held_for_writing
from tpllm.jobs.runner import run_job

REPOSITORY = pathlib.Path(__file__).parents[2]
CONTEXT = 40
LOAD_S, COMPILE_S, PROMPT_S, TOKEN_S = 10.0, 20.0, 0.01, 0.05


class Words:
    """A tokenizer of words: each is its length."""

    splits_special = False

    def encode(self, text, *, parse_special=None):
        return [len(word) for word in text.split()]

    def chat_prompt(self, messages, *, template_kwargs=None):
        if messages[0]["role"] != "user":
            raise TokenizerError("the template says: begin with the user")
        return messages[0]["content"], [1, *self.encode(messages[0]["content"])]


class Paced(FakeLLM):
    """Takes a fixed time for each token, on a clock of its own; a completion ends by itself at the length that is its prompt's first id."""

    now = 0.0

    def __init__(self, model, *, max_num_seqs=4, **options):
        super().__init__(model, max_num_seqs=max_num_seqs, **options)
        self.shapes = SimpleNamespace(max_num_seqs=max_num_seqs, max_model_len=CONTEXT)
        self.config = SimpleNamespace(vocab_size=1000)
        self.is_compiled = False
        type(self).now += LOAD_S

    def get_tokenizer(self):
        return Words()

    def generate_iter(self, requests, *, on_error="raise"):
        for number, (prompt, params) in enumerate(requests):
            ids = prompt["prompt_token_ids"]
            limit = min(params.max_tokens or CONTEXT, CONTEXT - len(ids))
            length = limit if params.ignore_eos else min(limit, ids[0])
            type(self).now += params.n * (len(ids) * PROMPT_S + (length - 1) * TOKEN_S)
            if not self.is_compiled:
                type(self).now += COMPILE_S
                self.is_compiled = True
            outputs = [CompletionOutput(index, "x", [1] * length, finish_reason="length" if length == limit else "stop") for index in range(params.n)]
            yield RequestOutput(str(number), None, ids, outputs, RequestMetrics(0.0), finished=True)


class NeverMade(FakeLLM):
    def __init__(self, *_, max_num_seqs=4, **__):
        raise AssertionError("no model is needed")


@pytest.fixture
def look():
    """A dry run on the clock of its engine."""
    def look(job, make_llm=Paced, **options):
        Paced.now = 0.0
        return dry_run(job, make_llm=make_llm, clock=lambda: Paced.now, **options)
    return look


def prompts(*texts: str, **keys) -> str:
    return "".join(json.dumps({"prompt": text, **keys}) + "\n" for text in texts)


def tree(folder: pathlib.Path) -> dict[str, tuple[bytes | None, int]]:
    return {str(path): (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def test_rows_and_tokens_are_counted_exactly(make_job, look):
    text = prompts("a bb ccc", "dddd", sampling={"max_tokens": 5}) + prompts("x y", sampling={"n": 3}) + \
        '{"messages": [{"role": "user", "content": "e f g"}], "sampling": {"max_tokens": 100}}\n'
    counts = look(make_job(text)).counts
    assert (counts.num_rows, counts.num_tokenized, counts.num_prompts, counts.num_completions) == (4, 4, 4, 6)
    assert counts.prompt_tokens == 3 + 1 + 2 + 4
    assert counts.prefill_tokens == 3 + 1 + 3 * 2 + 4
    assert counts.completion_tokens == 5 + 5 + 3 * (CONTEXT - 2) + (CONTEXT - 4)
    assert counts.longest_prompt == 4
    assert not counts.is_sample


def test_every_row_that_would_fail_is_counted_and_the_first_are_named_with_file_and_line(make_job, look):
    text = prompts("a") + "{torn\n\n" + prompts("w " * CONTEXT, "") + '{"messages": [{"role": "system", "content": "x"}]}\n' \
        '{"prompt_token_ids": [1, 1000]}\n{"prompt": "b", "sampling": {"top_p": 9}}\n{"none": 1}\n'
    run = look(make_job(text))
    counts = run.counts
    assert (counts.num_rows, counts.num_unreadable, counts.num_refused, counts.num_too_long) == (8, 3, 4, 1)
    path = make_job(text).input
    assert [reason.split(": ", 1)[0] for reason in counts.reasons] == [f"row {row} ({path} line {line})" for row, line in
                                                                      ((1, 2), (2, 4), (3, 5), (4, 6), (5, 7))]
    assert "not JSON" in counts.reasons[0]
    assert f"the prompt has {CONTEXT} tokens" in counts.reasons[1]
    assert "begin with the user" in counts.reasons[3]
    assert "token id 1000" in counts.reasons[4]
    assert "would fail   7 of 8 rows, the first:" in "\n".join(describe(run))


def test_of_many_rows_an_evenly_spaced_sample_is_tokenized_and_said_so_and_all_are_parsed(make_job, look):
    text = prompts(*("a " * (1 + number % 7) for number in range(1000)), sampling={"max_tokens": 3}) + "{torn\n" * 9
    run = look(make_job(text), max_tokenized=100)
    counts = run.counts
    assert (counts.num_rows, counts.num_unreadable) == (1009, 9)
    assert 90 <= counts.num_tokenized <= 100
    assert counts.is_sample
    assert counts.prompt_tokens * counts.scale == pytest.approx(sum(1 + number % 7 for number in range(1000)), rel=0.05)
    assert counts.completion_tokens * counts.scale == pytest.approx(3000)
    shown = "\n".join(describe(run))
    assert f"every row was parsed; tokens were counted in {counts.num_tokenized} evenly spaced rows" in shown
    assert "prompts      about 1000 with " in shown


def test_the_time_is_what_the_engine_takes_for_all_rows(make_job, look):
    lengths = [3, 6, 9, 6] * 25
    job = make_job(prompts(*("w" * length + " b" * (length - 1) for length in lengths), sampling={"max_tokens": 20}))
    run = look(job)

    def seconds(lengths, completion):
        return LOAD_S + COMPILE_S + sum(length * PROMPT_S + (completion(length) - 1) * TOKEN_S for length in lengths)
    assert run.most_seconds == pytest.approx(seconds(lengths, lambda length: 20), rel=0.1)
    assert run.likely_seconds == pytest.approx(seconds(lengths, lambda length: length), rel=0.3)
    assert run.likely_seconds < run.most_seconds
    assert run.startup_seconds == pytest.approx(LOAD_S + COMPILE_S, rel=0.1)
    assert run.speed.num_prompts == 3
    assert run.speed.num_seconds < 20


def test_completions_that_would_not_end_within_the_measurement_leave_only_the_most(make_job, look, monkeypatch):
    monkeypatch.setattr("tests.jobs.test_dry_run.TOKEN_S", 5.0)
    run = look(make_job(prompts(*["w" * 30] * 9, sampling={"max_tokens": 30})))
    assert run.likely_seconds is None
    assert run.most_seconds > 9 * 25 * 5.0
    assert "only the most is known" in "\n".join(describe(run))


def test_rows_of_a_single_token_are_timed_too(make_job, look):
    run = look(make_job(prompts("a b", "c d", sampling={"max_tokens": 1})))
    assert run.speed.completion_rate is None
    assert run.most_seconds == pytest.approx(LOAD_S + COMPILE_S + 4 * PROMPT_S, rel=0.1)


def test_the_rows_that_a_dry_run_counts_as_failing_are_those_that_fail(make_job, look):
    job = make_job(rows_text(11, bad=(1, 7)))
    run = look(job)
    run_job(job, make_llm=FakeLLM)
    assert run.counts.num_unreadable == len(all_errors(pathlib.Path(job.output))) == 2


def test_nothing_is_written_whether_the_output_is_there_or_not(make_job, look, tmp_path):
    job = make_job(rows_text(11))
    before = tree(tmp_path)
    look(job)
    assert tree(tmp_path) == before
    assert not pathlib.Path(job.output).exists()


class Dies(Paced):
    def generate_iter(self, *arguments, **options):
        for number, output in enumerate(FakeLLM.generate_iter(self, *arguments, **options)):
            if number == 5:
                raise RuntimeError("the engine is gone")
            yield output


def test_of_a_job_that_was_begun_only_what_is_left_is_counted(make_job, look, tmp_path):
    job = make_job(rows_text(11))
    with pytest.raises(RuntimeError):
        run_job(job, make_llm=Dies)
    (next(pathlib.Path(job.output).glob("journal-*")).with_name("part-00003.jsonl.tmp")).write_text("half")
    before = tree(tmp_path)
    run = look(job)
    assert (run.num_done, run.counts.num_rows) == (5, 6)
    assert tree(tmp_path) == before
    assert "5 are finished, 6 are left" in "\n".join(describe(run))


def test_a_complete_job_has_nothing_left_and_loads_no_model(make_job, look):
    job = make_job(rows_text(11))
    run_job(job, make_llm=FakeLLM)
    run = look(job, make_llm=NeverMade)
    assert run.counts is None
    assert "nothing is left to do" in "\n".join(describe(run))


def test_a_shard_is_counted_alone(make_job, look):
    run = look(make_job(rows_text(11), shard="1/2"))
    assert run.counts.num_rows == run.parts.num_rows == 5
    assert "(shard 1/2)" in "\n".join(describe(run))


def test_a_job_that_runs_now_is_said(make_job, look):
    job = make_job(rows_text(11))
    run_job(make_job(rows_text(11)), make_llm=Paced2)
    with held_for_writing(pathlib.Path(job.output)):
        assert f"another process (pid {os.getpid()}) runs this job now" in "\n".join(describe(look(job)))


class Paced2(Paced):
    """Runs whole jobs as the fake engine does."""

    def generate_iter(self, *arguments, **options):
        return FakeLLM.generate_iter(self, *arguments, **options)


def test_where_no_row_would_run_there_is_no_time(make_job, look):
    run = look(make_job("{torn\n{torn\n"))
    assert run.speed is None
    assert "no row would run" in "\n".join(describe(run))


@pytest.mark.parametrize(("changes", "message"), [
    ({"seed": 1}, r"belongs to another job: seed was 0 and is now 1"),
    ({"engine": {"max_num_seqs": 2}}, r"begun in another environment: engine.max_num_seqs was 3 and is now 2"),
    ({"shard": "0/2"}, r"holds a job that is not sharded"),
    ({"input": "none.jsonl"}, r"none.jsonl"),
])
def test_what_would_keep_a_run_from_beginning_is_refused_in_the_same_words(make_job, look, tmp_path, changes, message):
    job = make_job(rows_text(11))
    with pytest.raises(RuntimeError):
        run_job(job, make_llm=Dies)
    before = tree(tmp_path)
    changed = dataclasses.replace(job, **changes)
    with pytest.raises(JobError, match=message):
        look(changed)
    assert tree(tmp_path) == before
    with pytest.raises(JobError, match=message):
        run_job(changed, make_llm=Paced)


def test_other_weights_than_those_the_job_was_begun_with_are_refused(make_job, look):
    class Retrained(Paced):
        def fingerprint(self):
            return {**super().fingerprint(), "model": {"name": "fake", "sha256": "1" * 8}}
    job = make_job(rows_text(11))
    with pytest.raises(RuntimeError):
        run_job(job, make_llm=Dies)
    with pytest.raises(JobError, match=r"belongs to another job: model.sha256 was '00000000' and is now '11111111'"):
        look(job, make_llm=Retrained)


def test_rows_of_one_custom_id_are_refused(make_job, look):
    with pytest.raises(JobError, match=r"custom_id 'a' is on row 0"):
        look(make_job('{"custom_id": "a", "prompt": "x"}\n{"custom_id": "a", "prompt": "y"}\n'))


def test_parts_without_a_manifest_are_refused(make_job, look):
    job = make_job(rows_text(3))
    pathlib.Path(job.output).mkdir()
    (pathlib.Path(job.output) / "part-00000.jsonl").write_text("mine\n")
    with pytest.raises(JobError, match=r"holds parts of a job \(part-00000.jsonl\) but no manifest.json"):
        look(job)


def test_an_output_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for name in ("file", "file/deeper"):
        with pytest.raises(JobError, match=r"cannot write to the output folder .*file.*Not a directory"):
            check_writable(tmp_path / name)
    check_writable(tmp_path / "new" / "deeper")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(JobError, match=r"cannot write to the output folder .*Permission denied"):
        check_writable(tmp_path / "new")


@pytest.mark.parametrize("words", [["JOB", "--dry-run"], ["--dry-run", "JOB"], ["JOB", "--seed", "3", "--dry-run"],
                                   ["JOB", "--dry-run", "--seed", "3"], ["--dry-run", "--shard", "0/1", "JOB"]])
def test_the_command_takes_the_option_before_and_after_the_file(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("rows.jsonl").write_text(rows_text(5))
    pathlib.Path("job.yaml").write_text("model: fake\ninput: rows.jsonl\noutput: out\n")
    before = tree(tmp_path)
    assert main(["run", *("job.yaml" if word == "JOB" else word for word in words)], make_llm=Paced) == 0
    out, _ = capsys.readouterr()
    assert "5 are left" in out
    assert out.endswith("Nothing was written.\n")
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_on_the_real_engine_the_tokens_are_those_of_the_run(tmp_path):
    rows = [{"prompt": "def f(x):\n" * (1 + number)} for number in range(6)]
    rows += [{"messages": [{"role": "user", "content": "Write a loop."}]}, {"prompt": "x " * 100}, {"prompt": ""}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = JobConfig(model="demo", input=str(tmp_path / "rows.jsonl"), output=str(tmp_path / "out"), mesh="tp=1",
                    engine={"max_num_seqs": 4, "max_model_len": 96}, sampling={"temperature": 0, "max_tokens": 6})
    run = dry_run(job)
    assert not (tmp_path / "out").exists()
    run_job(job)
    done = [json.loads(line) for line in (tmp_path / "out" / "part-00000.jsonl").read_text().splitlines()]
    assert run.counts.prompt_tokens == sum(row["usage"]["prompt_tokens"] for row in done)
    assert run.counts.completion_tokens >= sum(row["usage"]["completion_tokens"] for row in done)
    assert run.counts.num_refused == len(rows) - len(done) == 2
    assert 0 < run.likely_seconds <= run.most_seconds


class Timed:
    """An engine whose clock goes on by the tokens that it computes and draws, and that draws all that are asked for."""

    shapes = SimpleNamespace(max_model_len=1000)

    def __init__(self):
        self.now, self.asked = 0.0, []

    def generate_iter(self, requests, *, on_error):
        for index, (prompt, params) in enumerate(requests):
            self.asked.append(params)
            self.now += PROMPT_S * len(prompt["prompt_token_ids"]) + TOKEN_S * params.n * (params.max_tokens - 1)
            completions = [CompletionOutput(index=number, token_ids=[1] * params.max_tokens, finish_reason="length") for number in range(params.n)]
            yield RequestOutput(request_id=str(index), prompt=None, prompt_token_ids=prompt["prompt_token_ids"], outputs=completions, finished=True,
                                metrics=RequestMetrics(arrival_time=0.0))


def test_a_sample_is_measured_within_its_time_and_ends_under_the_rows_own_parameters():
    engine, row = Timed(), SampleRow([7] * 300, SamplingParams(n=3, min_tokens=5))
    speed = measure_speed(engine, [row, row], budget_s=60.0, clock=lambda: engine.now)
    assert speed.prompt_rate == pytest.approx(3 * 600 / 6)
    assert speed.completion_rate == pytest.approx(1 / TOKEN_S)
    assert 50 < speed.num_seconds <= 60
    assert engine.asked[-1].min_tokens == 5 < engine.asked[-1].max_tokens
