"""The job that an output folder belongs to, as its manifest tells it, so that it can go on without its job file."""
import os
from typing import Any

from tpllm.errors import JobError
from tpllm.jobs.config import JOB_KEYS, check_keys
from tpllm.jobs.manifest import PATHS
from tpllm.jobs.outputs.folder import MANIFEST, read_manifest
from tpllm.jobs.shard import parse_shard
from tpllm.jobs.shard_folders import find_shard_folders, local_folder


def read_job_folder(output: str) -> dict[str, Any]:
    """The keys and values of the job file that would make a folder.

    Args:
        output: a job's output folder, or a shard's folder below it.

    Raises:
        JobError: a folder that holds no manifest, or a damaged one.
    """
    folder = local_folder(output)
    manifest = read_manifest(folder)
    if manifest is None:
        shards = find_shard_folders(folder)
        hint = f"it holds shards: give the folder of one, such as {shards[0]}" if shards else "give a job file, or the output folder of a job"
        raise JobError(f"{output} holds no job: there is no {MANIFEST} in it; {hint}")
    try:
        settings, paths = dict(manifest["job"]), dict(manifest.get(PATHS, {}))
        given = paths.get("input")  # not there in a manifest of an early version, and then to be given
        if given is not None and paths["working_directory"] != os.getcwd():
            names = [given] if isinstance(given, str) else given
            given = [name if "://" in name else os.path.join(paths["working_directory"], name) for name in names]
    except (KeyError, TypeError, ValueError) as error:
        raise JobError(f"{folder / MANIFEST} is damaged: {error!r:.100}; restore it") from None
    check_keys(settings, JOB_KEYS, name=str(folder / MANIFEST))
    if "shard" not in settings:
        return {**settings, "input": given, "output": output}
    wanted, name = parse_shard(settings["shard"]).folder_name, folder.resolve().name
    if name != wanted:
        raise JobError(f"{output} is the folder of shard {settings['shard']} under the name {name}; call it {wanted}")
    return {**settings, "input": given, "output": str(folder.resolve().parent)}
