"""How much work one program gets, decided by how long earlier programs took. No result depends on it."""
import numpy as np

from tpllm.engine.executor import MAX_STEPS
from tpllm.engine.plan import StepPlan

CHUNK_SECONDS = 0.25  # about how long one decode program runs where nobody streams
STREAM_SECONDS = 0.04  # the same where somebody streams
MAX_SLOWDOWN = 3.0  # where somebody streams, a program that also prefills may take as long as so many decode steps
FIRST_BUDGET = 64  # tokens, as long as nothing was measured


class Pace:
    """The measured times of an engine's programs, and what follows from them.

    Args:
        buckets: the lengths that its chunks may have, ascending.
    """

    def __init__(self, buckets: tuple[int, ...]):
        self._buckets = buckets
        self._step_s: float | None = None  # the estimated time of one decode step
        self._bucket_s: dict[int, float] = {}
        self._last_read = 0.0

    def steps_at_once(self, is_watched: bool) -> int:
        """The number of decode steps that one program should run."""
        seconds = STREAM_SECONDS if is_watched else CHUNK_SECONDS
        return 1 if self._step_s is None else int(np.clip(round(seconds / self._step_s), 1, MAX_STEPS))

    def token_budget(self, is_watched: bool) -> int | None:
        """The most tokens of a program that prefills beside rows that decode; None for no limit."""
        if not is_watched:
            return None
        if self._step_s is None:
            return FIRST_BUDGET
        limit, best = MAX_SLOWDOWN * self._step_s, self._buckets[0]
        for bucket in self._buckets:
            if self._estimate(bucket) <= limit:
                best = bucket
        return best

    def measure(self, plan: StepPlan, now: float, *, dispatched_at: float, num_steps: int) -> float:
        """Record a program whose results were read. Returns the seconds that it took, as far as the host can tell."""
        took, self._last_read = now - max(self._last_read, dispatched_at), now
        if plan.pieces:
            self._bucket_s[plan.bucket] = _follow(self._bucket_s.get(plan.bucket), took)
        elif num_steps:
            self._step_s = _follow(self._step_s, took / num_steps)
        return took

    def _estimate(self, bucket: int) -> float:
        """The seconds of a program of that many tokens: as measured, or in proportion to the nearest length that was measured."""
        if bucket in self._bucket_s:
            return self._bucket_s[bucket]
        if not self._bucket_s:
            return 0.0 if bucket <= FIRST_BUDGET else np.inf
        nearest = min(self._bucket_s, key=lambda known: abs(np.log2(known / bucket)))
        return self._bucket_s[nearest] * max(bucket / nearest, 0.25)


def _follow(known: float | None, latest: float) -> float:
    """The new estimate: it falls at once to a shorter time and rises slowly to slower ones, for a compile or a busy machine slows single programs."""
    return max(latest if known is None else min(latest, 0.8 * known + 0.2 * latest), 1e-6)
