"""A mapping from logical axes to mesh axes."""
import dataclasses

from sharding_rules.axes import LOGICAL_AXES


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which mesh axis each logical axis is split over; an axis that is not named is replicated.

    Args:
        entries: pairs (logical axis, mesh axis, or several from the slowest to the quickest). Hashable, so a model's static configuration can hold
            it.

    Raises:
        ValueError: a logical axis that does not exist, or one named twice.
    """

    entries: tuple[tuple[str, str | tuple[str, ...]], ...] = ()

    def __post_init__(self):
        names = [logical for logical, _ in self.entries]
        for name in names:
            if name not in LOGICAL_AXES:
                raise ValueError(f"unknown logical axis {name!r}; known: {', '.join(LOGICAL_AXES)}")
        if len(set(names)) != len(names):
            raise ValueError(f"a logical axis is named twice in {names}; give each at most one mesh axis")

    def mesh_axis(self, logical: str | None) -> str | tuple[str, ...] | None:
        """The mesh axis or axes of one logical axis, or None where it is replicated."""
        return dict(self.entries).get(logical)

    def without(self, *logical: str) -> "Rules":
        """The same rules with these logical axes replicated."""
        return Rules(tuple(entry for entry in self.entries if entry[0] not in logical))
