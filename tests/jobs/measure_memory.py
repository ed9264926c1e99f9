"""For tests, in a process of its own: how much the resident memory grows at its peak while a job's input is read, or a job runs.

``measure_memory.py make jsonl|parquet PATH NUM_ROWS PROMPT_CHARS`` writes an input, ``... read PATH`` scans it and goes through its rows,
``... naive PATH`` reads it whole, as a job must not, and ``... run PATH FOLDER FORMAT`` runs a job on the fake engine. The last three print the
growth in bytes.
"""
import json
import os
import pathlib
import re
import sys

import pandas  # noqa: F401  (pyarrow imports it where it is there, and what is imported later would count as growth)
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from tests.jobs.fake_llm import FakeLLM
from tests.jobs.faulty_disk import QuickDisk
from tpllm.jobs.config import JobConfig
from tpllm.jobs.outputs import parquet_parts  # noqa: F401  (as pandas)
from tpllm.jobs.runner import run_job
from tpllm.jobs.sources.open import open_source

BLOCK_ROWS = 10_000


def make(kind: str, path: str, num_rows: int, prompt_chars: int) -> None:
    """Rows that hardly compress; Parquet in one row group, the worst that may come."""
    blocks = ({"custom_id": [f"id-{i}" for i in range(start, start + BLOCK_ROWS)],
               "prompt": [os.urandom(prompt_chars // 2).hex() for _ in range(BLOCK_ROWS)]}
              for start in range(0, num_rows, BLOCK_ROWS))
    if kind == "parquet":
        pq.write_table(pa.concat_tables(map(pa.table, blocks)), path, row_group_size=num_rows)
        return
    with open(path, "w") as file:
        for block in blocks:
            file.writelines(json.dumps({"custom_id": custom_id, "prompt": prompt}) + "\n"
                            for custom_id, prompt in zip(block["custom_id"], block["prompt"], strict=True))


def read(path: str) -> None:
    """What a job does with its input, but run it."""
    source = open_source(path)
    num_rows = source.scan(infer_columns=source.kind == "jsonl").num_rows
    assert sum(1 for _ in source.rows()) == num_rows


def read_whole(path: str) -> None:
    """What the ceiling must not allow."""
    whole = pq.read_table(path) if path.endswith(".parquet") else pathlib.Path(path).read_bytes()
    del whole


def run(path: str, folder: str, output_format: str) -> None:
    """A job from its beginning to its end."""
    job = JobConfig(model="fake", input=path, output=folder, output_format=output_format, rows_per_part=500, sampling={"max_tokens": 2},
                    engine={"max_num_seqs": 64})
    assert run_job(job, make_llm=FakeLLM, disk=QuickDisk()).is_complete


def main(what: str, *arguments: str) -> None:
    """Do it, and print by how much the memory grew."""
    if what == "make":
        make(arguments[0], arguments[1], int(arguments[2]), int(arguments[3]))
        return
    before = psutil.Process().memory_info().rss
    {"read": read, "naive": read_whole, "run": run}[what](*arguments)
    print(_peak() - before)


def _peak() -> int:
    """Of this program alone; ``getrusage`` would also tell of the process that started it."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
