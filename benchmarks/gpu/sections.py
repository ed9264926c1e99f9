"""What each section runs; in the order of its importance."""
import statistics
from typing import Any

from benchmarks.gpu.contests import CONTESTS, Pace, failure, run_contest
from benchmarks.gpu.session import OutOfTimeError, Section, Session
from benchmarks.gpu.worker import TaskError

QUANTIZATIONS = (None, "int8", "int4", "fp8")
PRODUCT_DTYPES = ("bfloat16", "float8_e4m3fn", "int8")
FULL = {"shape": "llama-3.1-8b", "batch_sizes": (1, 8, 64), "prompt_lens": (2048, 8192), "prompt_len": 512, "output_len": 65, "num_runs": 2}
TINY = {"shape": "tiny", "batch_sizes": (1, 2), "prompt_lens": (40,), "prompt_len": 20, "output_len": 24, "num_runs": 1}
PEER_BATCHES = (1, 8)
SPARE_TOKENS = 64  # of a row: a page, and decode steps ahead
TOPOLOGIES = {"NVIDIA H200": "h200:1", "NVIDIA H100 80GB HBM3": "h100:1", "cpu": "cpu:1"}


def lengths(session: Session) -> dict[str, Any]:
    """Of the models that are run end to end."""
    return TINY if session.is_tiny else FULL


def begin(session: Session, names: list[str]) -> None:
    """Describe the machine; start what only compiles, and so can go on beside the first section."""
    session.report["machine"] = session.workers["jax"].call(".jax_worker:describe", timeout_s=120)
    if session.report["machine"]["platform"] != "gpu" and not session.is_tiny:
        raise TaskError(f"JAX finds no GPU here but {session.report['machine']['platform']}; install jax[cuda13], or use --tiny")
    sizes = lengths(session)
    if "transformers" in names:
        session.workers["transformers"].start(".transformers_worker:open_model", shape=sizes["shape"], batch_sizes=list(_peer_batches(session)),
                                              prompt_len=sizes["prompt_len"], output_len=sizes["output_len"], is_compiled=not session.is_tiny)
    if "plan" in names and _topology(session):
        session.workers["plan"].start(".plan_worker:forecast", is_compiled=True, **_plan_options(session, None, 1))


def correctness(session: Session, section: dict[str, Any]) -> None:
    """Every op's own cases; the rest of what was started meanwhile is waited for too, so that nothing computes beside what is timed."""
    worker, entries = session.workers["jax"], section.setdefault("entries", [])
    for op, cases in worker.call(".correctness_worker:list_cases", timeout_s=session.timeout(60), is_tiny=session.is_tiny).items():
        for case in cases:
            try:
                entries.append(worker.call(".correctness_worker:check", timeout_s=session.timeout(60), is_tiny=session.is_tiny, **case))
            except TaskError as error:
                entries.append({**case, **failure(error), "is_right": False})
            except OutOfTimeError:
                section.setdefault("not_run", []).append(f"{op}: {case}")


def ceilings(session: Session, section: dict[str, Any]) -> None:
    """The best that XLA and torch reach."""
    _settle(session)
    num_bytes, size = (2**22, 128) if session.is_tiny else (2**31, 8192)
    section["best"] = {}
    for name in ("jax", "torch"):
        entry = section[name] = {}
        _note(entry, "copy", lambda name=name: session.workers[name].call(f".{name}_worker:copy_bandwidth", timeout_s=session.timeout(60),
                                                                          num_bytes=num_bytes, num_samples=5))
        for dtype in PRODUCT_DTYPES:
            _note(entry, dtype, lambda name=name, dtype=dtype: [2 * size**3 / seconds for seconds in session.workers[name].call(
                f".{name}_worker:matmul_seconds", timeout_s=session.timeout(60), dtype=dtype, size=size, num_samples=5)])
        if isinstance(entry["copy"], dict) and "copy_bytes_per_s" in entry["copy"]:
            _keep_best(section["best"], "copy", entry["copy"]["copy_bytes_per_s"])
        for dtype in PRODUCT_DTYPES:
            if isinstance(entry[dtype], list):
                _keep_best(section["best"], dtype, entry[dtype])


def _note(entry: dict[str, Any], name: str, run: Any) -> None:
    try:
        entry[name] = run()
    except TaskError as error:
        entry[name] = failure(error)


def _keep_best(best: dict[str, float], name: str, samples: list[float]) -> None:
    best[name] = max(best.get(name, 0.0), statistics.median(samples))


def _settle(session: Session) -> None:
    """Wait until nothing that was started beside goes on; what takes too long is ended, and tells so where it is asked for."""
    for name in ("transformers", "plan"):
        worker = session.workers[name]
        if worker.is_busy:
            found = session.report["setup"].setdefault("started_beside", {})
            try:
                found[name] = worker.finish(timeout_s=session.timeout(100))
            except TaskError as error:
                found[name] = failure(error)


def contest_section(name: str) -> Any:
    """The section of some contests."""
    def run(session: Session, section: dict[str, Any]) -> None:
        _settle(session)
        pace = Pace(1, 1, 0.001) if session.is_tiny else Pace()
        for contest in CONTESTS[name](is_tiny=session.is_tiny):
            if session.left_s < 2:
                section.setdefault("not_run", []).append(contest.name)
                continue
            section.setdefault("entries", []).append(run_contest(contest, session.workers, pace, is_tiny=session.is_tiny))
    return run


def end_to_end(session: Session, section: dict[str, Any]) -> None:
    """Decode and prefill of each quantization."""
    _settle(session)
    sizes, worker = lengths(session), session.workers["jax"]
    row_len, num_seqs = sizes["prompt_len"] + sizes["output_len"], max(sizes["batch_sizes"])
    longest = max(max(sizes["prompt_lens"]) + 2, row_len)
    engine = {"shape": sizes["shape"], "max_model_len": longest, "max_num_seqs": num_seqs,
              "kv_cache_tokens": max(longest, num_seqs * row_len) + SPARE_TOKENS * num_seqs}
    steps = [("decode", f"decode of {batch}", {"batch_size": batch, "prompt_len": sizes["prompt_len"], "output_len": sizes["output_len"]})
             for batch in sizes["batch_sizes"]]
    steps += [("prefill", f"prefill of {length}", {"prompt_len": length}) for length in sizes["prompt_lens"]]
    for quantization in QUANTIZATIONS:
        name = quantization or "bfloat16"
        try:
            opened = worker.call(".engine_worker:open_engine", timeout_s=session.timeout(120), quantization=quantization, **engine)
        except OutOfTimeError:
            section.setdefault("not_run", []).append(name)
            continue
        except TaskError as error:
            section.setdefault("entries", []).append({"quantization": quantization, "decode": [], "prefill": [], **failure(error)})
            continue
        entry: dict[str, Any] = {"quantization": quantization, "decode": [], "prefill": [], "engine": opened}
        section.setdefault("entries", []).append(entry)
        for kind, what, arguments in steps:
            _measure_step(session, section, entry, (kind, f"{name}, {what}"), {**arguments, "num_runs": sizes["num_runs"]})
        _try_close(session)


def _measure_step(session: Session, section: dict[str, Any], entry: dict[str, Any], named: tuple[str, str], arguments: dict[str, Any]) -> None:
    kind, what = named
    try:
        entry[kind].append(session.workers["jax"].call(f".engine_worker:{kind}", timeout_s=session.timeout(90), **arguments))
    except TaskError as error:
        entry[kind].append({**arguments, **failure(error)})
    except OutOfTimeError:
        section.setdefault("not_run", []).append(what)


def _try_close(session: Session) -> None:
    try:
        session.workers["jax"].call(".engine_worker:close_engine", timeout_s=60)
    except TaskError:
        session.workers["jax"].stop()


def transformers_peer(session: Session, section: dict[str, Any]) -> None:
    """The model that was compiled beside the first section."""
    _settle(session)
    sizes, opened = lengths(session), session.report["setup"].get("started_beside", {}).get("transformers", {})
    section["model"] = opened
    if "absent" in opened or "error" in opened:
        section.setdefault("not_run", []).append("its model could not be opened, see there")
        return
    for batch_size in _peer_batches(session):
        try:
            entry = session.workers["transformers"].call(".transformers_worker:decode", timeout_s=session.timeout(60), batch_size=batch_size,
                                                         prompt_len=sizes["prompt_len"], output_len=sizes["output_len"], num_runs=3)
        except TaskError as error:
            section.setdefault("entries", []).append({"batch_size": batch_size, **failure(error)})
            break
        for name in ("ttft_s", "step_s"):
            entry[name] = statistics.median(run[name] for run in entry["runs_s"])
        entry["decode_tokens_per_s"] = batch_size / entry["step_s"]
        section.setdefault("entries", []).append(entry)
    session.workers["transformers"].stop()  # its weights would stay on the device


def plan(session: Session, section: dict[str, Any]) -> None:
    """The plan's tokens a second of each decode that was measured."""
    _settle(session)
    section["compiled"] = session.report["setup"].get("started_beside", {}).get("plan")
    if not _topology(session):
        section.setdefault("not_run", []).append(f"no plan is made for a {session.report['machine']['device_kind']}")
        return
    for model in session.entries("end_to_end"):
        for row in model["decode"]:
            if not row.get("decode_tokens_per_s"):
                continue
            found = session.workers["plan"].call(".plan_worker:forecast", timeout_s=session.timeout(60), is_compiled=False,
                                                 **_plan_options(session, model["quantization"], row["batch_size"]))["speed"]
            planned, measured = found["tokens_per_s"], row["decode_tokens_per_s"]
            section.setdefault("entries", []).append({
                "quantization": model["quantization"], "batch_size": row["batch_size"], "planned_tokens_per_s": planned,
                "measured_tokens_per_s": measured, "error_of_tokens_per_s": planned / measured - 1 if planned else None})


def _plan_options(session: Session, quantization: str | None, batch_size: int) -> dict[str, Any]:
    sizes = lengths(session)
    return {"model": sizes["shape"], "topology": _topology(session), "quantization": quantization, "num_seqs": batch_size,
            "context_len": sizes["prompt_len"] + sizes["output_len"], "prompt_len": sizes["prompt_len"]}


def _topology(session: Session) -> str | None:
    return TOPOLOGIES.get(session.report["machine"]["device_kind"])


def _peer_batches(session: Session) -> tuple[int, ...]:
    return (1,) if session.is_tiny else PEER_BATCHES


SECTIONS = (
    Section("correctness", correctness, 0), Section("ceilings", ceilings, 20), Section("flash_attention", contest_section("flash_attention"), 30),
    Section("paged_attention", contest_section("paged_attention"), 30), Section("products", contest_section("products"), 60),
    Section("end_to_end", end_to_end, 150), Section("transformers", transformers_peer, 20), Section("plan", plan, 15),
    Section("fused", contest_section("fused"), 20),
)
