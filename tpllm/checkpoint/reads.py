"""Which files a model was made of. Whoever loads one reads its small files here, and a recording notes the content of each: so what a model's
fingerprint tells of is what was read, and no list of names forgets the next file. A file that was not there is none; once it is, it is one more.
"""
import contextlib
import contextvars
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from tpllm.errors import CheckpointError

_recording: contextvars.ContextVar["Reads | None"] = contextvars.ContextVar("recording", default=None)


class Reads:
    """The SHA-256 of every small file that was read while this recorded."""

    def __init__(self):
        self._digests: dict[Path, str] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """While the block runs, note what this thread reads."""
        token = _recording.set(self)
        try:
            yield
        finally:
            _recording.reset(token)

    def note(self, path: Path, data: bytes) -> None:
        """Note a file.

        Raises:
            CheckpointError: it was read before, and had another content.
        """
        digest = hashlib.sha256(data).hexdigest()
        if self._digests.setdefault(Path(os.path.abspath(path)), digest) != digest:
            raise CheckpointError(f"{path} changed while the model was loaded; load it again")

    def below(self, folder: Path) -> dict[str, str]:
        """The digests by names relative to a folder, in order; of a file elsewhere by its path."""
        root = Path(os.path.abspath(folder))
        return dict(sorted((path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path), digest)
                           for path, digest in self._digests.items()))


def note_read(path: Path, data: bytes) -> None:
    """Tell the recording, if there is one, what a file holds."""
    if (recording := _recording.get()) is not None:
        recording.note(path, data)
