"""What is measured: sizes of one prefill, or of a prefill and the decode steps after it."""
import dataclasses
import os

PAUSE_S = 0.05  # before each turn: the threads of the other side spin for a while after their work, then sleep


@dataclasses.dataclass(frozen=True)
class Cell:
    """One thing to measure: a prefill (no steps), or decode steps after it."""

    name: str
    num_rows: int
    prompt_len: int
    num_steps: int = 0

    @property
    def context_len(self) -> int:
        """Tokens of a row: its prompt, the token that the prefill gives, one for each step."""
        return self.prompt_len + 1 + self.num_steps


def num_threads() -> int:
    """Of both sides: ``$TPLLM_NUM_THREADS``, or one a core."""
    return int(os.environ.get("TPLLM_NUM_THREADS") or os.cpu_count())
