"""Facts of a compiled program as JSON, small enough to be committed: alike instructions are one text and a count.

Instructions inside fusions are left out, but for custom calls: nothing that is read off a program for an accelerator lies there.
"""
import collections
import dataclasses
import itertools
import re
from typing import Any

from tpllm.aot.hlo import COLLECTIVES, VIEWS, HloArray, Instruction, replica_groups
from tpllm.aot.report import ProgramFacts, ProgramMemory

FORMAT = 1
"""Of an entry, its meaning included: what earlier ones leave out cannot be read back."""
_ARRAY = re.compile(r"(?:(\d+)\*)?(\w+)\[([\d,]*)\](@chip)?")


def to_json(facts: ProgramFacts) -> dict[str, Any]:
    """``facts`` as JSON; instructions lose their order."""
    kept = [found for found in facts.instructions if not found.is_fused or found.op == "custom-call"]
    counts = collections.Counter(map(_instruction_text, kept))
    return {"memory": dataclasses.asdict(facts.memory), "num_aliased": facts.num_aliased, "instructions": dict(sorted(counts.items()))}


def from_json(entry: dict[str, Any]) -> ProgramFacts:
    """The facts that :func:`to_json` wrote."""
    instructions = [instruction for text, count in entry["instructions"].items() for instruction in [_read_instruction(text)] * count]
    return ProgramFacts(ProgramMemory(**entry["memory"]), entry["num_aliased"], instructions)


def _instruction_text(instruction: Instruction) -> str:
    """Such as ``all-reduce-start tuples=3 groups={{0,1}}: 2*bf16[8,4096], f32[5]``."""
    words = [f"{instruction.op}-{instruction.phase}" if instruction.phase else instruction.op]
    if instruction.num_tuples:
        words.append(f"tuples={instruction.num_tuples}")
    if instruction.is_fused:
        words.append("fused")
    if instruction.op in COLLECTIVES and (groups := _groups_text(instruction.line)):
        words.append(f"groups={groups}")
    if instruction.custom_call_target:
        words.append(f"target={instruction.custom_call_target}")
    return f"{' '.join(words)}: {_results_text(instruction)}"


def _results_text(instruction: Instruction) -> str:
    arrays = [f"{array.dtype}[{','.join(map(str, array.shape))}]{'@chip' if array.is_on_chip else ''}" for array in instruction.results]
    if instruction.op in VIEWS:  # a loop carries hundreds, whose order says nothing
        arrays.sort()
    runs = [(array, len(list(run))) for array, run in itertools.groupby(arrays)]
    return ", ".join(array if count == 1 else f"{count}*{array}" for array, count in runs)


def _groups_text(line: str) -> str:
    try:
        groups = replica_groups(line)
    except ValueError:  # a permute has pairs; what else has none is refused where groups are asked for
        return ""
    return "{" + ",".join("{" + ",".join(map(str, sorted(group))) + "}" for group in groups) + "}"


def _read_instruction(text: str) -> Instruction:
    head, _, results = text.rpartition(": ")
    name, *words = head.split(" ")
    op, _, phase = name.rpartition("-") if name.endswith(("-start", "-done")) else (name, "", "")
    values = dict(word.partition("=")[::2] for word in words)
    arrays = [HloArray(dtype, tuple(map(int, filter(None, dims.split(",")))), bool(place))
              for count, dtype, dims, place in _ARRAY.findall(results) for _ in range(int(count or 1))]
    line = f'{text}, replica_groups={values.get("groups", "")}, custom_call_target="{values.get("target", "")}"'
    return Instruction(op=op, phase=phase, results=tuple(arrays), num_tuples=int(values.get("tuples", 0)), computation="",
                       is_fused="fused" in values, line=line)
