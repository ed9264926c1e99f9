"""Text that the demo model has not seen: the files of Python's standard library that were held out of its training."""
import hashlib
import pathlib
import sysconfig
from collections.abc import Iterator

LEFT_OUT = {"site-packages", "encodings", "pydoc_data", "__pycache__"}  # packages that are not the library's; tables, not code
HELD_OUT_OF_256 = 26


def library_files(*, is_held_out: bool) -> Iterator[tuple[pathlib.PurePath, str]]:
    """(path below the standard library, text) of every file of one split, in order. About a tenth is held out, by a hash of the path."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if LEFT_OUT & set(name.parts) or (hashlib.sha256(str(name).encode()).digest()[0] < HELD_OUT_OF_256) != is_held_out:
            continue
        try:
            yield name, path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # files that test how encodings are found
