"""Files that were damaged on purpose: every mutation follows from the file and a number, so that a failure can be made again.

``mutation(data, seed)`` gives one damaged copy of a JSON document, ``byte_mutation`` one of any other file. :mod:`outcomes` tries them.
"""
import copy
import dataclasses
import json
import random


@dataclasses.dataclass(frozen=True)
class Raw:
    """A value that is written as this text, which need not be JSON."""

    text: str


ODD_VALUES = (
    None, True, False, 0, -1, 1, 7, 255, 2**31 - 1, 2**31, -(2**31) - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400,
    0.0, -0.0, 0.5, 1.0, 50.0, -1.5, 1e-320, 1e308,
    Raw("1e999"), Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("9" * 5000), Raw("01"), Raw("1."),
    "", " ", "0", "1", "-1", "1.5", "true", "false", "null", "NaN", "\x00", "a\nb", "é", "\u2028", "<unk>", "</s>", "../../etc/passwd", "/",
    "(((((", "[^", "\\p{L}", "%s%n", "{{ x }}", "{% for", "x" * 70_000,
    Raw('"\\ud800"'), Raw('"\\udc00\\ud800"'), Raw('"\n"'), Raw('"' + "\\u0041" * 9999 + '"'),
    [], {}, [[]], [None], [0], ["a"], [1, "a", None], {"a": 1}, {"": {}}, {"type": "x"}, {"content": 1}, [{}], [[1, 2], [3]], [["a", "b"]],
    [True] * 300, list(range(20_000)), {str(i): i for i in range(5000)},
    Raw("[" * 60 + "]" * 60), Raw('{"a":' * 900 + "1" + "}" * 900), Raw("[" * 100_000 + "]" * 100_000),
    Raw('{"type":"Sequence","normalizers":[' * 200 + "]}" * 200),
    Raw(""), Raw("undefined"), Raw("'a'"), Raw("1 2"), Raw("[1,]"), Raw("/* */ 1"),
)


HEADER_NUMBERS = (0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
"""Eight bytes as a file's header may read them: lengths, counts, offsets."""
PREFIXES = (b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"[", b"{", b"1", b"// x\n", b"version https://git-lfs.github.com/spec/v1\n")


def mutation(data: bytes, seed: int) -> tuple[str, bytes]:
    """(what was done, a damaged copy) of a JSON document: mostly its values, now and then its bytes."""
    rng = random.Random(seed)
    if rng.random() < 0.15:
        return byte_mutation(data, seed)
    root, done = [json.loads(data)], []  # the document is the only element, so that it can be replaced as any other value
    for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3))):
        done.append(_change(root, rng))
    text = _written(root[0])
    return f"{seed}: {'; '.join(done)}", text.encode("utf-8", "surrogatepass")


def byte_mutation(data: bytes, seed: int) -> tuple[str, bytes]:
    """(what was done, a damaged copy) of any file."""
    rng = random.Random(seed)
    begin, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    if rng.random() < 0.5:
        end = min(end, begin + rng.choice((1, 2, 8, 64)))
    kind = rng.choice(list(BYTE_KINDS))
    return f"{seed}: {kind} at {begin}..{end}", BYTE_KINDS[kind](data, (begin, end), rng)


def _flipped(data: bytes, num_bits: int, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(num_bits if data else 0):
        changed[_early(rng, len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _with(data: bytes, part: bytes, rng: random.Random, *, is_over: bool) -> bytes:
    """The file with a part of other bytes, which take the place of its own or stand between them."""
    place = _early(rng, len(data) + 1)
    return data[:place] + part + data[place + (len(part) if is_over else 0):]


def _nested(data: bytes, rng: random.Random) -> bytes:
    depth = rng.choice((50, 900, 200_000))
    return b"[" * depth + data + b"]" * depth


BYTE_KINDS = {
    "cut": lambda data, span, rng: data[:span[0]],
    "cut near the end": lambda data, span, rng: data[:max(len(data) - rng.randrange(1, 20), 0)],
    "flip": lambda data, span, rng: _flipped(data, 1, rng),
    "flip many": lambda data, span, rng: _flipped(data, rng.randrange(2, 40), rng),
    "set": lambda data, span, rng: _with(data, bytes([rng.choice((0, 0xFF, 0x7F, 0x80, 0x22, 0x5B, 0x7B, 0x30))]), rng, is_over=True),
    "numbers": lambda data, span, rng: _with(data, rng.choice((*HEADER_NUMBERS, rng.getrandbits(64))).to_bytes(8, "little"), rng, is_over=True),
    "insert": lambda data, span, rng: _with(data, rng.randbytes(rng.choice((1, 4, 8, 200))), rng, is_over=False),
    "delete": lambda data, span, rng: data[:span[0]] + data[span[1]:],
    "repeat": lambda data, span, rng: data[:span[0]] + data[span[0]:span[1]][:1000] * rng.choice((2, 3, 100)) + data[span[1]:],
    "zeros": lambda data, span, rng: data[:span[0]] + bytes(span[1] - span[0]) + data[span[1]:],
    "empty": lambda data, span, rng: rng.choice((b"", b"\n", b"\x00", b" " * 5000)),
    "prefix": lambda data, span, rng: rng.choice(PREFIXES) + data,
    "nest": lambda data, span, rng: _nested(data, rng),
    "utf16": lambda data, span, rng: data.decode("utf-8", "replace").encode("utf-16"),
}


def _early(rng: random.Random, size: int) -> int:
    """A place below ``size``, often near the start, where headers stand."""
    return min(int(size * rng.random() ** rng.choice((1, 4))), max(size - 1, 0))


CHANGES = ("odd", "odd", "odd", "like", "like", "like", "near", "near", "near", "near", "elsewhere", "elsewhere", "remove", "twin", "rename")


def _change(root: list, rng: random.Random) -> str:
    """Change one value of the document; says what was done."""
    holder, key = _pick(root, rng)
    kind, where = rng.choice(CHANGES), f"[{key!r}]"[:60]
    if kind == "remove" and holder is not root:
        del holder[key]
    elif kind == "elsewhere":
        other, its_key = _pick(root, rng)
        holder[key], where = copy.deepcopy(other[its_key]), f"{where} from [{its_key!r}]"[:90]
    elif isinstance(holder, dict) and kind in ("twin", "rename"):
        _twin_or_rename(holder, key, rng, kind)
    elif kind == "near":
        holder[key] = near(holder[key], rng)
    elif kind == "like":
        holder[key] = rng.choice(_like(holder[key], rng))
    else:
        holder[key] = _odd(rng)
    return f"{kind} {where}"


def _like(value: object, rng: random.Random) -> list:
    """Values near to one: of another type, a bit more, a bit less."""
    depth = rng.choice((1, 2, 40, 1200))
    found = [str(value)[:1000], [value], {"value": value}, bool(value), Raw("[" * depth + _written(value) + "]" * depth)]
    if isinstance(value, bool) or value is None:
        found += [str(value).lower(), int(bool(value)), not value]
    elif isinstance(value, int | float):
        found += [-value, value + 1, value * 2, value * 10**6, -1 - value, value / 3 if abs(value) < 1e300 else 0]
        found += [float(value), int(value)] if abs(value) < 1e300 else []
    elif isinstance(value, str):
        found += [value[:-1], value * 2, value.upper(), value + "\x00", value[:1], " " + value, value + "é", len(value)]
    elif isinstance(value, list):
        found += [value[::-1], value[:-1], value[1:], value * 2, value[:1] * 5000, [*value, _odd(rng)], []]
    elif isinstance(value, dict):
        found += [{**value, rng.choice(("x", "type", "content", "", "é" * 50)): _odd(rng)}, list(value), list(value.values()), {}]
    return found


def near(value: object, rng: random.Random) -> object:
    """A value of the same type, as good as the other one by what it is: it gets past all that looks at types."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        half = type(value)(value / 2) if abs(value) < 1e300 else 0
        return rng.choice((value + 1, max(value - 1, 0), value * 2, half, type(value)(0), type(value)(1)))
    if isinstance(value, str):
        return rng.choice((value[:-1], value[1:], value[::-1], value * 2, value.swapcase(), value + rng.choice("a \n\u2581\u00e9"), ""))
    if isinstance(value, list):
        return rng.choice((value[::-1], value[:-1], value[1:], value + value[:1], rng.sample(value, len(value)), value[1:] + value[:1]))
    if isinstance(value, dict):
        items = list(value.items())
        values = rng.sample(list(value.values()), len(value))
        return dict(rng.choice((items[1:], items[:-1], items[::-1], list(zip(value, values, strict=True)))))
    return value


def _odd(rng: random.Random) -> object:
    return copy.deepcopy(rng.choice(ODD_VALUES))


def _twin_or_rename(holder: dict, key: str, rng: random.Random, kind: str) -> None:
    items = list(holder.items())
    if kind == "twin":  # the same key twice, which JSON allows and readers take in different ways
        items.insert(rng.randrange(len(items) + 1), (_SameKey(key), _odd(rng)))
    else:
        items = [(rng.choice((name + "x", name[:-1], name.upper(), "")) if name == key else name, value) for name, value in items]
    holder.clear()
    holder.update(items)


class _SameKey(str):
    """A key that a dict takes beside the same text."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def _pick(root: list, rng: random.Random) -> tuple[list | dict, int | str]:
    """A holder and a key in it, by a walk from the root: what stands high in the document is picked as often as what stands in a long list."""
    holder, key = root, 0
    while isinstance(holder[key], list | dict) and holder[key] and rng.random() < (0.95 if holder is root else 0.8):
        holder = holder[key]
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    return holder, key


def _written(value: object) -> str:
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
