"""What runs next: host integers only, no device, no clock."""
import collections
import dataclasses

from tpllm.engine.request import Sequence

MAX_PREFILLS_IN_A_ROW = 4  # chunks before rows that are already decoding get a step


@dataclasses.dataclass(frozen=True)
class PrefillPlan:
    """One chunk of the prompt of at most one row of each data group.

    Attributes:
        rows: (sequence, first prompt token of its chunk), at most one a group.
        bucket: the padded length of the chunk.
    """

    rows: tuple[tuple[Sequence, int], ...]
    bucket: int


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """Some decode steps for every live row.

    Attributes:
        owners: who sits in which slot now; by the time the tokens are read, others may.
        num_steps: K.
    """

    owners: tuple[tuple[int, Sequence], ...]
    num_steps: int


class Scheduler:
    """Slots, the queue before them, and the choice between prefill and decode.

    Args:
        num_slots: rows the device holds.
        num_groups: data groups the slots are cut into, in order.
        buckets: padded chunk lengths, ascending. A prompt is cut at multiples of the largest; its rest takes the smallest that holds it, so
            how a prompt is cut depends on its own length only.
    """

    def __init__(self, num_slots: int, num_groups: int, buckets: tuple[int, ...]):
        self.slots: list[Sequence | None] = [None] * num_slots
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.num_groups = num_groups
        self.buckets = buckets
        self._prefills_in_a_row = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def plan(self, steps_at_once: int) -> PrefillPlan | DecodePlan | None:
        """The next program, or None where nothing can run before results are read.

        Args:
            steps_at_once: decode steps to run in one go while no prompt waits for them to end.
        """
        self._admit()
        prefilling = [sequence for sequence in self.slots if sequence is not None and sequence.is_prefilling]
        decoding = [(slot, sequence) for slot, sequence in enumerate(self.slots) if sequence is not None and sequence.may_go_on]
        if prefilling and (not decoding or self._prefills_in_a_row < MAX_PREFILLS_IN_A_ROW):
            self._prefills_in_a_row += 1
            return self._plan_prefill(prefilling)
        self._prefills_in_a_row = 0
        if not decoding:
            return None
        if prefilling:
            steps_at_once = 1
        elif self.waiting:
            steps_at_once = max(1, steps_at_once // 4)  # a slot that ends early idles until the steps are over
        num_steps = min(steps_at_once, max(sequence.max_new_tokens - sequence.num_dispatched for _, sequence in decoding))
        for _, sequence in decoding:
            sequence.num_dispatched += num_steps
        return DecodePlan(owners=tuple(decoding), num_steps=num_steps)

    def release(self, sequence: Sequence) -> None:
        """Free the slot of a sequence that has ended, or take it out of the queue."""
        if sequence.slot is not None and self.slots[sequence.slot] is sequence:
            self.slots[sequence.slot] = None
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is queued or in a slot."""
        return bool(self.waiting) or any(sequence is not None for sequence in self.slots)

    def _admit(self) -> None:
        for slot, holder in enumerate(self.slots):
            if holder is None and self.waiting:
                sequence = self.waiting.popleft()
                sequence.slot, self.slots[slot] = slot, sequence

    def _plan_prefill(self, prefilling: list[Sequence]) -> PrefillPlan:
        bucket = self._next_bucket(prefilling[0])
        chosen: dict[int, Sequence] = {}
        for sequence in prefilling:
            group = sequence.slot * self.num_groups // len(self.slots)
            is_alike = self._next_bucket(sequence) == bucket and sequence.wants_prompt_logprobs == prefilling[0].wants_prompt_logprobs
            if group not in chosen and is_alike:  # a row's program must not depend on its neighbours
                chosen[group] = sequence
        rows = tuple((sequence, sequence.num_prefilled) for sequence in chosen.values())
        for sequence, start in rows:
            sequence.num_prefilled = min(start + bucket, sequence.prompt_len)
            sequence.num_dispatched = int(not sequence.is_prefilling)
        return PrefillPlan(rows=rows, bucket=bucket)

    def _next_bucket(self, sequence: Sequence) -> int:
        rest = sequence.prompt_len - sequence.num_prefilled
        return next((bucket for bucket in self.buckets if bucket >= rest), self.buckets[-1])
