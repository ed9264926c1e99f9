"""SIGTERM and SIGINT leave a resumable folder; a second signal, or a job that does not come to an end, ends the process all the same."""
import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from tests.jobs.fake_job_process import REPOSITORY, NoSleepLLM, end, start, wait_for
from tests.jobs.fake_llm import FakeLLM
from tests.jobs.small_job import contents, rows_text
from tpllm.jobs.runner import run_job
from tpllm.jobs.signals import GRACE_S, LAST_RITES_S, StopRequested, StopSignals

TEXT = rows_text(60)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_job_and_the_next_run_goes_on(make_job, run_text, number, code):
    job = make_job(TEXT, engine={"max_num_seqs": 3, "tick_s": 0.05})
    folder = pathlib.Path(job.output)
    process = start(job)
    wait_for(lambda: (folder / "part-00001.jsonl").exists(), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    assert "rows finished; give the same command again to go on" in errors
    result = run_job(job, make_llm=NoSleepLLM)
    assert result.is_complete
    assert 0 < result.num_new < 60
    whole = run_text(TEXT, output="whole", engine={"max_num_seqs": 3, "tick_s": 0.0})
    ours, theirs = contents(folder), contents(whole)
    assert ours.pop("manifest.json") != theirs.pop("manifest.json")  # only tick_s differs
    assert ours == theirs


def test_a_signal_interrupts_a_step_that_would_take_minutes(make_job):
    job = make_job(TEXT, engine={"max_num_seqs": 3, "tick_s": 600})
    process = start(job)
    process.send_signal(signal.SIGTERM)
    assert end(process) == 143


def test_a_stopped_job_reports_its_signal_to_a_caller_in_python(make_job):
    class Stops(FakeLLM):
        def generate_iter(self, *arguments, **options):
            for number, output in enumerate(super().generate_iter(*arguments, **options)):
                if number == 5:
                    os.kill(os.getpid(), signal.SIGINT)
                yield output
    former = signal.getsignal(signal.SIGINT)
    job = make_job(TEXT)
    result = run_job(job, make_llm=Stops)
    assert (result.signal, result.num_done, result.is_complete) == (signal.SIGINT, 5, False)
    assert signal.getsignal(signal.SIGINT) is former
    assert run_job(job, make_llm=FakeLLM).num_new == 55


def test_a_held_section_is_not_interrupted():
    steps = []
    with StopSignals() as stop:
        with stop.held():
            os.kill(os.getpid(), signal.SIGTERM)
            steps.append("written")
        steps.append("not reached")
    assert steps == ["written"]
    assert stop.number == signal.SIGTERM


def test_a_stop_that_is_swallowed_on_its_way_is_raised_again():
    with StopSignals() as stop:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except StopRequested:
            pass
        with pytest.raises(StopRequested):
            stop.check()


def test_a_job_outside_the_main_thread_runs_without_handlers(make_job):
    results = []
    thread = threading.Thread(target=lambda: results.append(run_job(make_job(TEXT), make_llm=FakeLLM)))
    thread.start()
    thread.join()
    assert results[0].is_complete


def run_script(script: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


STUCK = """
import time
from tpllm.jobs.signals import StopSignals
with StopSignals(grace_s={grace_s}) as stop, stop.held():
    stop.before_exit(lambda: print("synced", flush=True))
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""


def test_a_second_signal_ends_the_process_at_once():
    process = run_script(STUCK.format(grace_s=600))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: "SigPnd:\t0000000000000000" in pathlib.Path(f"/proc/{process.pid}/status").read_text(), process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode in (130, 143)
    assert output == ""


def test_a_job_that_does_not_come_to_an_end_is_ended_after_its_last_sync():
    process = run_script(STUCK.format(grace_s=0.2))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    assert output == "synced\n"


def test_the_grace_period_is_within_the_thirty_seconds_of_a_service_manager():
    assert GRACE_S + LAST_RITES_S < 30
