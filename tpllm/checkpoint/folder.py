"""Opening a checkpoint: everything about it but its weights' values."""
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpllm.checkpoint.formats import find_format
from tpllm.checkpoint.gguf.config import config_from_gguf
from tpllm.checkpoint.gguf.header import GgufFile, open_gguf
from tpllm.checkpoint.gguf.names import gguf_weight_names
from tpllm.checkpoint.gguf.rope import FACTOR_TENSORS
from tpllm.checkpoint.gguf.weights import GgufFormat
from tpllm.checkpoint.index import read_index
from tpllm.checkpoint.safetensors import Header, TensorEntry, digest_of_samples, sample_digest
from tpllm.checkpoint.settle import settle_head, with_prefix
from tpllm.checkpoint.source import GGUF, OPEN_HUB, Hub, Reads, find_folder, only_gguf, read_json
from tpllm.checkpoint.store import MANIFEST, StoreFormat
from tpllm.checkpoint.stored import CheckpointFormat
from tpllm.errors import CheckpointError, ConfigError, TpllmError, log, short
from tpllm.families.family import Family
from tpllm.families.registry import find_family
from tpllm.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder in Hugging Face's layout or a GGUF file, checked as far as it can be without reading the weights.

    Attributes:
        folder: where it lies; the file itself where it is GGUF.
        revision: the hub commit, or None for a folder.
        hf_config: config.json, or what it would be, with what was given to override it.
        family: what it is to the loader.
        config: the model, not yet fitted to a mesh; whether it has a head of its own, the weights say.
        generation_config: generation_config.json, or empty.
        tensors: name -> file, dtype, shape and place of every tensor.
        headers: file name -> header of every file of weights.
        weights: what is known of quantized weights, or None for a plain checkpoint.
        gguf: what is in the file, where it is GGUF.
        reads: of the small files that this was made of, and that whoever reads on in the folder records there.
    """

    folder: Path
    revision: str | None
    hf_config: Mapping[str, Any]
    family: Family
    config: ModelConfig
    generation_config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    headers: Mapping[str, Header]
    weights: CheckpointFormat | None = None
    gguf: GgufFile | None = None
    reads: Reads = dataclasses.field(default_factory=Reads, compare=False, repr=False)

    def fingerprint(self) -> dict[str, Any]:
        """What tells this checkpoint from any other, as JSON: the revision; the SHA-256 of every small file that was read so far, the tokenizer's too
        where they were recorded in ``reads``; and of each weight file its size and the SHA-256 of its header and of what
        :func:`~tpllm.checkpoint.safetensors.digest_of_samples` reads of it. It does not depend on where the folder lies or when it was written.
        """
        weights = {name: {"size": header.size, "header_sha256": header.digest, "samples_sha256": sample_digest(header)}
                   for name, header in sorted(self.headers.items())}
        if isinstance(self.weights, StoreFormat):
            weights = {path.relative_to(self.folder).as_posix(): {"size": path.stat().st_size, "samples_sha256": digest_of_samples(path)}
                       for path in self.weights.files()}
        return {"revision": self.revision, "files": self.reads.below(self.folder), "weights": weights}


def open_checkpoint(model: str | Path, *, revision: str | None = None, hub: Hub = OPEN_HUB,
                    hf_overrides: Mapping[str, Any] | None = None) -> Checkpoint:
    """Find a checkpoint, and read and check its configuration and the headers of its weights.

    Args:
        model: a folder, a GGUF file, a hub id ``owner/name`` (``owner/name:Q4_K_M`` of GGUF files), ``"demo"`` or
            ``"demo-draft"`` (a folder of that name is ``"./demo"``).
        revision: of a hub id: branch, tag or commit; all files come from the one commit it resolves to. The hub's cache is used as its own
            client does, also with ``HF_HUB_OFFLINE=1``.
        hub: how it is asked.
        hf_overrides: values that replace those of config.json; of a mapping within it each by its key.

    Raises:
        CheckpointError: nothing there, a file damaged, missing or outside the folder, or weights in a format that is not read.
        ConfigError: an architecture that is not known, or a model that cannot be built.
    """
    if not isinstance(hf_overrides, Mapping | None):
        raise ConfigError(f"hf_overrides is {short(hf_overrides)}; give a dict of values of config.json, such as {{'rope_theta': 1e6}}")
    folder, commit = find_folder(model, revision, hub)
    reads = Reads()
    with reads.recording():
        return dataclasses.replace(_open(folder, commit, hf_overrides or {}), reads=reads)


def _open(folder: Path, commit: str | None, overrides: Mapping[str, Any]) -> Checkpoint:
    gguf = folder if folder.suffix == GGUF else only_gguf(folder)
    if gguf is not None:
        return _open_gguf(gguf, commit, overrides)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds no config.json; give the folder that holds it, beside the weights and the tokenizer")
    hf_config = _overridden(read_json(folder, "config.json"), overrides)
    family, config = _read_config(folder, hf_config)
    if (folder / MANIFEST).exists():
        # Weights of a store have the names of our parameters.
        return Checkpoint(folder=folder, revision=commit, hf_config=hf_config, config=config, tensors={}, headers={}, weights=StoreFormat(folder),
                          family=family.renamed({name: name for name in family.weight_names}), generation_config=_generation_config(folder))
    tensors, headers = read_index(folder)
    tensors = with_prefix(folder, tensors, family)
    family, config = settle_head(folder, tensors, family, config)
    weights = find_format(hf_config, tensors)
    return Checkpoint(folder=folder, revision=commit, hf_config=hf_config, family=family, config=config,
                      generation_config=_generation_config(folder), tensors=tensors, headers=headers, weights=weights)


def _overridden(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, **{name: _overridden(values[name], value) if isinstance(value, Mapping) and isinstance(values.get(name), Mapping) else value
                         for name, value in overrides.items()}}


def config_without_weights(model: str | Path) -> tuple[Mapping[str, Any], ModelConfig] | None:
    """(config.json, the model it describes) of a folder that holds no weights; None of anything else."""
    folder = Path(model)
    if not (folder / "config.json").exists() or (folder / MANIFEST).exists() or any(folder.glob("*.safetensors")) or any(folder.glob(f"*{GGUF}")):
        return None
    hf_config = read_json(folder, "config.json")
    return hf_config, _read_config(folder, hf_config)[1]


def _generation_config(folder: Path) -> dict[str, Any]:
    return read_json(folder, "generation_config.json") if (folder / "generation_config.json").exists() else {}


def _open_gguf(path: Path, commit: str | None, overrides: Mapping[str, Any]) -> Checkpoint:
    """A GGUF file under the names that its family gives to a Hugging Face checkpoint."""
    gguf = open_gguf(path)
    hf_config = _overridden(config_from_gguf(gguf), overrides)
    family, config = _read_config(path, hf_config)
    weights = GgufFormat(gguf)
    return Checkpoint(folder=path, revision=commit, hf_config=hf_config, config=config, generation_config={}, weights=weights, gguf=gguf,
                      family=family.renamed(gguf_weight_names(family.weight_names, gguf.arch)),
                      tensors={name: entry for name, entry in weights.tensors.items() if name not in FACTOR_TENSORS},
                      headers={header.path.name: header for header in gguf.headers})


def _read_config(folder: Path, hf_config: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    try:
        family = _find_family(folder, hf_config)
        return family, family.config_from_hf(hf_config)
    except TpllmError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:  # a field of the wrong type
        raise CheckpointError(f"{folder / 'config.json'}: a field has a value that cannot be: {type(error).__name__}: {error}") from None


def _find_family(folder: Path, hf_config: Mapping[str, Any]) -> Family:
    """The family, never with the checkpoint's own code."""
    has_code = "auto_map" in hf_config
    try:
        family = find_family(hf_config)
    except ConfigError as error:
        if not has_code:
            raise
        raise CheckpointError(f"{folder}: the model brings its own code (auto_map), which is never run. {error}") from None
    if has_code:
        log.info("%s brings its own code (auto_map); it is not run: the checkpoint is loaded as %s", folder, family.name)
    return family
