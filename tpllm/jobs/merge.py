"""Putting the shards of a job together, into the folder that the unsharded job would have made.

Everything is checked before anything is written. Then the manifest is put in place, and then part after part, so that a merge that ends at any
point leaves a folder that the next merge, or the unsharded job, completes. The shards' folders stay as they are.
"""
import contextlib
import dataclasses
import pathlib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tpllm.errors import JobError
from tpllm.jobs.manifest import as_json, describe, differences, is_environment, parts_of, refuse_changes
from tpllm.jobs.outputs.durable import Disk, writing_to
from tpllm.jobs.outputs.folder import OutputFolder, opened_output, read_manifest, refuse_damage, with_parts
from tpllm.jobs.outputs.journal import journal_files
from tpllm.jobs.outputs.lock import held_for_reading
from tpllm.jobs.outputs.part_files import PartFiles, part_files
from tpllm.jobs.outputs.part_records import COMMITS, PARTS, PartRecord, read_records, record_of
from tpllm.jobs.shard import Parts, Shard
from tpllm.jobs.shard_folders import find_shard_folders, local_folder

NUM_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class MergeResult:
    """What a merge came to.

    Attributes:
        num_rows: of the job.
        num_parts: of the job.
        num_new: parts that this merge put in place.
        num_shards: that were put together.
        num_errors: rows in errors files.
    """

    num_rows: int
    num_parts: int
    num_new: int
    num_shards: int
    num_errors: int


@dataclasses.dataclass(frozen=True)
class _ShardFolder:
    path: pathlib.Path
    manifest: Mapping[str, Any]
    parts: Parts
    files: Mapping[int, PartFiles]
    records: Mapping[int, PartRecord]

    @property
    def shard(self) -> Shard:
        return self.parts.shard

    @property
    def job(self) -> dict[str, Any]:
        """The manifest of the whole job, but for its history and its parts."""
        settings = {key: value for key, value in self.manifest["job"].items() if key != "shard"}
        return {key: value for key, value in {**self.manifest, "job": settings}.items() if key not in ("environment_changes", PARTS)}


def merge_shards(output: str, shard_folders: Sequence[str] = (), *, allow_environment_change: bool = False,
                 disk: Disk | None = None) -> MergeResult:
    """Put the shards of a job together.

    Args:
        output: the folder of the whole job; made if it is not there.
        shard_folders: the shards' folders; by default those below ``output``.
        allow_environment_change: put shards together that ran under other versions, hardware, mesh or batch size; it is recorded.
        disk: how to write.

    Raises:
        JobError: shards of different jobs, a shard that is missing, doubled, incomplete, damaged or still running, or an output that holds
            another job.
    """
    target, disk = local_folder(output), disk or Disk()
    paths = [local_folder(path) for path in shard_folders] or find_shard_folders(target)
    if not paths:
        raise JobError(f"{target} holds no shards of a job (shard-00000-of-00002 and so on); give their folders after it")
    with contextlib.ExitStack() as locks:
        shards = []
        for path in paths:
            if path.is_dir():
                locks.enter_context(held_for_reading(path))
            shards.append(_read_shard(path))
        shards.sort(key=lambda shard: shard.shard)
        manifest = _whole_manifest(shards, is_environment_free=allow_environment_change)
        _check_set(shards)
        _check_complete(shards)
        parts = parts_of(manifest)
        with opened_output(target, disk) as folder:
            _put_manifest(folder, manifest, shards, is_environment_free=allow_environment_change)
            num_new = _put_parts(folder, shards, disk)
            return MergeResult(parts.num_rows, len(parts.numbers), num_new, len(shards), folder.num_error_rows())


def _read_shard(path: pathlib.Path) -> _ShardFolder:
    if not path.is_dir():
        raise JobError(f"the shard folder {path} is not there; give the folders of the shards")
    manifest = read_manifest(path)
    if manifest is None:
        inner = find_shard_folders(path)
        raise JobError(f"{path} holds no manifest.json, so no shard was begun there" + (f"; did you mean {inner[0]}?" if inner else "; run it first"))
    try:
        parts = parts_of(manifest)
    except JobError as error:
        raise JobError(f"{path}: {error}") from None
    if "shard" not in manifest["job"]:
        raise JobError(f"{path} is the folder of a job that is not sharded; give the folders of shards")
    return _ShardFolder(path, manifest, parts, part_files(path), read_records(path, manifest))


def _whole_manifest(shards: Sequence[_ShardFolder], *, is_environment_free: bool) -> dict[str, Any]:
    """The manifest of the whole job: that of the first shard that loaded a model, and what is to be said of the others."""
    base = next((shard for shard in shards if "model" in shard.manifest), shards[0])
    history = []
    for shard in shards:
        changes = differences(base.job, shard.job)
        between = f"the shards in {base.path} and {shard.path}"
        if job := [change for change in changes if not is_environment(change[0])]:
            raise JobError(f"{between} are of different jobs: {describe(job, '{key} is {old} and {new}')}; merge the shards of one job")
        if changes and not is_environment_free:
            raise JobError(f"{between} ran in different environments: {describe(changes, '{key} is {old} and {new}')}; tokens could differ in "
                           "rare cases: run them in one, or allow it with --allow-environment-change")
        history += [{"shard": str(shard.shard), **entry} for entry in shard.manifest.get("environment_changes", ())]
        history += [{"shard": str(shard.shard), "changes": changes}] if changes else []
    return as_json({**base.job, **({"environment_changes": history} if history else {})})


def _check_set(shards: Sequence[_ShardFolder]) -> None:
    first, places = shards[0], {}
    for shard in shards:
        if shard.shard.count != first.shard.count:
            raise JobError(f"{first.path} is shard {first.shard} and {shard.path} is shard {shard.shard}: these are shards of different numbers; "
                           "give the folders of one number of shards")
        if (twin := places.setdefault(shard.shard, shard)) is not shard:
            raise JobError(f"shard {shard.shard} is there twice, in {twin.path} and in {shard.path}; give one of them")
    missing = [shard for index in range(first.shard.count) if (shard := Shard(index, first.shard.count)) not in places]
    if missing:
        raise JobError(f"{_listed('shard', missing)} {'is' if len(missing) == 1 else 'are'} missing; run it with: "
                       f"tpllm run JOB.yaml --shard {missing[0]}, or give its folder too")


def _check_complete(shards: Sequence[_ShardFolder]) -> None:
    lacking = [(shard, missing) for shard in shards if (missing := [part for part in shard.parts.numbers if part not in shard.files])]
    if lacking:
        raise JobError("; ".join(_what_lacks(shard, missing) for shard, missing in lacking[:NUM_SHOWN])
                       + (f"; and {len(lacking) - NUM_SHOWN} more shards are incomplete" if len(lacking) > NUM_SHOWN else ""))
    for shard in shards:
        for part in shard.parts.numbers:
            refuse_damage(shard.files[part], shard.records.get(part), shard.parts.size(part), hashes=True, command="the shard")


def _what_lacks(shard: _ShardFolder, missing: list[int]) -> str:
    rows = [shard.parts.rows(part) for part in missing]
    shown = ", ".join(f"{span.start} to {span.stop - 1}" for span in rows[:NUM_SHOWN] if span) + (", ..." if len(rows) > NUM_SHOWN else "")
    output = f" --output {shlex.quote(str(shard.path.parent))}" if shard.path.name == shard.shard.folder_name else ""
    return (f"shard {shard.shard} in {shard.path} is incomplete: {_listed('part', missing)} of its {len(shard.parts.numbers)} "
            f"{'is' if len(missing) == 1 else 'are'} missing ({sum(map(len, rows))} rows: {shown}); finish it with: "
            f"tpllm run JOB.yaml --shard {shard.shard}{output}")


def _put_manifest(folder: OutputFolder, manifest: dict[str, Any], shards: Sequence[_ShardFolder], *, is_environment_free: bool) -> None:
    """The manifest of the whole job, which tells of all parts before they are put in place: of those that are there already what is recorded here."""
    old = folder.read_manifest()
    history = manifest.get("environment_changes", [])
    job = {key: value for key, value in manifest.items() if key != "environment_changes"}
    if old is not None:
        changes = refuse_changes(old, job, output=str(folder.path), is_environment_free=is_environment_free)
        folder.check_parts(parts_of(manifest), hashes=True)
        former = list(old.get("environment_changes", ()))
        history = former + [entry for entry in history if entry not in former]
        history += as_json([{"merged_rows": manifest["input"]["num_rows"], "changes": changes}]) if changes else []
    records = {part: shard.records.get(part) or record_of(shard.files[part]) for shard in shards for part in shard.parts.numbers}
    records |= {part: folder.records[part] for part in records if part in folder.committed}
    new = with_parts({**job, **({"environment_changes": history} if history else {})}, records)
    if new != old:
        folder.write_manifest(new)


def _put_parts(folder: OutputFolder, shards: Iterable[_ShardFolder], disk: Disk) -> int:
    """Returns how many parts were not there yet."""
    new = [shard.files[part] for shard in shards for part in shard.parts.numbers if part not in folder.committed]
    for files in sorted(new, key=lambda files: files.part):
        folder.adopt(files)
    with writing_to(folder.path):
        # Of an unsharded run that was begun here: every part is committed now, and the manifest tells of it.
        for path in (*journal_files(folder.path).values(), folder.path / COMMITS):
            disk.remove(path)
        disk.sync_folder(folder.path)
    return len(new)


def _listed(noun: str, values: Sequence[object]) -> str:
    shown = ", ".join(map(str, values[:NUM_SHOWN])) + (f" and {len(values) - NUM_SHOWN} more" if len(values) > NUM_SHOWN else "")
    return f"{noun}{'s' if len(values) > 1 else ''} {shown}"
