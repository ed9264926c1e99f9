"""Nothing ends the thread of an AsyncLLM but its close, and whoever waits gets an answer."""
import asyncio
import concurrent.futures
import contextlib
import dataclasses
import threading

import pytest

import tpllm.async_llm
from tests.engine.conftest import make_llm, random_prompts
from tests.facade.test_async_llm import GREEDY, last
from tpllm import AsyncLLM
from tpllm.errors import ConfigError

LONG = dataclasses.replace(GREEDY, max_tokens=110, ignore_eos=True)
PROMPT = random_prompts(6)[0]


@pytest.fixture(scope="module")
def expected():
    """Tokens of the prompt alone."""
    return make_llm().generate(PROMPT, GREEDY)[0].outputs[0].token_ids


@pytest.fixture(scope="module")
def survivor():
    """One AsyncLLM for whatever these tests do to it."""
    llm = AsyncLLM(make_llm())
    yield llm
    llm.close()
    assert not llm._thread.is_alive()


@pytest.fixture
def served(survivor, expected):
    """It serves after the test as it did before."""
    yield survivor

    async def serve():
        return await asyncio.wait_for(last(survivor.generate(PROMPT, GREEDY)), 60), await asyncio.wait_for(survivor.metrics(), 60)
    output, metrics = asyncio.run(serve())
    assert output.outputs[0].token_ids == expected
    assert (metrics.num_running, metrics.num_pages_used) == (0, 0)


def in_a_loop_that_closes(coroutine, *, is_cancelled: bool = False) -> None:
    """Begin a coroutine, and close its event loop before it has ended."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(coroutine)
    loop.run_until_complete(asyncio.sleep(0.01))
    if is_cancelled:
        task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
    task._log_destroy_pending = False
    loop.close()


def test_an_event_loop_that_is_closed_ends_its_requests_and_no_others(served):
    async def begin():
        iterator = served.generate(PROMPT, LONG)
        await anext(iterator)
        return iterator
    num_aborted = asyncio.run(served.metrics()).num_ended.get("abort", 0)
    loop = asyncio.new_event_loop()
    iterator = loop.run_until_complete(begin())
    loop.close()
    for _ in range(3):
        in_a_loop_that_closes(served.metrics())
        in_a_loop_that_closes(served.reset_prefix_cache())

    async def wait_until_idle():
        while (await served.metrics()).num_running:
            await asyncio.sleep(0.01)
        return await served.metrics()
    metrics = asyncio.run(asyncio.wait_for(wait_until_idle(), 60))
    assert metrics.num_ended["abort"] == num_aborted + 1, "nobody reads it any more"
    assert iterator.ag_frame is not None


def test_a_question_that_nobody_waits_for_any_more_harms_nothing(served, caplog):
    async def ask():
        for _ in range(20):
            task = asyncio.create_task(served.metrics())
            await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(served.metrics(), 1e-9)
        return await served.metrics()
    assert asyncio.run(ask()).num_waiting == 0
    assert not caplog.records
    in_a_loop_that_closes(served.metrics(), is_cancelled=True)


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt("no"), SystemExit(1), StopIteration("no"), asyncio.CancelledError("no")],
                         ids=lambda error: type(error).__name__)
def test_a_question_that_fails_gives_its_error_to_who_asked(served, monkeypatch, error):
    def fail():
        raise error
    monkeypatch.setattr(served._llm, "metrics", fail)

    async def ask():
        with pytest.raises(Exception) as caught:  # noqa: PT011
            await asyncio.wait_for(served.metrics(), 60)
        return caught.value
    found = asyncio.run(ask())
    assert found is error or repr(error) in str(found)
    monkeypatch.undo()


@pytest.mark.parametrize("error", [RuntimeError("no room"), KeyboardInterrupt("no room"), SystemExit("no room"), MemoryError("no room")],
                         ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("name", ["dispatch", "plan"])
def test_a_step_that_fails_is_an_error_for_all_that_wait_and_for_nobody_after(served, monkeypatch, name, error):
    owner = served._engine.runner if name == "dispatch" else served._engine.scheduler
    function, fails = getattr(owner, name), iter([False, True])

    def fail_once(*args):
        if next(fails, False):
            raise error
        return function(*args)
    monkeypatch.setattr(owner, name, fail_once)

    async def ask():
        return await asyncio.wait_for(asyncio.gather(*(last(served.generate(prompt, GREEDY)) for prompt in random_prompts(*[5] * 9))), 60)
    outputs = asyncio.run(ask())
    failed = [output.outputs[0].error for output in outputs if output.outputs[0].finish_reason == "error"]
    assert failed
    assert all("no room" in message and type(error).__name__ in message for message in failed)
    assert all(len(output.outputs[0].token_ids) == 12 for output in outputs if output.outputs[0].finish_reason == "length")


def test_an_output_that_cannot_be_shown_is_an_error_for_the_one_who_waits(served, monkeypatch):
    def fail(request):
        raise MemoryError("no room")
    monkeypatch.setattr(tpllm.async_llm, "output_so_far", fail)
    output = asyncio.run(asyncio.wait_for(last(served.generate(PROMPT, LONG)), 60))
    monkeypatch.undo()
    assert output.outputs[0].finish_reason == "error"
    assert "no room" in output.outputs[0].error


def test_two_event_loops_share_it_and_a_request_id_is_unique_among_both(served, expected):
    def in_its_own_loop(_):
        async def ask():
            return await asyncio.gather(*(last(served.generate(PROMPT, GREEDY)) for _ in range(3)))
        return [output.outputs[0].token_ids for output in asyncio.run(ask())]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(in_its_own_loop, range(4))) == [[expected] * 3] * 4

    async def twice():
        iterator = served.generate(PROMPT, LONG, request_id="x")
        await anext(iterator)

        def other_loop():
            with pytest.raises(ConfigError, match="'x' runs already"):
                asyncio.run(last(served.generate(PROMPT, GREEDY, request_id="x")))
        await asyncio.to_thread(other_loop)
        await iterator.aclose()
    asyncio.run(twice())


def test_the_llm_below_may_be_used_meanwhile(served, expected):
    def use():
        return [served._llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids for _ in range(5)]

    async def ask():
        below = asyncio.to_thread(use)
        return await asyncio.gather(below, *(last(served.generate(PROMPT, GREEDY)) for _ in range(5)))
    below, *outputs = asyncio.run(asyncio.wait_for(ask(), 60))
    assert below == [expected] * 5
    assert [output.outputs[0].token_ids for output in outputs] == [expected] * 5


def test_an_abort_of_a_request_that_is_still_in_the_queue_ends_it(served):
    async def ask():
        running = [asyncio.create_task(last(served.generate(prompt, LONG))) for prompt in random_prompts(*[5] * 8)]
        iterator = served.generate(PROMPT, LONG, request_id="late")
        late = asyncio.create_task(last(iterator))
        await asyncio.sleep(0)
        await served.abort("late")
        output = await late
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        while (await served.metrics()).num_running:
            await asyncio.sleep(0.01)
        return output
    assert asyncio.run(asyncio.wait_for(ask(), 60)).outputs[0].finish_reason == "abort"


def test_closing_while_requests_run_ends_them_and_closing_again_waits_for_the_same():
    served = AsyncLLM(make_llm())

    async def ask():
        tasks = [asyncio.create_task(last(served.generate(prompt, LONG))) for prompt in random_prompts(*[5] * 9)]
        await asyncio.sleep(0.05)
        await asyncio.gather(*(asyncio.to_thread(served.close) for _ in range(3)))
        outputs = await asyncio.gather(*tasks)
        with pytest.raises(ConfigError, match="this AsyncLLM is closed"):
            await served.metrics()
        await served.abort("nobody")
        return outputs
    outputs = asyncio.run(asyncio.wait_for(ask(), 60))
    assert {output.outputs[0].finish_reason for output in outputs} <= {"abort", "length"}
    served.close()


def test_requests_that_race_with_its_closing_end_or_are_refused():
    served, refused = AsyncLLM(make_llm()), []
    timer = threading.Timer(0.3, served.close)

    async def ask():
        timer.start()
        while not refused:
            try:
                for answer in await asyncio.gather(last(served.generate(PROMPT, GREEDY)), served.metrics(), return_exceptions=True):
                    if isinstance(answer, Exception):
                        raise answer
            except ConfigError as error:
                refused.append(str(error))
    asyncio.run(asyncio.wait_for(ask(), 60))
    timer.join()
    assert "closed" in refused[0]


def test_closing_the_llm_below_ends_what_runs_and_refuses_the_rest_with_a_clear_word():
    llm = make_llm()
    served = AsyncLLM(llm)

    async def ask():
        iterator = served.generate(PROMPT, LONG)
        await anext(iterator)
        await asyncio.to_thread(llm.close)
        return await last(iterator), await last(served.generate(PROMPT, GREEDY))
    ended, refused = asyncio.run(asyncio.wait_for(ask(), 60))
    assert ended.outputs[0].finish_reason == "abort"
    assert "closed" in refused.outputs[0].error
    served.close()
