"""A dry run as lines of text."""
from collections.abc import Iterator

from tpllm.jobs.dry_run.run import DryRun
from tpllm.jobs.progress import time_text

INDENT = " " * 13


def describe(run: DryRun) -> Iterator[str]:
    """What a dry run found, line by line."""
    job, parts = run.job, run.parts
    num_left = parts.num_rows - run.num_done
    yield _line("job", f"model {job.model}; input {job.input if isinstance(job.input, str) else ', '.join(job.input)}; output {job.folder}")
    done = f"; {run.num_done} are finished" if run.num_done else ""
    shard = f" (shard {parts.shard})" if job.shard else ""
    num_parts = f"{len(parts.numbers)} part{'' if len(parts.numbers) == 1 else 's'}"
    yield _line("rows", f"{parts.num_rows} in {num_parts}{shard}{done}, {num_left} are left")
    if run.pid is not None:
        yield _line("", f"another process (pid {run.pid or 'not known'}) runs this job now")
    if run.is_remote:
        yield _line("", "what the remote output holds was not looked at, only the working folder on this machine")
    if run.counts is None:
        yield _line("", "nothing is left to do")
    else:
        yield from _describe_rows(run)
        yield from _describe_time(run)
    yield "Nothing was written."


def _describe_rows(run: DryRun) -> Iterator[str]:
    counts = run.counts
    num_failing = counts.num_unreadable + round(counts.num_refused * counts.scale)
    about = "about " if counts.is_sample else ""
    colon = ", the first:" if counts.reasons else ""
    yield _line("would fail", f"{about if counts.num_refused else ''}{num_failing} of {counts.num_rows} rows{colon}")
    for reason in counts.reasons:
        yield _line("", f"  {reason}")
    if counts.is_sample:
        yield _line("tokens", f"every row was parsed; tokens were counted in {counts.num_tokenized} evenly spaced rows, and estimated from them")
    num_prompts, prompt_tokens = round(counts.num_prompts * counts.scale), round(counts.prompt_tokens * counts.scale)
    mean = counts.prompt_tokens / counts.num_prompts if counts.num_prompts else 0.0
    yield _line("prompts", f"{about}{num_prompts} with {prompt_tokens} tokens (mean {mean:.1f}, longest {counts.longest_prompt}); "
                           f"besides, {about}{round(counts.num_too_long * counts.scale)} over the context of {run.context}")
    num_completions, completion_tokens = round(counts.num_completions * counts.scale), round(counts.completion_tokens * counts.scale)
    yield _line("completions", f"{about}{num_completions} with at most {completion_tokens} tokens")


def _describe_time(run: DryRun) -> Iterator[str]:
    speed = run.speed
    if speed is None:
        yield _line("time", "no row would run")
        return
    likely = f"about {time_text(run.likely_seconds)}, " if run.likely_seconds is not None else ""
    yield _line("time", f"{likely}at most {time_text(run.most_seconds)}; {time_text(run.startup_seconds)} of it to load and compile, as it took now")
    rates = f"{speed.prompt_rate:.1f} prompt tokens/s" + (f", {speed.completion_rate:.1f} completion tokens/s" if speed.completion_rate else "")
    lengths = (f"; their completions came to an end with {speed.mean_length:.1f} tokens on average" if speed.mean_length is not None
               else "; their completions were not run to the end, so only the most is known")
    yield _line("", f"this rests on {speed.num_prompts} of the job's own prompts, run together for {speed.num_seconds:.1f} s on this machine: "
                    f"{rates}{lengths}")


def _line(name: str, text: str) -> str:
    return f"{name.ljust(len(INDENT))}{text}"
