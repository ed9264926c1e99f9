"""The contests: what is computed, by whom, at which sizes; and how their sides take turns."""
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.worker import TaskError, Worker

MIB = 2**20
IN_MEMORY = 2048 * MIB
"""Of inputs that a program goes through where memory is the limit: many times what the cache on the chip holds."""
FEW = 256 * MIB
LARGEST_ERROR = 2e-2
"""Of a kernel's result in bfloat16 beside XLA's, which rounds too; int8 activations of normal numbers are off by about 1 %."""
PREPARE_S = 90
MEASURE_S = 30


@dataclasses.dataclass(frozen=True)
class Entrant:
    """A side of a contest.

    Attributes:
        label: as the table names it.
        side: its builder, of ``jax_worker.SIDES`` or ``torch_worker.SIDES``.
        worker: ``"jax"`` or ``"torch"``.
        options: for the builder, beside the contest's sizes.
        needs_gpu: whether it cannot run on a CPU.
        is_ours: whether it is this project's.
    """

    label: str
    side: str
    worker: str = "jax"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    needs_gpu: bool = True
    is_ours: bool = False


@dataclasses.dataclass(frozen=True)
class Contest:
    """Sides that compute the same.

    Attributes:
        name: unique in its section.
        sizes: for every builder.
        entrants: who takes part.
        flops: multiplications and additions of a call.
        target_bytes: of inputs that a program goes through.
    """

    name: str
    sizes: Mapping[str, int]
    entrants: Sequence[Entrant]
    flops: float
    target_bytes: int = FEW


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long a contest measures.

    Attributes:
        num_rounds: turns of each side.
        num_samples: of a turn.
        sample_s: what a sample takes at least.
    """

    num_rounds: int = 3
    num_samples: int = 3
    sample_s: float = 0.03


def run_contest(contest: Contest, workers: Mapping[str, Worker], pace: Pace, *, is_tiny: bool) -> dict[str, Any]:
    """Prepare every side, then let them take turns; JSON-able. A side that cannot take part has an ``"error"`` or is ``"absent"``."""
    sides: dict[str, dict[str, Any]] = {}
    generations: dict[str, int] = {}
    for entrant in contest.entrants:
        if is_tiny and entrant.needs_gpu:
            sides[entrant.label] = {"absent": "needs a GPU with CUDA"}
        else:
            sides[entrant.label] = _prepare(contest, entrant, workers, generations)
    for _ in range(pace.num_rounds):
        for entrant in contest.entrants:
            if "samples_s" in sides[entrant.label]:
                _take_turn(contest, entrant, workers, generations, sides[entrant.label], pace)
    for worker, module in {(entrant.worker, _module(entrant)) for entrant in contest.entrants}:
        if workers[worker].is_running:
            _try(lambda worker=worker, module=module: workers[worker].call(f"{module}:drop", timeout_s=MEASURE_S))
    for side in sides.values():
        _summarize(side, contest.flops)
    return {"name": contest.name, "sizes": dict(contest.sizes), "flops": contest.flops, "sides": sides}


def _module(entrant: Entrant) -> str:
    return f".{entrant.worker}_worker"


def _prepare(contest: Contest, entrant: Entrant, workers: Mapping[str, Worker], generations: dict[str, int]) -> dict[str, Any]:
    worker = workers[entrant.worker]
    generations[entrant.label] = worker.generation
    try:
        found = worker.call(f"{_module(entrant)}:prepare", timeout_s=PREPARE_S, key=entrant.label, side=entrant.side,
                            sizes={**contest.sizes, **entrant.options}, target_bytes=contest.target_bytes)
    except TaskError as error:
        return failure(error)
    if "error_of_result" in found:
        found["is_right"] = found["error_of_result"] <= LARGEST_ERROR
    return {**found, "is_ours": entrant.is_ours, "samples_s": []}


def _take_turn(contest: Contest, entrant: Entrant, workers: Mapping[str, Worker], generations: dict[str, int], side: dict[str, Any],
               pace: Pace) -> None:
    worker = workers[entrant.worker]
    if generations[entrant.label] != worker.generation:  # another side ended the process in which this one was prepared
        again = _prepare(contest, entrant, workers, generations)
        if "samples_s" not in again:
            side |= again
            del side["samples_s"]
            return
    try:
        side["samples_s"] += worker.call(f"{_module(entrant)}:measure", timeout_s=MEASURE_S, key=entrant.label, num_samples=pace.num_samples,
                                         sample_s=pace.sample_s)
    except TaskError as error:
        side |= failure(error)
        del side["samples_s"]


def failure(error: TaskError) -> dict[str, Any]:
    """An entry for what failed: that something is not installed is no error."""
    text = str(error)
    if text.startswith(("ModuleNotFoundError", "ImportError")):
        return {"absent": text.partition(": ")[2]}
    return {"error": text, "details": error.details}


def _summarize(side: dict[str, Any], flops: float) -> None:
    if side.get("samples_s"):
        side["seconds"] = statistics.median(side["samples_s"])
        side["bytes_per_s"] = side["num_bytes"] / side["seconds"]
        side["flops_per_s"] = flops / side["seconds"]


def _try(run: Any) -> None:
    try:
        run()
    except TaskError:
        pass  # the worker is gone, and what it kept with it


def ours(side: str, *, label: str = "ours", others: Sequence[str] = (), **options: Any) -> list[Entrant]:
    """This project's op as it chooses for itself, which on Hopper is Mosaic's kernel and on a CPU the reference, and by other kernels of its own."""
    return [Entrant(label, side, options=options, needs_gpu=False, is_ours=True),
            *(Entrant(f"{label}, {name}", side, options={**options, "implementation": name}, is_ours=True) for name in others)]


def attention_contests(*, is_tiny: bool) -> list[Contest]:
    """Of a prompt."""
    found = []
    for T in ((128,) if is_tiny else (8192, 2048)):
        sizes = {"B": 1, "T": T, "N": 4, "K": 2, "H": 64} if is_tiny else {"B": 1, "T": T, "N": 32, "K": 8, "H": 128}
        entrants = [*ours("flash_ours"),
                    Entrant("torch SDPA, flash", "sdpa", "torch", {"backend": "FLASH_ATTENTION"}),
                    Entrant("torch SDPA, cuDNN", "sdpa", "torch", {"backend": "CUDNN_ATTENTION"}),
                    Entrant("jax.nn, cuDNN", "flash_jax", options={"implementation": "cudnn"}),
                    Entrant("JAX's Mosaic kernel", "flash_bundled_mosaic", options={"block_q": 128, "block_kv": 128}),
                    Entrant("JAX's Triton kernel", "flash_bundled_triton"),
                    Entrant("tokamax", "flash_tokamax", needs_gpu=False),
                    Entrant("tokamax, Triton", "flash_tokamax", options={"implementation": "triton"})]
        if is_tiny:
            entrants.append(Entrant("jax.nn, XLA", "flash_jax", options={"implementation": "xla"}, needs_gpu=False))
        found.append(Contest(f"causal {T}", sizes, entrants, flops=2 * T * (T + 1) * sizes["N"] * sizes["H"] * sizes["B"]))
    return found


def paged_contests(*, is_tiny: bool) -> list[Contest]:
    """Decoding over pages."""
    found = []
    for B, S in (((2, 256),) if is_tiny else ((64, 4096), (8, 32768))):
        sizes = {"B": B, "S": S, "page": 64, **({"N": 4, "K": 2, "H": 64} if is_tiny else {"N": 32, "K": 8, "H": 128})}
        entrants = ours("paged_ours")
        for dtype in ("int8", "float8_e4m3fn"):
            entrants += ours("paged_ours", label=f"ours, {dtype} cache", cache_dtype=dtype)
        entrants += [Entrant(f"JAX's Triton kernel, {splits} splits", "paged_bundled", options={"k_splits": splits, "pages_per_compute_block": 4})
                     for splits in ((4, 16) if B > 8 else (16, 64))]
        found.append(Contest(f"{B} rows of {S}", sizes, entrants, flops=4 * B * S * sizes["N"] * sizes["H"]))
    return found


def product_contests(*, is_tiny: bool) -> list[Contest]:
    """Few rows, where weights are read, and many, where they are multiplied."""
    shapes = ((8, 128, 256),) if is_tiny else ((1, 14336, 4096), (16, 14336, 4096), (8, 4096, 14336))
    found = [_few_rows(*shape, is_tiny=is_tiny) for shape in shapes]
    size = 128 if is_tiny else 4096
    sizes = {"M": size, "N": size, "K": size}
    peers = [Entrant("bf16, XLA", "dense_xla", needs_gpu=False), Entrant("bf16, torch", "dense", "torch", needs_gpu=False),
             Entrant("bf16, JAX's Mosaic kernel", "dense_bundled_mosaic", options={"tile_m": 128, "tile_n": 128, "tile_k": 64}),
             Entrant("fp8, XLA", "fp8_xla"), Entrant("fp8, torch._scaled_mm", "scaled_mm", "torch"),
             Entrant("fp8, torch._scaled_mm by row", "scaled_mm", "torch", {"by_row": True})]
    own = [*(Entrant(f"{label}, ours", "eight_bit_ours", options={"name": name}, is_ours=True)
             for label, name in (("fp8", "fp8-a8"), ("fp8 in blocks of 128", "fp8-g128-a8"), ("int8 x int8", "w8a8"))),
           *(entrant for label, name in (("fp8, ours, from bfloat16", "fp8-a8"), ("int8 x int8, ours, from bfloat16", "w8a8"),
                                         ("int8 weights, ours", "int8"), ("int4 weights, ours", "int4"))
             for entrant in ours("packed_ours", label=label, name=name))]
    return [*found, Contest(f"{size}^3", sizes, [*own, *peers], flops=2 * size**3)]


def _few_rows(M: int, N: int, K: int, *, is_tiny: bool) -> Contest:
    entrants = [Entrant("bf16, XLA", "dense_xla", needs_gpu=False), Entrant("bf16, torch", "dense", "torch", needs_gpu=False)]
    for label, name, others in (("int8", "int8", ()), ("int4-g32", "int4", ("triton", "jax_triton")), ("q4_k", "q4_k", ())):
        entrants += ours("packed_ours", label=f"{label}, ours", others=others, name=name)
    entrants += [Entrant(f"{label}, XLA", "packed_xla", options={"bits": bits, "group": group}, needs_gpu=False)
                 for label, bits, group in (("int8", 8, 0), ("int4-g32", 4, 32))]
    return Contest(f"{M} x {N} x {K}", {"M": M, "N": N, "K": K}, entrants, flops=2 * M * N * K, target_bytes=MIB if is_tiny else IN_MEMORY)


def fused_contests(*, is_tiny: bool) -> list[Contest]:
    """Norms and feed-forward layers."""
    found = []
    for M in ((8,) if is_tiny else (8192, 64)):
        entrants = [*ours("norm_ours", others=("triton",)), Entrant("XLA", "norm_xla", needs_gpu=False),
                    Entrant("tokamax", "norm_tokamax", needs_gpu=False)]
        D = 256 if is_tiny else 4096
        found.append(Contest(f"rms_norm {M} x {D}", {"M": M, "D": D}, entrants, flops=5 * M * D, target_bytes=FEW))
    for M in ((8,) if is_tiny else (1, 64, 2048)):
        sizes = {"M": M, "D": 128, "F": 256} if is_tiny else {"M": M, "D": 4096, "F": 14336}
        entrants = [*ours("mlp_ours"), Entrant("XLA", "mlp_xla", needs_gpu=False), Entrant("tokamax", "mlp_tokamax", needs_gpu=False),
                    *(one for name in ("int8", "int4") for one in ours("mlp_packed_ours", label=f"ours, {name} weights", name=name))]
        found.append(Contest(f"gated_mlp {M} x {sizes['D']} x {sizes['F']}", sizes, entrants, flops=6 * M * sizes["D"] * sizes["F"],
                             target_bytes=MIB if is_tiny else IN_MEMORY))
    return found


CONTESTS = {"flash_attention": attention_contests, "paged_attention": paged_contests, "products": product_contests, "fused": fused_contests}
