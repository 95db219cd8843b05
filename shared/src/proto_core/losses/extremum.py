"""The one search under every cluster and separation loss: the highest similarity among the prototypes of a mask."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["masked_maximum"]


def masked_maximum(
    similarities: Float[Tensor, "N P"],
    mask: Bool[Tensor, "R P"],
    *,
    fill: float,
    rows: Int[Tensor, "R"] | None = None,
) -> tuple[Float[Tensor, "R"], Bool[Tensor, "R"]]:
    """Highest similarity on the mask, where entries off the mask take part with the value ``fill``.

    The search itself is not differentiated; the gradient goes to the one entry found. When an entry off the mask wins
    (an empty mask, or ``fill=0`` and nothing but negative similarities on it) the result is 0 with a zero gradient.

    Args:
        similarities: similarity of every sample to every prototype.
        mask: prototypes that count.
        fill: value of the others: ``-inf`` leaves them out, ``0.0`` is the product of similarity and mask.
        rows: the sample that each row of the mask is about; ``None``: row r is about sample r.

    Returns:
        The maximum, and whether it lies on the mask.

    Example:
        >>> import torch
        >>> from proto_core.losses.extremum import masked_maximum
        >>> similarities = torch.tensor([[-0.5, 0.9], [0.3, 0.4]])
        >>> masked_maximum(similarities, torch.tensor([[True, False], [True, False]]), fill=0.0)
        (tensor([0.0000, 0.3000]), tensor([False,  True]))
    """
    with torch.no_grad():
        candidates = similarities if rows is None else similarities[rows]
        index = torch.where(mask, candidates, fill).argmax(dim=1)
        found = mask.gather(1, index.unsqueeze(1)).squeeze(1)
        if rows is None:
            rows = torch.arange(len(mask), device=mask.device)
        position = rows * similarities.shape[1] + index
    return torch.where(found, similarities.reshape(-1).gather(0, position), 0), found
