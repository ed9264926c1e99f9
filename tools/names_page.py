"""Write docs/guide/names.md, which tells what other projects' names are here, from the tables that the package works by.

    python tools/names_page.py
"""
import pathlib
import re

from tpllm.names import Only, Refused, Renamed, Same, Taken
from tpllm.names.others import OTHERS
from tpllm.names.vllm import ARGUMENTS, CALLS, METHODS, SAMPLING, TYPES

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "guide" / "names.md"
BRACES = re.compile(r"(\{'.*\})")
INTRO = """# Coming from vLLM, transformers, llama.cpp or mlx-lm

tpllm's names are vLLM's where it has one, and a script for vLLM's offline inference runs with its import changed:

```python
from tpllm import LLM, SamplingParams

llm = LLM(model="demo", tensor_parallel_size=1, gpu_memory_utilization=0.9, enforce_eager=True, max_model_len=256)
params = llm.get_default_sampling_params()
params.max_tokens = 8
for output in llm.generate(["def read(path):", "import os"], params, use_tqdm=False):
    print(len(output.outputs[0].token_ids) <= 8, output.finished)
llm.close()
```

```text
True True
True True
```

Each name works, under this name or another of ours; or it changes no result, and is taken with a line in the log; or it stands for something that
is not there, and the error says what to use. An unknown argument is an error that names the nearest one, and for the names below their counterpart.
(`tools/names_page.py` writes this page from the tables that the package works by.)
"""
METRICS = """
`get_metrics()` gives `Counter`, `Gauge` and `Histogram` of `tpllm.metrics_reader` (vLLM's `vllm.v1.metrics.reader`), such as
`vllm:generation_tokens`; `metrics()` has more, under our names. A call's outputs are a list with `to_pandas()`, a table of a row for each completion.
"""
TOKENIZER = """
## The tokenizer

`llm.get_tokenizer()` has what most scripts use of transformers' tokenizers: `encode`, `decode`, `batch_decode`, `tokenizer(text)`,
`apply_chat_template`, `convert_ids_to_tokens`, `convert_tokens_to_ids`, `bos_token_id`, `eos_token_id`, `pad_token_id` and their texts, and `len`.
They behave as there, with these exceptions: there are no tensors and no padding, `vocab_size` counts added tokens, a text that begins with the BOS
gets no second one, and special-token text in the messages of a chat stays text.
"""


def page() -> str:
    """The whole page."""
    parts = [INTRO]
    for title, table in (("`LLM(...)`", ARGUMENTS), ("`generate` and `chat`", CALLS), ("`SamplingParams(...)`", SAMPLING),
                         ("Methods of `LLM`", METHODS), ("Types", TYPES)):
        parts.append(f"\n## vLLM: {title}\n")
        works = [(name, _works(one)) for name, one in table.items() if isinstance(one, Same | Renamed)]
        taken = [(name, one.why) for name, one in table.items() if isinstance(one, Taken)]
        refused = [(name, _refused(one)) for name, one in table.items() if isinstance(one, Only | Refused)]
        for head, rows in (("works", works), ("changes no result", taken), ("what to use instead", refused)):
            if rows:
                parts.append(_table("name", head, rows))
        if table is METHODS:
            parts.append(METRICS)
    parts.append(TOKENIZER)
    for project, names in OTHERS.items():
        parts.append(f"\n## {project}\n" + _table(project, "here", list(names.items())))
    return "".join(parts)


def _works(meaning: Same | Renamed) -> str:
    ours = f"`{meaning.ours}`" if isinstance(meaning, Renamed) else "yes"
    return f"{ours}{'; ' * bool(meaning.note)}{meaning.note}"


def _refused(meaning: Only | Refused) -> str:
    values = "" if isinstance(meaning, Refused) or callable(meaning.values) else f"only {', '.join(f'`{value!r}`' for value in meaning.values)}: "
    return values + meaning.use


def _table(left: str, right: str, rows: list[tuple[str, str]]) -> str:
    texts = [(name, BRACES.sub(r"`\1`", text)) for name, text in rows]
    lines = [f"| {left} | {right} |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in texts)]
    return "\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
