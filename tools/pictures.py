"""Draw the pictures that README.md and the docs show: docs/pictures/*.svg.

    pip install -e .[pictures]
    python tools/pictures.py                    # all of them
    python tools/pictures.py chart engine       # some

Each function with the name of a picture draws it and gives its SVG:

    chart    tokens/s beside llama.cpp, from the result files that CELLS names
    engine   slots over programs, by the cells of notebooks/04_engine.ipynb
    answer   what ANSWER, run by this environment's tpllm, prints on a terminal; the first time it downloads 93 MB from a package index

tests/tools/test_pictures.py holds that the committed pictures show what these sources say.
"""
import argparse
import fcntl
import hashlib
import io
import itertools
import json
import os
import pathlib
import pty
import re
import struct
import subprocess
import sys
import termios

import matplotlib
import matplotlib.pyplot as plt
import pyte
from rich.console import Console
from rich.text import Text

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "pictures"
RESULTS = ROOT / "benchmarks" / "results"

PREFIX = "2026-11-26-cpu-vs-llama-cpp-tinyllama-1.1b"
CELLS = {  # a panel of the chart -> (cell of the benchmark, kind of weights -> the result file that holds it)
    "decode, 1 row": ("decode-1-at-128", dict.fromkeys(("int4", "int8", "bf16"), f"{PREFIX}-decode.json")),
    "decode, 8 rows": ("decode-8-at-128", dict.fromkeys(("int4", "int8", "bf16"), f"{PREFIX}-decode.json")),
    "prefill of 128 tokens": ("prefill-128", {"int4": f"{PREFIX}.json", "int8": f"{PREFIX}.json", "bf16": f"{PREFIX}-bf16.json"}),
}
"""llama.cpp runs Q4_0, Q8_0 and F16 there. ``-decode.json`` measured decoding again on a quieter machine, with twice as many steps."""
OURS, THEIRS = "#0b7285", "#b6bec6"

NOTEBOOK = ROOT / "notebooks" / "04_engine.ipynb"
LAST_CELL = "draw_key(top, (\"prefill\", \"decode\", \"idle\"))"
"""How the notebook's cell ends that makes the figure."""

ANSWER = ("tpllm fetch smollm2", 'tpllm generate smollm2 -p "What is the capital of France?" --temp 0')
COLUMNS = 88
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "tpllm", "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"]}


def medians(panel: str, kind: str) -> tuple[float, float]:
    """Tokens/s of tpllm and of llama.cpp in a cell of the chart."""
    cell, files = CELLS[panel]
    found = read_result(files[kind])["kinds"][kind]["cells"][cell]["medians"]
    return found["tokens_per_s"], found["peer_tokens_per_s"]


def read_result(name: str) -> dict:
    """A result file of the benchmarks."""
    return json.loads((RESULTS / name).read_text())


def caption() -> str:
    """On which processors and days the chart's cells were measured."""
    machines = [read_result(name)["machine"] for name in sorted({name for _, files in CELLS.values() for name in files.values()})]
    places = sorted({f"{machine['num_cpus']} cores of an {machine['cpu_model']}, {machine['date'][:10]}" for machine in machines})
    return f"tokens/s, more is better: TinyLlama-1.1B's shape, {'; '.join(places)}"


def chart() -> str:
    """Tokens/s of tpllm beside llama.cpp: a panel for each kind of work, two bars for each kind of weights."""
    figure, panels = plt.subplots(1, len(CELLS), figsize=(9, 2.9), layout="constrained")
    for axes, panel in zip(panels, CELLS, strict=True):
        kinds = list(CELLS[panel][1])
        speeds = [medians(panel, kind) for kind in kinds]
        for side, (label, color) in enumerate((("tpllm", OURS), ("llama.cpp", THEIRS))):
            bars = axes.bar([place + 0.42 * side - 0.21 for place in range(len(kinds))], [pair[side] for pair in speeds], width=0.4, color=color,
                            label=label)
            axes.bar_label(bars, [speed_text(pair[side]) for pair in speeds], size=9, padding=2)
        axes.set_title(panel, size=11)
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set(yticks=[], ylim=(0, 1.15 * max(map(max, speeds))))
        axes.tick_params(length=0)
        axes.spines[["top", "left", "right"]].set_visible(False)
    panels[0].legend(frameon=False, loc="upper right")
    figure.supxlabel(caption(), size=9)
    return svg_of(figure, source=", ".join(sorted({name for _, files in CELLS.values() for name in files.values()})))


def speed_text(speed: float) -> str:
    """Tokens/s in three digits, as README's table has them."""
    return f"{speed:.1f}" if speed < 100 else f"{speed:.0f}"


def engine() -> str:
    """Who sits in which slot of the engine, program by program, beside static batching: the figure of the notebook."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(ROOT))
    namespace: dict = {}
    for number, source in enumerate(engine_cells(), 1):
        exec(compile(source, f"{NOTEBOOK.name}, cell {number}", "exec"), namespace)
    namespace["llm"].close()
    return svg_of(namespace["figure"], source=engine_stamp())


def engine_cells() -> list[str]:
    """The notebook's code up to the cell that makes the figure."""
    sources = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    before = list(itertools.takewhile(lambda source: not source.rstrip().endswith(LAST_CELL), sources))
    return sources[:len(before) + 1]


def engine_stamp() -> str:
    """The notebook's name and a hash of the cells that the picture is made of."""
    return f"{NOTEBOOK.name} {hashlib.sha256(chr(0).join(engine_cells()).encode()).hexdigest()[:16]}"


def svg_of(figure: plt.Figure, *, source: str) -> str:
    """A figure as SVG, on white so that dark pages can show it, its texts as text; alike whenever it is made."""
    text = io.StringIO()
    figure.savefig(text, format="svg", facecolor="white", metadata={"Date": None, "Creator": None, "Source": source})
    plt.close(figure)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def answer() -> str:
    """A terminal in which somebody types ANSWER."""
    return terminal(ANSWER)


def terminal(commands: tuple[str, ...]) -> str:
    """A picture of a terminal after some commands, run one after the other in the repository's root."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    for command in commands:
        console.print(Text(f"$ {command}", "bold"))
        console.print(Text("\n".join(run_in_terminal(command))))
    svg = console.export_svg(title="tpllm", unique_id="tpllm")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # the fonts that it would fetch
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def run_in_terminal(command: str) -> list[str]:
    """The lines that a shell command leaves on a terminal of COLUMNS.

    Raises:
        subprocess.CalledProcessError: it fails.
    """
    screen = pyte.Screen(COLUMNS, 100)
    stream, (leader, follower) = pyte.ByteStream(screen), pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 100, COLUMNS, 0, 0))
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(command, shell=True, cwd=ROOT, stdin=follower, stdout=follower, stderr=follower,
                               env={**os.environ, "PATH": path, "TERM": "xterm-256color"})
    os.close(follower)
    while True:
        try:
            stream.feed(os.read(leader, 1 << 16))
        except OSError:  # nobody holds the other end any more
            break
    os.close(leader)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command)
    return "\n".join(line.rstrip() for line in screen.display).rstrip().split("\n")


PICTURES = {function.__name__: function for function in (chart, engine, answer)}


def draw(name: str) -> str:
    """The SVG of a picture."""
    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        return PICTURES[name]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", choices=[*PICTURES, []], metavar="PICTURE", help="which; by default all")
    for name in parser.parse_args().pictures or PICTURES:
        (FOLDER / f"{name}.svg").write_text(draw(name))
        print(FOLDER.relative_to(ROOT) / f"{name}.svg")


if __name__ == "__main__":
    main()
