"""The best mesh of a topology: every one that cuts the model is judged by the analytic model, the best are compiled."""
import dataclasses
from typing import Any

from sharding_rules import MeshError, ShardingError
from tpllm.errors import ConfigError
from tpllm.model.params import bytes_per_device
from tpllm.plan.costs import decode_work
from tpllm.plan.devices import find_devices, limits_of
from tpllm.plan.exchange import exchange_seconds
from tpllm.plan.planner import device_bytes, make_plan, row_bytes, standing_bytes
from tpllm.plan.setup import PlanOptions, Setup, Subject, open_subject, prepare


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh before it is compiled.

    Attributes:
        mesh: as a user writes it.
        setup: on it.
        has_room: whether weights and caches fit.
        tokens_per_s: at most; 0 where the devices' speeds are not known.
    """

    mesh: str
    setup: Setup
    has_room: bool
    tokens_per_s: float

    def entry(self) -> dict[str, Any]:
        """JSON-able."""
        return {"mesh": self.mesh, "has_room": self.has_room, "tokens_per_s": self.tokens_per_s,
                "weight_bytes": bytes_per_device(self.setup.params), "kv_bytes_per_row": row_bytes(self.setup)}


def find_meshes(options: PlanOptions) -> list[Candidate]:
    """Every mesh over all devices of the topology that cuts the model and its rows evenly, the best first.

    Raises:
        ConfigError: there is none.
    """
    subject, num_devices = open_subject(options.model), len(find_devices(options.topology))
    found = [candidate for sizes in _meshes(num_devices, subject) if (candidate := _judge(options, subject, sizes)) is not None]
    if not found:
        raise ConfigError(f"no mesh over {num_devices} devices cuts {options.model} and {options.num_seqs} rows evenly; ask for a topology of fewer "
                          "devices, or for a number of rows with more divisors")
    return sorted(found, key=lambda candidate: (-candidate.has_room, -candidate.tokens_per_s, bytes_per_device(candidate.setup.params)))


def plan_best(options: PlanOptions) -> dict[str, Any]:
    """The plan of the best mesh whose programs fit, or of the first where none does; ``"candidates"`` names all."""
    candidates, first = find_meshes(options), None
    for candidate in candidates:
        report = make_plan(dataclasses.replace(options, mesh=candidate.mesh), candidate.setup)
        first = first or report
        if report["memory"]["fits"] or not candidate.has_room:
            break
    best = report if report["memory"]["fits"] else first
    return {**best, "candidates": [candidate.entry() for candidate in candidates]}


def _meshes(num_devices: int, subject: Subject) -> list[dict[str, int]]:
    sizes = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
    experts = sizes if subject.config.num_experts else [1]
    return [{"dp": num_devices // (ep * tp), **({"ep": ep} if ep > 1 else {}), "tp": tp} for ep in experts for tp in sizes
            if num_devices % (ep * tp) == 0]


def _judge(options: PlanOptions, subject: Subject, sizes: dict[str, int]) -> Candidate | None:
    if subject.config.num_heads % sizes["tp"]:  # attention would be computed by all alike
        return None
    text = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "tp=1"
    try:
        setup = prepare(dataclasses.replace(options, mesh=text), subject)
    except (MeshError, ShardingError, ConfigError):
        return None
    limits, has_room = limits_of(setup.devices[0]), standing_bytes(setup, setup.shapes.max_num_seqs) <= device_bytes(setup)
    if limits.bytes_per_s is None:
        return Candidate(text, setup, has_room, 0.0)
    group = list(setup.config.partition.mesh.devices.reshape(sizes["dp"], -1)[0])
    hidden_bytes = setup.shapes.max_num_seqs // sizes["dp"] * setup.config.hidden_size * setup.dtype.itemsize
    exchange_s = (2 * setup.config.num_layers + 1) * exchange_seconds("all-reduce", hidden_bytes, group, setup.devices)
    step_s = decode_work(setup).seconds(bytes_per_s=limits.bytes_per_s, flops=limits.flops) + exchange_s
    return Candidate(text, setup, has_room, setup.shapes.max_num_seqs / step_s)
