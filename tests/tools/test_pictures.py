"""The pictures of README.md and the docs: what is committed shows what the result files, the notebook and the commands say."""
import re
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest

from tools import pictures

README = (pictures.ROOT / "README.md").read_text()


def committed(name: str) -> str:
    """The text of a picture, which has to be XML that fetches nothing."""
    svg = (pictures.FOLDER / f"{name}.svg").read_text()
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert not re.search(r"(url\(|href=)[\"']?(https?:)?//|@import|@font-face|<script", svg)
    return svg


def texts(svg: str) -> list[str]:
    """What a reader sees, in order."""
    return ["".join(element.itertext()).replace("\xa0", " ").strip() for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def ratio(panel: str, kind: str) -> float:
    cell, files = pictures.CELLS[panel]
    return pictures.read_result(files[kind])["kinds"][kind]["cells"][cell]["medians"]["tokens_ratio"]


def test_the_chart_shows_the_numbers_of_the_result_files():
    shown = texts(committed("chart"))
    for panel, (_, files) in pictures.CELLS.items():
        for side in range(2):
            bars = [pictures.speed_text(pictures.medians(panel, kind)[side]) for kind in files]
            places = [shown.index(bar) for bar in bars]
            assert places == list(range(places[0], places[0] + len(bars))), f"{panel}: {bars}"
    assert pictures.caption() in shown


def test_the_chart_is_drawn_of_what_is_committed():
    assert texts(pictures.draw("chart")) == texts(committed("chart"))


def test_the_pages_say_the_numbers_of_the_chart():
    table = (pictures.ROOT / "docs" / "benchmarks.md").read_text()
    for panel, (_, files) in pictures.CELLS.items():
        for kind in files:
            ours, theirs = map(pictures.speed_text, pictures.medians(panel, kind))
            assert f"| {ours} / {theirs} | {ratio(panel, kind):.2f} |" in table
    ratios = [ratio(panel, kind) for panel, (_, files) in pictures.CELLS.items() for kind in files]
    assert f"{min(ratios):.2f} to {max(ratios):.2f} times" in README


def test_the_engine_s_picture_was_drawn_by_the_notebook_s_cells_of_today():
    svg = committed("engine")
    assert pictures.engine_stamp() in svg
    assert {"continuous batching", "static batching", "slot 0", "prefill", "decode"} <= set(texts(svg))


def test_the_answer_is_that_of_the_command_that_the_page_shows():
    shown = texts(committed("answer"))
    for command in pictures.ANSWER:
        assert f"$ {command}" in shown
    assert len(shown) > 2 * len(pictures.ANSWER)


def test_a_terminal_shows_what_is_left_on_it():
    command = r"printf 'loading\r\033[2Kan answer\n\033[31mred\033[0m\n'; test -t 1 && stty size"
    lines = pictures.run_in_terminal(command)
    assert lines == ["an answer", "red", f"100 {pictures.COLUMNS}"]


def test_a_command_that_fails_makes_no_picture():
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        pictures.run_in_terminal("exit 3")


def test_every_picture_stands_on_a_page_with_words_for_those_who_do_not_see_it():
    for name in pictures.PICTURES:
        assert re.search(rf"!\[[^\]]{{20,}}\]\(docs/pictures/{name}\.svg\)", README), name
