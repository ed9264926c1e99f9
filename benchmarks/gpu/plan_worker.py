"""Tasks of the worker that plans: what ``tpllm plan`` says of the decodes that are measured. It needs no device, and takes none."""
from typing import Any

from tpllm.plan import PlanOptions, make_plan, prepare_environment
from tpllm.plan.costs import decode_work, prefill_work
from tpllm.plan.devices import limits_of
from tpllm.plan.setup import prepare


def forecast(*, is_compiled: bool, **options: Any) -> dict[str, Any]:
    """The plan's speeds on one device; JSON-able.

    Args:
        is_compiled: whether the programs are compiled, as ``tpllm plan`` does, which says whether they fit. On one device, where nothing is
            exchanged, times follow from what is counted alone, and are the same without.
        options: of :class:`PlanOptions`.
    """
    prepare_environment()
    plan_options = PlanOptions(mesh="tp=1", dtype="bfloat16", **options)
    if is_compiled:
        report = make_plan(plan_options)
        return {name: report[name] for name in ("plan", "memory", "refusal", "speed")} | {"compile_s": report.get("compile_s")}
    setup = prepare(plan_options)
    limits = limits_of(setup.devices[0])
    if limits.bytes_per_s is None:
        return {"speed": {"step_s": None, "tokens_per_s": None, "ttft_s": None}}
    step_s, ttft_s = (work(setup).seconds(bytes_per_s=limits.bytes_per_s, flops=limits.flops) for work in (decode_work, prefill_work))
    return {"speed": {"step_s": step_s, "tokens_per_s": plan_options.num_seqs / step_s, "ttft_s": ttft_s}}
