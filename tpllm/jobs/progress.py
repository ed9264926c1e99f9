"""How far a job is: a bar on a terminal, from the loading of the model on, a plain line every few seconds elsewhere; on standard error."""
import contextlib
import sys
import time
from typing import TextIO

LINE_INTERVAL_S = 5.0


class Progress:
    """Counts rows and tokens of this run and shows them.

    Args:
        num_rows: of the whole job.
        num_before: rows that earlier runs finished.
        stream: where to write; standard error by default.
        model: that is loaded until :meth:`begin`.
    """

    def __init__(self, num_rows: int, num_before: int, stream: TextIO | None = None, *, model: str = ""):
        self.num_rows, self.num_done, self.num_before = num_rows, num_before, num_before
        self.num_tokens = self.num_errors = 0
        self._stream = sys.stderr if stream is None else stream
        self._num_shown = num_before
        self._bar = self._open_bar(f"loading {model}") if self._stream is not None and self._stream.isatty() else None

    def begin(self) -> None:
        """The model is loaded: the clock starts, and what takes long before the first row is finished is mostly compiling."""
        self._started = self._last_line = time.monotonic()
        self._num_shown = -1
        if self._bar is None:
            self._say(f"{self.num_rows} rows" + (f", {self.num_before} finished before" if self.num_before else ""))
        else:
            self._bar.update(self._task, rate="compiling", refresh=True)

    def advance(self, num_tokens: int, *, is_error: bool) -> None:
        """Count one more finished row."""
        self.num_done += 1
        self.num_tokens += num_tokens
        self.num_errors += is_error
        if self._bar is not None:
            self._bar.update(self._task, completed=self.num_done, rate=self._rate())
        elif time.monotonic() - self._last_line >= LINE_INTERVAL_S:
            self._show_line()

    def line(self) -> str:
        """Rows, tokens a second and the time left, as text."""
        elapsed = time.monotonic() - self._started
        num_new = self.num_done - self.num_before
        left = f", {time_text(elapsed / num_new * (self.num_rows - self.num_done))} left" if num_new else ""
        errors = f", {self.num_errors} failed" if self.num_errors else ""
        return f"{self.num_done}/{self.num_rows} rows{errors}, {self._rate()}{left}"

    def close(self) -> None:
        """Take the bar off the terminal, or write the last line."""
        if self._bar is not None:
            self._bar.stop()
        elif self.num_done != self._num_shown:
            self._show_line()

    def _show_line(self) -> None:
        self._last_line, self._num_shown = time.monotonic(), self.num_done
        self._say(self.line())

    def _rate(self) -> str:
        return f"{self.num_tokens / max(time.monotonic() - self._started, 1e-9):.1f} tokens/s"

    def _say(self, text: str) -> None:
        if self._stream is None:  # a closed standard error; print would take standard output for it
            return
        with contextlib.suppress(OSError):  # a job goes on when nobody reads its progress any more
            print(f"tpllm: {text}", file=self._stream, flush=True)

    def _open_bar(self, stage: str):
        from rich import progress
        from rich.console import Console
        bar = progress.Progress(progress.BarColumn(), progress.MofNCompleteColumn(), "rows", progress.TextColumn("{task.fields[rate]}", markup=False),
                                progress.TimeElapsedColumn(), "left", progress.TimeRemainingColumn(), console=Console(file=self._stream))
        self._task = bar.add_task("rows", total=self.num_rows, completed=self.num_before, rate=stage)
        bar.start()
        return bar


def time_text(seconds: float) -> str:
    """As minutes and seconds, or hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
