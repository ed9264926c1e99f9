"""How fast answers came."""
import time
from collections.abc import Iterable, Iterator

from tpllm.engine.outputs import CompletionDelta


class Speed:
    """Counts the tokens of one or several answers, and the time that they took.

    Attributes:
        first_s: seconds from the first request to its first token; None before there is one.
    """

    first_s: float | None = None

    def __init__(self):
        self._num_tokens, self._num_later, self._later_s, self._was_cut = 0, 0, 0.0, False

    def __str__(self) -> str:
        facts = [f"{self._num_tokens} token{'' if self._num_tokens == 1 else 's'}{', the most that were allowed' if self._was_cut else ''}"]
        facts += [] if self.per_second is None else [f"{self.per_second:.1f} tokens/s"]
        facts += [] if self.first_s is None else [f"first token after {self.first_s:.2f} s"]
        return "tpllm: " + ", ".join(facts)

    @property
    def per_second(self) -> float | None:
        """Tokens a second, without the first of each answer; None where there are no others."""
        return self._num_later / self._later_s if self._num_later and self._later_s else None

    def count(self, deltas: Iterable[CompletionDelta]) -> Iterator[str]:
        """The text of an answer as it comes, counted on its way."""
        asked, times, num_tokens, reason = time.monotonic(), [], [], None
        try:
            for delta in deltas:
                reason = delta.finish_reason
                if delta.token_ids:
                    times.append(time.monotonic())
                    num_tokens.append(len(delta.token_ids))
                yield delta.text
        finally:
            if times:
                self.add(sum(num_tokens), first_s=times[0] - asked, later_s=times[-1] - times[0], num_first=num_tokens[0], was_cut=reason == "length")

    def add(self, num_tokens: int, *, first_s: float, later_s: float, num_first: int = 1, was_cut: bool) -> None:
        """Count an answer.

        Args:
            num_tokens: of all of it.
            first_s: seconds from the request to the first tokens.
            later_s: seconds from the first tokens to the last.
            num_first: how many tokens came first, together.
            was_cut: whether it ended at the most tokens that it may have.
        """
        self._num_tokens += num_tokens
        self._num_later += num_tokens - num_first
        self._later_s += later_s
        self._was_cut |= was_cut
        self.first_s = first_s if self.first_s is None else self.first_s
