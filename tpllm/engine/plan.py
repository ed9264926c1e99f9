"""A plan of the scheduler: one device program, and what is done before it."""
import dataclasses

import numpy as np

from tpllm.engine.request import Sequence


@dataclasses.dataclass(frozen=True)
class Owner:
    """A row that a program gives tokens to, in which slot, and how often it had lost its slot by then.

    Attributes:
        num_steps: how many steps the program may run for it; unless it ends, it gets at least as many tokens.
        most: the most tokens that it can get.
    """

    slot: int
    sequence: Sequence
    num_preemptions: int
    num_steps: int
    most: int

    @property
    def is_current(self) -> bool:
        """Whether the row still takes the program's tokens: it has not ended and has not lost its slot since."""
        return not self.sequence.is_finished and self.sequence.num_preemptions == self.num_preemptions


@dataclasses.dataclass(frozen=True)
class Move:
    """Pages of a row that are copied to the host, or back from it.

    Attributes:
        key: the key of the copy.
        sequence, slot: the row, and the slot that it leaves or gets.
        pages: its pages, in order.
    """

    key: int
    sequence: Sequence
    slot: int
    pages: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens ``start`` to ``start + count`` of a row's context, to be computed in its slot."""

    sequence: Sequence
    slot: int
    start: int
    count: int


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One program, and what is done before it.

    Attributes:
        pieces: pieces of contexts to be computed. Without any, the program runs decode steps for all its owners.
        owners: the rows that get tokens: those whose context the pieces complete, and those that decode.
        bucket: the padded number of tokens of each data group.
        started: rows that get their slot with this program, to compute their contexts.
        saves, restores: pages to be copied to the host, and back from it; a restored row goes on in its slot.
        copies: (data group, from, to) of pages to be copied.
    """

    pieces: tuple[Piece, ...]
    owners: tuple[Owner, ...]
    bucket: int = 0
    started: tuple[Sequence, ...] = ()
    saves: tuple[Move, ...] = ()
    restores: tuple[Move, ...] = ()
    copies: tuple[tuple[int, int, int], ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.owners or self.pieces or self.started or self.saves or self.restores or self.copies)

    def steps(self, num_slots: int) -> np.ndarray:
        """int32 [B], how many steps the program may run for each slot; 0 for those that it leaves alone."""
        steps_B = np.zeros(num_slots, np.int32)
        for owner in self.owners:
            steps_B[owner.slot] = owner.num_steps
        return steps_B


class PlanBuilder:
    """Collects the parts of a plan."""

    def __init__(self):
        self.pieces: list[Piece] = []
        self.owners: list[Owner] = []
        self.started: list[Sequence] = []
        self.saves: list[Move] = []
        self.restores: list[Move] = []
        self.copies: list[tuple[int, int, int]] = []

    def give_tokens(self, sequence: Sequence, num_steps: int = 1, tokens_per_step: int = 1) -> None:
        """Let the program run ``num_steps`` for a row, each of which gives it 1 to ``tokens_per_step`` tokens."""
        owner = Owner(sequence.slot, sequence, sequence.num_preemptions, num_steps, most=num_steps * tokens_per_step)
        sequence.promise(owner.num_steps, owner.most)
        self.owners.append(owner)

    def computes(self, sequence: Sequence) -> bool:
        """Whether the program computes a piece of a row's context."""
        return any(piece.sequence is sequence for piece in self.pieces)

    def has(self, sequence: Sequence) -> bool:
        """Whether the program, or what is done before it, concerns a row."""
        return (self.computes(sequence) or any(owner.sequence is sequence for owner in self.owners)
                or any(move.sequence is sequence for move in self.restores))

    def plan(self, *, bucket: int = 0) -> StepPlan:
        """The finished plan."""
        return StepPlan(pieces=tuple(self.pieces), owners=tuple(self.owners), bucket=bucket, started=tuple(self.started),
                        saves=tuple(self.saves), restores=tuple(self.restores), copies=tuple(self.copies))
