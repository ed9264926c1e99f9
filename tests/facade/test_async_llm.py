"""One engine behind many coroutines."""
import asyncio
import dataclasses
import itertools

import numpy as np
import pytest

from tests.engine.conftest import make_llm, make_packed_llm, random_prompts
from tpllm import AsyncLLM, SamplingParams
from tpllm.engine.sampling_params import RequestOutputKind
from tpllm.errors import ConfigError
from tpllm.model.config import ALL_LAYERS

GREEDY = SamplingParams(temperature=0, max_tokens=12)


async def last(iterator):
    """The finished output."""
    async for output in iterator:
        found = output
    return found


def serve(function, **options):
    """Run a coroutine function with an AsyncLLM that is closed afterwards."""
    async def main():
        async with AsyncLLM(make_llm(**options)) as llm:
            return await asyncio.wait_for(function(llm), 120)
    return asyncio.run(main())


@pytest.fixture
def token_by_token(monkeypatch):
    """Programs of one decode step, so that a request of many tokens is not at its end before anybody could have looked at it."""
    monkeypatch.setattr("tpllm.engine.pace.MAX_STEPS", 1)


def test_requests_that_come_and_go_get_the_tokens_they_get_alone():
    prompts = random_prompts(*[5, 40, 17, 3, 60] * 4)
    params = [SamplingParams(seed=index, max_tokens=4 + index, n=1 + index % 2) for index in range(20)]

    async def ask(llm):
        async def one(index):
            await asyncio.sleep(index % 7 / 100)
            return await last(llm.generate(prompts[index], params[index], request_id=str(index)))
        return await asyncio.gather(*(one(index) for index in range(20)))
    outputs = serve(ask)
    expected = make_llm().generate(prompts, params)
    assert [[sample.token_ids for sample in output.outputs] for output in outputs] == [
        [sample.token_ids for sample in output.outputs] for output in expected]
    assert all(output.finished for output in outputs)


@pytest.mark.usefixtures("token_by_token")
def test_outputs_grow_and_earlier_ones_do_not_change():
    async def ask(llm):
        return [output async for output in llm.generate(random_prompts(5)[0], dataclasses.replace(GREEDY, max_tokens=60))]
    outputs = serve(ask)
    tokens = [output.outputs[0].token_ids for output in outputs]
    assert len(tokens) > 2
    assert all(len(shorter) < len(longer) and longer[:len(shorter)] == shorter for shorter, longer in itertools.pairwise(tokens))
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


@pytest.mark.usefixtures("token_by_token")
def test_an_aborted_request_ends_with_what_it_has_and_the_others_go_on():
    async def ask(llm):
        long = dataclasses.replace(GREEDY, max_tokens=100)

        async def abort_after_some(request_id):
            async for output in llm.generate(random_prompts(9)[0], long, request_id=request_id):
                if not output.finished and len(output.outputs[0].token_ids) > 3:
                    await llm.abort(request_id)
            return output
        other = asyncio.create_task(last(llm.generate(random_prompts(5)[0], long)))
        aborted = await abort_after_some("a")
        await llm.abort("nobody")
        return aborted, await other, await llm.metrics()
    aborted, other, metrics = serve(ask)
    assert aborted.outputs[0].finish_reason == "abort"
    assert 3 < len(aborted.outputs[0].token_ids) < 100
    assert other.outputs[0].finish_reason == "length"
    assert metrics.num_pages_used == 0
    assert metrics.num_ended == {"abort": 1, "length": 1}


@pytest.mark.usefixtures("token_by_token")
def test_leaving_the_iterator_aborts_the_request():
    async def ask(llm):
        iterator = llm.generate(random_prompts(9)[0], dataclasses.replace(GREEDY, max_tokens=110))
        await anext(iterator)
        await iterator.aclose()
        for _ in range(200):
            metrics = await llm.metrics()
            if not metrics.num_running:
                break
            await asyncio.sleep(0.01)
        return metrics
    assert serve(ask).num_ended == {"abort": 1}


def test_a_request_that_cannot_be_served_ends_with_an_error_and_the_others_go_on():
    async def ask(llm):
        bad = [{"prompt_token_ids": []}, {"prompt_token_ids": [3] * 500}, 7, {"prompt_token_ids": [96]}]
        results = await asyncio.gather(*(last(llm.generate(prompt, GREEDY)) for prompt in [*bad, *random_prompts(6)]))
        wrong = await last(llm.generate(random_prompts(3)[0], {"temperature": 0}))
        return [*results, wrong]
    outputs = serve(ask)
    assert [output.outputs[0].finish_reason for output in outputs] == ["error"] * 4 + ["length", "error"]
    assert "120" in outputs[1].outputs[0].error
    assert all(output.outputs[0].error for output in outputs[:4])


def test_an_internal_error_ends_the_requests_it_hits_and_later_ones_are_served(monkeypatch):
    llm = make_llm()
    dispatch, failures = llm._engine.runner.dispatch, iter([False, True])
    monkeypatch.setattr(llm._engine.runner, "dispatch", lambda *args: 1 / 0 if next(failures, False) else dispatch(*args))

    async def main():
        async with AsyncLLM(llm) as served:
            failed = await last(served.generate(random_prompts(6)[0], GREEDY))
            return failed, await last(served.generate(random_prompts(6)[0], GREEDY))
    failed, fine = asyncio.run(main())
    assert failed.outputs[0].finish_reason == "error"
    assert "ZeroDivisionError" in failed.outputs[0].error
    assert fine.outputs[0].token_ids == make_llm().generate(random_prompts(6), GREEDY)[0].outputs[0].token_ids


def test_an_error_while_a_rows_tokens_are_read_ends_that_row_only(monkeypatch):
    llm = make_llm()
    push = llm._engine._logprobs

    def fail_for_seven(token, scores, at, *, count):
        if count == 7:
            raise RuntimeError("seven")
        return push(token, scores, at, count=count)
    monkeypatch.setattr(llm._engine, "_logprobs", fail_for_seven)
    broken, fine = llm.generate(random_prompts(4, 5), [dataclasses.replace(GREEDY, logprobs=7), dataclasses.replace(GREEDY, logprobs=2)])
    assert broken.outputs[0].finish_reason == "error"
    assert "seven" in broken.outputs[0].error
    assert fine.outputs[0].finish_reason == "length"
    assert llm.metrics().num_pages_used == 0


def test_two_requests_of_one_id_and_one_after_the_end_are_refused():
    async def ask(llm):
        iterator = llm.generate(random_prompts(4)[0], GREEDY, request_id="x")
        first = await anext(iterator)  # perhaps the last one already
        with pytest.raises(ConfigError, match="'x' runs already"):
            await anext(llm.generate(random_prompts(4)[0], GREEDY, request_id="x"))
        assert [first, *[output async for output in iterator]][-1].finished
        return llm
    llm = serve(ask)
    with pytest.raises(ConfigError, match="closed"):
        asyncio.run(last(llm.generate(random_prompts(4)[0], GREEDY)))
    llm.close()


def test_each_kind_of_output_tells_the_same_in_the_end(token_by_token):
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=1, n=2)

    async def ask(llm):
        kinds = [dataclasses.replace(params, output_kind=kind) for kind in RequestOutputKind]
        return [[output async for output in llm.generate(random_prompts(5)[0], kind, "x")] for kind in kinds]
    cumulative, deltas, final = serve(ask)
    assert len(cumulative) > 1
    assert len(deltas) > 1
    assert len(final) == 1
    for index, whole in enumerate(final[0].outputs):
        assert cumulative[-1].outputs[index] == whole
        assert [token for output in deltas for token in output.outputs[index].token_ids] == whole.token_ids
        assert [scores for output in deltas for scores in output.outputs[index].logprobs] == whole.logprobs
        assert "".join(output.outputs[index].text for output in deltas) == whole.text
    assert [output.finished for output in deltas] == [False] * (len(deltas) - 1) + [True]


def test_metrics_count_what_was_done_and_prometheus_reads_them():
    from prometheus_client.parser import text_string_to_metric_families
    llm = make_packed_llm(page_size=16)
    prompts = [{"prompt_token_ids": [*range(40), index]} for index in range(6)]
    llm.generate(prompts, GREEDY)
    metrics = llm.metrics()
    assert (metrics.num_requests, metrics.num_generated_tokens, metrics.num_ended) == (6, 72, {"length": 6})
    assert metrics.num_prefilled_tokens == 41 * 6 - 5 * 32
    assert metrics.prefix_hit_rate == pytest.approx(5 * 32 / (41 * 6))
    assert (metrics.num_running, metrics.num_waiting, metrics.num_pages_used, metrics.num_preemptions) == (0, 0, 0, 0)
    assert metrics.num_pages == 32
    assert metrics.ttft.num_values == 6
    assert metrics.inter_token.num_values == 66
    assert metrics.memory_roofline_share is None
    assert 0 < metrics.host_share < 1
    assert min(metrics.bytes_per_s, metrics.flops_per_s, metrics.tokens_per_s, metrics.busy_s) > 0
    families = {family.name: family for family in text_string_to_metric_families(metrics.to_prometheus())}
    assert families["tpllm_generated_tokens"].samples[0].value == 72
    assert families["tpllm_num_pages"].samples[0].value == 32
    assert families["tpllm_ended"].samples[0].labels == {"finish_reason": "length"}
    buckets = [sample.value for sample in families["tpllm_inter_token_seconds"].samples if sample.name.endswith("_bucket")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == 66
    assert metrics.to_dict()["ttft"]["num_values"] == 6
    assert families["tpllm_model_info"].samples[0].labels == {"kernels": llm.fingerprint()["kernels"], "quantization": "none"}
    assert "tpllm_load_s" not in families  # its parameters were given


def test_rows_of_a_lower_priority_come_first():
    llm, prompts = make_llm(max_num_seqs=1), random_prompts(3, 4, 5)
    outputs = llm.generate(prompts, GREEDY, priority=[2, 1, 0])
    assert [output.prompt_token_ids for output in outputs] == [prompt["prompt_token_ids"] for prompt in prompts]
    assert [output.request_id for output in outputs] == ["0", "1", "2"]
    ends = [output.metrics.finished_time for output in outputs]
    assert ends == sorted(ends, reverse=True)
    with pytest.raises(ConfigError, match="3 prompts but 2 priorities"):
        llm.generate(prompts, GREEDY, priority=[1, 2])
    with pytest.raises(ValueError, match="priority is 'x'"):
        llm.generate(random_prompts(3), GREEDY, priority=["x"])


def test_a_cache_too_small_for_a_prompt_says_so_and_cuts_what_would_outgrow_it():
    llm = make_llm(kv_cache_tokens=64, page_size=16)
    with pytest.raises(ValueError, match="the prompt has 64 tokens, but the whole KV cache holds 64"):
        llm.generate(random_prompts(64), GREEDY)
    output = llm.generate(random_prompts(50), SamplingParams(temperature=0, max_tokens=60))[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (14, "length")


@pytest.mark.parametrize(("options", "words"), [
    ({"kv_cache_tokens": 0}, "kv_cache_tokens is 0"), ({"kv_cache_tokens": 10**15}, "use at most"), ({"memory_share": 0}, "memory_share is 0"),
    ({"memory_share": 1e-12}, "no page of the KV cache fits"), ({"page_size": 24}, "page_size is 24"), ({"preemption": "x"}, "preemption is 'x'"),
    ({"preemption": "recompute"}, "use 'swap'"), ({"kv_cache_tokens": 64, "memory_share": 0.5}, "give one of them"),
    ({"max_num_seqs": 5000}, "at most 1024"),
])
def test_impossible_caches_are_refused_with_what_to_change(options, words):
    with pytest.raises(ValueError, match=words):
        make_llm(**options)


def test_an_aborted_requests_pages_are_free_at_once():
    llm = make_llm(page_size=16)
    request = llm.submit("0", random_prompts(60)[0], dataclasses.replace(GREEDY, max_tokens=50))
    for _ in range(3):
        llm._engine.step()
    assert llm.metrics().num_pages_used >= 4
    llm._engine.abort(request)
    assert llm.metrics().num_pages_used == 0
    assert np.all(llm._engine.scheduler.tables[ALL_LAYERS] == -1)
    assert llm.generate(random_prompts(5), GREEDY)[0].outputs[0].finish_reason == "length"
