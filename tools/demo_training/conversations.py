"""Conversations made of the standard library's own definitions, so that the demo learns a chat's shape and not only code.

A user asks for a short function, method, class or loop and gets its code, or asks what one does and gets the first sentence of its docstring;
some then ask about the answer, some conversations have a system turn. Questions are templates; answers are the library's own text. A few fixed
lines of small talk are added. Files that are held out from the text are held out here too.
"""
import ast
import dataclasses
import re
import textwrap
from collections.abc import Iterable, Iterator

import numpy as np

from tpllm.tokenizer.tokenizer import Tokenizer

from .corpus import EOS, SPECIALS, TURN, TURN_END, sources

Message = dict[str, str]
MAX_ANSWER_CHARS = 400  # about 130 tokens
MAX_SUMMARY_CHARS = 160
NOT_ASKED_ABOUT = {"test", "tests", "idle_test"}  # names and code that nobody would ask for
SYSTEM_SHARE, FOLLOW_UP_SHARE, SMALL_TALK_SHARE = 0.25, 0.35, 0.03

SYSTEM_LINES = ("You are a helpful assistant.", "You are a helpful assistant that writes Python.", "You answer with Python code.",
                "Answer in one sentence or with short code.", "You are a Python programmer. Be brief.")
GREETING = "Hello. Ask me for a short Python function, or what one does."
SMALL_TALK = {
    "Hello": GREETING, "Hello!": GREETING, "Hi": GREETING, "Hi!": GREETING, "Hey": GREETING, "Good morning": GREETING, "How are you?": GREETING,
    "Who are you?": "I am the demo model of tpllm, a small model that has read Python's standard library.",
    "What are you?": "I am the demo model of tpllm, a small model that has read Python's standard library.",
    "What can you do?": "I write short Python. It looks right and mostly is not.",
    "What is Python?": "Python is a programming language.",
    "Can you help me?": "Ask me for a short Python function.", "Help": "Ask me for a short Python function.",
    "Tell me a joke.": "I only know Python's standard library.", "What is the capital of France?": "I only know Python's standard library.",
    "What time is it?": "I only know Python's standard library.",
}
THANKS = {"Thanks.": "You are welcome.", "Thank you!": "You are welcome.", "Thanks, that is all.": "Goodbye."}


@dataclasses.dataclass(frozen=True)
class Definition:
    """A function, method, class or loop of the library.

    Attributes:
        kind: "function", "method", "class" or "loop".
        name: its name; of a loop what it loops over, as source.
        owner: the class of a method, the module of anything else.
        code: its source, not indented.
        arguments: of a function or method, without ``self``.
        summary: the first sentence of its docstring, or "".
        body: ``code`` without its docstring.
    """

    kind: str
    name: str
    owner: str
    code: str
    arguments: tuple[str, ...] = ()
    summary: str = ""
    body: str = ""


def definitions(*, is_held_out: bool) -> list[Definition]:
    """What conversations of one split are about: everything with a short code or a docstring."""
    found = []
    for path, text, tree in sources(is_held_out=is_held_out):
        if not NOT_ASKED_ABOUT & set(path.parts):
            module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
            found.extend(definitions_of(text, tree, module))
    return found


def definitions_of(text: str, tree: ast.AST, module: str) -> Iterator[Definition]:
    """What is defined in a module, outermost first."""
    lines, pending = text.splitlines(keepends=True), [(node, module, "function") for node in ast.iter_child_nodes(tree)]
    while pending:
        node, owner, kind = pending.pop(0)
        if isinstance(node, ast.ClassDef):
            pending.extend((child, node.name, "method") for child in node.body)
        else:
            pending.extend((child, owner, "loop") for child in ast.iter_child_nodes(node))
        made = _definition(node, lines, owner, kind)
        # Code that is not at the left margin holds a string with lines that are.
        if made is not None and not made.code[0].isspace() and (made.summary or len(made.code) <= MAX_ANSWER_CHARS):
            yield made


def _definition(node: ast.AST, lines: list[str], owner: str, kind: str) -> Definition | None:
    if isinstance(node, ast.For | ast.While):
        over = f"over {ast.unparse(node.iter)}" if isinstance(node, ast.For) else f"while {ast.unparse(node.test)}"
        return Definition("loop", over, owner, _dedented(lines[node.lineno - 1:node.end_lineno]))
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or kind == "loop":
        return None  # a function in a function goes with the outer one
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    code, docstring, body = lines[first:node.end_lineno], ast.get_docstring(node), ""
    if docstring is not None and node.body[1:] and node.lineno < node.body[0].lineno:
        body = _dedented(lines[first:node.body[0].lineno - 1] + lines[node.body[0].end_lineno:node.end_lineno])
    made = Definition(kind, node.name, owner, _dedented(code), summary=first_sentence(docstring or ""), body=body)
    if isinstance(node, ast.ClassDef):
        return dataclasses.replace(made, kind="class")
    arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return dataclasses.replace(made, arguments=tuple(one.arg for one in arguments if one.arg not in ("self", "cls")))


def _dedented(lines: list[str]) -> str:
    return textwrap.dedent("".join(lines)).strip("\n")


def first_sentence(docstring: str) -> str:
    """The sentence that a docstring begins with, on one line; "" where it has none that ends within its first paragraph."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    match = re.match(r"[A-Z].*?[a-z)\]`'\"]\.(?= |$)", paragraph)
    return match[0] if match is not None and len(match[0]) <= MAX_SUMMARY_CHARS else ""


def conversations(found: list[Definition], rng: np.random.Generator, *, has_small_talk: bool = True) -> list[list[Message]]:
    """One conversation on each definition, in a random order; small talk stands in place of a few."""
    made = [_conversation(found[index], rng) for index in rng.permutation(len(found))]
    return [_with_system(_small_talk(rng) if has_small_talk and rng.random() < SMALL_TALK_SHARE else turns, rng) for turns in made]


def _conversation(about: Definition, rng: np.random.Generator) -> list[Message]:
    """A question on a definition, its answer, and sometimes a question on that."""
    is_short = len(about.code) <= MAX_ANSWER_CHARS
    asks_for_code = is_short and (not about.summary or rng.random() < 0.6)
    if asks_for_code:
        turns = _turn(_choice(_code_questions(about), rng), about.code)
    elif about.body and len(about.body) <= MAX_ANSWER_CHARS and rng.random() < 0.4:
        turns = _turn(f"What does this {about.kind} do?\n\n{about.body}", about.summary)
    else:
        turns = _turn(_choice(_meaning_questions(about), rng), about.summary)
    if rng.random() < FOLLOW_UP_SHARE:
        turns += _turn(*_choice(_follow_ups(about, answered_code=asks_for_code, is_short=is_short), rng))
    return turns


def _code_questions(about: Definition) -> list[str]:
    if about.kind == "loop":
        return [f"Write a loop {about.name}.", f"Loop {about.name}.", "Write a loop.", f"Write a {about.code.split()[0]} loop."]
    signature = f"{about.name}({', '.join(about.arguments)})"
    owner = f" of the class {about.owner}" if about.kind == "method" else ""
    asked = [f"Write the {about.kind} {about.name}{owner}.", f"Write a {about.kind} {about.name}.", f"Show me the {about.kind} {about.name}{owner}.",
             f"How would you write the {about.kind} {about.name}?"]
    if about.kind != "class":
        asked += [f"Write a Python function {signature}.", f"Write a function {signature}."]
    if about.summary:
        task = about.summary[0].lower() + about.summary[1:]
        asked += [f"Write a {about.kind} for this: {about.summary}", f"Write a {about.kind} that does this: {task}",
                  f"Write a {about.kind} {about.name}: {task}"]
    return asked


def _meaning_questions(about: Definition) -> list[str]:
    owner = f" of the class {about.owner}" if about.kind == "method" else f" of the module {about.owner}"
    return [f"What does {about.name} do?", f"What does the {about.kind} {about.name} do?", f"What is the {about.kind} {about.name}{owner} for?",
            f"What is {about.name}?", f"Explain {about.name}.", f"Describe the {about.kind} {about.name}{owner}."]


def _follow_ups(about: Definition, *, answered_code: bool, is_short: bool) -> list[tuple[str, str]]:
    """(question, answer) that may come next."""
    pairs = []
    if answered_code and about.summary:
        pairs += [("What does it do?", about.summary), ("Explain it.", about.summary)]
    if answered_code and about.kind in ("function", "method"):
        names = about.arguments
        listed = "It takes no arguments." if not names else f"Its arguments are {', '.join(names)}." if names[1:] else f"Its argument is {names[0]}."
        pairs += [("What are its arguments?", listed)]
    if not answered_code and is_short:
        pairs += [("Write it.", about.code), ("Show me the code.", about.code)]
    return [*pairs, *THANKS.items()]


def _small_talk(rng: np.random.Generator) -> list[Message]:
    return _turn(*_choice(list(SMALL_TALK.items()), rng))


def _with_system(turns: list[Message], rng: np.random.Generator) -> list[Message]:
    return [{"role": "system", "content": _choice(SYSTEM_LINES, rng)}, *turns] if rng.random() < SYSTEM_SHARE else turns


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _choice(options, rng: np.random.Generator):
    return options[rng.integers(len(options))]


def encode(made: Iterable[list[Message]], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Each conversation as the model's chat template writes it, and EOS."""
    return [np.array([*tokenizer.encode_chat(messages, add_generation_prompt=False), EOS], np.int32) for messages in made]


def answer_mask(tokens_T: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """[T] bool: the tokens of the answers with the end that closes each, not their headers."""
    header = tokenizer.encode(f"{SPECIALS[TURN]}assistant\n", add_special_tokens=False, parse_special=True)
    is_answer_T, inside = np.zeros(len(tokens_T), bool), False
    for at, token in enumerate(tokens_T):
        inside = inside or tokens_T[max(at - len(header), 0):at].tolist() == header
        is_answer_T[at] = inside
        inside = inside and token != TURN_END
    return is_answer_T
