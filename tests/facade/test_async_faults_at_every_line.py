"""An error at any line that AsyncLLM's thread runs: whoever waits gets an answer, and it serves on."""
import asyncio
import copy

import pytest

from tests.engine.conftest import make_llm
from tests.engine.fake_device import fake_engine
from tests.engine.line_faults import LineFaults, code_at, name_of
from tests.engine.test_failed_steps import PARAMS, PROMPTS, tokens_of
from tests.facade.test_async_llm import last
from tpllm import AsyncLLM, async_llm

LOOP_ITSELF = ("while not (self._is_closed", "try:", "with contextlib.suppress", "for stream in")
"""Lines of no work, whose failure is not looked for: they begin the handling of all others."""


async def leave(served):
    iterator = served.generate(PROMPTS[0], PARAMS[0])
    await anext(iterator)
    await iterator.aclose()


async def ask(served):
    waiting = [last(served.generate(prompt, params)) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    waiting += [served.metrics(), leave(served)]
    return await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)


def serve(served) -> tuple[list, list]:
    """What a first and a second wave get, and the end of it."""
    first, second = asyncio.run(ask(served)), asyncio.run(ask(served))

    async def close_meanwhile():
        asking = asyncio.create_task(ask(served))
        await asyncio.sleep(0)
        await asyncio.to_thread(served.close)
        return await asking
    asyncio.run(close_meanwhile())
    assert not served._thread.is_alive()
    return first, second


@pytest.mark.parametrize("part", [0.3, pytest.param(1, marks=pytest.mark.slow)])
def test_whatever_line_fails_whoever_waits_gets_an_answer_and_it_serves_on(part):
    real, faults = make_llm(), LineFaults(async_llm, in_threads=True)

    def run(place=None):
        def fail():
            raise MemoryError("a fault on purpose")
        llm = copy.copy(real)
        llm._engine = fake_engine(real, num_pages=32)
        return serve(faults.run(lambda: AsyncLLM(llm), place, fail))
    (*expected, metrics, left), _ = run()
    assert (metrics.num_pages, left) == (32, None)
    places = [place for place in faults.choose(part) if not code_at(place).startswith(LOOP_ITSELF)]
    assert len(places) > 20 * part
    num_passed = 0
    for place in places:
        for wave in run(place):
            for output, right in zip(wave, expected, strict=False):
                assert output.outputs[0].finish_reason in ("length", "error"), name_of(place)
                if output.outputs[0].finish_reason == "error":
                    assert "a fault on purpose" in output.outputs[0].error, name_of(place)
                else:
                    assert tokens_of([output]) == tokens_of([right]), name_of(place)
            assert isinstance(wave[3], MemoryError) or wave[3].num_pages == 32, name_of(place)
        num_passed += faults.num_events[place[:2]] >= 1
    assert num_passed > 0.8 * len(places)  # what a thread passes is not the same each time
