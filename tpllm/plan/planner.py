"""Makes a plan of a setup: compiles both programs, adds up bytes and seconds."""
import dataclasses
import math
import time
from typing import Any

import jax
import psutil
from rich.filesize import decimal

from sharding_rules import mesh_text
from sharding_rules.axes import BATCH
from tpllm.aot.report import ProgramFacts, compile_all
from tpllm.aot.step_programs import abstract_slots, lower_decode, lower_prefill
from tpllm.engine.sampling_params import MAX_STOP_TOKEN_IDS
from tpllm.errors import MemoryNeedError
from tpllm.model.kv_cache import cache_bytes_per_device
from tpllm.model.params import bytes_per_device
from tpllm.plan.costs import decode_work, prefill_work
from tpllm.plan.devices import limits_of
from tpllm.plan.exchange import exchanges_of, total_seconds
from tpllm.plan.setup import PlanOptions, Setup, prepare

PROGRAMS = {"decode": lower_decode, "prefill": lower_prefill}
MAX_TRIES = 4  # of a smaller number of rows, where what was asked for does not fit
SAMPLE_LAYERS = 2  # are compiled at two numbers of rows
USABLE = 0.97  # of a GPU's memory; its driver and libraries take the rest


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Both programs of a setup."""

    setup: Setup
    programs: dict[str, ProgramFacts]
    seconds: float

    @property
    def temporary_bytes(self) -> int:
        """The temporary bytes of the program that needs more."""
        return max(program.temporary_bytes for program in self.programs.values())


def make_plan(options: PlanOptions, setup: Setup | None = None) -> dict[str, Any]:
    """Compile a model's programs for its devices and say what they take; JSON-able.

    Args:
        options: what a user asks for.
        setup: made of them already.

    Returns:
        What was planned; under ``"memory"`` bytes of each device, whether they fit and how many rows do; under ``"programs"`` what ``decode`` (a
        step of all rows) and ``prefill`` (a chunk) exchange, read and compute; under ``"speed"`` the least times, None where a device's
        speeds are not known.

    Raises:
        TpllmError: see :func:`.prepare`.
    """
    setup = prepare(options) if setup is None else setup
    memory, compiled, refusal = find_room(setup)
    report = {"plan": _subject(setup), "memory": memory, "refusal": refusal, "programs": {}, "speed": {}}
    if compiled is not None:
        report["compiled_num_seqs"], report["compile_s"] = compiled.setup.shapes.max_num_seqs, compiled.seconds
        report["programs"] = {name: _program(setup, program) for name, program in compiled.programs.items()}
        report["speed"] = _speed(setup, report["programs"])
    return report


def find_room(setup: Setup) -> tuple[dict[str, Any], Compiled | None, str | None]:
    """(bytes of each device, the programs at as many rows as were asked for or fewer, why those asked for do not fit)."""
    room, wanted, refusal = device_bytes(setup), setup.shapes.max_num_seqs, None
    fixed, row = bytes_per_device(setup.params), row_bytes(setup)
    num_groups, compiled, num_seqs = setup.config.partition.size(BATCH), None, wanted
    for _ in range(MAX_TRIES):
        needed = standing_bytes(setup, num_seqs)
        if needed > room:
            reason = f"weights and caches need {decimal(needed)} of each device, programs can have {decimal(room)} of it"
            num_seqs = min(num_seqs - num_groups, int((room - fixed) / row * 0.9) * num_groups)
        else:
            compiled, reason = _compile(setup, num_seqs)
            if compiled is not None:
                break
            num_seqs = num_seqs // 2 // num_groups * num_groups
        refusal = refusal or reason
        if num_seqs < num_groups:
            break
    memory = {"device_bytes": room, "weight_bytes": fixed, "kv_bytes": wanted // num_groups * kv_row_bytes(setup),
              "kv_bytes_per_row": kv_row_bytes(setup), "slot_bytes": wanted // num_groups * (row - kv_row_bytes(setup)),
              "temporary_bytes": None if compiled is None else compiled.temporary_bytes, "fits": refusal is None,
              "num_seqs_that_fit": 0 if compiled is None else rows_that_fit(compiled, room)}
    return memory, compiled, refusal


def rows_that_fit(compiled: Compiled, room: int) -> int:
    """About how many rows there is room for: temporaries of the whole model, and more for each further row as of its first layers alone."""
    setup, num_groups = compiled.setup, compiled.setup.config.partition.size(BATCH)
    left, num_rows = room - bytes_per_device(setup.params), setup.shapes.max_num_seqs // num_groups
    step, chunk = (compiled.programs[name].temporary_bytes for name in PROGRAMS)
    further = _step_bytes_of_a_row(setup)
    most = min((left - chunk) / row_bytes(setup), (left - step + num_rows * further) / (row_bytes(setup) + further))
    return max(int(most) * num_groups, setup.shapes.max_num_seqs)


def _step_bytes_of_a_row(setup: Setup) -> float:
    """The bytes by which each row lets the temporaries of a decode step grow."""
    setup = dataclasses.replace(setup, config=setup.config.slice(0, SAMPLE_LAYERS))
    once, twice = (_with_rows(setup, times * setup.shapes.max_num_seqs) for times in (1, 2))
    fewer, more = compile_all([_lower(sample, "decode") for sample in (once, twice)])
    return max(0.0, (more.temporary_bytes - fewer.temporary_bytes) / (setup.shapes.max_num_seqs / setup.config.partition.size(BATCH)))


def _with_rows(setup: Setup, num_seqs: int) -> Setup:
    return dataclasses.replace(setup, shapes=dataclasses.replace(setup.shapes, max_num_seqs=num_seqs))


def _lower(setup: Setup, name: str) -> jax.stages.Lowered:
    return PROGRAMS[name](setup.config, setup.shapes, params=setup.params, cache_dtype=setup.cache_dtype)


def device_bytes(setup: Setup) -> int:
    """Memory of one device that programs can have; CPU devices share the machine's evenly."""
    limits = limits_of(setup.devices[0])
    if limits.memory_bytes is None:
        return psutil.virtual_memory().total // setup.config.partition.mesh.size
    return int(limits.memory_bytes * USABLE) if setup.config.partition.platform == "gpu" else limits.memory_bytes


def kv_row_bytes(setup: Setup) -> int:
    """Bytes that a row's pages take on each device of its data group."""
    num_groups = setup.config.partition.size(BATCH)
    return cache_bytes_per_device(setup.config, num_groups, setup.shapes.pages_per_row * setup.shapes.page_size, setup.cache_dtype)


def row_bytes(setup: Setup) -> int:
    """Those, and its slot's state."""
    shapes = dataclasses.replace(setup.shapes, max_num_seqs=setup.config.partition.size(BATCH))
    return kv_row_bytes(setup) + bytes_per_device(abstract_slots(setup.config, shapes, num_stop_ids=MAX_STOP_TOKEN_IDS + 1))


def standing_bytes(setup: Setup, num_seqs: int) -> int:
    """Bytes of weights, pages and slots on each device with so many rows."""
    return bytes_per_device(setup.params) + math.ceil(num_seqs / setup.config.partition.size(BATCH)) * row_bytes(setup)


def _compile(setup: Setup, num_seqs: int) -> tuple[Compiled | None, str | None]:
    """(both programs at so many rows, or None where they do not fit; why not)."""
    setup, room, start = _with_rows(setup, num_seqs), device_bytes(setup), time.perf_counter()
    try:
        programs = dict(zip(PROGRAMS, compile_all([_lower(setup, name) for name in PROGRAMS]), strict=True))
    except MemoryNeedError as error:
        return None, str(error)
    for name, program in programs.items():
        memory = program.memory
        needed = memory.argument_bytes + memory.temporary_bytes + memory.output_bytes - memory.aliased_bytes
        if needed > room and setup.config.partition.platform != "tpu":  # a TPU's compiler refuses itself, and counts the chip's own memory too
            return None, f"{name} needs {decimal(needed)} of each device, programs can have {decimal(room)} of it"
    return Compiled(setup, programs, time.perf_counter() - start), None


def _subject(setup: Setup) -> dict[str, Any]:
    config, mesh, options = setup.config, setup.config.partition.mesh, setup.options
    return {"model": options.model, "topology": options.topology, "device_kind": setup.devices[0].device_kind, "mesh": mesh_text(mesh),
            "num_devices": mesh.size, "num_devices_of_topology": len(setup.devices), "dtype": str(setup.dtype),
            "quantization": options.quantization, "kv_cache_dtype": str(setup.cache_dtype), "num_seqs": setup.shapes.max_num_seqs,
            "context_len": setup.shapes.max_model_len, "prompt_len": setup.prompt_len, "prefill_chunk": setup.shapes.prefill_chunk,
            "page_size": setup.shapes.page_size, "jax": jax.__version__, "kv_repeat": config.kv_repeat}


def _program(setup: Setup, program: ProgramFacts) -> dict[str, Any]:
    exchanges = exchanges_of(program, list(setup.config.partition.mesh.devices.flat), setup.devices)
    return {"temporary_bytes": program.temporary_bytes, "num_aliased": program.num_aliased, "exchange_s": total_seconds(exchanges),
            "exchanged_bytes": sum(one.num_bytes * one.count for one in exchanges), "collectives": list(map(dataclasses.asdict, exchanges))}


def _speed(setup: Setup, programs: dict[str, Any]) -> dict[str, Any]:
    """The least times: memory or arithmetic, whichever takes longer, and the exchanges after it."""
    limits, num_chunks = limits_of(setup.devices[0]), math.ceil(setup.prompt_len / setup.shapes.prefill_chunk)
    works = {"decode": decode_work(setup), "prefill": prefill_work(setup)}
    speed: dict[str, Any] = {name: dataclasses.asdict(work) for name, work in works.items()}
    if limits.bytes_per_s is None:
        return {**speed, "step_s": None, "tokens_per_s": None, "ttft_s": None}
    peaks = {"bytes_per_s": limits.bytes_per_s, "flops": limits.flops}
    step_s = works["decode"].seconds(**peaks) + programs["decode"]["exchange_s"]
    ttft_s = works["prefill"].seconds(**peaks) + num_chunks * programs["prefill"]["exchange_s"]
    is_memory_bound = works["decode"].num_bytes / limits.bytes_per_s > works["decode"].flops / limits.flops
    return {**speed, "step_s": step_s, "tokens_per_s": setup.shapes.max_num_seqs / step_s, "ttft_s": ttft_s,
            "decode_is_bound_by": "memory" if is_memory_bound else "arithmetic"}
