"""Names of other projects: each works, is taken, or is refused with what to use."""
import inspect
import logging

import pytest

from tpllm.errors import ConfigError, SamplingError
from tpllm.names import Only, Refused, Renamed, Same, Taken, missing, takes, translated, vllm
from tpllm.names.others import OTHERS

TABLE = {"theirs": Renamed("ours"), "double": Renamed("ours", make=lambda given: 2 * given["double"]), "fast": Taken("it is always fast"),
         "one": Only((1,), "use another"), "small": Only(lambda value: value < 3, "make it small"), "code": Refused("leave it out"), "same": Same()}


def translate(**given):
    return translated(given, known={"ours": None, "n": 1}, table=TABLE, error=ConfigError)


@pytest.mark.parametrize(("given", "ours"), [
    ({"n": 2}, {"n": 2}), ({"theirs": 3}, {"ours": 3}), ({"theirs": None}, {}), ({"double": 3}, {"ours": 6}),
    ({"double": 3, "theirs": 6}, {"ours": 6}),
    ({"ours": 4, "theirs": 4}, {"ours": 4}), ({"fast": True}, {}), ({"one": 1}, {}), ({"one": None}, {}), ({"small": 2}, {}), ({"code": False}, {}),
    ({"code": None}, {}), ({"code": {}}, {}), ({"code": ""}, {})], ids=str)
def test_a_name_becomes_ours_or_is_taken(given, ours):
    assert translate(**given) == ours


@pytest.mark.parametrize(("given", "words"), [
    ({"ours": 4, "theirs": 5}, "theirs is 5 and ours is 4, which say the same thing; give one of them"),
    ({"double": 3, "theirs": 5}, "say the same thing"), ({"one": 2}, "one is 2, which is not supported; use another"),
    ({"small": 3}, "small is 3, which is not supported; make it small"), ({"code": True}, "code is True, which is not supported; leave it out"),
    ({"thiers": 1}, "there is no argument 'thiers'; did you mean 'theirs'?"), ({"zzz": 1}, "there is no argument 'zzz'$"),
    ({"n_ctx": 1}, r"there is no argument 'n_ctx'; llama.cpp calls so what is here `max_model_len`")], ids=str)
def test_what_is_not_there_is_refused_with_what_to_use(given, words):
    with pytest.raises(ConfigError, match=words):
        translate(**given)


def test_what_has_no_effect_is_said_in_one_line_of_the_log(caplog):
    with caplog.at_level(logging.INFO, "tpllm"):
        translate(fast=True, one=1)
    assert [record.message for record in caplog.records] == ["fast=True has no effect: it is always fast", "one=1 is what is done anyway"]


class Example:
    @takes(TABLE, error=SamplingError)
    def __init__(self, *, ours: int | None = None):
        if ours == 0:
            raise ConfigError("ours is 0; it must be more")
        self.ours = ours


def test_a_function_that_takes_names_tells_of_them_in_its_signature():
    assert Example(theirs=3).ours == Example(ours=3).ours == 3
    assert list(inspect.signature(Example).parameters) == ["ours", "theirs", "double"]
    with pytest.raises(SamplingError, match=r"Example is given 3 without a name; name every value, as in ours=\.\.\."):
        Example(3)
    with pytest.raises(ConfigError, match=r"ours is 0; it must be more \(theirs is ours here\)"):
        Example(theirs=0)
    with pytest.raises(ConfigError, match=r"ours is 0; it must be more$"):
        Example(ours=0, fast=True)


def test_a_missing_attribute_says_what_to_use():
    assert missing("code", of="X", known=(), table=TABLE) == "X has no attribute 'code'; leave it out"
    assert missing("generat", of="X", known=["generate"], table=TABLE) == "X has no attribute 'generat'; did you mean 'generate'?"
    assert missing("zzz", of="X", known=["generate"], table=TABLE) == "X has no attribute 'zzz'"


def test_every_entry_of_the_tables_says_why_or_what_to_use():
    tables = (vllm.ARGUMENTS, vllm.CALLS, vllm.METHODS, vllm.SAMPLING, vllm.TYPES)
    texts = [one.why if isinstance(one, Taken) else one.use for table in tables for one in table.values() if isinstance(one, Taken | Only | Refused)]
    assert len(texts) > 80
    assert all(texts)
    assert all(text for names in OTHERS.values() for text in names.values())
