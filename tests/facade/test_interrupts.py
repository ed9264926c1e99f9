"""Ctrl-C at any time: the call ends, and the LLM is as good as before."""
import contextlib
import dataclasses
import os
import random
import signal
import threading
import time

import pytest

from tests.engine.conftest import make_llm, make_packed_llm
from tests.engine.test_failed_steps import GREEDY, PARAMS, PROMPTS, TIGHT, check_whole, tokens_of

NUM_INTERRUPTS = int(os.environ.get("TPLLM_INTERRUPTS", "5"))


@contextlib.contextmanager
def interrupted_after(seconds: float):
    """A real SIGINT, from another thread, so many seconds later; whether it comes in time or not, none is left over."""
    is_sent, may_send = threading.Event(), threading.Event()

    def send():
        may_send.wait(seconds)
        os.kill(os.getpid(), signal.SIGINT)
        is_sent.set()
    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        may_send.set()
        with contextlib.suppress(KeyboardInterrupt):
            is_sent.wait()
            thread.join()
            time.sleep(0)


@pytest.mark.slow
@pytest.mark.parametrize("is_native", [True, False], ids=["native", "xla"])
def test_no_interrupt_makes_a_token_wrong_or_the_llm_dead(is_native, request):
    """``TPLLM_INTERRUPTS`` says how many."""
    if is_native:
        request.getfixturevalue("native_library")
    rng, num_interrupted = random.Random(0), 0
    make = make_packed_llm if is_native else make_llm
    prompts, params = PROMPTS * 2, [*PARAMS, *(dataclasses.replace(one, seed=7, temperature=0.7) for one in PARAMS)]
    with make(**TIGHT) as fresh, make(**TIGHT) as llm:
        expected = [tokens_of(fresh.generate(*one))[0] for one in zip(prompts, params, strict=True)]
        assert tokens_of(llm.generate(prompts, params)) == expected
        llm.reset_prefix_cache()
        start = time.monotonic()
        assert tokens_of(llm.generate(prompts, params)) == expected
        took = time.monotonic() - start
        for number in range(NUM_INTERRUPTS):
            if number % 3 == 0:
                llm.reset_prefix_cache()
            order = rng.sample(range(len(prompts)), len(prompts))
            try:
                with interrupted_after(rng.uniform(0, took)):
                    found = tokens_of(llm.generate([prompts[index] for index in order], [params[index] for index in order]))
            except KeyboardInterrupt:
                num_interrupted += 1
            else:
                assert found == [expected[index] for index in order]
            assert not llm._engine.has_work
            assert tokens_of(llm.generate(prompts, params)) == expected
            assert llm.metrics().num_pages_used == 0
        print(f"{NUM_INTERRUPTS} interrupts, {num_interrupted} of them ended a call; {llm.metrics().num_preemptions} rows lost their pages")
        assert llm.metrics().num_preemptions > 0
    assert num_interrupted > NUM_INTERRUPTS / 3


def test_ctrl_c_while_a_stream_is_read_ends_it_and_the_next_one_is_whole():
    llm = make_llm()
    expected = tokens_of(llm.generate(PROMPTS, PARAMS))

    def read():
        for _ in llm.stream(PROMPTS[0], dataclasses.replace(GREEDY, max_tokens=60)):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        read()
    check_whole(llm, expected)


def test_an_error_in_the_loop_over_outputs_gives_up_the_rest():
    llm, prompts = make_llm(), PROMPTS * 2
    expected = tokens_of(llm.generate(PROMPTS, PARAMS))

    def fail_in_the_body():
        for _ in llm.generate_iter(prompts, GREEDY):
            raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        fail_in_the_body()
    check_whole(llm, expected)
    iterator = llm.generate_iter(prompts, GREEDY)
    next(iterator)
    with pytest.raises(LookupError):
        iterator.throw(LookupError)
    check_whole(llm, expected)

    def failing_prompts():
        yield from prompts[:3]
        raise OSError("the file is gone")
    with pytest.raises(OSError, match="gone"):
        list(llm.generate_iter(failing_prompts(), GREEDY))
    check_whole(llm, expected)
