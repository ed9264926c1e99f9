"""The tool that makes faults: what it finds in a tiny tree of its own, that it leaves that tree alone, and that its list fits this one."""
import json
import pathlib
import subprocess
import sys
import textwrap
import tomllib

import pytest

from tools.mutants import main
from tools.mutation.copied_tree import copied_tree
from tools.mutation.draw import draw
from tools.mutation.mutant import Mutant, StaleError, read_mutants

ROOT = pathlib.Path(__file__).parents[2]
FILES = {
    "pyproject.toml": '[tool.pytest.ini_options]\npythonpath = ["."]\nmarkers = ["slow", "oracle", "aot"]\n',
    "tpllm/__init__.py": "",
    "tpllm/engine/__init__.py": "",
    "tpllm/engine/numbers.py": """\
        def double(x):
            if x > 100 and x < 0:
                return min(x, 3)
            return x * 2


        def triple(x):
            return x * 3
        """,
    "tests/test_double.py": """\
        import os
        import subprocess
        import sys

        from tpllm.engine.numbers import double


        def test_in_this_process():
            assert double(2) == 4


        def test_in_another_one(tmp_path):
            code = "from tpllm.engine.numbers import triple; print(triple(1))"
            assert subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path) == b"3\\n"
        """,
    "tests/test_skipped.py": "import pytest\n\n\n@pytest.mark.skip\ndef test_nothing():\n    pass\n",
    "tests/test_failing.py": "def test_that_fails():\n    assert False\n",
    "tests/test_hanging.py": "from tpllm.engine.numbers import triple\n\n\ndef test_end():\n    while triple(1) != 3:\n        pass\n",
}
MUTANTS = {  # name -> (old, new, test)
    "caught": ("return x * 2", "return x * 3", "double"), "caught elsewhere": ("return x * 3", "return x * 4", "double"),
    "survives": ("return min(x, 3)", "return min(x, 4)", "double"), "stale": ("return x * 5", "return x * 6", "double"),
    "skipped": ("return x * 2", "return x * 3", "skipped"), "broken": ("return x * 2", "return x * 3", "failing"),
    "hangs": ("return x * 3", "return x * 4", "hanging")}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A tree with mutants."""
    monkeypatch.delenv("TPLLM_CACHE_DIR", raising=False)
    entries = [f'[[mutant]]\nname = "{name}"\nfile = "tpllm/engine/numbers.py"\nold = "{old}"\nnew = "{new}"\ntests = ["tests/test_{test}.py"]\n'
               for name, (old, new, test) in MUTANTS.items()]
    for name, text in {**FILES, "tools/mutation/by_hand.toml": "\n".join(entries)}.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return tmp_path / "tree"


def files(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_each_mutant_is_caught_or_told_of_and_the_tree_is_left_alone(root, capsys):
    before = files(root)
    names = [name for name in MUTANTS if name != "hangs"]
    assert main(["--only", *names, "--json", str(root.parent / "outcomes.json")], root=root) == 1
    assert files(root) == before
    outcomes = {one["mutant"]["name"]: (one["verdict"], one["by"]) for one in json.loads((root.parent / "outcomes.json").read_text())}
    assert outcomes == {
        "caught": ("caught", "test_double::test_in_this_process"), "caught elsewhere": ("caught", "test_double::test_in_another_one"),
        "survives": ("SURVIVED", ""), "stale": ("STALE", "stale: its old line is in tpllm/engine/numbers.py 0 times, not once: return x * 5"),
        "skipped": ("NOT TRIED", "without the fault: every test was skipped, or none was found"),
        "broken": ("BROKEN", "without the fault: test_failing::test_that_fails")}
    printed = capsys.readouterr().out
    assert "| caught | tpllm/engine/numbers.py | tests/test_double.py | caught | test_double::test_in_this_process |" in printed
    assert "2 of 6 caught, 1 SURVIVED, 1 STALE, 1 BROKEN, 1 NOT TRIED" in printed


@pytest.mark.parametrize(("name", "code"), [("caught", 0), ("stale", 1)])
def test_the_exit_code_says_whether_each_of_those_that_were_asked_for_was_caught(root, name, code):
    assert main(["--only", name, "--workers", "1"], root=root) == code


@pytest.mark.slow
def test_tests_that_hang_count_as_failing_and_are_told_of(root, capsys):
    assert main(["--only", "hangs", "--timeout", "20"], root=root) == 0
    assert "it hung: the tests ran past 20 s" in capsys.readouterr().out


def test_what_is_wrong_with_a_list_is_said(root, capsys):
    assert main(["--only", "caugth"], root=root) == 2
    assert "there is no mutant 'caugth'; --list prints their names" in capsys.readouterr().err
    data = root / "tools/mutation/by_hand.toml"
    data.write_text(data.read_text() * 2)
    assert main(["--list"], root=root) == 2
    assert "two mutants have the name" in capsys.readouterr().err
    data.write_text('[[mutant]]\nname = "a"\ncolour = "red"\ntests = []\n')
    assert main(["--list"], root=root) == 2
    assert "the entry 'a'" in capsys.readouterr().err


TEST = ("tests/test_double.py",)


@pytest.mark.parametrize(("old", "new", "tests", "message"), [
    ("return x", "return y", TEST, "0 times, not once"), ("def double(x):", "def double(y):", ("tests/none.py",), "none.py is not there"),
    ("def double(x):", "def double(x):", TEST, "exactly one line"), ("def double(x):", "def double(y):", (), "a test file is not there"),
    ("def double(x):\n    if x > 100 and x < 0:", "def twice(x):\n    if x:", TEST, "exactly one line")])
def test_a_mutant_that_no_longer_fits_says_why(root, old, new, tests, message):
    with pytest.raises(StaleError, match=message):
        Mutant("m", "tpllm/engine/numbers.py", old, new, tests).applied(root)


def test_lines_around_make_a_line_that_is_there_twice_a_single_one(root):
    path = root / "tpllm/engine/numbers.py"
    path.write_text("def f():\n    if a:\n        b()\n    b()\n")
    mutant = Mutant("m", "tpllm/engine/numbers.py", "    b()\nb()", "    b()\npass", TEST)
    assert mutant.applied(root) == "def f():\n    if a:\n        b()\n    pass\n"


def test_a_draw_is_the_same_for_the_same_seed_and_changes_one_line_of_what_computes(root):
    drawn = draw(root, 100, seed=3)
    assert drawn == draw(root, 100, seed=3) != draw(root, 100, seed=4)
    assert {(mutant.old, mutant.new) for mutant in drawn} >= {
        ("if x > 100 and x < 0:", "if x > 100 or x < 0:"), ("if x > 100 and x < 0:", "if not (x > 100 and x < 0):"),
        ("if x > 100 and x < 0:", "if x >= 100 and x < 0:"), ("return min(x, 3)", "return max(x, 3)"), ("return min(x, 3)", "return min(3, x)"),
        ("return x * 2", "return x // 2"), ("return x * 2", "return x * 3")}


def test_every_mutant_of_the_list_fits_this_tree():
    mutants = read_mutants(ROOT / "tools/mutation")
    for mutant in mutants:
        mutant.applied(ROOT)
    assert len(mutants) >= 80


def test_what_no_test_can_notice_is_said_of_lines_that_are_there():
    for entry in tomllib.loads((ROOT / "tools/mutation/equivalent.toml").read_text("utf-8"))["mutant"]:
        assert entry.pop("reason")
        Mutant(**entry, tests=("tests/tools/test_mutants.py",), harm="none").applied(ROOT)


def test_a_copied_tree_has_a_native_library_that_loads(native_library):
    with copied_tree(ROOT, "") as tree:
        command = [sys.executable, "-c", "from tpllm.native import library; print(library.PATH, library.is_available())"]
        done = subprocess.run(command, cwd=tree.path, env=tree.environment(), capture_output=True, text=True, check=True)
        assert done.stdout.split() == [str(tree.path / "tpllm/native/_kernels.so"), "True"]
