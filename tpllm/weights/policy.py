"""Which matrices are quantized, and how: one scheme for all, or one for each pattern of names."""
import dataclasses
from collections.abc import Mapping
from fnmatch import fnmatchcase

from tpllm.errors import ConfigError, did_you_mean
from tpllm.weights.quantize import SCHEMES, weight_only
from tpllm.weights.scheme import Scheme

NONE = "none"
Quantization = str | Mapping[str, str | None] | None
"""What ``quantization=`` takes: see :func:`parse_policy`."""
TABLES = ("embed", "head")
TABLE_SCHEME = SCHEMES["int8"]
"""What a lone name of fewer bits makes of the tables, which cost the most perplexity a bit (``docs/guide/quantization.md``)."""
ROUTERS = (".router", ".shared_gate")
"""How the names of those end that choose and weigh experts: they are small, and are not quantized."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a user asks of a load; hashable.

    Attributes:
        rules: (pattern, scheme or None to keep it dense); the first that matches a parameter's name counts. Where none does, the checkpoint's own
            scheme is kept.
    """

    rules: tuple[tuple[str, Scheme | None], ...] = ()

    def choose(self, name: str, stored: Scheme | None = None) -> Scheme | None:
        """How to keep a matrix.

        Args:
            name: of the parameter, such as ``layers.3.mlp.up``.
            stored: how the checkpoint holds it.
        """
        if name.endswith(ROUTERS):
            return stored
        for pattern, scheme in self.rules:
            if fnmatchcase(name, pattern):
                return weight_only(scheme) if scheme is not None and name in TABLES else scheme
        return stored


AS_STORED = Policy()
"""What the checkpoint holds is kept."""


def parse_policy(quantization: Quantization) -> Policy:
    """The policy of ``quantization=``.

    Args:
        quantization: None to keep what the checkpoint holds; a name for all matrices; or a name for each pattern of parameter names, as a dict or as
            in ``"*.mlp.*=int4,*=none"``. ``"none"`` leaves matrices in the activations' dtype. A lone name of fewer than 8 bits leaves the embedding
            and the head 8 bits, as llama.cpp's files do with 6; ``"*=int4"`` does not.

    Raises:
        ConfigError: an unknown name, or a pattern that is none.
    """
    if quantization is None:
        return AS_STORED
    if isinstance(quantization, str) and "=" not in quantization:
        scheme = _find(quantization)
        tables = TABLES if scheme is not None and scheme.bits < TABLE_SCHEME.bits else ()
        return Policy((*((table, TABLE_SCHEME) for table in tables), ("*", scheme)))
    if isinstance(quantization, str):
        pairs = [pair.partition("=")[::2] for pair in quantization.split(",")]
        return Policy(tuple((pattern.strip(), _find(name.strip())) for pattern, name in pairs))
    if isinstance(quantization, Mapping) and all(isinstance(pattern, str) for pattern in quantization):
        return Policy(tuple((pattern, _find(name)) for pattern, name in quantization.items()))
    raise ConfigError(f"quantization is {quantization!r}; it must be a name, or a name for each pattern of parameter names")


def _find(name: str | None) -> Scheme | None:
    if name is None or name == NONE:
        return None
    if not isinstance(name, str) or name not in SCHEMES:
        guess = did_you_mean(name.lower(), (*SCHEMES, NONE)) if isinstance(name, str) else ""
        raise ConfigError(f"quantization is {name!r}; {guess}it must be one of {', '.join(SCHEMES)}, {NONE}, or None to keep what the checkpoint "
                          "holds")
    return SCHEMES[name]
