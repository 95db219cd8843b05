"""What every system of images that trains does alike: know its input, note figures, refuse other checkpoints."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningModule
from torch import Tensor

from proto_core.training import StoredSystem
from proto_vision.data.dataset import ImageBatch

__all__ = ["ImageSystem"]


@runtime_checkable
class HasImages(Protocol):
    """Anything that holds the images of a batch."""

    @property
    def image(self) -> Tensor:
        """``[N, ...]``."""


class ImageSystem(StoredSystem, LightningModule):
    """A stored system whose input is batches of square images.

    Args:
        image_size: height and width of the input, in pixels.
        in_channels: of the input.
    """

    def __init__(self, image_size: int, in_channels: int) -> None:
        super().__init__()
        self.image_size, self.in_channels = image_size, in_channels
        self.test_results: dict[str, Any] = {}

    def input_settings(self) -> dict[str, Any]:
        """Those of the settings that every system has."""
        return {"image_size": self.image_size, "in_channels": self.in_channels}

    def batch_index(self, batch: ImageBatch) -> Tensor:
        """Row of each image in the data set (see proto_core.prototypes.projection.ProjectsPrototypes)."""
        return batch.index

    def check_settings(self, found: dict[str, Any]) -> None:
        """Refuse a checkpoint of another kind of input.

        Raises:
            ValueError: names what differs.
        """
        for key in ("image_size", "in_channels"):
            if found[key] != getattr(self, key):
                raise ValueError(f"checkpoint: trained with {key} {found[key]}, this model has {getattr(self, key)}")

    def note(self, name: str, value: Tensor, batch: HasImages, *, prog_bar: bool = False) -> None:
        """Log a batch's figure as its epoch's mean; does nothing without a trainer."""
        if getattr(self, "_trainer", None) is not None:
            options: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True}
            self.log(name, value, batch_size=len(batch.image), prog_bar=prog_bar, **options)
