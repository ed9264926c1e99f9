"""The rows of a small job, and what its folder holds in the end."""
import json
import pathlib


def rows_text(num_rows: int, *, bad: tuple[int, ...] = ()) -> str:
    """JSONL of ``num_rows`` prompts of several kinds; the rows in ``bad`` are no JSON."""
    kinds = [lambda i: {"prompt": f"p{i}", "note": f"é {i}"}, lambda i: {"custom_id": f"id-{i}", "messages": [{"role": "user", "content": f"m{i}"}]},
             lambda i: {"prompt": [i, 2], "sampling": {"n": 2, "logprobs": 1}}]
    return "".join("{torn\n" if i in bad else json.dumps(kinds[i % 3](i)) + "\n" for i in range(num_rows))


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file of an output folder but the lock."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file() and path.name != ".lock"}


def all_rows(folder: pathlib.Path) -> list[dict]:
    """The lines of all parts, in order."""
    return [json.loads(line) for path in sorted(folder.glob("part-?????.jsonl")) for line in path.read_bytes().splitlines()]


def all_errors(folder: pathlib.Path) -> list[dict]:
    """The lines of all errors files, in order."""
    return [json.loads(line) for path in sorted(folder.glob("part-*.errors.jsonl")) for line in path.read_bytes().splitlines()]
