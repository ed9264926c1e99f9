"""What config.json and the weights say differently, settled as transformers settles it, each with a line in the log: the prefix of names, and whether
there is a head beside the embedding."""
import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

from tpllm.checkpoint.formats.matrix import FLOATS
from tpllm.checkpoint.read import are_same_bytes
from tpllm.checkpoint.safetensors import TensorEntry
from tpllm.errors import log
from tpllm.families.family import Family
from tpllm.model.config import ModelConfig

PREFIX = "model."
_LAYER_OR_EXPERT, _NUMBER = re.compile(r"\{[ie]\}"), re.compile(r"(?<=\.)\d+(?=\.)")


def with_prefix(folder: Path, tensors: Mapping[str, TensorEntry], family: Family) -> Mapping[str, TensorEntry]:
    """Tensors under the names of a decoder with a head, where the file has those of one that was saved without: ``layers.0...`` for
    ``model.layers.0...``."""
    parts = {name.split(".")[1] for name in family.weight_names.values() if name.startswith(PREFIX)}
    has_prefix = any(name.startswith(PREFIX) and name.split(".")[1] in parts for name in tensors)
    if has_prefix or not any(name.split(".")[0] in parts for name in tensors):
        return tensors
    log.info("%s: the names of its weights lack %r, as those of a model without a head do; it is added", folder, PREFIX)
    names = {name: PREFIX + name if name.split(".")[0] in parts else name for name in tensors}
    return {names[name]: dataclasses.replace(entry, name=names[name]) for name, entry in tensors.items()}


def settle_head(folder: Path, tensors: Mapping[str, TensorEntry], family: Family, config: ModelConfig) -> tuple[Family, ModelConfig]:
    """(the family, the model) as the weights have it: another head is kept, a lone head is the embedding too, and without one the embedding is it.

    Not where the file has a tensor of that shape that nothing reads: it may be the missing one under a damaged name.
    """
    embed, head = family.checkpoint_name("embed"), family.checkpoint_name("head")
    has_embed, has_head = _has_module(tensors, embed), _has_module(tensors, head)
    if not (has_embed and has_head) and config.vocab_size * config.hidden_size in sizes_of_strangers(tensors, family):
        return family, config
    if config.ties_embeddings and has_head and not has_embed:
        log.info("%s: it holds %s and no %s: config.json ties them, and both are read from it", folder, head, embed)
        return dataclasses.replace(family, weight_names={**family.weight_names, "embed": head}), config
    if config.ties_embeddings and has_head and not _is_same(tensors, embed, head):
        log.warning("%s: config.json ties the head to the embedding, and the file holds another %s: that is used, as in transformers; set "
                    "tie_word_embeddings to false", folder, head)
        return family, dataclasses.replace(config, ties_embeddings=False)
    if not config.ties_embeddings and has_embed and not has_head:
        log.warning("%s: tensor %r is missing, though config.json does not tie the head to the embedding: the embedding is used, as in vLLM; set "
                    "tie_word_embeddings to true, or download the missing file", folder, head)
        return family, dataclasses.replace(config, ties_embeddings=True)
    return family, config


def sizes_of_strangers(tensors: Mapping[str, TensorEntry], family: Family) -> set[int]:
    """How many values those tensors of floats have that no parameter of a family is called by."""
    known = {_LAYER_OR_EXPERT.sub("#", name) for name in family.weight_names.values()}
    return {math.prod(entry.shape) for name, entry in tensors.items() if entry.dtype in FLOATS and _NUMBER.sub("#", name) not in known}


def _has_module(tensors: Mapping[str, TensorEntry], weight: str) -> bool:
    """Whether a weight is there, plain or as the tensors of a quantized module."""
    module = weight.removesuffix("weight")
    return weight in tensors or any(name.startswith(module) and name != f"{module}bias" for name in tensors)


def _is_same(tensors: Mapping[str, TensorEntry], first: str, second: str) -> bool:
    return first in tensors and second in tensors and are_same_bytes(tensors[first], tensors[second])
