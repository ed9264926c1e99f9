"""How much to do at a time, from how long programs took: nothing that a result depends on."""
import numpy as np

from tpllm.engine.executor import MAX_STEPS
from tpllm.engine.plan import StepPlan

CHUNK_SECONDS = 0.25  # about how long the device decodes before the host looks, when nobody watches the tokens come
STREAM_SECONDS = 0.04
MAX_SLOWDOWN = 3.0  # decode steps that a step may take which also prefills, when somebody watches
FIRST_BUDGET = 64


class Pace:
    """What was measured of an engine's programs.

    Args:
        buckets: of its chunks, ascending.
    """

    def __init__(self, buckets: tuple[int, ...]):
        self._buckets = buckets
        self._step_s: float | None = None  # of one decode step, about
        self._bucket_s: dict[int, float] = {}
        self._last_read = 0.0

    def steps_at_once(self, is_watched: bool) -> int:
        """Decode steps of one program."""
        seconds = STREAM_SECONDS if is_watched else CHUNK_SECONDS
        return 1 if self._step_s is None else int(np.clip(round(seconds / self._step_s), 1, MAX_STEPS))

    def token_budget(self, is_watched: bool) -> int | None:
        """Tokens of a program that prefills beside rows that decode; None for as many as it takes."""
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
        """Take note of a program whose results were read; the seconds it took, as far as the host can tell."""
        took, self._last_read = now - max(self._last_read, dispatched_at), now
        if plan.pieces:
            self._bucket_s[plan.bucket] = _follow(self._bucket_s.get(plan.bucket), took)
        elif num_steps:
            self._step_s = _follow(self._step_s, took / num_steps)
        return took

    def _estimate(self, bucket: int) -> float:
        """Seconds of a program of that many tokens: measured, or in proportion to the nearest one that was."""
        if bucket in self._bucket_s:
            return self._bucket_s[bucket]
        if not self._bucket_s:
            return 0.0 if bucket <= FIRST_BUDGET else np.inf
        nearest = min(self._bucket_s, key=lambda known: abs(np.log2(known / bucket)))
        return self._bucket_s[nearest] * max(bucket / nearest, 0.25)


def _follow(known: float | None, latest: float) -> float:
    """Follow what is faster at once and what is slower gradually: a compile or a busy machine makes single programs slow."""
    return max(latest if known is None else min(latest, 0.8 * known + 0.2 * latest), 1e-6)
