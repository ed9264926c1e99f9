"""A progress bar for calls that complete many prompts."""
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tpllm.engine.outputs import RequestOutput


@contextlib.contextmanager
def progress_bar(total: int, *, is_shown: bool | Callable[..., Any] | None) -> Iterator[Callable[[RequestOutput], None]]:
    """A bar on standard error of prompts done and tokens a second.

    Args:
        total: prompts.
        is_shown: None shows it on a terminal or in a notebook, for more than one prompt. A class or function makes another bar: it is called with
            ``total`` and ``desc``, as ``tqdm`` is, and what it gives has ``update`` and ``close``.

    Yields:
        A function to call with each finished output.
    """
    if is_shown is None:
        is_shown = total > 1 and (sys.stderr.isatty() or "ipykernel" in sys.modules)
    if not is_shown:
        yield lambda output: None
        return
    if callable(is_shown):
        with contextlib.closing(is_shown(total=total, desc="prompts")) as bar:
            yield lambda output: bar.update(1)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task, start, num_tokens = progress.add_task("prompts", total=total, speed=""), time.monotonic(), 0

        def advance(output: RequestOutput) -> None:
            nonlocal num_tokens
            num_tokens += sum(len(completion.token_ids) for completion in output.outputs)
            progress.update(task, advance=1, speed=f"{num_tokens / (time.monotonic() - start):.1f} tokens/s")
        yield advance
