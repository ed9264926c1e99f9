"""What a compressed-tensors quantization_config says of each module (https://github.com/vllm-project/compressed-tensors)."""
import dataclasses

from tpllm.checkpoint.formats.names import ModuleNames
from tpllm.checkpoint.formats.settings import Settings
from tpllm.errors import log, short

PACKED, FP4, PLAIN = "weight_packed of int32", "weight_packed of 4-bit floats", "weight of 8 bits"
LAYOUTS = {"pack-quantized": PACKED, "int-quantized": PLAIN, "float-quantized": PLAIN, "naive-quantized": PLAIN, "mxfp8-quantized": PLAIN,
           "nvfp4-pack-quantized": FP4, "mxfp4-pack-quantized": FP4}
"""How the formats that are read store a matrix."""
STATUSES = ("initialized", "calibration", "frozen", "compressed", "decompressed")
STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")


@dataclasses.dataclass(frozen=True)
class Args:
    """How a group's weights are quantized: the library's QuantizationArgs.

    Attributes:
        bits: of a code, 2 to 8.
        is_float: whether codes are floats.
        is_symmetric: whether codes have no zeros.
        block: (outputs, inputs) that share a scale; 0 is all of them.
        has_order: whether inputs were sorted by activation, so that there is a ``weight_g_idx``.
        quantizes_input: whether the product takes int8 activations.
        layout: one of :data:`PACKED`, :data:`FP4`, :data:`PLAIN`, or None where only the tensors tell.
    """

    bits: int
    is_float: bool
    is_symmetric: bool
    block: tuple[int, int]
    has_order: bool
    quantizes_input: bool
    layout: str | None


class Groups:
    """The config_groups and what they leave out.

    Raises:
        CheckpointError: a field that is not what it must be, or a variant that is not read.
    """

    def __init__(self, settings: Settings):
        self._where = settings.where
        _refuse_unknown(settings)
        whole = settings.text("format", default="mixed-precision")
        table = settings.table("config_groups")
        if not table.values:
            raise settings.error("config_groups", "it must have at least one group")
        self._ignored = ModuleNames(settings.names("ignore"), settings.where)
        self._groups = []
        for key, value in table.values.items():
            if isinstance(value, list):
                raise table.error(key, "names of presets are not read: write out its weights, as compressed-tensors does when it saves")
            group = table.table(key)
            self._groups.append((ModuleNames(group.names("targets"), group.where), _read_args(group, whole)))
        if "kv_cache_scheme" in settings:
            log.info("%s: kv_cache_scheme is not used: the cache has the dtype that kv_cache_dtype says", self._where)

    def find(self, module: str) -> Args | None:
        """The group of a module: the one that names it most closely; None where it is ignored, or in none, or in one without weights."""
        if self._ignored.rank(module) is not None:
            return None
        ranked = [(rank, index) for index, (names, _) in enumerate(self._groups) if (rank := names.rank(module)) is not None]
        return self._groups[min(ranked)[1]][1] if ranked else None


def _refuse_unknown(settings: Settings) -> None:
    status = settings.text("quantization_status", default="compressed")
    settings.one_of("quantization_status", status, STATUSES)
    sparsity = settings.table("sparsity_config")
    if sparsity.text("format", default="dense") != "dense":
        raise sparsity.error("format", "sparse weights are not read: save them dense")
    transforms = settings.table("transform_config")
    if transforms.table("config_groups").values:
        raise settings.error("transform_config", "models with transforms (Hadamard rotations) are not run: take one without")


def _read_args(group: Settings, whole: str) -> Args | None:
    """One group's weights; None where it has none."""
    if "weights" not in group:
        return None
    name = group.text("format", default=whole)
    if name not in LAYOUTS and name != "mixed-precision":
        raise group.error("format", f"format {name!r} is not read; known are {', '.join(LAYOUTS)}: save the model with another")
    weights = group.table("weights")
    bits, kind = weights.integer("num_bits", default=8), weights.text("type", default="int")
    weights.one_of("type", kind, ("int", "float"))
    weights.one_of("num_bits", bits, range(2, 9) if kind == "int" else (4, 8))
    if weights.flag("dynamic", default=False):
        raise weights.error("dynamic", "weights are read where it is false")
    order = weights.values.get("actorder")
    weights.one_of("actorder", order, (None, False, True, "group", "dynamic", "weight", "static"))
    block = _read_block(weights)
    is_row = bits == 8 and kind == "int" and block[1] == 0
    return Args(bits, kind == "float", weights.flag("symmetric", default=True), block, order in (True, "group", "dynamic"),
                _quantizes_input(group, is_row=is_row), LAYOUTS.get(name))


def _read_block(weights: Settings) -> tuple[int, int]:
    """(outputs, inputs) that share a scale."""
    size = weights.integer("group_size", default=0)
    inferred = "group" if size > 0 else "channel" if size == -1 else "tensor"
    strategy = weights.text("strategy", default=inferred)
    weights.one_of("strategy", strategy, STRATEGIES)
    if strategy in ("group", "tensor_group"):
        if size <= 0:
            raise weights.error("group_size", f"strategy {strategy!r} needs a positive one")
        return 1, size
    if strategy == "block":
        value = weights.values.get("block_structure")
        sizes = [int(part) for part in value.split("x") if part.isdecimal() and len(part) < 10] if isinstance(value, str) else value
        return Settings({"block_structure": sizes}, weights.where).pair("block_structure")
    return (0, 0) if strategy == "tensor" else (1, 0)


def _quantizes_input(group: Settings, *, is_row: bool) -> bool:
    """Whether activations become int8, one scale a row. It says what else the file asks for and does not get."""
    if "output_activations" in group:
        log.info("%s: output_activations is not used: outputs are not quantized", group.where)
    if "input_activations" not in group:
        return False
    inputs = group.table("input_activations")
    bits, kind, strategy = inputs.integer("num_bits", default=8), inputs.text("type", default="int"), inputs.text("strategy", default="tensor")
    is_dynamic = inputs.values.get("dynamic", False)
    inputs.one_of("dynamic", is_dynamic, (True, False, None, "local"))
    if not is_row or (bits, kind) != (8, "int"):
        log.info("%s: activations stay as they are, and are not quantized to %s of %d bits", group.where, short(kind), bits)
        return False
    if not is_dynamic or strategy != "token" or not inputs.flag("symmetric", default=True):
        log.info("%s: the activations' scales in the file (%s, %s) are not used: each row gets its own, symmetric, when it is computed",
                 group.where, short(strategy), "dynamic" if is_dynamic else "static")
    return True
