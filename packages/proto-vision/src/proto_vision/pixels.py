"""Undoing the normalisation of a data module, for networks whose decoder answers in pixel values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from proto_core.precision import full_precision
from proto_vision.data.module import IMAGENET

__all__ = ["Pixels"]


class Pixels(nn.Module):
    """Normalised images -> pixel values in [0, 1], ``x std + mean``, in float32.

    Args:
        in_channels: 3 (RGB) or 1 (grey).
        mean: per channel, as the data module's; by default what data modules have by default.
        std: per channel, likewise.

    Raises:
        ValueError: another number of values than channels, a std that is not positive.

    Example:
        >>> import torch
        >>> from proto_vision.pixels import Pixels
        >>> Pixels(1)(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1)).flatten()
        tensor([0., 1.])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, in_channels: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None):
        super().__init__()
        default = IMAGENET if in_channels == 3 else ((0.5,) * in_channels,) * 2
        for name, values, usual in (("mean", mean, default[0]), ("std", std, default[1])):
            chosen = tuple(usual if values is None else values)
            if len(chosen) != in_channels:
                raise ValueError(f"{name}: found {len(chosen)} values for {in_channels} channels")
            self.register_buffer(name, torch.tensor(chosen).reshape(-1, 1, 1), persistent=False)
        if not bool((self.std > 0).all()):
            raise ValueError(f"std: found {self.std.flatten().tolist()}, needed values above 0")

    def extra_repr(self) -> str:
        """Mean and std."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"

    def settings(self) -> dict[str, list[float]]:
        """Plain values."""
        return {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}

    def forward(self, images: Float[Tensor, "N channels H W"]) -> Float[Tensor, "N channels H W"]:
        """Pixel values."""
        return full_precision(images) * self.std + self.mean
