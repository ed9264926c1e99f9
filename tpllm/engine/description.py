"""What an engine holds, for people: one line, or a small table for notebooks."""
import dataclasses
import html
import math

import jax
from rich.filesize import decimal

from pallas_kernels.implementations import are_kernels_on
from sharding_rules import mesh_text
from sharding_rules.axes import BATCH
from tpllm.engine.shapes import EngineShapes
from tpllm.model.config import ModelConfig
from tpllm.model.kv_cache import cache_bytes_per_device
from tpllm.model.params import DecoderParams, bytes_per_device, named_leaves, param_specs
from tpllm.native import instruction_set
from tpllm.weights.linear import weight_of
from tpllm.weights.weight import Weight

# No colours: the page's own serve light and dark themes. Alignment is set because notebooks centre or right-align cells.
_ROW = '<tr><th scope="row" style="text-align:left">{}</th><td style="text-align:left">{}</td></tr>'
_TABLE = '<table><caption style="text-align:left"><b>LLM</b></caption><tbody>{}</tbody></table>'


@dataclasses.dataclass(frozen=True)
class Description:
    """Names and numbers only: nothing that keeps a model in memory.

    Attributes:
        model: as the user named it; None where parameters were given.
        family: of the checkpoint, or None.
        num_parameters: of the logical model, without repeated heads and padding.
        dtype, kv_cache_dtype: of weights, and of keys and values.
        mesh: as in ``"tp=4"``.
        devices: how many of which platform.
        weight_bytes, cache_bytes: on each device; replicas count on every device.
        max_model_len, max_num_seqs: the engine's limits.
        kernels: what computes; see :func:`kernels_of`.
        quantization: the schemes that weights are kept in, as in ``"int4, int8"``; None where all are floats.
        load_s: seconds from the model's name to an engine over it; None where parameters were given.
    """

    model: str | None
    family: str | None
    num_parameters: int
    dtype: str
    kv_cache_dtype: str
    mesh: str
    devices: str
    weight_bytes: int
    cache_bytes: int
    max_model_len: int
    max_num_seqs: int
    kernels: str
    quantization: str | None
    load_s: float | None

    def to_text(self, *, is_open: bool) -> str:
        """One line, as ``repr`` shows it."""
        facts = [f"{self.num_parameters:,} parameters in {self.dtype}", f"mesh {self.mesh} ({self.devices})", f"kernels {self.kernels}"]
        facts += [f"quantization {self.quantization}"] if self.quantization else []
        facts += [] if self.load_s is None else [f"loaded in {self.load_s:.1f} s"]
        if is_open:
            facts.append(f"a device holds {decimal(self.weight_bytes)} of weights and {decimal(self.cache_bytes)} of KV cache")
        facts += [f"max_model_len={self.max_model_len}", f"max_num_seqs={self.max_num_seqs}", "open" if is_open else "closed"]
        return f"<LLM {'from parameters' if self.model is None else repr(self.model)}: {', '.join(facts)}>"

    def to_html(self, *, is_open: bool) -> str:
        """A table without scripts, colours or anything to fetch; every value is escaped."""
        rows = {"model": "given as parameters" if self.model is None else self.model, "family": self.family,
                "parameters": f"{self.num_parameters:,} in {self.dtype}", "quantization": self.quantization,
                "mesh": f"{self.mesh} ({self.devices})", "kernels": self.kernels, "load time": self.load_s and f"{self.load_s:.1f} s"}
        if is_open:
            rows["weights"] = f"{decimal(self.weight_bytes)} a device"
            rows["KV cache"] = f"{decimal(self.cache_bytes)} a device, in {self.kv_cache_dtype}"
        rows |= {"max_model_len": f"{self.max_model_len:,} tokens a row", "max_num_seqs": f"{self.max_num_seqs:,} rows at once",
                 "state": "open" if is_open else "closed: its memory was given back"}
        cells = [_ROW.format(html.escape(name), html.escape(str(value))) for name, value in rows.items() if value is not None]
        return _TABLE.format("".join(cells))


def describe(config: ModelConfig, params: DecoderParams, *, shapes: EngineShapes, num_pages: int, cache_dtype, model: str | None = None,
             family: str | None = None, load_s: float | None = None) -> Description:
    """The description of an engine over ``params``.

    Args:
        config: fitted to its mesh.
        params: on the mesh.
        shapes, num_pages, cache_dtype: the engine's.
        model, family, load_s: as in the description, where there are any.
    """
    mesh = config.partition.mesh
    return Description(
        model=model, family=family, num_parameters=_num_parameters(config), dtype=str(params.dtype), kv_cache_dtype=str(cache_dtype),
        mesh=mesh_text(mesh), devices=f"{mesh.devices.size} {config.partition.platform} device{'s' * (mesh.devices.size > 1)}",
        weight_bytes=bytes_per_device(params),
        cache_bytes=cache_bytes_per_device(config, num_pages * config.partition.size(BATCH), shapes.page_size, cache_dtype),
        max_model_len=shapes.max_model_len, max_num_seqs=shapes.max_num_seqs, kernels=kernels_of(params), quantization=_kept_schemes(params),
        load_s=load_s)


def kernels_of(params: DecoderParams) -> str:
    """What computes: ``"xla"``, the native kernels and their instruction set, as in ``"native avx2"``, or ``"pallas"``, an accelerator's kernels
    where it has one for the op."""
    if weight_of(params.embed).is_native:
        return f"native {instruction_set()}"
    platforms = {device.platform for device in jax.tree.leaves(params)[0].devices()}
    return "pallas" if platforms & {"gpu", "tpu"} and are_kernels_on() else "xla"


def _kept_schemes(params: DecoderParams) -> str | None:
    weights = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Weight))
    names = {weight.layout.kept.name for weight in weights if isinstance(weight, Weight) and weight.layout.kept is not None}
    return ", ".join(sorted(names)) or None


def _num_parameters(config: ModelConfig) -> int:
    logical = param_specs(dataclasses.replace(config, kv_repeat=1, padded_vocab_size=config.vocab_size))
    return sum(math.prod(spec.shape) for _, spec in named_leaves(logical))
