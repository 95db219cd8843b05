"""Features of images as they are in testing: of the training images, of any files, batch by batch or of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import DataLoader, Dataset

from proto_core.distributed import is_distributed
from proto_core.modes import evaluation_mode
from proto_vision.data.module import ImageDataModule
from proto_vision.embedding import FoldEmbeddings

__all__ = ["evaluated", "image_features", "read_batches", "training_features"]


def image_features(network: Any, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N F"]:
    """Features of a system that has them: ``ood_features(images)``, or else ``embed(images)``.

    Raises:
        ValueError: the system has neither.

    Example:
        >>> import torch
        >>> from proto_vision import PALM
        >>> from proto_vision.feature_bank import image_features
        >>> image_features(PALM("conv3", 4, image_size=16, in_channels=1), torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 128])
    """
    for name in ("ood_features", "embed"):
        if callable(getattr(network, name, None)):
            return getattr(network, name)(images)
    raise ValueError(f"system {network.system!r}: gives no features of images, needed ood_features or embed")


@torch.no_grad()
def evaluated(
    network: nn.Module,
    images: Float[Tensor, "N channels S S"],
    answer: Callable[[Any, Tensor], Tensor] = image_features,
) -> Tensor:
    """What a network says in evaluation mode, on its device and in its type.

    Args:
        network: stays in the mode that it was in.
        images: anywhere.
        answer: of the network to images.
    """
    with evaluation_mode(network):
        return answer(network, images.to(next(network.parameters())))


class Pictures(Dataset[tuple[Tensor | None, str]]):
    """Images as the model sees them in testing, or what is wrong with them.

    Args:
        data: reads and prepares images.
        places: ids of the data set (``str``) or files (``Path``).
    """

    def __init__(self, data: ImageDataModule, places: Sequence[str | Path]) -> None:
        self.data, self.places = data, list(places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, position: int) -> tuple[Tensor | None, str]:
        try:
            return self.data.model_input(self.places[position]), ""
        except ValueError as error:
            return None, str(error)


def read_batches(
    data: ImageDataModule, places: Sequence[str | Path], what: str
) -> Iterable[list[tuple[Tensor | None, str]]]:
    """Images in the order of their places, each with what is wrong with it or nothing; shows its progress.

    Args:
        data: reads and prepares images.
        places: ids of the data set (``str``) or files (``Path``).
        what: they are, for the progress bar.
    """
    loader = DataLoader(
        Pictures(data, places), batch_size=data.batch_size, num_workers=data.num_workers, collate_fn=list
    )
    return track(loader, what, transient=True, console=Console(stderr=True))


def training_features(network: Any, data: ImageDataModule) -> tuple[Float[Tensor, "N F"], Int[Tensor, "N"]]:
    """Features and classes of the training images, un-augmented, on the CPU; ranks share the work.

    Args:
        network: a system with features, see :func:`image_features`.
        data: its training fold. Images that cannot be read are left out with ``skip_corrupt``.

    Raises:
        ValueError: an image that cannot be read, a system without features.

    Example:
        >>> from proto_vision import PALM, Digits
        >>> from proto_vision.feature_bank import training_features
        >>> features, targets = training_features(PALM("conv3", image_size=8, in_channels=1), Digits(image_size=8))
        >>> features.shape, targets[:3].tolist()
        (torch.Size([724, 128]), [0, 1, 4])
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
    rows = data.rows("train")[rank::world]
    places = [data.record_ids[row] for row in rows]
    fold, seen = FoldEmbeddings(), 0
    for part in read_batches(data, places, "training images"):
        readable = np.array([image is not None for image, _ in part])
        if not readable.all() and not data.skip_corrupt:
            raise ValueError(next(problem for _, problem in part if problem))
        index = torch.from_numpy(rows[seen : seen + len(part)][readable])
        seen += len(part)
        if len(index):
            images = torch.stack([image for image, _ in part if image is not None])
            features = evaluated(network, images)
            fold.update(features, data.targets[index].to(features.device), index.to(features.device))
    return fold.gathered()
