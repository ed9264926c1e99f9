"""Ctrl-C at any time: the call ends, and the LLM is as good as before."""
import contextlib
import dataclasses
import os
import random
import signal
import threading
import time

import pytest

from tpllm import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SHARED = "import os\nimport sys\n\n\ndef main():\n    \"\"\"The program.\"\"\"\n    path = os.path.join(sys.argv[1], 'file')\n"
PROMPTS = [SHARED + end for end in ("    with open(path) as f:\n", "    return path\n", "    print(", "")] + ["class A:\n", "x ="]


def texts(outputs) -> list[str]:
    return [output.outputs[0].text for output in outputs]


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


@pytest.mark.parametrize("num_interrupts", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_no_interrupt_makes_a_token_wrong_or_the_llm_dead(num_interrupts):
    rng, counts = random.Random(0), {"interrupted": 0, "whole": 0}
    with LLM("demo", mesh="tp=1", max_num_seqs=4, max_model_len=256, page_size=16) as llm:
        expected = texts(llm.generate(PROMPTS, GREEDY))
        start = time.monotonic()
        llm.reset_prefix_cache()
        assert texts(llm.generate(PROMPTS, GREEDY)) == expected
        took = time.monotonic() - start
        for number in range(num_interrupts):
            if number % 3 == 0:
                llm.reset_prefix_cache()
            order = rng.sample(range(len(PROMPTS)), len(PROMPTS))
            try:
                with interrupted_after(rng.uniform(0, 1.1 * took)):
                    found = texts(llm.generate([PROMPTS[index] for index in order], GREEDY))
            except KeyboardInterrupt:
                counts["interrupted"] += 1
            else:
                counts["whole"] += 1
                assert found == [expected[index] for index in order]
            assert not llm._engine.has_work
            assert texts(llm.generate(PROMPTS, GREEDY)) == expected
            assert llm.metrics().num_pages_used == 0
        print(counts, llm.metrics().num_ended)
    assert counts["interrupted"] > num_interrupts / 4


def test_ctrl_c_while_a_stream_is_read_ends_it_and_the_next_one_is_whole():
    with LLM("demo", mesh="tp=1", max_num_seqs=2, max_model_len=256) as llm:
        long = dataclasses.replace(GREEDY, max_tokens=60)
        whole = "".join(delta.text for delta in llm.stream(PROMPTS[0], long))

        def read():
            for _ in llm.stream(PROMPTS[0], long):
                signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            read()
        assert not llm._engine.has_work
        assert "".join(delta.text for delta in llm.stream(PROMPTS[0], long)) == whole


def test_an_error_in_the_loop_over_outputs_gives_up_the_rest():
    with LLM("demo", mesh="tp=1", max_num_seqs=2, max_model_len=256) as llm:
        expected = texts(llm.generate(PROMPTS, GREEDY))

        def fail_in_the_body():
            for _ in llm.generate_iter(PROMPTS, GREEDY):
                raise ZeroDivisionError
        with pytest.raises(ZeroDivisionError):
            fail_in_the_body()
        assert not llm._engine.has_work
        iterator = llm.generate_iter(PROMPTS, GREEDY)
        next(iterator)
        with pytest.raises(LookupError):
            iterator.throw(LookupError)
        assert not llm._engine.has_work

        def prompts():
            yield from PROMPTS[:3]
            raise OSError("the file is gone")
        with pytest.raises(OSError, match="gone"):
            list(llm.generate_iter(prompts(), GREEDY))
        assert not llm._engine.has_work
        assert texts(llm.generate(PROMPTS, GREEDY)) == expected
