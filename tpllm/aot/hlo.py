"""Reading the text of an optimized XLA program: its instructions, its collectives, and which arguments it updates in place."""
import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast", "ragged-all-to-all")
VIEWS = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call", "optimization-barrier", "after-all")
_BITS = re.compile(r"[a-z]+(\d+)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?")
_LAYOUT = re.compile(r"\{[^{}]*\}")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_NAMED = re.compile(r"\s+(?:ROOT )?%?[\w.-]+ = ")
_OP = re.compile(r" ([a-z][a-z0-9-]*)\(")
_TARGET = re.compile(r'\bcustom_call_target="([^"]*)"')
_CALLED_BY_FUSION = re.compile(r"\) *,?.*\bcalls=%?([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class HloArray:
    """One array that an instruction gives.

    Attributes:
        dtype: as HLO writes it: ``"bf16"``, ``"f32"``, ``"s32"``, ``"pred"``.
        shape: on one device.
        is_on_chip: whether it lies in a TPU's vector memory (memory space 1) and not in the device's main memory.
    """

    dtype: str
    shape: tuple[int, ...]
    is_on_chip: bool = False

    @property
    def num_elements(self) -> int:
        """The product of the shape."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes without a layout's padding."""
        bits = _BITS.match(self.dtype)  # pred has none and takes a byte
        return -(-self.num_elements * (int(bits[1]) if bits else 8) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        op: such as ``"all-reduce"``.
        phase: ``"start"`` or ``"done"`` of an asynchronous one, else empty.
        results: the arrays it gives. A start may repeat its operands before them: those in a tuple of their own are left out.
        num_tuples: the tuples in its type, nested ones too; a device keeps a table of addresses for each.
        computation: the computation it stands in.
        is_fused: whether it stands inside a fusion, where its result need never exist in memory.
        line: its text.
    """

    op: str
    phase: str
    results: tuple[HloArray, ...]
    num_tuples: int
    computation: str
    is_fused: bool
    line: str

    @property
    def largest(self) -> HloArray:
        """The result of most elements; of the start of a gather that is what it gathers."""
        return max(self.results, key=lambda array: array.num_elements, default=HloArray("token", (0,)))

    @property
    def custom_call_target(self) -> str:
        """What a custom call calls, such as ``"tpu_custom_call"``; empty for other instructions."""
        target = _TARGET.search(self.line)
        return target[1] if target else ""


def read_instructions(text: str) -> list[Instruction]:
    """Every instruction of a program, those inside fusions, loops and branches included."""
    lines = text.splitlines()
    fused = {name[1] for line in lines if " fusion(" in line and (name := _CALLED_BY_FUSION.search(line))}
    return [dataclasses.replace(instruction, is_fused=instruction.computation in fused) for instruction in _parse(lines)]


def _parse(lines: list[str]) -> Iterator[Instruction]:
    computation = ""
    for line in lines:
        if header := _COMPUTATION.match(line):
            computation = header[1]
        elif named := _NAMED.match(line):
            end = _end_of_group(line, named.end())
            if op := _OP.match(line, end):
                start = _end_of_group(line, named.end() + 1) if line.startswith("((", named.end()) else named.end()
                results = tuple(HloArray(dtype, tuple(map(int, filter(None, dims.split(",")))), "S(1)" in layout)
                                for dtype, dims, layout in _ARRAY.findall(line[start:end]))
                name, _, phase = op[1].rpartition("-") if op[1].endswith(("-start", "-done")) else (op[1], "", "")
                num_tuples = _LAYOUT.sub("", line[named.end():end]).count("(")
                yield Instruction(op=name, phase=phase, results=results, num_tuples=num_tuples, computation=computation, is_fused=False, line=line)


def _end_of_group(line: str, start: int) -> int:
    """Where the type that begins at ``start`` ends; tuples nest, and layouts hold parentheses of their own."""
    depth = 0
    for index in range(start, len(line)):
        depth += (line[index] in "({[") - (line[index] in ")}]")
        if depth <= 0 and line[index] in " ,":
            return index
    return len(line)


def collectives(instructions: list[Instruction]) -> list[Instruction]:
    """The instructions by which devices exchange data, an asynchronous one counted once."""
    return [instruction for instruction in instructions if instruction.op in COLLECTIVES and instruction.phase != "done"]


def materialized(instructions: list[Instruction]) -> list[Instruction]:
    """The instructions that write a result into the device's main memory: not views, nothing inside a fusion, nothing kept on the chip."""
    return [instruction for instruction in instructions
            if not instruction.is_fused and instruction.op not in VIEWS and instruction.phase != "start"
            and any(not array.is_on_chip for array in instruction.results)]


def num_aliased(text: str) -> int:
    """How many outputs of a program lie in the memory of a donated argument."""
    return len(re.findall(r"\{[\d, ]*\}: \(\d+, \{[\d, ]*\}, (?:may|must)-alias\)", text.partition("\n")[0]))


def replica_groups(line: str) -> list[frozenset[int]]:
    """The sets of devices of a collective, from any of the ways in which HLO writes them.

    Raises:
        ValueError: a line in none of them.
    """
    if lists := re.search(r"replica_groups=\{(\{[\d,{}]+\})\}", line):
        return [frozenset(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", lists[1])]
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return [frozenset(row) for row in _device_ids(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2])).tolist()]
    mesh = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", line)
    if mesh is None:
        raise ValueError(f"no replica groups in {line.strip()[:200]!r}")
    axes = re.findall(r"'(\w+)'=(\d+)", mesh[1])
    sizes = [int(size) for _, size in axes]
    reduced = [index for index, (name, _) in enumerate(axes) if f"'{name}'" in mesh[4]]
    ids = _device_ids(mesh[2] or ",".join(map(str, sizes)), mesh[3]).reshape(sizes)
    ids = np.moveaxis(ids, reduced, range(-len(reduced), 0))
    return [frozenset(row) for row in ids.reshape(-1, math.prod(ids.shape[-len(reduced):])).tolist()]


def _device_ids(dims: str, permutation: str | None) -> np.ndarray:
    """Consecutive ids in an array of ``dims``, transposed: XLA's iota tile assignment."""
    sizes = [int(dim) for dim in dims.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(axis) for axis in permutation.split(",")]) if permutation else ids
