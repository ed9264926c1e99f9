"""The files of compilers' results: what is compiled, what is compared, what is written. A fake compiler answers here."""
import json
import types

import jax
import pytest

from tests.aot import known_results
from tests.aot.known_results import NUM_COMPARED, DifferenceError, Results
from tests.aot.program_keys import Program
from tests.aot.test_hlo import DEVICE_TEXT
from tpllm.aot.hlo import num_aliased, read_instructions, replica_groups
from tpllm.aot.report import ProgramFacts, ProgramMemory
from tpllm.errors import MemoryNeedError

GPU, TPU = "jax-1.2-gpu", "jax-1.2-tpu"
FACTS = ProgramFacts(ProgramMemory(1, 2, 3, 4, 5), num_aliased(DEVICE_TEXT), read_instructions(DEVICE_TEXT))
FACES = ("memory", "num_aliased", "custom_calls")


@pytest.fixture(autouse=True)
def programs_by_name(monkeypatch):
    """What is lowered is a namespace here: its name, and its compiler if it is not a GPU's."""
    def identify(lowered):
        compiler = getattr(lowered, "compiler", GPU)
        return None if compiler == "cpu" else Program(f"jit_{lowered.name}", f"key of {lowered.name}", compiler)
    monkeypatch.setattr(known_results, "identify", identify)


class Compiler:
    """Answers with the same facts, or raises ``refusal``; knows what it was asked."""

    def __init__(self, refusal=None, facts=FACTS):
        self.asked, self.refusal, self.facts = [], refusal, facts

    def __call__(self, lowered):
        self.asked.append(lowered.name)
        if self.refusal is not None:
            raise self.refusal
        return self.facts


def lowered(name, **extra):
    return types.SimpleNamespace(name=name, **extra)


def ask(folder, *names, compiler=None, **options):
    """The results after asking for some programs, and their compiler."""
    compiler = Compiler() if compiler is None else compiler
    results = Results(folder, compiler, **options)
    for name in names:
        results.facts(lowered(name))
    return results, compiler


def read(facts):
    """What tests read off a program, in no order."""
    groups = sorted(str(replica_groups(found.line)) for found in facts.collectives)
    written = sorted((found.op, found.phase, found.num_tuples, str(found.results)) for found in facts.materialized + facts.collectives)
    return facts.memory, facts.num_aliased, sorted(facts.custom_calls), groups, written


def test_a_new_program_is_compiled_once_and_then_read_from_the_file_with_the_same_facts(tmp_path):
    fresh, compiler = ask(tmp_path, "a", "a")
    assert compiler.asked == ["a"]
    assert [(question.program.name, question.lowered) for question in fresh.new] == [("jit_a", None)]
    known, compiler = ask(tmp_path, "a")
    assert compiler.asked == known.new == []
    assert read(known.facts(lowered("a"))) == read(fresh.facts(lowered("a"))) == read(FACTS)


def test_a_file_has_a_sorted_line_for_each_program_and_every_compiler_its_own(tmp_path):
    results, _ = ask(tmp_path, "b", "c", "a")
    results.facts(lowered("b", compiler=TPU))
    lines = [json.loads(line) for line in (tmp_path / f"{GPU}.jsonl").read_text().splitlines()]
    assert [line["program"] for line in lines] == ["jit_a", "jit_b", "jit_c"]
    assert lines[0]["instructions"]["all-reduce-start tuples=3 groups={{0,1,2,3}}: bf16[8,2], f32[5]"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{GPU}.jsonl", f"{TPU}.jsonl"]


def test_what_lies_in_a_fusion_is_left_out_but_for_custom_calls(tmp_path):
    text = DEVICE_TEXT.replace("ROOT %transpose.1", '%call.1 = (s32[8], f32[]) custom-call(%p), custom_call_target="Hint"\n  ROOT %transpose.1')
    results, _ = ask(tmp_path, compiler=Compiler(facts=ProgramFacts(FACTS.memory, 0, read_instructions(text))))
    found = results.facts(lowered("a"))
    assert found.custom_calls == ["Hint"]
    assert [(one.op, one.num_tuples) for one in found.instructions if one.is_fused] == [("custom-call", 1)]


def test_a_refusal_is_a_result(tmp_path):
    refusal = MemoryNeedError("the program needs 19.3GiB of each device, which has 15.75GiB")
    for compiler in (Compiler(refusal), Compiler()):
        with pytest.raises(MemoryNeedError, match=r"needs 19\.3GiB of each device, which has 15\.75GiB"):
            ask(tmp_path, "a", compiler=compiler)
    assert compiler.asked == []
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"RESOURCE_EXHAUSTED: vmem$"):
        ask(tmp_path, "b", compiler=Compiler(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: vmem\nat 0x7ffe")))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"RESOURCE_EXHAUSTED: vmem$"):
        ask(tmp_path, "b")


def test_a_fault_of_the_machine_is_no_result(tmp_path):
    with pytest.raises(jax.errors.JaxRuntimeError, match="no ptxas"):
        ask(tmp_path, "a", compiler=Compiler(jax.errors.JaxRuntimeError("NOT_FOUND: no ptxas")))
    assert list(tmp_path.iterdir()) == []


def test_in_ci_nothing_is_written_and_what_to_commit_is_known(tmp_path):
    results, compiler = ask(tmp_path, "a", "a", "b", writes=False)
    assert [question.program.key for question in results.new] == ["key of a", "key of b"]
    assert compiler.asked == ["a", "b"]
    assert list(tmp_path.iterdir()) == []


def test_three_known_programs_are_drawn_by_the_seed_whatever_the_order(tmp_path):
    names = [f"program{index}" for index in range(12)]
    ask(tmp_path, *names)
    drawn = {}
    for seed in range(5):
        for order in (names, names[::-1]):
            results, compiler = ask(tmp_path, *order, "new", seed=seed, writes=False)
            assert compiler.asked == ["new"]
            results.compare_some(again := Compiler())
            drawn[seed, order[0]] = sorted(again.asked)
            assert sorted(program.name for program in results.compared) == [f"jit_{name}" for name in drawn[seed, order[0]]]
        assert len(drawn[seed, names[0]]) == NUM_COMPARED
        assert drawn[seed, names[0]] == drawn[seed, names[-1]]
    assert len(set(map(tuple, drawn.values()))) > 1


def test_an_edited_file_is_noticed_and_both_figures_are_told(tmp_path):
    ask(tmp_path, "a")
    path = tmp_path / f"{GPU}.jsonl"
    path.write_text(path.read_text().replace('"temporary_bytes":4', '"temporary_bytes":3').replace("fusion: bf16[128,64]", "fusion: bf16[64,128]"))
    told = (r"jax-1.2-gpu.jsonl .*jit_a.*key of a, seed 7.*instructions.fusion: bf16\[128,64\] null in the file, 1 compiled, .*"
            r"memory.temporary_bytes 3 in the file, 4 compiled.*remove the line of this key, run `make test-aot`")
    results, _ = ask(tmp_path, "a", seed=7)
    with pytest.raises(DifferenceError, match=told):
        results.compare_some(Compiler())
    with pytest.raises(DifferenceError, match=told):
        ask(tmp_path, "a", seed=7, compiles_all=True)
    with pytest.raises(DifferenceError, match="refusal null in the file"):
        ask(tmp_path, "a", compiler=Compiler(MemoryNeedError("too large")), compiles_all=True)


def test_a_full_run_compiles_and_compares_everything_once(tmp_path):
    ask(tmp_path, "a", "b")
    results, compiler = ask(tmp_path, "a", "b", "b", "c", compiles_all=True)
    assert compiler.asked == ["a", "b", "c"]
    assert [program.name for program in results.compared] == ["jit_a", "jit_b"]
    results.compare_some(compiler)
    assert len(compiler.asked) == results.num_asked == 3


def test_pruning_removes_what_nothing_asked_for_and_tells_it(tmp_path):
    results, _ = ask(tmp_path, "a", "b", "c")
    results.facts(lowered("a", compiler=TPU))
    results, _ = ask(tmp_path, "b")
    assert results.prune() == ["jit_a (jax-1.2-gpu, key of a)", "jit_c (jax-1.2-gpu, key of c)"]
    assert results.prune() == []
    assert [json.loads(line)["key"] for line in (tmp_path / f"{GPU}.jsonl").read_text().splitlines()] == ["key of b"]
    assert (tmp_path / f"{TPU}.jsonl").exists(), "its compiler was not asked, and may not be installed"


def test_two_processes_keep_what_the_other_has_added(tmp_path):
    one, other = (ask(tmp_path, "a", compiler=Compiler())[0] for _ in range(2))
    one.facts(lowered("b"))
    other.facts(lowered("c"))
    other.facts(lowered("a"))
    assert [json.loads(line)["key"] for line in (tmp_path / f"{GPU}.jsonl").read_text().splitlines()] == ["key of a", "key of b", "key of c"]
    assert len(other.prune()) == 1


def test_programs_for_this_machine_are_always_compiled(tmp_path):
    results, compiler = ask(tmp_path)
    assert results.facts(lowered("a", compiler="cpu")) is results.facts(lowered("a", compiler="cpu")) is FACTS
    assert compiler.asked == ["a", "a"]
    assert (results.num_asked, list(tmp_path.iterdir())) == (0, [])
