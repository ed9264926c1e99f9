"""What the benchmark has to show on an H200, and whether it did."""
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

DECODE_SHARES = {None: 0.85, "int8": 0.80, "int4": 0.65}  # of the copy bandwidth, one row
ATTENTION_RATIO, PAGED_SHARE, FP8_RATIO, INT8_RATIO, PLAN_ERROR = 0.95, 0.85, 1.6, 1.7, 0.25
Report = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        what: is measured.
        at_least: that it must be; ``at_most`` in its place.
        value: that it is; None where it was not measured.
        section: where it is measured.
    """

    what: str
    value: float | None
    section: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def is_reached(self) -> bool | None:
        """None where it was not measured."""
        if self.value is None:
            return None
        return self.value >= self.at_least if self.at_least is not None else self.value <= self.at_most

    def entry(self) -> dict[str, Any]:
        """JSON-able."""
        return {**dataclasses.asdict(self), "is_reached": self.is_reached}


def find_bars(report: Report) -> list[Bar]:
    """Every bar, measured or not."""
    return [*_decode_bars(report), *_attention_bars(report), *_product_bars(report), *_plan_bars(report)]


def ceiling(report: Report, name: str) -> float | None:
    """A measured ceiling: ``"copy"`` in bytes a second, ``"bfloat16"``, ``"float8_e4m3fn"`` or ``"int8"`` in operations a second."""
    return report["sections"].get("ceilings", {}).get("best", {}).get(name)


def _decode_bars(report: Report) -> list[Bar]:
    found, copy = [], ceiling(report, "copy")
    for quantization, share in DECODE_SHARES.items():
        one = next((entry for entry in _entries(report, "end_to_end") if entry["quantization"] == quantization), {})
        row = next((row for row in one.get("decode", []) if row.get("batch_size") == 1), {})
        value = row["bytes_per_s"] / copy if row.get("bytes_per_s") and copy else None
        found.append(Bar(f"decode {quantization or 'bfloat16'}, 1 row: share of the copy bandwidth", value, "end_to_end", at_least=share))
    return found


def _attention_bars(report: Report) -> list[Bar]:
    flash = _contest(report, "flash_attention", 0)
    ours = _best_s(flash, lambda label, side: label == "ours")
    peer = _best_s(flash, lambda label, side: "SDPA" in label or "cuDNN" in label)
    paged, copy = _contest(report, "paged_attention", 0), ceiling(report, "copy")
    speed = paged.get("sides", {}).get("ours", {}).get("bytes_per_s")
    return [Bar(f"flash attention {flash.get('name', '')}: speed over the best of cuDNN and torch SDPA", peer / ours if ours and peer else None,
                "flash_attention", at_least=ATTENTION_RATIO),
            Bar(f"paged decode {paged.get('name', '')}: share of the copy bandwidth", speed / copy if speed and copy else None, "paged_attention",
                at_least=PAGED_SHARE)]


def _product_bars(report: Report) -> list[Bar]:
    found = []
    for contest in _entries(report, "products"):
        bf16 = _best_s(contest, lambda label, side: label.startswith("bf16"))
        is_square = contest["name"].endswith("^3")
        ours = _best_s(contest, lambda label, side, wanted="fp8, ours" if is_square else "int8, ours": label == wanted)
        what = "fp8 product" if is_square else "int8 weights"
        found.append(Bar(f"{what} {contest['name']}: speed over bfloat16's best", bf16 / ours if bf16 and ours else None, "products",
                         at_least=FP8_RATIO if is_square else INT8_RATIO))
    return found or [Bar("int8 weights: speed over bfloat16's best", None, "products", at_least=INT8_RATIO),
                     Bar("fp8 product: speed over bfloat16's best", None, "products", at_least=FP8_RATIO)]


def _plan_bars(report: Report) -> list[Bar]:
    errors = [abs(error) for entry in _entries(report, "plan") if (error := entry["error_of_tokens_per_s"]) is not None]
    return [Bar("tpllm plan's tokens/s: largest error beside the measured", max(errors, default=None), "plan", at_most=PLAN_ERROR)]


def _entries(report: Report, section: str) -> list[dict[str, Any]]:
    return report["sections"].get(section, {}).get("entries", [])


def _contest(report: Report, section: str, index: int) -> dict[str, Any]:
    entries = _entries(report, section)
    return entries[index] if index < len(entries) else {}


def _best_s(contest: Report, is_wanted: Callable[[str, Report], bool]) -> float | None:
    return min((side["seconds"] for label, side in contest.get("sides", {}).items() if "seconds" in side and is_wanted(label, side)), default=None)

