"""Frozen features: of a backbone by name, of a checkpoint of any system, of a file; training and test samples apart."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader

from proto_core.files import atomic_write
from proto_core.modes import evaluation_mode
from proto_vision.data.dataset import ImageBatch, ImageDataset, split_rows
from proto_vision.data.module import ImageDataModule
from proto_vision.encoders import create_encoder

__all__ = [
    "FrozenFeatures",
    "create_frozen",
    "fold_features",
    "frozen_features",
    "image_set_features",
    "read_features",
    "read_test_features",
    "write_features",
]

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


class FrozenFeatures(NamedTuple):
    """Features of training and of test samples.

    Attributes:
        x_train: ``[N, D]`` float32.
        y_train: ``[N]`` int64, classes.
        x_test: ``[M, D]`` float32.
        y_test: ``[M]`` int64.
        class_names: names of the classes.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    class_names: list[str]


def frozen_features(network: Any, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N D"]:
    """What a network knows of images before its head decides.

    Of a system: ``ood_features`` or ``embed`` where it has them, the latent vector of an autoencoder (``encode`` of its
    network), the maps that part prototypes are compared with, averaged over their places. Of any other module: its
    answer, maps averaged likewise.

    Args:
        network: asked as it is; see :func:`proto_core.modes.evaluation_mode`.
        images: as its data module makes them.

    Raises:
        ValueError: a system without any of these, an answer that is neither vectors nor maps.

    Example:
        >>> import torch
        >>> from proto_vision import EvalProtoPNetModule
        >>> from proto_vision.disc_vs_gen import frozen_features
        >>> net = EvalProtoPNetModule("conv3", 10, image_size=16, in_channels=1, prototype_channels=8)
        >>> frozen_features(net.eval(), torch.rand(4, 1, 16, 16)).shape
        torch.Size([4, 8])
    """
    inner = getattr(network, "network", None)
    if callable(getattr(network, "ood_features", None)):
        found = network.ood_features(images)
    elif callable(getattr(network, "embed", None)):
        found = network.embed(images)
    elif callable(getattr(network, "prototype_features", None)):
        rows = torch.arange(len(images), device=images.device)
        batch = ImageBatch(images, torch.zeros_like(rows), rows, rows >= 0)
        return torch.cat([_vectors(maps) for maps, _ in network.prototype_features(batch).values()], dim=1)
    elif callable(getattr(inner, "encode", None)):
        prepare = getattr(network, "inputs", None) or getattr(network, "pixels", None)
        found = inner.encode(images if prepare is None else prepare(images))  # type: ignore[union-attr]  # see above
    elif hasattr(network, "system"):
        raise ValueError(f"system {network.system!r}: has no features of images to evaluate")
    else:
        found = network(images)
    return _vectors(found)


def _vectors(found: Any) -> Tensor:
    if not isinstance(found, Tensor) or found.ndim not in (2, 4):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"network: gave {shape}, needed features [N, D] or maps [N, D, h, w]")
    return (found.mean(dim=(2, 3)) if found.ndim == 4 else found).float()


def create_frozen(backbone: str, data: ImageDataModule, *, pretrained: bool = False) -> nn.Module:
    """A backbone for a data module's images.

    Args:
        backbone: a name of :func:`proto_vision.encoders.create_encoder`, or ``"pixels"`` for the image itself.
        data: whose images it is for.
        pretrained: its weights (a download where they are not at hand); otherwise they are random.

    Raises:
        ValueError: an unknown name, weights that there are not.
    """
    if backbone == "pixels":
        if pretrained:
            raise ValueError("pretrained: there are no weights for 'pixels'")
        return nn.Flatten()
    return create_encoder(backbone, in_channels=data.in_channels, image_size=data.image_size, pretrained=pretrained)[0]


@torch.no_grad()
def _answers(network: nn.Module, data: ImageDataModule, fold: str, progress: Progress) -> tuple[Tensor, Tensor]:
    """Features and classes of a fold of a data module that is set up."""
    place = next(iter(network.parameters()), torch.zeros(())).device
    loader: DataLoader[Any] = DataLoader(
        data.plain_set(data.rows(fold)),
        batch_size=data.batch_size,
        num_workers=data.num_workers,
        collate_fn=ImageDataset.collate,
    )
    steps = progress(loader, f"{'training' if fold == 'train' else fold} images")
    with evaluation_mode(network):
        answers = [(frozen_features(network, batch.image.to(place)).cpu(), batch.target) for batch in steps]
    x, y = (torch.cat(column) for column in zip(*answers))
    return x, y


def fold_features(
    network: nn.Module, data: ImageDataModule, fold: str = "test", *, progress: Progress = lambda steps, text: steps
) -> FrozenFeatures:
    """Features of one fold's images, not augmented, of whatever classes: also those that never train.

    Args:
        network: asked in evaluation mode, on its own device.
        data: the images.
        fold: ``"train"``, ``"val"`` or ``"test"``.
        progress: called with batches and what is done, gives the batches back one by one.

    Returns:
        Features on the CPU, all as those of test samples; ``class_names`` are those of all classes.

    Raises:
        ValueError: an empty fold, a network without features.

    Example:
        >>> from torch import nn
        >>> from proto_vision import Digits
        >>> from proto_vision.data.protocols import UnseenClasses
        >>> from proto_vision.disc_vs_gen import fold_features
        >>> found = fold_features(nn.Flatten(), Digits(image_size=8, protocol=UnseenClasses(2)))
        >>> found.y_test.unique().tolist(), found.x_test.shape
        ([8, 9], torch.Size([354, 64]))
    """
    data.prepare_data()
    data.setup()
    x, y = _answers(network, data, fold, progress)
    return FrozenFeatures(x[:0], y[:0], x, y, data.table.class_names)


def image_set_features(
    network: nn.Module, data: ImageDataModule, *, progress: Progress = lambda steps, text: steps
) -> FrozenFeatures:
    """Features of a data module's training and test images, none of them augmented.

    Args:
        network: asked in evaluation mode, on its own device.
        data: the images.
        progress: called with batches and what is done, gives the batches back one by one.

    Returns:
        Features on the CPU.

    Raises:
        ValueError: an empty fold, test images of classes without training images, a network without features.

    Example:
        >>> from torch import nn
        >>> from proto_vision import Digits
        >>> from proto_vision.disc_vs_gen import image_set_features
        >>> image_set_features(nn.Flatten(), Digits(image_size=8)).x_test.shape
        torch.Size([896, 64])
    """
    data.prepare_data()
    data.setup()
    rows = data.rows("test")
    unseen = np.unique(data.table.targets[rows])
    names = [data.table.class_names[c] for c in unseen[unseen >= data.num_classes]]
    if names:
        found = f"{len(names)} classes without training images, such as {names[:3]}"
        raise ValueError(f"{data}: the test fold holds {found}; needed the classes that train, in both folds")
    x_train, y_train = _answers(network, data, "train", progress)
    x_test, y_test = _answers(network, data, "test", progress)
    return FrozenFeatures(x_train, y_train, x_test, y_test, data.class_names)


# -- files


def write_features(path: str | os.PathLike[str], features: FrozenFeatures) -> None:
    """Write features as ``.npz``, whole: ``features``, ``labels`` (names) and ``fold`` of all samples.

    Args:
        path: the file.
        features: what is written.
    """
    names = np.asarray(features.class_names)
    x, y = (torch.cat(pair).numpy() for pair in (features[0:4:2], features[1:4:2]))
    fold = np.repeat(["train", "test"], [len(features.y_train), len(features.y_test)])
    with atomic_write(path, "wb") as file:
        np.savez_compressed(file, features=x, labels=names[y], fold=fold)


def read_features(path: str | os.PathLike[str], *, test_fraction: float = 0.3, seed: int = 0) -> FrozenFeatures:
    """Features of a file that any program may have written.

    ``.npz``: arrays ``features`` ``[N, D]``, ``labels`` ``[N]`` (texts or whole numbers) and, where folds are given,
    ``fold`` ``[N]`` of ``"train"`` and ``"test"`` (anything else is left out). Nothing pickled is read. ``.csv``: a
    column ``label``, perhaps ``fold``, perhaps ``record`` (not looked at); all other columns are features.

    Args:
        path: the file.
        test_fraction: share of each class that tests, where the file has no folds.
        seed: of that share.

    Raises:
        ValueError: a file that cannot be read, a column or array that is missing, what is no number, an empty fold.

    Example:
        >>> import pathlib, tempfile
        >>> from proto_vision.disc_vs_gen import read_features
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "features.csv"
        >>> _ = path.write_text("label,fold,a,b\\ncat,train,1,2\\ndog,train,3,4\\ncat,test,5,6\\n")
        >>> read_features(path).x_test, read_features(path).class_names
        (tensor([[5., 6.]]), ['cat', 'dog'])
    """
    x, targets, fold, names = _read(Path(path))
    if fold is None:
        chosen = split_rows(targets, test_fraction, seed, argument="test_fraction")
        fold = np.full(len(targets), "train", dtype="<U5")
        fold[chosen] = "test"
    rows = [np.flatnonzero(fold == name) for name in ("train", "test")]
    if not all(map(len, rows)):
        counts = f"{len(rows[0])} training and {len(rows[1])} test samples"
        raise ValueError(f"{str(path)!r}: found {counts}, needed some of both (column fold, or the share that tests)")
    x_train, y_train, x_test, y_test = (torch.from_numpy(part[take]) for take in rows for part in (x, targets))
    return FrozenFeatures(x_train, y_train, x_test, y_test, names)


def read_test_features(path: str | os.PathLike[str]) -> FrozenFeatures:
    """Test samples of a file as :func:`read_features` reads it, or all where it has no folds; none for training.

    Args:
        path: the file.

    Raises:
        ValueError: as :func:`read_features`; folds of which none is ``"test"``.

    Example:
        >>> import pathlib, tempfile
        >>> from proto_vision.disc_vs_gen import read_test_features
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "features.csv"
        >>> _ = path.write_text("label,a,b\\ncat,1,2\\ndog,3,4\\n")
        >>> read_test_features(path).y_test
        tensor([0, 1])
    """
    x, targets, fold, names = _read(Path(path))
    rows = np.arange(len(targets)) if fold is None else np.flatnonzero(fold == "test")
    if not rows.size:
        raise ValueError(f"{str(path)!r}: found no test sample, needed some (column fold, or none at all)")
    x_test, y_test = (torch.from_numpy(part[rows]) for part in (x, targets))
    return FrozenFeatures(x_test[:0], y_test[:0], x_test, y_test, names)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, list[str]]:
    """Features, classes, folds and names of the classes of a file."""
    if path.suffix.lower() not in (".npz", ".csv"):
        raise ValueError(f"features: found {str(path)!r}, needed a file that ends in .npz or .csv")
    x, labels, fold = _read_npz(path) if path.suffix.lower() == ".npz" else _read_csv(path)
    if x.ndim != 2 or labels.shape != x.shape[:1] or not x.size or (fold is not None and fold.shape != labels.shape):
        shapes = f"features {x.shape}, labels {labels.shape}" + ("" if fold is None else f", fold {fold.shape}")
        raise ValueError(f"{str(path)!r}: found {shapes}, needed [N, D] and [N] with N and D at least 1")
    if not np.isfinite(x).all():
        row = int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])
        raise ValueError(f"{str(path)!r}: sample {row} (from 0) holds NaN or infinite features, needed numbers")
    names, targets = np.unique(labels, return_inverse=True)
    return x, targets.astype(np.int64), fold, [str(name) for name in names]


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in ("features", "labels", "fold") if name in file}
    except Exception as error:  # a broken archive can fail in any way; whichever, the file is the fault
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"features: {str(path)!r} cannot be read ({reason})") from error
    lacking = [name for name in ("features", "labels") if name not in found]
    if lacking:
        raise ValueError(f"{str(path)!r}: lacks {lacking}, needed arrays features [N, D] and labels [N]")
    if found["features"].dtype.kind not in "fiub" or found["labels"].dtype.kind not in "iubU":
        kinds = f"features {found['features'].dtype}, labels {found['labels'].dtype}"
        raise ValueError(f"{str(path)!r}: found {kinds}, needed numbers, and texts or whole numbers")
    return found["features"].astype(np.float32), found["labels"], found.get("fold")


def _read_csv(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            head = next(reader, [])
            lines = [line for line in reader if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "not a table in text"
        raise ValueError(f"features: {str(path)!r} cannot be read ({reason})") from error
    used = [place for place, name in enumerate(head) if name not in ("label", "fold", "record")]
    if "label" not in head or not used or not lines:
        raise ValueError(f"{str(path)!r}: found columns {head[:5]}, needed label, features, and a line for each sample")
    short = next((number for number, line in enumerate(lines, 2) if len(line) != len(head)), None)
    if short is not None:
        raise ValueError(f"{str(path)!r}, line {short}: found {len(lines[short - 2])} columns, needed {len(head)}")
    return _numbers(path, lines, used), _column(lines, head, "label"), _fold(lines, head)


def _numbers(path: Path, lines: Sequence[Sequence[str]], used: Sequence[int]) -> np.ndarray:
    try:
        return np.array([[line[place] for place in used] for line in lines]).astype(np.float32)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: a feature is no number ({error})") from error


def _column(lines: Sequence[Sequence[str]], head: Sequence[str], name: str) -> np.ndarray:
    place = list(head).index(name)
    return np.array([line[place] for line in lines])


def _fold(lines: Sequence[Sequence[str]], head: Sequence[str]) -> np.ndarray | None:
    return _column(lines, head, "fold") if "fold" in head else None
