"""Reading a pickle without running it: lists, tuples, dictionaries, texts, bytes, numbers and plain numpy arrays.

A pickle names what is to be called. Here nothing that it names is called or imported: a few names that numpy's arrays
need have stand-ins, all others are refused. Arrays are made at the end, from their bytes.
"""

from __future__ import annotations

import os
import pickle
from typing import Any, Literal

import numpy as np

__all__ = ["read_plain_pickle"]


def read_plain_pickle(
    path: str | os.PathLike[str], *, encoding: Literal["latin1", "bytes"] = "latin1", argument: str = "file"
) -> Any:
    """What a pickle holds, of plain containers, texts, bytes, numbers and arrays of numbers.

    Args:
        path: the file.
        encoding: how texts of Python 2 are read: ``"latin1"`` as texts, ``"bytes"`` as bytes.
        argument: name for the error.

    Returns:
        The same containers; arrays cannot be written to, as they are the bytes of the file.

    Raises:
        ValueError: a file that cannot be read, is no pickle, or asks for anything else; names the file.

    Example:
        >>> import pathlib, pickle, tempfile
        >>> import numpy as np
        >>> from proto_vision.data.plain_pickle import read_plain_pickle
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "some.pickle"
        >>> _ = path.write_bytes(pickle.dumps({"data": np.eye(2), "labels": [3, 4]}))
        >>> read_plain_pickle(path)
        {'data': array([[1., 0.],
               [0., 1.]]), 'labels': [3, 4]}
    """
    try:
        with open(path, "rb") as file:
            return _plain(_PlainUnpickler(file, encoding=encoding).load())
    except OSError as error:
        raise ValueError(f"{argument}: {str(path)!r} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a pickle can fail in any way; whichever, the file is the fault
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{argument}: {str(path)!r} is no pickle of plain data ({reason})") from error


class _Kind:
    """Stands for numpy's dtype of numbers; of its state only the order of the bytes is looked at."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        code = code.decode() if isinstance(code, bytes) else code
        if not isinstance(code, str) or code.lstrip("<>=|") not in _CODES:
            raise pickle.UnpicklingError(f"an array of {str(code)[:20]!r}, needed one of numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        """Take the order of the bytes, ``(version, order, ...)``."""
        order: Any = state[1].decode() if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"an array in byte order {str(order)[:20]!r}, needed '<', '>' or '|'")
        self.dtype = self.dtype.newbyteorder(order)


_CODES = {"b1", "?", "B", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8"}


class _Array:
    """Stands for numpy's array of numbers until all of it is known."""

    values: np.ndarray

    def __setstate__(self, state: Any) -> None:
        """Take ``(version, shape, dtype, by columns, bytes)``."""
        _, shape, kind, by_columns, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if not isinstance(kind, _Kind) or not isinstance(raw, (bytes, bytearray)):
            raise pickle.UnpicklingError("an array of objects, needed one of numbers")
        self.values = np.frombuffer(raw, kind.dtype).reshape(shape, order="F" if by_columns else "C")


def _new_array(*_: Any) -> _Array:
    return _Array()


def _array_of_buffer(raw: Any, kind: Any, shape: Any, order: Any = "C", *_: Any) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, kind, order == "F", raw))
    return array


def _number(kind: Any, raw: Any = None, *_: Any) -> int | float | bool:
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    if not isinstance(kind, _Kind) or not isinstance(raw, bytes) or len(raw) != kind.dtype.itemsize:
        raise pickle.UnpicklingError("a number that is none, needed its bytes")
    return np.frombuffer(raw, kind.dtype)[0].item()


def _as_bytes(text: Any = "", encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", b"latin1"):
        raise pickle.UnpicklingError(f"a text in {str(encoding)[:20]!r}, needed bytes")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _as_bytes,
    ("__builtin__", "bytes"): _as_bytes,
    ("builtins", "bytes"): _as_bytes,
}
for _core in ("numpy.core", "numpy._core"):
    _ADMITTED[(f"{_core}.multiarray", "_reconstruct")] = _new_array
    _ADMITTED[(f"{_core}.multiarray", "scalar")] = _number
    _ADMITTED[(f"{_core}.numeric", "_frombuffer")] = _array_of_buffer


class _PlainUnpickler(pickle.Unpickler):
    """Builds containers, texts and numbers; for arrays it takes the stand-ins above, for anything else it fails."""

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in, or an error; nothing is imported."""
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not read from a file")
        return _ADMITTED[(module, name)]

    def persistent_load(self, pid: Any) -> Any:
        """Refused."""
        raise pickle.UnpicklingError("it refers to something outside of the file")


def _plain(found: Any) -> Any:
    """The same with arrays in place of their stand-ins."""
    if isinstance(found, _Array):
        return found.values
    if isinstance(found, dict):
        return {_plain(key): _plain(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return type(found)(map(_plain, found))
    if found is None or isinstance(found, (str, bytes, bytearray, int, float)):
        return found
    raise pickle.UnpicklingError(f"it holds a {type(found).__name__}, needed plain data")
