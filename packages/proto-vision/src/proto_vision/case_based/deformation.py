"""Elastic deformation of images: smooth random displacements, as in handwriting (Simard et al., 2003).

Source: the training of arXiv 1710.04806. It is computed in PyTorch on the images' own device, a whole batch at once;
:func:`elastic_deform` is its face for NumPy arrays. Difference from the authors' code: any image size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from proto_core.precision import no_autocast

__all__ = ["ElasticDeformation", "elastic_deform"]

_TRUNCATE = 4


class ElasticDeformation:
    """Each image is read at displaced places: ``output(r, c) = image(r + dx, c + dy)``, bilinear, zero outside.

    ``dx = alpha G_sigma(u)`` and ``dy = alpha G_sigma(v)``: u (rows) and v (columns) are noise, G a Gaussian cut at
    four sigma with zeros around the image. All channels of an image move alike.

    Args:
        sigma: of the Gaussian, in pixels.
        alpha: factor of the displacement, in pixels; 0 leaves images as they are.

    Shapes:
        images ``[N, channels, H, W]``, noise ``[N, 2, H, W]`` -> ``[N, channels, H, W]`` in the noise's precision.

    Raises:
        ValueError: a negative sigma or alpha; noise of another shape.

    Example:
        >>> import torch
        >>> from proto_vision.case_based import ElasticDeformation
        >>> image = torch.arange(3.0).expand(1, 1, 2, 3)
        >>> ElasticDeformation(sigma=0, alpha=0.5)(image, torch.ones(1, 2, 2, 3))
        tensor([[[[0.5000, 1.5000, 0.0000],
                  [0.0000, 0.0000, 0.0000]]]])
    """

    def __init__(self, sigma: float = 4.0, alpha: float = 20.0) -> None:
        for name, value in (("sigma", sigma), ("alpha", alpha)):
            if not value >= 0:
                raise ValueError(f"{name}: found {value}, needed at least 0")
        self.sigma, self.alpha = sigma, alpha

    def __repr__(self) -> str:
        return f"{type(self).__name__}(sigma={self.sigma}, alpha={self.alpha})"

    def __call__(
        self, images: Float[Tensor, "N channels H W"], noise: Float[Tensor, "N 2 H W"] | None = None
    ) -> Float[Tensor, "N channels H W"]:
        """Deform a batch; by default with noise from U[-1, 1)."""
        needed = (len(images), 2, *images.shape[2:])
        if noise is None:
            kind = torch.promote_types(images.dtype, torch.float32)
            noise = torch.rand(needed, dtype=kind, device=images.device) * 2 - 1
        if tuple(noise.shape) != needed:
            raise ValueError(f"noise: found shape {tuple(noise.shape)}, needed {needed}")
        return _read(images.to(noise.dtype), self.alpha * self._smooth(noise))

    def _smooth(self, noise: Tensor) -> Tensor:
        reach = int(_TRUNCATE * self.sigma + 0.5)
        steps = torch.arange(-reach, reach + 1, dtype=torch.float64)
        kernel = (-0.5 * (steps / max(self.sigma, 1e-12)).square()).exp()
        kernel = (kernel / kernel.sum()).to(noise)
        with no_autocast(noise):
            rows = F.conv2d(noise.flatten(0, 1).unsqueeze(1), kernel.reshape(1, 1, -1, 1), padding=(reach, 0))
            return F.conv2d(rows, kernel.reshape(1, 1, 1, -1), padding=(0, reach)).reshape(noise.shape)


def _read(images: Tensor, displacement: Tensor) -> Tensor:
    """Bilinear values at displaced places; 0 for places outside the pixels' centres."""
    height, width = images.shape[2:]
    pixels, value = images.flatten(2), torch.zeros_like(images)
    down = displacement[:, 0] + torch.arange(height, device=images.device).unsqueeze(1)
    across = displacement[:, 1] + torch.arange(width, device=images.device)
    inside = (down >= 0) & (down <= height - 1) & (across >= 0) & (across <= width - 1)
    row, column = (place.nan_to_num().floor().long() for place in (down, across))
    for step_down in (0, 1):
        for step_across in (0, 1):
            r, c = row + step_down, column + step_across
            share = (1 - (down - r).abs()) * (1 - (across - c).abs())
            index = r.clamp(0, height - 1) * width + c.clamp(0, width - 1)
            corner = pixels.gather(2, index.flatten(1).unsqueeze(1).expand_as(pixels)).unflatten(2, (height, width))
            value = value + share.unsqueeze(1) * corner
    return torch.where(inside.unsqueeze(1), value, 0)


def elastic_deform(
    images: Shaped[np.ndarray, "N H W"],
    noise: Shaped[np.ndarray, "N 2 H W"] | None = None,
    sigma: float = 4.0,
    alpha: float = 20.0,
    generator: np.random.Generator | None = None,
) -> Float[np.ndarray, "N H W"]:
    """:class:`ElasticDeformation` of NumPy arrays, computed in float64.

    Args:
        images: grey images.
        noise: row noise u, then column noise v of each image, in [-1, 1]; by default drawn from U[-1, 1), u first.
        sigma: of the Gaussian, in pixels.
        alpha: factor of the displacement, in pixels.
        generator: of the noise; by default a new one.

    Returns:
        Images in the precision of ``images``, float64 for integers.

    Raises:
        ValueError: arrays of another shape, a negative sigma or alpha.

    Example:
        >>> import numpy as np
        >>> from proto_vision.case_based import elastic_deform
        >>> elastic_deform(np.ones((2, 28, 28)), generator=np.random.default_rng(0)).shape
        (2, 28, 28)
    """
    images = np.asarray(images)
    if images.ndim != 3:
        raise ValueError(f"images: found shape {images.shape}, needed [N, H, W]")
    shape = (len(images), 2, *images.shape[1:])
    if noise is None:
        noise = (generator or np.random.default_rng()).uniform(-1, 1, shape)
    pixels: Any = torch.as_tensor(images.astype(np.float64)).unsqueeze(1)
    found = ElasticDeformation(sigma, alpha)(pixels, torch.as_tensor(np.asarray(noise, dtype=np.float64)))
    kind = images.dtype if np.issubdtype(images.dtype, np.floating) else np.float64
    return found.squeeze(1).numpy().astype(kind)
