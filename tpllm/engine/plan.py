"""A plan of the scheduler: one device program, and what has to be done before it."""
import dataclasses

from tpllm.engine.request import Sequence


@dataclasses.dataclass(frozen=True)
class Owner:
    """A row that a program gives tokens to, in which slot, and how often it had lost its slot by then."""

    slot: int
    sequence: Sequence
    num_preemptions: int

    @property
    def is_current(self) -> bool:
        """Whether the row still wants what the program gives."""
        return not self.sequence.is_finished and self.sequence.num_preemptions == self.num_preemptions


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens ``start`` to ``start + count`` of a row's context, to be computed in its slot."""

    sequence: Sequence
    slot: int
    start: int
    count: int


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One program, and what has to be done before it.

    Attributes:
        pieces: of contexts. None: the program is ``num_steps`` decode steps for all its owners.
        owners: the rows that get tokens: those whose context the pieces complete, and those that decode.
        bucket: padded tokens of each data group.
        num_steps: K; 1 where there are pieces.
        started: rows that come to their slot with this program.
        saves, restores: (data group, row, its pages), to be copied to the host, or back.
        copies: (data group, from, to), pages to be copied.
    """

    pieces: tuple[Piece, ...]
    owners: tuple[Owner, ...]
    bucket: int = 0
    num_steps: int = 1
    started: tuple[Sequence, ...] = ()
    saves: tuple[tuple[int, Sequence, tuple[int, ...]], ...] = ()
    restores: tuple[tuple[int, Sequence, tuple[int, ...]], ...] = ()
    copies: tuple[tuple[int, int, int], ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.owners or self.pieces or self.started or self.saves or self.restores or self.copies)


class Draft:
    """A plan being made."""

    def __init__(self):
        self.pieces: list[Piece] = []
        self.owners: list[Owner] = []
        self.started: list[Sequence] = []
        self.saves: list[tuple[int, Sequence, tuple[int, ...]]] = []
        self.restores: list[tuple[int, Sequence, tuple[int, ...]]] = []
        self.copies: list[tuple[int, int, int]] = []

    def give_tokens(self, sequence: Sequence) -> None:
        """Let the program give a row tokens."""
        self.owners.append(Owner(sequence.slot, sequence, sequence.num_preemptions))

    def computes(self, sequence: Sequence) -> bool:
        """Whether the program computes a piece of a row's context."""
        return any(piece.sequence is sequence for piece in self.pieces)

    def has(self, sequence: Sequence) -> bool:
        """Whether a row has a part in the program, or in what comes before it."""
        return (self.computes(sequence) or any(owner.sequence is sequence for owner in self.owners)
                or any(row is sequence for _, row, _ in self.restores))

    def plan(self, *, bucket: int = 0, num_steps: int = 1) -> StepPlan:
        """The finished plan."""
        return StepPlan(pieces=tuple(self.pieces), owners=tuple(self.owners), bucket=bucket, num_steps=num_steps, started=tuple(self.started),
                        saves=tuple(self.saves), restores=tuple(self.restores), copies=tuple(self.copies))
