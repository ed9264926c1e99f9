"""The fenced blocks of a Markdown page, and whether an output is what the page shows; :mod:`tools.run_docs` says what a page may hold."""
import dataclasses
import re

RUN = ("sh", "console", "python")
SHOWN = ("text", "yaml", "json", "mermaid", "toml", "jinja")
MASKS = (
    (re.compile(r"^tpllm: (\d+)/(?!\1 )\d+ rows.*\n", re.M), ""),  # progress lines but the last: how many there are depends on the speed
    (re.compile(r"\d[\d.,]*(?= (?:m?s|(?:prompt |completion )?tokens/s|rows/s|GB/s)\b)"), "0"),  # times and speeds
    (re.compile(r"\b\d+(?::\d\d)+\b"), "0:00"),  # times on a clock
)
FENCE = re.compile(r"^ *(?P<fence>`{3,}|~{3,})(?P<language>[^`]*)$")
COMMENT = re.compile(r"^<!-- (?P<verb>not run|model text|file)(?:: (?P<value>[^\n]*?))?(?:\n(?P<body>.*))? ?-->$", re.S)


class PageError(ValueError):
    """A page that says less than this tool needs; it names the page and the line."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: of its opening fence, from 1.
        language: the fence's.
        lines: between the fences.
        comments: (verb, value, body) of the comments directly above it.
        is_below_previous: whether nothing but blank lines stands between the block before and this one.
    """

    line: int
    language: str
    lines: tuple[str, ...]
    comments: tuple[tuple[str, str, str | None], ...]
    is_below_previous: bool

    def comment(self, verb: str) -> str | None:
        """The value of its comment of this kind, or None."""
        return next((value for other, value, _ in self.comments if other == verb), None)

    @property
    def is_model_text(self) -> bool:
        """Whether what it prints is a model's."""
        return self.comment("model text") is not None


@dataclasses.dataclass(frozen=True)
class Shown:
    """An output as a page shows it: ``lines``, from line ``start`` (from 0) of the page on."""

    start: int
    lines: tuple[str, ...]
    is_model_text: bool

    @property
    def text(self) -> str:
        """The lines as one text."""
        return "\n".join(self.lines)


def read_blocks(name: str, text: str) -> list[Block]:
    """The fenced blocks of a page.

    Raises:
        PageError: a block without a language or with an unknown one, one that does not end, or a comment that is not understood.
    """
    blocks, comments, is_below, lines = [], [], False, text.split("\n")
    number = 0
    while number < len(lines):
        line, start = lines[number], number
        if fence := FENCE.match(line):
            indent = line.index(fence["fence"])
            number = _find(lines, number + 1, lambda end, fence=fence: end.strip() == fence["fence"], f"{name}:{start + 1}: the block does not end")
            language = fence["language"].strip()
            body = tuple(each[indent:] for each in lines[start + 1:number])
            blocks.append(Block(start + 1, language, body, tuple(comments), is_below))
            _check_language(name, blocks[-1])
            comments, is_below = [], True
        elif line.lstrip().startswith("<!--"):
            number = _find(lines, number, lambda end: end.rstrip().endswith("-->"), f"{name}:{start + 1}: the comment does not end")
            match = COMMENT.match("\n".join(lines[start:number + 1]).strip())
            if match is None or (match["verb"] == "model text") != (not match["value"]):
                raise PageError(f"{name}:{start + 1}: the comment {line!r} is not understood; see tools/run_docs.py --help")
            comments.append((match["verb"], match["value"] or "", match["body"]))
        elif line.strip():
            _check_comments(name, number, comments)
            is_below = False
        number += 1
    _check_comments(name, number, comments)
    return blocks


def _check_comments(name: str, number: int, comments: list[tuple[str, str, str | None]]) -> None:
    """Only a comment that brings its file with it may stand above something else than a block."""
    if any(body is None for _, _, body in comments):
        raise PageError(f"{name}:{number + 1}: the comment above has no block below it")


def _find(lines: list[str], start: int, is_end, message: str) -> int:
    for number in range(start, len(lines)):
        if is_end(lines[number]):
            return number
    raise PageError(message)


def _check_language(name: str, block: Block) -> None:
    where = f"{name}:{block.line}"
    if block.language.startswith("{") or block.language in RUN:
        return
    if block.language not in SHOWN:
        raise PageError(f"{where}: the block's language is {block.language!r}; write one of {', '.join(RUN)} to have it run, "
                        f"or one of {', '.join(SHOWN)}")
    if any(line.startswith("$ ") for line in block.lines):
        raise PageError(f"{where}: a {block.language} block holds a command; make it a console block")


def matches(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed, but for ``...`` and ``MASKS``."""
    shown, printed = _masked(shown), _masked(printed)
    return re.fullmatch(".*?".join(map(re.escape, shown.split("..."))), printed, re.S) is not None


def _masked(text: str) -> str:
    text = "\n".join(line.rstrip() for line in text.strip("\n").split("\n")) + "\n"
    for pattern, replacement in MASKS:
        text = pattern.sub(replacement, text)
    return text.strip("\n")


def with_outputs(text: str, renewed: list[tuple[Shown, str]]) -> str:
    """A page's text with new outputs."""
    lines = text.split("\n")
    for shown, printed in sorted(renewed, key=lambda each: -each[0].start):
        lines[shown.start:shown.start + len(shown.lines)] = [line.rstrip() for line in printed.split("\n")]
    return "\n".join(lines)
