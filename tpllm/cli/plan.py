"""Say what a model takes on devices that need not be there, by compiling it for them: memory, rows that fit, exchanges, and the least times.

  tpllm plan --model llama-3.1-70b --topology v5e:4x4 --quantization int8
  tpllm plan --model ./my-model --topology h200:8 --search --html plan.html
  tpllm plan --model demo --topology cpu:8

A folder needs only its config.json. The compilers come with tpllm[tpu] and tpllm[cuda]; docs/guide/plan.md names the few packages that do.
Times are the least that the devices' memory, arithmetic and links allow, not forecasts.
"""
import argparse
import json
from collections.abc import Callable
from typing import Any

from tpllm.cli.entry import raise_interrupts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--model", required=True, help="a known shape such as llama-3.1-70b, a folder, a GGUF file, a hub id, or 'demo'")
    parser.add_argument("--topology", required=True, help="devices: 'v5e:4x4', 'v5p:2x2x1', 'v6e:2x4', 'h100:8', 'h200:8', 'cpu:8'")
    parser.add_argument("--mesh", default="auto", help="such as 'dp=2,tp=8' (default: as much tp as the model allows)")
    parser.add_argument("--search", action="store_true", help="try every mesh over all the devices and plan the best one")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16")
    parser.add_argument("--quantization", help="of the weights, such as int8 or int4, or '*.mlp.*=int4,*=none'")
    parser.add_argument("--kv-cache-dtype", default="auto", metavar="NAME", help="float32, bfloat16, float16, int8 or fp8 (default: as --dtype)")
    parser.add_argument("--num-seqs", type=int, default=8, metavar="N", help="rows at once (default 8)")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of each, prompt and completion (default 4096, or the model's if less)")
    parser.add_argument("--prompt-len", type=int, metavar="N", help="tokens of the prompt whose time is estimated (default a quarter of the context)")
    parser.add_argument("--prefill-chunk", type=int, metavar="N", help="prompt tokens in one program, a power of two")
    parser.add_argument("--json", metavar="FILE", help="write the plan there too; '-' prints it instead of the tables")
    parser.add_argument("--html", metavar="FILE", help="write it as a page with pictures there")


def run(args: argparse.Namespace, *, make_llm: Callable[..., Any] | None) -> int:
    """Run the command; returns the exit code."""
    import pathlib

    from tpllm.bench.command import check_writable
    from tpllm.plan import PlanOptions, make_plan, plan_best, prepare_environment
    from tpllm.plan.picture import html_page
    from tpllm.plan.table import print_plan
    prepare_environment()
    raise_interrupts()
    files = [path for path in (args.json, args.html) if path not in (None, "-")]
    for path in files:
        check_writable(path)
    options = PlanOptions(model=args.model, topology=args.topology, mesh=args.mesh, dtype=args.dtype, quantization=args.quantization,
                          kv_cache_dtype=args.kv_cache_dtype, num_seqs=args.num_seqs, context_len=args.context, prompt_len=args.prompt_len,
                          prefill_chunk=args.prefill_chunk)
    report = (plan_best if args.search else make_plan)(options)
    text = json.dumps(report, indent=1)
    if args.json not in (None, "-"):  # the files first: whoever reads what is printed may go away
        pathlib.Path(args.json).write_text(text + "\n")
    if args.html:
        pathlib.Path(args.html).write_text(html_page(report))
    if args.json == "-":
        print(text)
    else:
        print_plan(report)
    return 0
