"""A plan for a terminal."""
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

SMALL_BYTES = 4096
EXCHANGE_HEADINGS = ("program", "op", "devices", "result", "count", "bytes", "time")
CANDIDATE_HEADINGS = ("mesh", "weights", "a row", "has room", "tokens/s at best")


def print_plan(report: dict[str, Any], console: Console | None = None) -> None:
    """Print a plan's memory, exchanges and speeds; ``console`` is a new one by default."""
    console = Console(width=110) if console is None else console
    for line in heading(report):
        console.print(line, highlight=False)
    for table in (_memory_table(report), _exchange_table(report), _candidate_table(report)):
        if table is not None:
            console.print(table)
    for line in speed_lines(report):
        console.print(line, highlight=False)


def heading(report: dict[str, Any]) -> list[str]:
    """What was planned, and whether it fits."""
    plan, memory = report["plan"], report["memory"]
    used = "" if plan["num_devices"] == plan["num_devices_of_topology"] else f" of {plan['num_devices_of_topology']}"
    lines = [f"{plan['model']} on {plan['topology']} ({plan['num_devices']}{used} x {plan['device_kind']}), mesh {plan['mesh']}",
             f"weights {plan['quantization'] or plan['dtype']}, keys and values {plan['kv_cache_dtype']}; {plan['num_seqs']} rows of "
             f"{plan['context_len']} tokens, chunks of {plan['prefill_chunk']}"]
    if memory["fits"]:
        return [*lines, f"it fits; about {memory['num_seqs_that_fit']} such rows do"]
    fewer = f"; {memory['num_seqs_that_fit']} rows do" if memory["num_seqs_that_fit"] else ", not with a single row either"
    return [*lines, f"it does NOT fit{fewer}: {report['refusal']}"]


def memory_parts(report: dict[str, Any]) -> dict[str, int | None]:
    """Bytes of each device by what they are for; what is free comes last."""
    memory = report["memory"]
    parts = {"weights": memory["weight_bytes"], "keys and values": memory["kv_bytes"], "slots": memory["slot_bytes"],
             "temporaries": memory["temporary_bytes"]}
    return {**parts, "free": memory["device_bytes"] - sum(value or 0 for value in parts.values())}


def grouped(collectives: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The exchanges, with the bytes and seconds of all that are alike added up; small ones, which sampling needs, are one entry a group size."""
    rows: dict[Any, dict[str, Any]] = {}
    for one in collectives:
        is_small = one["num_bytes"] < SMALL_BYTES
        row = rows.setdefault(one["group_size"] if is_small else id(one), {
            "op": "small ones" if is_small else one["op"], "group_size": one["group_size"], "results": "" if is_small else one["results"],
            "count": 0, "num_bytes": 0, "seconds": None if one["seconds"] is None else 0.0})
        row["count"] += one["count"]
        row["num_bytes"] += one["num_bytes"] * one["count"]
        if one["seconds"] is not None:
            row["seconds"] += one["seconds"] * one["count"]
    return list(rows.values())


def exchange_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """A cell for each of ``EXCHANGE_HEADINGS``."""
    return [(name, one["op"], str(one["group_size"]), one["results"], str(one["count"]), decimal(one["num_bytes"]),
             "-" if one["seconds"] is None else f"{1e6 * one['seconds']:,.0f} us")
            for name, program in report["programs"].items() for one in grouped(program["collectives"])]


def candidate_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """A cell for each of ``CANDIDATE_HEADINGS``."""
    return [(one["mesh"], decimal(one["weight_bytes"]), decimal(one["kv_bytes_per_row"]), "yes" if one["has_room"] else "no",
             f"{one['tokens_per_s']:,.0f}" if one["tokens_per_s"] else "-") for one in report["candidates"]]


def speed_lines(report: dict[str, Any]) -> list[str]:
    """The least times in words."""
    speed, plan = report["speed"], report["plan"]
    if not speed:
        return []
    weights, cache = (decimal(round(speed["decode"][name])) for name in ("weight_bytes", "kv_bytes"))
    work = f"a decode step reads {weights} of weights and {cache} of keys and values on each device and computes " \
           f"{speed['decode']['flops'] / 1e9:,.1f} GFLOP"
    if speed["tokens_per_s"] is None:
        return [work, "no times: this device's speeds are not known"]
    exchange_s = report["programs"]["decode"]["exchange_s"]
    return [work, f"at best {speed['tokens_per_s']:,.0f} tokens/s: {1e3 * speed['step_s']:.2f} ms a step of {plan['num_seqs']} rows, "
                  f"{1e3 * exchange_s:.2f} ms of it exchanges; bound by {speed['decode_is_bound_by']}",
            f"at best {1e3 * speed['ttft_s']:,.1f} ms to the first token of a prompt of {plan['prompt_len']}"]


def _memory_table(report: dict[str, Any]) -> Table:
    table, room = _table("memory of each device", "", "bytes", "share"), report["memory"]["device_bytes"]
    for name, value in memory_parts(report).items():
        table.add_row(name, *("-", "-") if value is None else (decimal(value) if value >= 0 else f"-{decimal(-value)}", f"{value / room:.1%}"))
    table.add_row("all", decimal(room), "")
    return table


def _exchange_table(report: dict[str, Any]) -> Table | None:
    table = _table("exchanges of a program", *EXCHANGE_HEADINGS)
    for row in exchange_rows(report):
        table.add_row(*map(_short, row))
    return table if table.row_count else None


def _candidate_table(report: dict[str, Any]) -> Table | None:
    if "candidates" not in report:
        return None
    table = _table("meshes, by an estimate before compiling", *CANDIDATE_HEADINGS)
    for row in candidate_rows(report):
        table.add_row(*row)
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    for text in headings:
        table.add_column(text, justify="left" if text in ("", "program", "op", "result", "mesh", "has room") else "right")
    return table


def _short(text: str, limit: int = 48) -> str:
    return text if len(text) <= limit else f"{text[:limit - 3]}..."
