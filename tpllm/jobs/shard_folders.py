"""The folders of a job's shards, below its output."""
import pathlib

from tpllm.errors import JobError
from tpllm.jobs.config import JobConfig
from tpllm.jobs.outputs.folder import MANIFEST
from tpllm.jobs.shard import SHARD_NAME, Parts


def find_shard_folders(output: pathlib.Path) -> list[pathlib.Path]:
    """All shard folders below an output, in order; none where there is no such folder."""
    return sorted(path for path in output.iterdir() if SHARD_NAME.fullmatch(path.name) and path.is_dir()) if output.is_dir() else []


def local_folder(output: str) -> pathlib.Path:
    """The folder of an output that is not a URL.

    Raises:
        JobError: it is one.
    """
    if "://" in output:
        raise JobError(f"{output} is a URL; copy the folder, or the shards' folders, to this machine and give where they are")
    return pathlib.Path(output)


def refuse_mixture(job: JobConfig) -> None:
    """Refuse to begin a shard where the whole job, or another number of shards, was begun, and the whole job where shards were: the same rows
    would be run twice, and the folders would never make one job.

    Raises:
        JobError: such a folder, and what to do with it.
    """
    output, folder = pathlib.Path(job.output), pathlib.Path(job.folder)
    if (folder / MANIFEST).exists():
        return
    if job.shard is not None and (output / MANIFEST).exists():
        raise JobError(f"the output folder {output} holds a job that is not sharded, or whose shards are merged; give shard {job.shard} "
                       "another output, or leave the shard out")
    others = [path for path in find_shard_folders(output) if int(SHARD_NAME.fullmatch(path.name)[2]) != job.own_shard.count or job.shard is None]
    if others and job.shard is None:
        raise JobError(f"the output folder {output} holds shards of a job ({others[0].name}); put them together with 'tpllm job merge {output}', "
                       "or give this job another output")
    if others:
        raise JobError(f"the output folder {output} holds shards of another number ({others[0].name}), and this is shard {job.shard}; "
                       "give this job another output, or run it in as many shards")


def describe_idle_shard(parts: Parts) -> str:
    """Why a shard has no parts, and what would give it some."""
    num_rows, shard = parts.num_input_rows, parts.shard
    cure = (f"rows_per_part {num_rows // shard.count} would give each of the {shard.count} shards some" if num_rows >= shard.count
            else f"use at most {max(num_rows, 1)} shards")
    return f"shard {shard} has nothing to do: {num_rows} rows make {parts.num_input_parts} parts of {parts.rows_per_part} rows; {cure}"
