"""What devices exchange in a step, and how long that takes at least.

The bytes that each device sends in the algorithms that need fewest (Thakur, Rabenseifner, Gropp 2005, doi:10.1177/1094342005051521): of n devices
and a result of s bytes, an all-reduce 2 s (n - 1) / n, an all-gather and an all-to-all s (n - 1) / n, a reduce-scatter s (n - 1), a permute s. Beside
its bytes a message takes a time for each hop from one end of the group to the other, and an all-reduce goes there and back.
"""
import collections
import dataclasses
from collections.abc import Sequence

import jax

from tpllm.aot.hlo import Instruction, replica_groups
from tpllm.aot.report import ProgramFacts, results_text
from tpllm.plan.devices import limits_of, wiring

SENT = {"all-reduce": lambda n: 2 * (n - 1) / n, "all-gather": lambda n: (n - 1) / n, "all-to-all": lambda n: (n - 1) / n,
        "ragged-all-to-all": lambda n: (n - 1) / n, "reduce-scatter": lambda n: n - 1.0, "collective-permute": lambda n: 1.0,
        "collective-broadcast": lambda n: 1.0}


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Collectives of one kind, shape and group size.

    Attributes:
        op: such as ``"all-reduce"``.
        results: dtype and shape of what one gives.
        group_size: devices that take part.
        count: how many there are; one inside a loop counts once.
        num_bytes: of one's results.
        seconds: of one; None where devices share memory.
    """

    op: str
    results: str
    group_size: int
    count: int
    num_bytes: int
    seconds: float | None


def exchanges_of(program: ProgramFacts, mesh_devices: Sequence[jax.Device], all_devices: Sequence[jax.Device]) -> list[Exchange]:
    """A program's collectives, those of most bytes first.

    Args:
        program: compiled.
        mesh_devices: of its mesh, in the mesh's order.
        all_devices: of the topology.
    """
    found: dict[tuple[str, str, frozenset[int]], list[Instruction]] = collections.defaultdict(list)
    for instruction in program.collectives:
        found[instruction.op, results_text(instruction), _group(instruction, len(mesh_devices))].append(instruction)
    exchanges = []
    for (op, results, group), instructions in found.items():
        num_bytes = sum(array.num_bytes for array in instructions[0].results)
        seconds = exchange_seconds(op, num_bytes, [mesh_devices[index] for index in sorted(group)], all_devices)
        exchanges.append(Exchange(op, results, len(group), len(instructions), num_bytes, seconds))
    return sorted(exchanges, key=lambda exchange: -exchange.num_bytes * exchange.count)


def exchange_seconds(op: str, num_bytes: float, group: Sequence[jax.Device], all_devices: Sequence[jax.Device]) -> float | None:
    """The least time of one collective; None where devices share memory.

    Args:
        op: a key of ``SENT``.
        num_bytes: of its result on one device.
        group: the devices that take part.
        all_devices: of the topology.
    """
    if limits_of(group[0]).link_bytes_per_s is None:
        return None
    if len(group) < 2:
        return 0.0
    bytes_per_s, num_hops = wiring(group, all_devices)
    return SENT[op](len(group)) * num_bytes / bytes_per_s + num_hops * limits_of(group[0]).hop_s * (2 if op == "all-reduce" else 1)


def total_seconds(exchanges: Sequence[Exchange]) -> float | None:
    """The seconds of all exchanges, one after the other; None where devices share memory."""
    return None if any(one.seconds is None for one in exchanges) else sum(one.seconds * one.count for one in exchanges)


def _group(instruction: Instruction, num_devices: int) -> frozenset[int]:
    """The devices that the first one exchanges with, itself included."""
    if instruction.op == "collective-permute":
        return frozenset(range(min(2, num_devices)))
    groups = replica_groups(instruction.line)
    return next((group for group in groups if 0 in group), groups[0]) if groups else frozenset(range(num_devices))
