"""An error or Ctrl-C at any line of the engine: the next call gives the right tokens, nothing is lost or held, and nobody hangs."""
import contextlib
import dataclasses
import importlib
import os
import signal

import pytest

from tests.engine.fake_device import fake_llm
from tests.engine.line_faults import LineFaults, name_of
from tests.engine.test_failed_steps import PARAMS, PROMPTS, tokens_of
from tpllm import LLM
from tpllm.engine.turns import SIGNALS
from tpllm.model.config import ALL_LAYERS

WORK = [importlib.import_module(f"tpllm.{name}") for name in (
    "engine.batch", "engine.calls", "engine.engine", "engine.executor", "engine.metrics", "engine.outputs", "engine.pace",
    "engine.pages", "engine.plan", "engine.request", "engine.rows", "engine.runner", "engine.scheduler",
    "engine.stop_strings", "tokenizer.detokenizer")]
WAYS = [importlib.import_module(f"tpllm.{name}") for name in (
    "llm", "engine.calls", "engine.engine", "engine.turns", "engine.runner", "engine.executor")]
MORE = float(os.environ.get("TPLLM_PART_OF_LINES", "0.25"))  # of the slow tests; 1 is every line
ERRORS = (KeyboardInterrupt, RuntimeError, MemoryError)
STOPPING = [dataclasses.replace(params, stop=["zzz", "q"], logprobs=1) for params in PARAMS]


@pytest.fixture(scope="module", params=["native", "xla"])
def fake(request, text_llm) -> LLM:
    """Few pages: rows lose them, and are computed again or swapped."""
    llm = fake_llm(is_native=request.param == "native", tokenizer=text_llm.get_tokenizer())
    llm._engine._pace.steps_at_once = lambda is_watched: 8  # not by the clock, so that each run is like the one before
    return llm


@pytest.fixture
def expected(fake):
    """Tokens of an engine that nothing happened to."""
    tokens, num_before = tokens_of(fake.generate(PROMPTS, PARAMS)), fake._engine.scheduler.num_preemptions
    fake.reset_prefix_cache()
    assert tokens_of(fake.generate(PROMPTS, PARAMS)) == tokens
    assert fake._engine.scheduler.num_preemptions > num_before, "this is to be a use in which rows lose their pages"
    return tokens


def use(llm: LLM) -> None:
    """A call that is left half way, and one after it."""
    llm.reset_prefix_cache()
    iterator = llm.generate_iter(PROMPTS[1:], PARAMS[1:])
    next(iterator)
    iterator.close()
    llm.generate(PROMPTS, STOPPING)


def check(llm: LLM, expected, after: str = "") -> None:
    """The tokens are right, and all slots and pages free."""
    assert tokens_of(llm.generate(PROMPTS, PARAMS)) == expected, after
    scheduler = llm._engine.scheduler
    assert (llm._engine.has_work, scheduler.has_work, llm.metrics().num_pages_used) == (False, False, 0), after
    assert (scheduler.tables[ALL_LAYERS] == -1).all()
    assert not llm._engine._turns.are_mine


@contextlib.contextmanager
def kept_handlers():
    """An error that comes between the last line of a block and its end skips that end, which only a tracer can do: handlers are put back here."""
    former = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(("part", "num_each"), [(0.05, 1), pytest.param(MORE, 1, marks=pytest.mark.slow)])
def test_whatever_line_fails_the_next_call_gives_the_right_tokens(fake, expected, part, num_each):
    faults = LineFaults(*WORK)
    faults.run(lambda: use(fake))
    check(fake, expected)
    places = list(faults.choose(part, num_each=num_each))
    assert len(places) > 400 * part
    for number, place in enumerate(places):
        def fail(error=ERRORS[number % 3]):
            raise error("a fault on purpose")
        with kept_handlers(), contextlib.suppress(*ERRORS):  # one that is a row's own ends that row, and the call goes on
            faults.run(lambda: use(fake), place, fail)
        assert faults.num_events[place[:2]] >= place[2], name_of(place)
        check(fake, expected, name_of(place))


@pytest.mark.parametrize(("part", "num_each"), [(0.05, 1), pytest.param(MORE, 2, marks=pytest.mark.slow)])
def test_at_whatever_instruction_ctrl_c_comes_the_next_call_gives_the_right_tokens(fake, expected, part, num_each):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
    faults, former = LineFaults(*WAYS, is_fine=True), signal.getsignal(signal.SIGINT)
    faults.run(lambda: use(fake))
    check(fake, expected)
    for place in list(faults.choose(part, num_each=num_each)):
        with contextlib.suppress(KeyboardInterrupt):
            faults.run(lambda: use(fake), place, lambda: signal.raise_signal(signal.SIGINT))
            pytest.fail(f"the signal is lost at {name_of(place)}")
        assert signal.getsignal(signal.SIGINT) is former, name_of(place)
        check(fake, expected, name_of(place))
