"""The cases of the native kernels, for their tests and their benchmark: what a weight looks like, and weights that look so."""
import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.page_table import PageTable, one_page_a_row
from pallas_kernels.quant_matmul import dequantize_reference
from tpllm.weights.native import ITEM_BYTES, Format, NativeLayout, NativeWeight, pack_rows
from tpllm.weights.scheme import E2M1_VALUES, Scheme, power_scales

DENSE_DTYPES = {Format.F32: np.float32, Format.F16: np.float16, Format.BF16: ml_dtypes.bfloat16}
FP8_DTYPES = {Format.E4M3: ml_dtypes.float8_e4m3fn, Format.E5M2: ml_dtypes.float8_e5m2}
KINDS = {Format.E4M3: ("e4m3", 8), Format.E5M2: ("e5m2", 8), Format.E2M1: ("e2m1", 4)}
NUM_CODES = {Format.Q2: 4, Format.Q3: 8, Format.I4: 16, Format.Q5: 32, Format.Q6: 64, Format.E2M1: 16}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of packed weight, and of activations that it multiplies.

    Attributes:
        format: of the codes.
        num_outputs, num_inputs: N and K.
        group, super_group, zero, quantizes_input: see ``Scheme``; of I8 a zero of 1 says that -128 occurs.
        has_mins: whether groups have mins.
        scale_dtype: of scales; None for no scales. Of E2M1 codes uint8 makes them powers of two.
        min_dtype: of mins; None for the scales' own. uint8 without a super group makes them zeros.
        x_dtype: of the activations.
    """

    format: Format
    num_outputs: int = 130
    num_inputs: int = 256
    group: int = 0
    has_mins: bool = False
    super_group: int = 0
    zero: int = 0
    scale_dtype: str | None = None
    x_dtype: str = "float32"
    quantizes_input: bool = False
    min_dtype: str | None = None

    def __str__(self) -> str:
        mins = self.has_mins and ("mins" if self.min_dtype is None else f"mins_{self.min_dtype}")
        parts = [self.format.name, f"{self.num_outputs}x{self.num_inputs}", self.group and f"group{self.group}", mins,
                 self.super_group and f"super{self.super_group}", self.scale_dtype, f"x_{self.x_dtype}", self.quantizes_input and "int8_input"]
        return "-".join(part for part in parts if part)

    @property
    def layout(self) -> NativeLayout:
        """How the packed weight lies."""
        shape = (self.num_outputs, self.num_inputs)
        if self.format in DENSE_DTYPES:
            return NativeLayout(None, shape, source_dtype=np.dtype(DENSE_DTYPES[self.format]))
        name, zero = ("int8 of a file", 0) if self.format == Format.I8 and self.zero else ("int8", self.zero)
        kind, bits = KINDS.get(self.format, ("int", NUM_CODES.get(self.format, 256).bit_length() - 1))
        return NativeLayout(Scheme(name, bits, self.group, kind=kind, zero=zero, super_group=self.super_group, quantizes_input=self.quantizes_input),
                            shape)


@dataclasses.dataclass(frozen=True)
class Canonical:
    """A weight before packing.

    Attributes:
        codes: [N, K] integers or floats.
        scales, mins: float32 [N, G], or [N] where an output has one, two-level ones multiplied out; or None.
        case: what it is of.
    """

    codes: np.ndarray
    scales: np.ndarray | None
    mins: np.ndarray | None
    case: Case

    def arguments(self) -> tuple[tuple, dict[str, int]]:
        """What the references of ``pallas_kernels.quant_matmul`` take besides activations."""
        arrays = (jax.device_put(self.codes), *(None if array is None else jax.device_put(array) for array in (self.scales, self.mins)))
        zero = 0 if self.case.format == Format.I8 else self.case.zero  # of I8 it says that -128 may occur
        return arrays, {"group": self.case.group, "zero": zero}

    def dense(self) -> np.ndarray:
        """float32 [N, K]."""
        arrays, how = self.arguments()
        return np.asarray(dequantize_reference(*arrays, **how))


def k_quant(code_format: Format, **changes) -> Case:
    """llama.cpp's Q4_K, Q5_K (both with mins) or Q6_K."""
    fields = {"num_inputs": 512, "super_group": 256, "group": 32, "scale_dtype": "uint8", "has_mins": True}
    if code_format == Format.Q6:
        fields |= {"group": 16, "scale_dtype": "int8", "has_mins": False, "zero": 32}
    return Case(code_format, **(fields | changes))


WEIGHTS = (
    Case(Format.F32, num_inputs=297),
    Case(Format.F16, num_inputs=297),
    Case(Format.BF16, num_inputs=297),
    Case(Format.I8, num_inputs=297, scale_dtype="float32"),
    Case(Format.I8, num_inputs=297, zero=1, scale_dtype="float32"),  # -128 occurs
    Case(Format.I8, group=128, scale_dtype="float16"),
    Case(Format.E4M3, num_inputs=297, scale_dtype="float32"),
    Case(Format.E5M2, num_inputs=297, scale_dtype="bfloat16"),
    Case(Format.E4M3, group=128, scale_dtype="float32"),
    Case(Format.I4, num_inputs=297, group=32, zero=8, scale_dtype="float16"),
    Case(Format.I4, num_inputs=297, zero=8, scale_dtype="float32"),
    Case(Format.I4, group=64, has_mins=True, scale_dtype="bfloat16"),
    Case(Format.I4, group=128, zero=8, scale_dtype="float16"),
    Case(Format.I4, group=256, has_mins=True, scale_dtype="float32"),
    Case(Format.I4, num_inputs=297, group=32, has_mins=True, scale_dtype="float16", min_dtype="uint8"),
    Case(Format.I8, group=64, has_mins=True, scale_dtype="float16", min_dtype="float32"),
    Case(Format.Q2, num_inputs=297, group=32, zero=2, scale_dtype="float16"),
    Case(Format.Q2, group=64, has_mins=True, scale_dtype="float32", min_dtype="uint8"),
    Case(Format.Q3, num_inputs=297, group=32, zero=4, scale_dtype="bfloat16"),
    Case(Format.Q3, group=128, has_mins=True, scale_dtype="float16", min_dtype="uint8"),
    Case(Format.Q5, group=32, zero=16, scale_dtype="float16"),
    Case(Format.Q5, group=32, has_mins=True, scale_dtype="float16"),
    Case(Format.Q6, group=16, zero=32, scale_dtype="float16"),
    Case(Format.Q6, group=32, zero=32, scale_dtype="float32"),
    Case(Format.E2M1, num_inputs=297, group=32, scale_dtype="uint8"),
    Case(Format.E2M1, num_inputs=304, group=16, scale_dtype="uint8"),
    Case(Format.E2M1, group=16, scale_dtype="float16"),
    k_quant(Format.I4),
    k_quant(Format.Q5),
    k_quant(Format.Q6),
)
INT8_INPUTS = tuple(Case(Format.I8, num_inputs=297, scale_dtype=scale_dtype, x_dtype=x_dtype, quantizes_input=True)
                    for scale_dtype, x_dtype in (("float32", "float32"), ("float16", "bfloat16"), ("float32", "float16")))
CASES = (*(dataclasses.replace(case, x_dtype=x_dtype) for case in WEIGHTS for x_dtype in ("float32", "bfloat16")),
         Case(Format.F16, num_inputs=297, x_dtype="float16"), Case(Format.I4, group=32, zero=8, scale_dtype="float16", x_dtype="float16"))


def make_weight(case: Case, seed: int = 0) -> tuple[NativeWeight, Canonical]:
    """A random weight whose outputs are of the order of the inputs, packed and not."""
    rng = np.random.default_rng(seed)
    layout = case.layout
    stored, codes = _codes(case, rng)
    packed_codes = np.empty(layout.array_shapes()["codes"], np.uint8)
    pack_rows(case.format, stored, packed_codes)
    arrays = {"codes": packed_codes} | _scales(case, rng)
    packed = layout.build({name: jax.device_put(array) for name, array in arrays.items()})
    return packed, Canonical(codes, _effective(arrays, "scales", case), _effective(arrays, "mins", case), case)


def make_input(case: Case, num_rows: int, seed: int = 1) -> jax.Array:
    """Random activations [num_rows, K]."""
    return _array(np.random.default_rng(seed).standard_normal((num_rows, case.num_inputs), np.float32), case.x_dtype)


def _codes(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(what is packed, what it means)."""
    shape = (case.num_outputs, case.num_inputs)
    if case.format in ITEM_BYTES:
        dense = (rng.standard_normal(shape, np.float32) / np.sqrt(shape[1])).astype(DENSE_DTYPES[case.format])
        return dense, dense
    if case.format in FP8_DTYPES:
        dense = rng.standard_normal(shape, np.float32).astype(FP8_DTYPES[case.format])
        return dense.view(np.uint8), dense
    if case.format == Format.I8:
        codes = rng.integers(-128 if case.zero else -127, 128, shape).astype(np.int8)
        return codes, codes
    codes = rng.integers(0, NUM_CODES[case.format], shape).astype(np.uint8)
    return codes, E2M1_VALUES[codes] if case.format == Format.E2M1 else codes


def _scales(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The packed arrays beside the codes."""
    if case.scale_dtype is None:
        return {}
    shapes = case.layout.array_shapes()
    if case.format == Format.E2M1 and case.scale_dtype == "uint8":
        return {"scales": rng.integers(118, 124, shapes["scales"]).astype(np.uint8)}
    size = {Format.I8: 127, Format.E4M3: 1, Format.E5M2: 1}.get(case.format) or NUM_CODES[case.format]
    size *= np.sqrt(case.num_inputs)
    if not case.super_group:
        arrays = {"scales": (rng.uniform(0.5, 1.5, shapes["scales"]) / size).astype(case.scale_dtype)}
        if case.has_mins:
            arrays["mins"] = (rng.integers(0, NUM_CODES[case.format], shapes["scales"]) if case.min_dtype == "uint8" else
                              rng.uniform(-8, 8, shapes["scales"]) / size).astype(case.min_dtype or case.scale_dtype)
        return arrays
    low, high = (1, 64) if case.scale_dtype == "uint8" else (-128, 128)
    arrays = {"scales": rng.integers(low, high, shapes["scales"]).astype(case.scale_dtype),
              "super_scales": (rng.uniform(0.5, 1.5, shapes["super_scales"]) / 64 / size).astype(np.float16)}
    if case.has_mins:
        arrays["mins"] = rng.integers(0, 64, shapes["scales"]).astype(case.scale_dtype)
        arrays["super_mins"] = (rng.uniform(0.5, 1.5, shapes["super_scales"]) / 8 / size).astype(np.float16)
    return arrays


def _effective(arrays: dict[str, np.ndarray], name: str, case: Case) -> np.ndarray | None:
    """float32 [N, G] or [N] of packed scales or mins, the second level multiplied in."""
    if name not in arrays:
        return None
    values = power_scales(arrays[name]) if case.format == Format.E2M1 and arrays[name].dtype == np.uint8 else arrays[name].astype(np.float32)
    if name == "mins" and case.min_dtype == "uint8":
        values = -values * arrays["scales"].astype(np.float32)
    if case.super_group:
        sign = -1 if name == "mins" else 1
        values = sign * values * np.repeat(arrays[f"super_{name}"].astype(np.float32), case.super_group // case.group, axis=1)[:, :values.shape[1]]
    if not case.group:
        return values.reshape(-1)[:case.num_outputs]
    return np.ascontiguousarray(values.transpose(0, 2, 1)).reshape(-1, values.shape[1])[:case.num_outputs]


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One call of attention to a cache.

    Attributes:
        starts: position of each row's first token; -1 for a row of padding.
        num_tokens: T, of each row; not read where ``pieces`` are given.
        num_padding: of the last row's tokens.
        num_heads, num_kv_heads, head_dim, num_rotated: N, K, H, R.
        max_len: the positions of a row of the cache.
        rows: cache row of each row of tokens, or None where they are the same.
        window, softcap: or None.
        has_sinks: whether each query head's softmax has one more logit.
        x_dtype, cache_dtype: of activations and cache.
        page_size: S, where a row has several pages, in any order; None where it is one page of ``max_len``.
        pieces: of a ragged call: how many tokens of each row one batch row holds, row after row, then the padding; else None.
    """

    starts: tuple[int, ...] = (70, 0, -1, 199)
    num_tokens: int = 1
    num_padding: int = 0
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    num_rotated: int = 64
    max_len: int = 200
    rows: tuple[int, ...] | None = None
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    x_dtype: str = "float32"
    cache_dtype: str = "float32"
    page_size: int | None = None
    pieces: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return "-".join(f"{field.name}={getattr(self, field.name)}".replace(" ", "") for field in dataclasses.fields(self)
                        if getattr(self, field.name) != field.default) or "plain"

    @property
    def positions(self) -> np.ndarray:
        """int32 [B, T]."""
        if self.pieces is not None:
            runs = [np.full(count, -1) if start < 0 else start + np.arange(count) for start, count in zip(self.starts, self.pieces, strict=True)]
            return np.concatenate([*runs, np.full(self.num_padding, -1)])[None].astype(np.int32)
        positions = np.array([[start + t if start >= 0 else -1 for t in range(self.num_tokens)] for start in self.starts], np.int32)
        positions[-1, self.num_tokens - self.num_padding:] = -1
        return positions

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row after the call."""
        counts = [*self.pieces] if self.pieces is not None else [*[self.num_tokens] * (len(self.starts) - 1), self.num_tokens - self.num_padding]
        return [start + count if start >= 0 else 0 for start, count in zip(self.starts, counts, strict=True)]

    @property
    def table_rows(self) -> np.ndarray | None:
        """The rows of a page table: int32 [B], or of a ragged call [B, T]; None where batch row b is row b."""
        rows = range(len(self.starts)) if self.rows is None else self.rows
        if self.pieces is not None:
            return np.concatenate([np.repeat(rows, self.pieces), np.zeros(self.num_padding)])[None].astype(np.int32)
        return None if self.rows is None else np.array(rows, np.int32)

    @property
    def num_rows(self) -> int:
        """R, rows of the cache."""
        return max(self.rows or (0,)) + len(self.starts)

    @property
    def tokens_a_page(self) -> int:
        """S."""
        return self.page_size or self.max_len

    @property
    def num_pages(self) -> int:
        """P; of a paged cache, some more than its rows can have."""
        return self.num_rows if self.page_size is None else self.num_rows * -(-self.max_len // self.page_size) + 5

    def how(self) -> dict:
        """The static arguments of the kernel."""
        return {"scale": self.head_dim**-0.5, "window": self.window, "softcap": self.softcap}


ATTENTIONS = (
    AttentionCase(),
    AttentionCase(cache_dtype="bfloat16", rows=(3, 0, 5, 1)),
    AttentionCase(cache_dtype="float16", head_dim=40, num_rotated=40),
    AttentionCase(cache_dtype="int8", num_heads=8),
    AttentionCase(cache_dtype="int8", head_dim=20, num_rotated=8, window=50),
    AttentionCase(x_dtype="bfloat16", cache_dtype="bfloat16", num_heads=12, window=64),
    AttentionCase(cache_dtype="float8_e4m3fn", num_heads=8),
    AttentionCase(starts=(70,), num_tokens=100, num_padding=3, rows=(2,), cache_dtype="float8_e4m3fn", head_dim=20, num_rotated=8),
    AttentionCase(x_dtype="float16", cache_dtype="float16", num_kv_heads=4),
    AttentionCase(starts=(1, 64, 190), num_tokens=9, num_padding=4, rows=(2, 0, 1)),
    AttentionCase(starts=(70,), num_tokens=100, num_padding=3, rows=(2,), cache_dtype="int8", softcap=3.0),
    AttentionCase(starts=(0,), num_tokens=130, x_dtype="bfloat16", cache_dtype="bfloat16", window=17),
    AttentionCase(num_heads=1, num_kv_heads=1, head_dim=6, num_rotated=0, softcap=1.5),
    AttentionCase(starts=(1099, 511, 512), max_len=1100, head_dim=32, num_rotated=32, window=700),
    AttentionCase(starts=(1050,), num_tokens=40, max_len=1100, head_dim=32, num_rotated=32, cache_dtype="float16"),
    AttentionCase(page_size=16),
    AttentionCase(page_size=32, x_dtype="bfloat16", cache_dtype="bfloat16", rows=(3, 0, 5, 1), window=64),
    AttentionCase(page_size=64, cache_dtype="float8_e4m3fn", num_heads=8),
    AttentionCase(page_size=16, starts=(70,), num_tokens=100, num_padding=3, rows=(2,), cache_dtype="int8", softcap=3.0),
    AttentionCase(page_size=80, starts=(1, 64, 190), num_tokens=9, num_padding=4, rows=(2, 0, 1), head_dim=20, num_rotated=8),
    AttentionCase(page_size=128, starts=(1099, 511, 512), max_len=1100, head_dim=32, num_rotated=32, window=700, cache_dtype="float16"),
    AttentionCase(pieces=(40, 1, 1), num_padding=6, starts=(64, 199, 70), rows=(2, 0, 3)),
    AttentionCase(page_size=16, pieces=(40, 1, 1), num_padding=6, starts=(64, 199, 70), rows=(2, 0, 3)),
    AttentionCase(page_size=64, pieces=(1, 1, 90, 30), starts=(199, 5, 0, 70), x_dtype="bfloat16", cache_dtype="bfloat16", window=50),
    AttentionCase(page_size=32, pieces=(1, 3, 60), num_padding=1, starts=(600, -1, 1000), max_len=1100, cache_dtype="int8", num_heads=10),
    AttentionCase(has_sinks=True, num_heads=8),
    AttentionCase(has_sinks=True, starts=(1099, 511, 0, -1), max_len=1100, num_heads=6, rows=(3, 0, 2, 1), window=128, cache_dtype="bfloat16"),
    *(AttentionCase(has_sinks=True, starts=(70,), num_tokens=100, num_padding=3, x_dtype="bfloat16", cache_dtype=cache_dtype, softcap=3.0)
      for cache_dtype in ("float16", "int8", "float8_e4m3fn")),
    AttentionCase(page_size=16, pieces=(1, 70, 1), num_padding=2, starts=(199, 20, 64), rows=(2, 0, 3), num_heads=8, window=50, has_sinks=True),
)


def make_attention(case: AttentionCase, seed: int = 0) -> dict:
    """Random arguments of ``tpllm.native.attention.attention`` by name, besides those of ``case.how()``."""
    rng = np.random.default_rng(seed)
    (B, T), H, R = case.positions.shape, case.head_dim, case.num_rotated
    q, k, v = (_array(rng.standard_normal((B, T, heads, H), np.float32), case.x_dtype)
               for heads in (case.num_heads, case.num_kv_heads, case.num_kv_heads))
    angles = rng.uniform(-3, 3, (B, T, R // 2)).astype(np.float32)
    rope = tuple(jax.device_put(np.concatenate([function(angles)] * 2, axis=-1)) for function in (np.cos, np.sin))
    sinks = {"sinks_N": jax.device_put(rng.uniform(-2, 4, case.num_heads).astype(np.float32))} if case.has_sinks else {}
    return {**sinks, "q_BTNH": q, "new_kv": (k, v), "cache": make_cache(case, rng), "positions_BT": jax.device_put(case.positions), "rope": rope,
            "table": make_table(case, rng)}


def make_table(case: AttentionCase, rng: np.random.Generator) -> PageTable | None:
    """Where the rows' tokens lie; None where batch row b is page b.

    Rows of several pages have them in any order, and none (-1) behind their last token; the two that have most tokens before the call share what
    pages both have filled.
    """
    rows = None if case.table_rows is None else jax.device_put(case.table_rows)
    if case.page_size is None:
        return None if rows is None else one_page_a_row(case.num_pages, rows)
    S, L = case.page_size, -(-case.max_len // case.page_size)
    pages_RL = rng.permutation(case.num_pages)[:case.num_rows * L].reshape(case.num_rows, L)
    runs = list(zip(case.starts, case.lengths, range(len(case.starts)) if case.rows is None else case.rows, strict=True))
    for _, length, row in runs:
        pages_RL[row, -(-length // S):] = -1
    for (start, _, row), (_, _, longest) in itertools.pairwise(sorted(runs)[-2:]):
        pages_RL[row, :max(start, 0) // S] = pages_RL[longest, :max(start, 0) // S]
    return PageTable(jax.device_put(pages_RL.astype(np.int32)), rows)


def in_rows(cache: Sequence[jax.Array], table: PageTable) -> list[np.ndarray]:
    """The same cache with one page a row: [R, K, L * S, ...], zeros where a row has no page."""
    pages_RL = np.asarray(table.pages_RL)
    rows = []
    for pool in map(np.asarray, cache):
        parts = np.where((pages_RL >= 0).reshape(*pages_RL.shape, *[1] * (pool.ndim - 1)), pool[pages_RL], np.zeros((), pool.dtype))
        parts = np.moveaxis(parts, 1, 2)  # [R, K, L, S, ...]
        rows.append(parts.reshape(*parts.shape[:2], -1, *parts.shape[4:]))
    return rows


def make_cache(case: AttentionCase, rng: np.random.Generator) -> tuple[jax.Array, ...]:
    """A cache full of random entries."""
    shape = (case.num_pages, case.num_kv_heads, case.tokens_a_page, case.head_dim)
    if case.cache_dtype == "float8_e4m3fn":
        codes = [_array(rng.standard_normal(shape, np.float32) * 100, case.cache_dtype) for _ in range(2)]
        return (*codes, *(jax.device_put(rng.uniform(0.005, 0.015, shape[:3]).astype(np.float32)) for _ in range(2)))
    if case.cache_dtype != "int8":
        return tuple(_array(rng.standard_normal(shape, np.float32), case.cache_dtype) for _ in range(2))
    codes = [jax.device_put(rng.integers(-127, 128, shape).astype(np.int8)) for _ in range(2)]
    return (*codes, *(jax.device_put(rng.uniform(0.01, 0.03, shape[:3]).astype(np.float32)) for _ in range(2)))


def _array(x: np.ndarray, dtype: str) -> jax.Array:
    """On the device in another dtype; numpy converts, for which XLA would compile a program for each shape."""
    return jax.device_put(x.astype(jnp.dtype(dtype)))
