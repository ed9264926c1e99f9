"""Which tensor lies in which of a folder's safetensors files."""
import re
from collections.abc import Mapping
from pathlib import Path

from tpllm.checkpoint.safetensors import Header, TensorEntry, read_header
from tpllm.checkpoint.source import inside, read_json
from tpllm.errors import CheckpointError, log, short

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")


def read_index(folder: Path) -> tuple[dict[str, TensorEntry], dict[str, Header]]:
    """(tensor name -> entry, file name -> header) of ``model.safetensors``, else of the index, else of every safetensors file there is.

    Raises:
        CheckpointError: no safetensors file, a missing or damaged one, an index that points out of the folder, or a tensor that is there twice.
    """
    has_single = (folder / SINGLE).exists()
    weight_map = _read_weight_map(folder) if (folder / INDEX).exists() and not has_single else {}
    names = [SINGLE] if has_single else sorted(set(weight_map.values())) or _shards(folder)
    paths = {name: inside(folder, name) for name in names}
    headers = {name: read_header(path) for name, path in paths.items()}
    return _tensors(folder, headers, weight_map), headers


def _read_weight_map(folder: Path) -> Mapping[str, str]:
    weight_map = read_json(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map must map tensor names to file names")
    return weight_map


def _tensors(folder: Path, headers: Mapping[str, Header], weight_map: Mapping[str, str]) -> dict[str, TensorEntry]:
    """Every tensor of the files: where the index puts it, else where it is. A name that no file holds is left out: whoever needs that tensor misses
    it."""
    tensors = {name: headers[file].tensors[name] for name, file in weight_map.items() if name in headers[file].tensors}
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        log.info("%s: weight_map names %d tensors that are not where it says, such as %s", folder / INDEX, len(absent), short(absent[0]))
    for header in headers.values():
        for name, entry in header.tensors.items():
            if name in weight_map and name in tensors:
                continue
            if name in tensors:
                raise CheckpointError(f"{folder}: tensor {entry.name!r} is both in {tensors[name].path.name} and in {entry.path.name}; remove the "
                                      f"file that does not belong there, or add {INDEX}")
            tensors[name] = entry
    return tensors


def _shards(folder: Path) -> list[str]:
    """Every safetensors file of a folder without an index; of a numbered set none may be missing."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise CheckpointError(_no_weights(folder))
    for name in names:
        match = _SHARD.fullmatch(name)
        for number in range(1, int(match[3]) + 1) if match and int(match[3]) < 10**5 else ():
            wanted = f"{match[1]}-{number:0{len(match[2])}d}-of-{match[3]}.safetensors"
            if wanted not in names:
                raise CheckpointError(f"{folder}: {wanted!r} is missing; download or copy it again")
    return names


def _no_weights(folder: Path) -> str:
    files = sorted(path.name for path in folder.glob("*"))
    pickles = [name for name in files if name.endswith(PICKLES)]
    if pickles:
        return (f"{folder}: {pickles[0]!r} is a pickle, which can run code when it is read, and is refused; convert it once where you trust "
                "it: transformers' AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes safetensors")
    ggufs = [name for name in files if name.endswith(".gguf")]
    if ggufs:
        return f"{folder} holds no *.safetensors file beside its config.json, but {ggufs[0]!r}; to open that, give the path of the file"
    return f"{folder} holds no *.safetensors file; it is no checkpoint, or its download is not complete"
