"""Files are written whole: under a temporary name in the same folder, flushed to disk, then renamed.

A reader sees the old file or the new one, never half of either, also after a kill or on a full disk.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

__all__ = ["atomic_write", "writable_folder"]


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file that takes the name ``path`` when the block ends without an error.

    Args:
        path: where the file shall be; its folder is made.
        mode: ``"w"`` (UTF-8 text) or ``"wb"``.

    Raises:
        ValueError: another mode.

    Example:
        >>> import tempfile, pathlib
        >>> from proto_core.files import atomic_write
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
        >>> with atomic_write(path) as file:
        ...     _ = file.write("whole")
        >>> path.read_text()
        'whole'
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode: found {mode!r}, needed 'w' or 'wb'")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        text: dict[str, Any] = {} if mode == "wb" else {"encoding": "utf-8", "newline": ""}
        with os.fdopen(descriptor, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def writable_folder(path: str | os.PathLike[str], argument: str = "out") -> Path:
    """Make the folder and write a probe into it, so that a bad output place is found before the work, not after.

    Raises:
        ValueError: the folder cannot be made or written to; names ``argument`` and the folder.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{argument}: cannot write to folder {str(folder)!r} ({error.strerror or error})") from error
    return folder
