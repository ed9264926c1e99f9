"""State that a batch holds for each of its rows: one declaration a field, from which empty arrays, shardings and a row's entries follow.

    class Rows:
        top_k: jax.Array = per_row(jnp.int32, pack=lambda row: max(row.params.top_k, 0))
        bias: jax.Array = per_row(jnp.float32, VOCAB, pack=_bias)

A new sampling parameter is such a field beside the formula that reads it.
"""
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import struct

from sharding_rules import Partition
from sharding_rules.axes import VOCAB

Rows = TypeVar("Rows")
SMALLEST, LARGEST = 1e-30, 1e30  # a positive parameter beyond these acts like them in float32, and would overflow there


@dataclasses.dataclass(frozen=True)
class Row:
    """What the device is told of a row that begins, or goes on after it lost its slot.

    Attributes:
        params: its :class:`.SamplingParams`.
        prompt, completion: token ids; those generated so far.
        seed, sample_index: of its noise: the request's, in [0, 2^64), and which of its ``n``.
        max_new_tokens: at most this many, the context's end included.
        eos_ids: the model's end-of-sequence ids.
        bad_words: token sequences that may not appear.
        is_alive: whether it decodes at once, its keys and values being there.
    """

    params: Any
    prompt: Sequence[int]
    completion: Sequence[int] = ()
    seed: int = 0
    sample_index: int = 0
    max_new_tokens: int = 0
    eos_ids: frozenset[int] = frozenset()
    bad_words: Sequence[Sequence[int]] = ()
    is_alive: bool = False


@dataclasses.dataclass(frozen=True)
class _Field:
    """``dims`` are numbers, or names whose sizes are given later; the vocabulary's is split over the mesh."""

    dtype: Any
    dims: tuple[int | str, ...]
    empty: float
    pack: Callable[..., Any]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.dims)


def per_row(dtype: Any, *dims: int | str, empty: float = 0, pack: Callable[..., Any]) -> Any:
    """A field of a ``struct.dataclass``: an array [B, *dims].

    Args:
        dtype: of its elements.
        dims: of one row's entry: numbers, or names such as ``VOCAB``.
        empty: what every element of a row that is not there holds.
        pack: of a :class:`Row`, and the sizes of ``dims``: the row's entry, as an array or numbers.
    """
    return struct.field(metadata={"per_row": _Field(dtype, dims, empty, pack)})


def rows_of(kind: type, **options: Any) -> Any:
    """A field that holds further fields: ``kind`` is a ``struct.dataclass`` of them; ``options`` go to ``dataclasses.field``."""
    return struct.field(metadata={"kind": kind}, **options)


def empty_rows(kind: type[Rows], num_rows: int, **sizes: int) -> Rows:
    """Rows that are not there; ``sizes`` are those of the named dims."""
    return _build(kind, lambda field: jnp.full((num_rows, *field.shape(sizes)), field.empty, field.dtype))


def shardings_of(kind: type[Rows], partition: Partition) -> Rows:
    """Where they lie: what is as wide as the vocabulary is split like it, the rest is everywhere."""
    return _build(kind, lambda field: partition.sharding((None, *field.dims) if VOCAB in field.dims else ()))


def pack_row(kind: type[Rows], row: Row, *, leave_out: tuple[type, ...] = (), **sizes: int) -> Rows:
    """The entries [1, ...] of one row, in numpy; None for the fields of the kinds in ``leave_out``."""
    return _build(kind, lambda field: np.array([field.pack(row, *field.shape(sizes))], field.dtype), leave_out)


def within_float32(value: float) -> float:
    """A parameter of at least 0 that float32 holds; 0 stays 0."""
    return value and min(max(value, SMALLEST), LARGEST)


def _build(kind: type[Rows], make: Callable[[_Field], Any], leave_out: tuple[type, ...] = ()) -> Rows:
    return kind(**{name: make(field) if isinstance(field, _Field) else None if field in leave_out else _build(field, make, leave_out)
                   for name, field in _fields(kind)})


@functools.cache
def _fields(kind: type) -> tuple[tuple[str, Any], ...]:
    """Names of a kind's fields with their :class:`_Field`, or the kind they hold."""
    return tuple((field.name, field.metadata.get("per_row", field.metadata.get("kind"))) for field in dataclasses.fields(kind))
