"""What quantization costs a model: perplexity of every scheme beside the model as it is, on the same tokens.

  tpllm bench quality --model demo --json out/quality.json

Every variant predicts the same windows of text, so the differences are paired: most of the noise of which text was drawn cancels, and the
standard error beside a difference is that of the mean over windows. "Best token" is the share of positions at which a variant's likeliest
token is the unquantized model's. --files compares other files of the same model, such as GGUF.
"""
import argparse
import contextlib
import dataclasses
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from sharding_rules import mesh_text
from tpllm.bench.command import at_least, measure_and_report
from tpllm.bench.held_out import library_files
from tpllm.bench.machine import describe_machine
from tpllm.engine.sampling_params import SamplingParams
from tpllm.errors import ConfigError
from tpllm.llm import LLM
from tpllm.loading import SMALL_CACHES
from tpllm.model.kv_cache import cache_bytes_per_token
from tpllm.tokenizer import Tokenizer
from tpllm.weights.policy import NONE
from tpllm.weights.quantize import SCHEMES


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to open the model."""

    name: str
    model: str
    quantization: str | None = None
    kv_cache_dtype: str = "auto"


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a variant made of the windows.

    Attributes:
        losses: nats of each token after a window's first, [windows, window_len - 1].
        best: the likeliest token at each of those positions, of the same shape.
        weight_bytes: of all parameters.
        kv_bytes_per_token: of one row's token, all layers.
    """

    losses: np.ndarray
    best: np.ndarray
    weight_bytes: int
    kv_bytes_per_token: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's arguments."""
    parser.add_argument("--model", default="demo", help="a folder, a GGUF file, a hub id, or 'demo' (default)")
    parser.add_argument("--quantization", nargs="*", default=list(SCHEMES), metavar="NAME",
                        help="schemes or policies to compare; by default all schemes")
    parser.add_argument("--kv-cache-dtype", nargs="*", default=list(SMALL_CACHES), metavar="NAME",
                        help="dtypes of the KV cache to compare, each with weights as they are (default: int8 fp8)")
    parser.add_argument("--files", nargs="*", default=[], metavar="MODEL", help="other files or folders of the same model and tokenizer")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="text to predict; by default Python files that the demo model has not seen")
    parser.add_argument("--windows", type=at_least(2), default=128, metavar="N", help="pieces of that text, drawn at random (default 128)")
    parser.add_argument("--window-len", type=at_least(2), default=512, metavar="N", help="tokens of each (default 512)")
    parser.add_argument("--mesh", default="auto", help="such as 'tp=4'; by default all local devices")
    parser.add_argument("--dtype", default="auto", help="of activations, and of weights that are not quantized: float32, bfloat16 or float16")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="chooses the windows (default 0)")
    parser.add_argument("--json", metavar="FILE", help="write the result there too")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON; returns the exit code."""
    return measure_and_report(args, measure, _print_table)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The result of the arguments' benchmark; JSON-able."""
    texts = [text for _, text in library_files(is_held_out=True)] if args.text is None else [_read_text(path) for path in args.text]
    machine, rows, base, windows = describe_machine(jax.local_devices()[0]), [], None, None
    for variant in _variants(args):
        with contextlib.closing(_open(variant, args)) as llm:
            is_first, has_own_tokens = windows is None, variant.model != args.model
            drawn = draw_windows(llm.get_tokenizer(), texts, args.window_len, args.windows, args.seed) if is_first or has_own_tokens else windows
            if is_first:
                windows, setup = drawn, _setup(args, llm)
            elif not np.array_equal(windows, drawn):
                raise ConfigError(f"{variant.model} has other tokens than {args.model}; only files of one model and tokenizer can be compared")
            found = predict(llm, windows)
        base = base or found
        rows.append({**dataclasses.asdict(variant), **compare(found, base)})
    return {"benchmark": "quality", "machine": machine, "setup": setup, "results": rows}


def compare(found: Predictions, base: Predictions) -> dict[str, Any]:
    """A variant beside the model as it is; JSON-able. Ratios, not percent."""
    more_W = (found.losses - base.losses).mean(1)
    return {"weight_bytes": found.weight_bytes, "kv_bytes_per_token": found.kv_bytes_per_token,
            "perplexity": float(np.exp(found.losses.mean())), "perplexity_increase": float(np.expm1(more_W.mean())),
            "standard_error": float(more_W.std(ddof=1) / len(more_W) ** 0.5), "best_token_share": float((found.best == base.best).mean())}


def draw_windows(tokenizer: Tokenizer, texts: Iterable[str], length: int, num_windows: int, seed: int) -> np.ndarray:
    """[num_windows, length] token ids, each of one text, drawn without replacement.

    Raises:
        ConfigError: there are too few.
    """
    encoded = (np.asarray(tokenizer.encode(text, parse_special=False), np.int32) for text in texts)
    windows = [tokens[start:start + length] for tokens in encoded for start in range(0, len(tokens) - length + 1, length)]
    if len(windows) < num_windows:
        raise ConfigError(f"the text has {len(windows)} windows of {length} tokens, fewer than {num_windows}; "
                          "give more text, or a smaller --windows or --window-len")
    return np.stack([windows[index] for index in np.random.default_rng(seed).permutation(len(windows))[:num_windows]])


def predict(llm: LLM, windows_WT: np.ndarray) -> Predictions:
    """Predict every token of the windows but the first of each."""
    outputs = llm.generate([{"prompt_token_ids": tokens.tolist()} for tokens in windows_WT],
                           SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1), use_tqdm=False)
    entries = [list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))[1:] for output in outputs]
    losses = [[-logprobs[token].logprob for token, logprobs in row] for row in entries]
    best = [[max(logprobs, key=lambda token: logprobs[token].logprob) for _, logprobs in row] for row in entries]
    cache_dtype = llm.fingerprint()["kv_cache_dtype"]
    return Predictions(np.array(losses), np.array(best), sum(leaf.nbytes for leaf in jax.tree.leaves(llm.params)),
                       cache_bytes_per_token(llm.config, np.dtype(cache_dtype)))


def _variants(args: argparse.Namespace) -> Iterator[Variant]:
    """The model as it is first."""
    yield Variant("as it is", args.model)
    yield from (Variant(name, args.model, quantization=name) for name in args.quantization if name != NONE)
    yield from (Variant(f"KV cache {name}", args.model, kv_cache_dtype=name) for name in args.kv_cache_dtype)
    yield from (Variant(pathlib.PurePath(model).name, model) for model in args.files)


def _open(variant: Variant, args: argparse.Namespace) -> LLM:
    return LLM(variant.model, mesh=args.mesh, dtype=args.dtype, quantization=variant.quantization, kv_cache_dtype=variant.kv_cache_dtype,
               max_model_len=args.window_len + 1)


def _read_text(path: str) -> str:
    try:
        return pathlib.Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}; give files of UTF-8 text") from error


def _setup(args: argparse.Namespace, llm: LLM) -> dict[str, Any]:
    return {"model": args.model, "mesh": mesh_text(llm.config.partition.mesh), "dtype": str(llm.params.dtype),
            "kernels": llm.fingerprint()["kernels"], "kv_cache_dtype": llm.fingerprint()["kv_cache_dtype"],
            "text": args.text or "held-out files of Python's standard library", "num_windows": args.windows, "window_len": args.window_len,
            "seed": args.seed}


def _print_table(report: dict[str, Any]) -> None:
    setup = report["setup"]
    title = (f"{setup['model']}, {setup['dtype']}, mesh {setup['mesh']}; {setup['num_windows']} windows of {setup['window_len']} tokens: "
             f"{setup['text'] if isinstance(setup['text'], str) else ', '.join(setup['text'])}")
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(("", "weights", "KV cache a token", "perplexity", "more", "± s.e.", "best token")):
        table.add_column(heading, justify="right" if index else "left")
    for row in report["results"]:
        table.add_row(row["name"], f"{row['weight_bytes'] / 1e6:.2f} MB", f"{row['kv_bytes_per_token']:.0f} B", f"{row['perplexity']:.4f}",
                      f"{row['perplexity_increase']:+.3%}", f"{row['standard_error']:.3%}", f"{row['best_token_share']:.1%}")
    Console(width=max(100, len(title))).print(table)
