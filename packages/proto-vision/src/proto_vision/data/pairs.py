"""What verification is tested on: lists of pairs of images, packed pairs (LFW's ``.bin``), templates of several images.

A ``.bin`` is a pickle. Nothing of it is run, see :mod:`proto_vision.data.plain_pickle`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from PIL import Image

from proto_vision.data.images import FileReader, read_image
from proto_vision.data.plain_pickle import read_plain_pickle

__all__ = ["PackedReader", "PairList", "Templates", "read_packed_pairs", "read_pairs", "read_templates"]

Path_ = str | os.PathLike[str]


class PairList(NamedTuple):
    """Pairs of images, and whether each is of one identity.

    Attributes:
        names: the M different images (or templates), in the order in which they are named.
        first: ``[L]`` int64, row of a pair's one image.
        second: ``[L]`` int64, row of the other.
        same: ``[L]`` int64, 1 for one identity, 0 for two.
        read: row -> RGB image; ``None`` for templates.
    """

    names: list[str]
    first: Int[np.ndarray, " L"]
    second: Int[np.ndarray, " L"]
    same: Int[np.ndarray, " L"]
    read: Callable[[int], Image.Image] | None = None

    def people(self) -> Int[np.ndarray, " M"] | None:
        """``[M]`` identities by the first folder of each path, or ``None`` where a pair's label says otherwise.

        Example:
            >>> import numpy as np
            >>> from proto_vision.data.pairs import PairList
            >>> zero = np.zeros(1, np.int64)
            >>> PairList(["s1/1.pgm", "s1/2.pgm"], zero, zero + 1, zero + 1).people()
            array([0, 0])
        """
        if not all("/" in name.replace("\\", "/") for name in self.names):
            return None
        folders = [name.replace("\\", "/").partition("/")[0] for name in self.names]
        people = np.unique(folders, return_inverse=True)[1].astype(np.int64)
        return people if ((people[self.first] == people[self.second]) == (self.same == 1)).all() else None


class Templates(NamedTuple):
    """Images that belong to templates, each of a medium (a still, or a video whose frames count as one).

    Attributes:
        names: ``[M]`` image files.
        templates: ``[M]`` int64.
        medias: ``[M]`` int64.
        read: row -> RGB image.
    """

    names: list[str]
    templates: Int[np.ndarray, " M"]
    medias: Int[np.ndarray, " M"]
    read: Callable[[int], Image.Image]


class PackedReader:
    """Row -> image of encoded bytes in memory.

    Args:
        images: encoded (JPEG or PNG) images.
        source: of the bytes, for the error.
    """

    def __init__(self, images: Sequence[bytes], source: str) -> None:
        self.images, self.source = images, source

    def __call__(self, row: int) -> Image.Image:
        """The image of a row.

        Raises:
            ValueError: bytes that are no image; names the source and the row.
        """
        try:
            return read_image(io.BytesIO(self.images[row]))
        except ValueError as error:
            raise ValueError(f"{self.source}, image {row}: cannot be read ({len(self.images[row])} bytes)") from error


def read_pairs(path: Path_, root: Path_) -> PairList:
    """A list of pairs, ``path1 path2 label`` a line, label 1 for one identity and 0 for two.

    Columns are divided by tabs where a line holds any, otherwise by spaces; empty lines and those that begin with ``#``
    are left out.

    Args:
        path: the list.
        root: folder that its paths start from.

    Raises:
        ValueError: a file that cannot be read, a line of other columns or labels (its number), pairs of one kind only,
            images that are not there (how many, and examples).

    Example:
        >>> import pathlib, tempfile
        >>> from proto_vision.data.pairs import read_pairs
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for name in "abc": _ = (folder / name).write_bytes(b"")
        >>> _ = (folder / "pairs.txt").write_text("a b 1\\na c 0\\n")
        >>> pairs = read_pairs(folder / "pairs.txt", folder)
        >>> pairs.names, pairs.second.tolist(), pairs.same.tolist()
        (['a', 'b', 'c'], [1, 2], [1, 0])
    """
    lines = _columns(path, "pairs", "path1 path2 label")
    same = [_label(path, number, parts[2]) for number, parts in lines]
    names = list(dict.fromkeys(name for _, parts in lines for name in parts[:2]))
    place = {name: row for row, name in enumerate(names)}
    first, second = ([place[parts[side]] for _, parts in lines] for side in (0, 1))
    _both_kinds(path, same)
    _there(path, names, Path(root))
    return PairList(names, _int(first), _int(second), _int(same), FileReader(Path(root), names))


def read_packed_pairs(path: Path_) -> PairList:
    """LFW and its like as face recognition packs them: a pickle of 2 L encoded images and L booleans.

    Images 2k and 2k + 1 make pair k. The pickle is read without running anything of it.

    Args:
        path: the ``.bin``.

    Raises:
        ValueError: a file that is no such pickle, asks for anything but lists, bytes, booleans and plain arrays, has
            another number of images than two a pair, or pairs of one kind only.

    Example:
        >>> import pathlib, pickle, tempfile
        >>> from proto_vision.data.pairs import read_packed_pairs
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "lfw.bin"
        >>> _ = path.write_bytes(pickle.dumps(([b"jpeg"] * 4, [True, False])))
        >>> read_packed_pairs(path).same.tolist()
        [1, 0]
    """
    found = read_plain_pickle(path, encoding="bytes", argument="pairs")
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise ValueError(f"pairs: {str(path)!r} holds {type(found).__name__}, needed a list of images and one of flags")
    images, same = (part.tolist() if isinstance(part, np.ndarray) else part for part in found)
    if not isinstance(images, (tuple, list)) or not isinstance(same, (tuple, list)):
        kinds = f"{type(images).__name__} and {type(same).__name__}"
        raise ValueError(f"pairs: {str(path)!r} holds {kinds}, needed a list of images and one of flags")
    encoded: list[Any] = [
        image.tobytes() if isinstance(image, np.ndarray) and image.dtype.itemsize == 1 else image for image in images
    ]
    strange = next((type(image).__name__ for image in encoded if not isinstance(image, bytes)), None)
    strange_flags = [flag for flag in same if isinstance(flag, np.ndarray) or flag not in (0, 1)]
    strange = strange or next((repr(flag)[:40] for flag in strange_flags), None)
    if strange or len(encoded) != 2 * len(same) or not encoded:
        found_what = f"{len(encoded)} images and {len(same)} flags" + (f", among them {strange}" if strange else "")
        raise ValueError(f"pairs: {str(path)!r} holds {found_what}, needed two encoded images for each flag")
    flags = [int(flag) for flag in same]
    _both_kinds(path, flags)
    first = np.arange(len(flags), dtype=np.int64) * 2
    names = [f"{Path(path).name}:{row}" for row in range(len(encoded))]
    return PairList(names, first, first + 1, _int(flags), PackedReader(encoded, str(path)))


def read_templates(images: Path_, pairs: Path_, root: Path_) -> tuple[Templates, PairList]:
    """IJB-B and IJB-C: which images a template has (``image template media`` a line), and pairs of templates.

    Args:
        images: list of images, such as ``ijbb_face_tid_mid.txt``.
        pairs: ``template1 template2 label`` a line, such as ``ijbb_template_pair_label.txt``.
        root: folder of the (aligned) images.

    Returns:
        The images, and pairs whose rows count the templates in rising order (as
        :func:`proto_core.metrics.template_features` gives them).

    Raises:
        ValueError: as :func:`read_pairs`; a template or a medium that is no number, pairs of templates without images.
    """
    lines = _columns(images, "templates", "image template media")
    names = [parts[0] for _, parts in lines]
    templates, medias = (_int([_whole(images, n, parts[side]) for n, parts in lines]) for side in (1, 2))
    asked = _columns(pairs, "pairs", "template1 template2 label")
    first, second = (_int([_whole(pairs, n, parts[side]) for n, parts in asked]) for side in (0, 1))
    same = [_label(pairs, number, parts[2]) for number, parts in asked]
    _both_kinds(pairs, same)
    known = np.unique(templates)
    unknown = np.setdiff1d(np.concatenate([first, second]), known)
    if unknown.size:
        raise ValueError(
            f"pairs: {str(pairs)!r} names {unknown.size} templates without an image in {str(images)!r}, such as "
            f"{unknown[:3].tolist()}"
        )
    _there(images, names, Path(root))
    rows = [np.searchsorted(known, side).astype(np.int64) for side in (first, second)]
    found = Templates(names, templates, medias, FileReader(Path(root), names))
    return found, PairList([str(template) for template in known], rows[0], rows[1], _int(same))


def _int(values: Sequence[int]) -> Int[np.ndarray, " L"]:
    return np.asarray(values, dtype=np.int64)


def _columns(path: Path_, argument: str, wanted: str) -> list[tuple[int, list[str]]]:
    """Lines of three columns with their numbers."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text"
        raise ValueError(f"{argument}: {str(path)!r} cannot be read ({reason})") from error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        parts = [part.strip() for part in line.split("\t")] if "\t" in line.strip() else line.split()
        if not parts or parts[0].startswith("#"):
            continue
        if len(parts) != 3 or not all(parts):
            hint = " (divide columns by tabs where paths hold spaces)" if len(parts) > 3 else ""
            raise ValueError(f"{str(path)!r}, line {number}: found {len(parts)} columns, needed {wanted!r}{hint}")
        found.append((number, parts))
    if not found:
        raise ValueError(f"{argument}: {str(path)!r} holds no line, needed {wanted!r}")
    return found


def _label(path: Path_, number: int, text: str) -> int:
    if text not in ("0", "1"):
        raise ValueError(f"{str(path)!r}, line {number}: found label {text!r}, needed 1 (one identity) or 0 (two)")
    return int(text)


def _whole(path: Path_, number: int, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}, line {number}: found {text!r}, needed a whole number") from error


def _both_kinds(path: Path_, same: Sequence[int]) -> None:
    if sum(same) in (0, len(same)):
        found = f"{sum(same)} pairs of one identity and {len(same) - sum(same)} of two"
        raise ValueError(f"pairs: {str(path)!r} holds {found}, needed both kinds")


def _there(path: Path_, names: Sequence[str], root: Path) -> None:
    if not root.is_dir():
        raise ValueError(f"{str(root)!r} is no folder, needed the one that the paths of {str(path)!r} start from")
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise ValueError(
            f"{str(path)!r} names {len(missing)} files of {len(names)} that are not in {str(root)!r}, such as "
            f"{missing[:3]}"
        )
