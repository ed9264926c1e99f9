"""A plan of the scheduler: one device program, and what has to be done before it."""
import dataclasses

import numpy as np

from tpllm.engine.request import Sequence


@dataclasses.dataclass(frozen=True)
class Owner:
    """A row that a program gives tokens to, in which slot, and how often it had lost its slot by then.

    Attributes:
        num_steps: that the program may run for it; unless it ends, it gets at least as many tokens.
        most: tokens that it gets at most.
    """

    slot: int
    sequence: Sequence
    num_preemptions: int
    num_steps: int
    most: int

    @property
    def is_current(self) -> bool:
        """Whether the row still wants what the program gives."""
        return not self.sequence.is_finished and self.sequence.num_preemptions == self.num_preemptions


@dataclasses.dataclass(frozen=True)
class Move:
    """Pages of a row that are copied to the host, or back from it.

    Attributes:
        key: what the copy is known by.
        sequence, slot: the row, and the slot that it leaves or comes to.
        pages: in order.
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
    """One program, and what has to be done before it.

    Attributes:
        pieces: of contexts. None: the program is decode steps for all its owners.
        owners: the rows that get tokens: those whose context the pieces complete, and those that decode.
        bucket: padded tokens of each data group.
        started: rows that come to their slot with this program, to compute their contexts.
        saves, restores: to the host, and back: then the row goes on in its slot.
        copies: (data group, from, to), pages to be copied.
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
        """int32 [B], how many steps the program may give each slot; 0 for those that it gives nothing."""
        steps_B = np.zeros(num_slots, np.int32)
        for owner in self.owners:
            steps_B[owner.slot] = owner.num_steps
        return steps_B


class PlanBuilder:
    """A plan being made."""

    def __init__(self):
        self.pieces: list[Piece] = []
        self.owners: list[Owner] = []
        self.started: list[Sequence] = []
        self.saves: list[Move] = []
        self.restores: list[Move] = []
        self.copies: list[tuple[int, int, int]] = []

    def give_tokens(self, sequence: Sequence, num_steps: int = 1, tokens_per_step: int = 1) -> None:
        """Let the program give a row one token a step, or up to ``tokens_per_step``."""
        owner = Owner(sequence.slot, sequence, sequence.num_preemptions, num_steps, most=num_steps * tokens_per_step)
        sequence.promise(owner.num_steps, owner.most)
        self.owners.append(owner)

    def computes(self, sequence: Sequence) -> bool:
        """Whether the program computes a piece of a row's context."""
        return any(piece.sequence is sequence for piece in self.pieces)

    def has(self, sequence: Sequence) -> bool:
        """Whether a row has a part in the program, or in what comes before it."""
        return (self.computes(sequence) or any(owner.sequence is sequence for owner in self.owners)
                or any(move.sequence is sequence for move in self.restores))

    def plan(self, *, bucket: int = 0) -> StepPlan:
        """The finished plan."""
        return StepPlan(pieces=tuple(self.pieces), owners=tuple(self.owners), bucket=bucket, started=tuple(self.started),
                        saves=tuple(self.saves), restores=tuple(self.restores), copies=tuple(self.copies))
