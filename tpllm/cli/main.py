"""``tpllm``: the command line. Each subcommand imports what it needs when it runs, so that ``--help`` is instant."""
import importlib
import logging
import signal
import sys
from collections.abc import Callable, Container, Sequence
from typing import Any

from tpllm import __version__
from tpllm.cli.help_text import EXIT_NO_OUTPUT, EXIT_USER_ERROR, HelpFormatter, Parser
from tpllm.cli.streams import OutputFailed, guarded_streams
from tpllm.errors import TpllmError

COMMANDS = {
    "generate": "answer a prompt, printed as it is generated",
    "chat": "talk with a model in the terminal",
    "run": "run a batch job: a file of prompts in, completions out",
    "job": "see how far a batch job is, run its failed rows again, or merge its shards",
    "list": "show the models that are on this machine",
    "fetch": "download a model",
    "rm": "delete a downloaded model",
    "inspect": "show a model's configuration, parameters and memory; weights are not loaded",
    "plan": "say what a model takes on devices that need not be there",
    "quantize": "write a quantized checkpoint that tpllm and transformers open",
    "bench": "measure speed and memory",
    "doctor": "show versions, devices, kernels and memory, for a bug report",
    "completion": "print the script by which a shell completes tpllm's commands",
}
DESCRIPTION = "Language-model inference on JAX/XLA: one program on one CPU, on GPUs and on a TPU slice."
EXAMPLES = """examples:
  tpllm generate HuggingFaceTB/SmolLM2-135M-Instruct -p "What is the capital of France?"
  tpllm chat model.Q4_K_M.gguf
  tpllm generate demo --raw -p "def " -n 32
  tpllm run job.yaml --sampling.max-tokens 32
  tpllm inspect demo --cpu-devices 8 --mesh tp=8

'tpllm COMMAND --help' says more of a command."""
OWN_PACKAGES = ("tpllm", "sharding_rules", "pallas_kernels")


def main(argv: Sequence[str] | None = None, *, make_llm: Callable[..., Any] | None = None) -> int:
    """Run one command.

    Args:
        argv: the command's words; by default the process's own.
        make_llm: makes the engine; :class:`tpllm.LLM` by default.

    Returns:
        The exit code: 0, 1 where the result cannot be generated or written to standard output, 2 for an error of the user's, 128 + n when stopped by
        signal n, and so 141 (SIGPIPE) where whoever read the output has gone.
    """
    try:
        with guarded_streams():
            return _run(argv, make_llm)
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except OutputFailed as error:
        with guarded_streams():
            print(f"tpllm: error: cannot write to standard output: {error.strerror}", file=sys.stderr)
        return EXIT_NO_OUTPUT


def _run(argv: Sequence[str] | None, make_llm: Callable[..., Any] | None) -> int:
    options, words = _global_options().parse_known_args(sys.argv[1:] if argv is None else argv)
    name = words[0] if words and words[0] in COMMANDS else None
    _log_to_stderr(is_verbose=options.verbose)
    try:
        args = make_parser((name,)).parse_args(words)
        if options.cpu_devices is not None:
            _set_cpu_devices(options.cpu_devices)
        return args.run_command(args, make_llm=make_llm)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except ValueError as error:
        if type(error).__module__.partition(".")[0] not in OWN_PACKAGES:
            raise
        print(f"tpllm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_NO_OUTPUT if type(error) is TpllmError else EXIT_USER_ERROR  # its subclasses are of what was given


def _global_options() -> Parser:
    """Options that may stand anywhere."""
    parser = Parser(prog="tpllm", add_help=False, allow_abbrev=False)
    parser.is_partial = True
    parser.add_argument("--cpu-devices", type=int, metavar="N", help="make N virtual CPU devices, to try meshes without any other device")
    parser.add_argument("--verbose", action="store_true", help="say more on standard error")
    parser.add_argument("-V", "--version", action="version", version=f"tpllm {__version__}", help="print the version and exit")
    return parser


def make_parser(names: Container[str]) -> Parser:
    """The parser of all commands; only those in ``names`` are imported, and only they have their arguments."""
    parser = Parser(prog="tpllm", description=DESCRIPTION, epilog=EXAMPLES, parents=[_global_options()],
                    allow_abbrev=False, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        command = importlib.import_module(f"tpllm.cli.{name}") if name in names else None
        subparser = commands.add_parser(name, help=text, description=command.__doc__ if command else text, allow_abbrev=False,
                                        epilog="--cpu-devices N and --verbose, too, may be given: see 'tpllm --help'.",
                                        formatter_class=HelpFormatter)
        if command:
            command.add_arguments(subparser)
            subparser.set_defaults(run_command=command.run)
    return parser


def _set_cpu_devices(count: int) -> None:
    from tpllm.errors import ConfigError
    if not 1 <= count <= 1024:
        raise ConfigError(f"--cpu-devices is {count}; it must be from 1 to 1024")
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def _log_to_stderr(*, is_verbose: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("tpllm: %(levelname)s: %(message)s"))
    logger = logging.getLogger("tpllm")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if is_verbose else logging.WARNING)


if __name__ == "__main__":
    from tpllm.cli.entry import main as begin
    sys.exit(begin())
