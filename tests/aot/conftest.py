"""Tests of compiled programs read committed results; see ``tests/aot/known_results.py``."""
import os
import random

import pytest

from tpllm.aot import report

RESULTS = pytest.StashKey()
REMOVED = pytest.StashKey()


def pytest_addoption(parser):
    group = parser.getgroup("results of compilers")
    group.addoption("--compile-all", action="store_true", help="compile programs whose results are known too, and compare")
    group.addoption("--prune", action="store_true", help="remove results that no test asks for, where all tests pass; for a run of all tests")
    group.addoption("--results-seed", type=int, default=None, help="draws the known results that are compiled and compared")


@pytest.fixture(scope="session")
def results(request):
    """Results of compilers; in the end some known ones are compiled again."""
    from tests.aot.known_results import FOLDER, Results  # what it imports of jax is private: not for tests that compile nothing
    seed = request.config.getoption("--results-seed", None)
    found = Results(FOLDER, report.compile_program, compiles_all=request.config.getoption("--compile-all", False),
                    writes=os.environ.get("CI", "").lower() not in ("true", "1"), seed=random.randrange(10**6) if seed is None else seed)
    request.config.stash[RESULTS] = found
    yield found
    found.compare_some(report.compile_lowered)
    if request.config.getoption("--prune", False) and not request.session.testsfailed:
        request.config.stash[REMOVED] = found.prune()


@pytest.fixture(autouse=True)
def known_results(request, monkeypatch):
    """Puts what is known in place of the compilers, for tests that need these."""
    if request.node.get_closest_marker("aot"):
        monkeypatch.setattr(report, "compile_program", request.getfixturevalue("results").facts)


def pytest_terminal_summary(terminalreporter, config):
    if (found := config.stash.get(RESULTS, None)) is None:
        return
    terminalreporter.write_line(f"aot: {found.num_asked} programs, {len(found.new)} of them new; {len(found.compared)} known ones compiled and "
                                f"compared (seed {found.seed})")
    for program in () if config.getoption("--compile-all", False) else found.compared:
        terminalreporter.write_line(f"aot: compared {program.name}, key {program.key}")
    for question in found.new:
        terminalreporter.write_line(f"aot: new in tests/aot/results/{question.program.compiler}.jsonl, to be committed (`make test-aot` writes it): "
                                    f"{question.program.name}, key {question.program.key}, asked for by {question.test}")
    for name in config.stash.get(REMOVED, ()):
        terminalreporter.write_line(f"aot: removed, for nothing asks for it: {name}")
