"""Stop strings in text that comes in pieces of any size."""
import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given

from tpllm.engine.stop_strings import StopStrings


def ended(pieces: list[str], stops: tuple[str, ...], *, is_included: bool = False) -> tuple[str, str | None]:
    """The text as it stands when a stop string ends it, or all of it."""
    finder, text = StopStrings(stops, is_included=is_included), ""
    for piece in pieces:
        num_checked = len(text)
        text += piece
        if found := finder.find(text, num_checked):
            return text[:found[0]], found[1]
    return text, None


@pytest.mark.parametrize(("pieces", "expected"), [
    (["ab", "cd"], ("a", "bc")), (["abcd"], ("a", "bc")), (["a", "b", "c", "d"], ("a", "bc")), (["b", "d"], ("bd", None)),
])
def test_a_string_is_found_across_pieces(pieces, expected):
    assert ended(pieces, ("bc", "xyz")) == expected


def test_the_string_that_ends_first_counts_and_of_those_the_longest():
    assert ended(["xabcx"], ("abc", "b")) == ("xa", "b")
    assert ended(["xabcx"], ("c", "abc", "bc")) == ("x", "abc")
    assert ended(["xabcx"], ("c", "abc"), is_included=True) == ("xabc", "abc")


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
       st.lists(st.integers(0, 12), max_size=5), st.booleans())
def test_how_the_text_is_cut_does_not_matter(text, stops, cuts, is_included):
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in itertools.pairwise(bounds)]
    assert ended(pieces, tuple(stops), is_included=is_included) == ended(list(text), tuple(stops), is_included=is_included)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_characters_called_certain_are_never_taken_back(text, stops):
    finder, final = StopStrings(tuple(stops), is_included=False), ended(list(text), tuple(stops))[0]
    for length in range(len(text) + 1):
        if ended(list(text[:length]), tuple(stops))[1] is None:
            assert final.startswith(text[:finder.num_certain(text[:length])])
