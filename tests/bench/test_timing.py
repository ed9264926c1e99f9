"""What times come to, and what a run asks of the engine."""
import jax
import pytest

from tpllm.bench.bandwidth import Bandwidth, device_bandwidth, host_bandwidth
from tpllm.bench.report import bandwidth_entry, decode_reads
from tpllm.bench.timing import RunTimes, Workload
from tpllm.bench.traffic import Traffic
from tpllm.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from tpllm.errors import TpllmError

WORKLOAD = {"batch_size": 2, "prompt_len": 100, "output_len": 11}


class RecordingLLM:
    """Gives every row its tokens, the first after 1, 2, ... seconds, and keeps what it was asked."""

    def __init__(self, num_missing: int = 0):
        self.num_missing, self.calls = num_missing, []

    def generate(self, prompts, params, *, use_tqdm):
        self.calls.append((prompts, params))
        completion = CompletionOutput(index=0, token_ids=[7] * (params.max_tokens - self.num_missing), finish_reason="error", error="NaN")
        return [RequestOutput(request_id=str(row), prompt=None, prompt_token_ids=[], outputs=[completion],
                              metrics=RequestMetrics(arrival_time=50.0, first_token_time=51.0 + row)) for row in range(len(prompts))]


def test_speeds_are_of_medians_and_of_all_rows():
    runs = [RunTimes(short=2.0, long=7.0, ttft=1.5), RunTimes(short=4.0, long=8.0, ttft=1.0), RunTimes(short=1.0, long=90.0, ttft=9.0)]
    speeds = Workload(50, **WORKLOAD).speeds(runs)
    assert speeds.ttft_s == 1.5
    assert speeds.prefill_tokens_per_s == 2 * 100 / 2.0
    assert speeds.step_s == (7.0 - 2.0) / 10  # the differences are 5, 4 and 89; the first token is the prefill's
    assert speeds.decode_tokens_per_s == 2 * 10 / 5.0


def test_a_decode_too_short_for_the_clock_has_no_speed():
    speeds = Workload(50, **WORKLOAD).speeds([RunTimes(short=2.0, long=1.9, ttft=1.0)])
    assert speeds.step_s is None
    assert speeds.decode_tokens_per_s is None
    reads = decode_reads(Traffic(weight_bytes=1, weight_bytes_read=1, kv_bytes_valid=1, batch_size=1), speeds, Bandwidth((1.0,)))
    assert reads["bytes_per_s"] is reads["share_of_median_bandwidth"] is reads["share_of_best_bandwidth"] is None


def test_a_run_is_one_token_then_many_from_fresh_prompts_past_eos():
    llm = RecordingLLM()
    assert Workload(50, **WORKLOAD).time_run(llm).ttft == 1.5
    (short_prompts, short), (long_prompts, long) = llm.calls
    assert (short.max_tokens, long.max_tokens) == (1, 11)
    assert short.is_greedy
    assert short.ignore_eos
    prompts = [prompt["prompt_token_ids"] for prompt in short_prompts + long_prompts]
    assert [len(prompt) for prompt in prompts] == [100] * 4
    assert len(set(map(tuple, prompts))) == 4
    assert {type(token) for prompt in prompts for token in prompt} == {int}
    assert max(map(max, prompts)) < 50


def test_a_row_that_fails_is_no_result():
    with pytest.raises(TpllmError, match="gave 0 of 1 tokens: NaN"):
        Workload(50, **WORKLOAD).time_run(RecordingLLM(num_missing=1))


def test_the_share_is_what_a_step_reads_over_its_time_and_the_bandwidth():
    traffic = Traffic(weight_bytes=1000, weight_bytes_read=800, kv_bytes_valid=200, batch_size=2)
    speeds = Workload(50, **WORKLOAD).speeds([RunTimes(short=1.0, long=6.0, ttft=1.0)])  # half a second a step
    reads = decode_reads(traffic, speeds, Bandwidth((2500.0,)) + Bandwidth((4000.0, 2000.0)))
    assert reads["bytes_per_step"] == 1000
    assert reads["bytes_per_token"] == 500
    assert reads["bytes_per_s"] == 2000
    assert reads["share_of_median_bandwidth"] == 2000 / 2500
    assert reads["share_of_best_bandwidth"] == 2000 / 4000


def test_bandwidth_of_the_host_and_of_devices_is_a_sample_a_pass():
    host = host_bandwidth(2**24, num_passes=3)
    devices = device_bandwidth(jax.local_devices()[:2], num_passes=2, num_bytes=2**16)
    assert (len(host.samples), len(devices.samples)) == (3, 2)
    assert min(host.samples + devices.samples) > 0
    entry = bandwidth_entry(host, "host memory")
    assert entry["samples_bytes_per_s"] == list(host.samples)
    assert entry["best_bytes_per_s"] == max(host.samples)
    assert entry["median_bytes_per_s"] == sorted(host.samples)[1]
