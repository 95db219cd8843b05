"""Do part prototypes mean the same part everywhere, and do they still under noise: consistency and stability.

The measures of EvalProtoPNet (ICCV 2023, arXiv 2212.05946), on images with annotated parts (CUB-200-2011: 15). Only
the K prototypes of an image's true class are looked at; the part a prototype stands for in an image is any annotated
part within a box around the maximum of its similarity map. Unlike in the authors' code, classes without an image are
left out of both averages instead of stopping the evaluation.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torchmetrics import Metric

from proto_core.checks import check_positive
from proto_core.metrics.peaks import map_peaks

__all__ = [
    "PartPrototypeScores",
    "assign_parts",
    "consistency_score",
    "parts_near",
    "perturb_images",
    "rescale_part_locations",
    "stability_score",
]


def rescale_part_locations(
    part_locs: Shaped[Tensor, "N M 2"], boxes: Shaped[Tensor, "N 4"], img_size: int
) -> Int[Tensor, "N M 2"]:
    """Parts ``(x, y)`` of whole images in pixels of the crop: ``trunc(img_size (x - x1) / (x2 - x1))``, y likewise.

    Args:
        part_locs: in pixels of the image; fractions are cut off first.
        boxes: the crops ``(x1, y1, x2, y2)``; fractions are cut off first.
        img_size: the crop is scaled to this width and height.

    Raises:
        ValueError: shapes that do not fit, a box without an area, a size below 1.

    Example:
        >>> import torch
        >>> from proto_core.metrics import rescale_part_locations
        >>> rescale_part_locations(torch.tensor([[[15, 30]]]), torch.tensor([[10, 20, 20, 40]]), 224)
        tensor([[[112, 112]]])
    """
    check_positive(img_size=img_size)
    if part_locs.ndim != 3 or part_locs.shape[2] != 2 or tuple(boxes.shape) != (len(part_locs), 4):
        shapes = f"{tuple(part_locs.shape)} and {tuple(boxes.shape)}"
        raise ValueError(f"part_locs, boxes: found shapes {shapes}, needed [N, M, 2] and [N, 4]")
    places, corners = part_locs.long().double(), boxes.long().double().unsqueeze(1)
    start, extent = corners[..., :2], corners[..., 2:] - corners[..., :2]
    if not bool((extent > 0).all()):
        row = int((extent <= 0).any(dim=2).flatten().nonzero()[0])
        raise ValueError(f"boxes: found {boxes[row].tolist()} in row {row}, needed x1 < x2 and y1 < y2")
    return (img_size * ((places - start) / extent)).trunc().long()


def assign_parts(
    maps: Float[Tensor, "N K h w"],
    part_locs: Int[Tensor, "N M 2"],
    part_visible: Shaped[Tensor, "N M"],
    *,
    img_size: int = 224,
    half_size: int = 36,
) -> Bool[Tensor, "N K M"]:
    """Which visible parts lie in the box around the maximum of each map, borders included.

    Maps are brought to the size of the image by bicubic interpolation (a = -0.75, half-pixel centres); the first
    maximum row by row counts; the box reaches ``half_size`` pixels to each side and ends at 0 and at ``img_size``.

    Args:
        maps: similarity maps of the prototypes of each image's own class.
        part_locs: ``(x, y)`` of :func:`rescale_part_locations`.
        part_visible: which parts the image shows.
        img_size: width and height of the image.
        half_size: half the side of the box, in pixels.

    Raises:
        ValueError: shapes that do not fit, a size below 1, a negative half size.

    Example:
        >>> import torch
        >>> from proto_core.metrics import assign_parts
        >>> maps = torch.zeros(1, 1, 4, 4)
        >>> maps[0, 0, 0, 3] = 1.0  # upper right
        >>> parts = torch.tensor([[[50, 6], [6, 50]]])
        >>> assign_parts(maps, parts, torch.ones(1, 2), img_size=56, half_size=10)
        tensor([[[ True, False]]])
    """
    fits = maps.ndim == 4 and part_locs.ndim == 3 and part_locs.shape[2] == 2 and 0 not in maps.shape[1:]
    if not fits or len(maps) != len(part_locs) or part_visible.shape != part_locs.shape[:2]:
        shapes = f"{tuple(maps.shape)}, {tuple(part_locs.shape)} and {tuple(part_visible.shape)}"
        raise ValueError(
            f"maps, part_locs, part_visible: found shapes {shapes}, needed [N, K, h, w], [N, M, 2], [N, M]"
        )
    peaks = map_peaks(maps, img_size)
    return parts_near(peaks, part_locs, part_visible, img_size=img_size, half_size=half_size)


def parts_near(
    peaks: Int[Tensor, "N K 2"],
    part_locs: Int[Tensor, "N M 2"],
    part_visible: Shaped[Tensor, "N M"],
    *,
    img_size: int = 224,
    half_size: int = 36,
) -> Bool[Tensor, "N K M"]:
    """Which visible parts lie in the box around each peak, borders included; see :func:`assign_parts`.

    Args:
        peaks: ``(x, y)`` of :func:`map_peaks`.
        part_locs: ``(x, y)`` of :func:`rescale_part_locations`.
        part_visible: which parts the image shows.
        img_size: width and height of the image.
        half_size: half the side of the box, in pixels.

    Raises:
        ValueError: shapes that do not fit, a size below 1, a negative half size.

    Example:
        >>> import torch
        >>> from proto_core.metrics import parts_near
        >>> parts_near(torch.tensor([[[5, 5]]]), torch.tensor([[[9, 1], [5, 10]]]), torch.ones(1, 2), half_size=4)
        tensor([[[ True, False]]])
    """
    check_positive(img_size=img_size)
    if half_size < 0:
        raise ValueError(f"half_size: found {half_size}, needed at least 0")
    shapes = [tuple(x.shape) for x in (peaks, part_locs, part_visible)]
    fits = peaks.ndim == part_locs.ndim == 3 and peaks.shape[2] == part_locs.shape[2] == 2
    if not fits or len(peaks) != len(part_locs) or part_visible.shape != part_locs.shape[:2]:
        found = ", ".join(map(str, shapes))
        raise ValueError(f"peaks, part_locs, part_visible: found shapes {found}, needed [N, K, 2], [N, M, 2], [N, M]")
    low = (peaks - half_size).clamp_min(0).unsqueeze(2)
    high = (peaks + half_size).clamp_max(img_size).unsqueeze(2)
    places = part_locs.unsqueeze(1)
    return ((places >= low) & (places <= high)).all(dim=-1) & (part_visible != 0).unsqueeze(1)


def consistency_score(
    assignment: Shaped[Tensor, "N K M"],
    part_visible: Shaped[Tensor, "N M"],
    targets: Int[Tensor, "N"],
    num_classes: int,
    *,
    threshold: float = 0.8,
) -> float:
    """Percentage of prototypes that meet one and the same part in a share ``threshold`` of the images that show it.

    Args:
        assignment: of :func:`assign_parts`.
        part_visible: which parts each image shows.
        targets: classes of the images.
        num_classes: C; classes without an image are left out.
        threshold: share of images.

    Raises:
        ValueError: shapes that do not fit, targets outside 0..C-1, no image at all.

    Example:
        >>> import torch
        >>> from proto_core.metrics import consistency_score
        >>> always, never = torch.ones(4, 1, 3), torch.zeros(4, 1, 3)
        >>> consistency_score(torch.cat([always, never], dim=1), torch.ones(4, 3), torch.tensor([0, 0, 1, 1]), 2)
        50.0
    """
    scores = _scores_for(assignment, num_classes, threshold=threshold)
    scores.update(assignment, part_visible, targets)
    return scores.compute()["consistency"]


def stability_score(
    assignment: Shaped[Tensor, "N K M"],
    assignment_perturbed: Shaped[Tensor, "N K M"],
    targets: Int[Tensor, "N"],
    num_classes: int,
) -> float:
    """Mean over prototypes of the percentage of images whose parts are all the same under perturbation.

    An image in which a prototype meets no part before and after counts as stable.

    Args:
        assignment: of :func:`assign_parts`, on clean images.
        assignment_perturbed: the same on images of :func:`perturb_images`.
        targets: classes of the images.
        num_classes: C; classes without an image are left out.

    Raises:
        ValueError: shapes that do not fit, targets outside 0..C-1, no image at all.

    Example:
        >>> import torch
        >>> from proto_core.metrics import stability_score
        >>> clean = torch.ones(2, 1, 3)
        >>> stability_score(clean, torch.stack([clean[0], 0 * clean[1]]), torch.tensor([0, 0]), 1)
        50.0
    """
    scores = _scores_for(assignment, num_classes)
    visible = torch.ones(len(assignment), assignment.shape[2], device=assignment.device)
    scores.update(assignment, visible, targets, assignment_perturbed)
    return scores.compute()["stability"]


def _scores_for(assignment: Tensor, num_classes: int, threshold: float = 0.8) -> PartPrototypeScores:
    if assignment.ndim != 3:
        raise ValueError(f"assignment: found shape {tuple(assignment.shape)}, needed [N, K, M]")
    return PartPrototypeScores(num_classes, *assignment.shape[1:], threshold=threshold).to(assignment.device)


def perturb_images(
    images: Float[Tensor, "N C H W"],
    *,
    std: float = 0.2,
    eps: float = 0.25,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "N C H W"]:
    """Normalised images plus normal noise, the noise (not the result) clipped to ``[-eps, eps]``.

    Args:
        images: after normalisation by mean and standard deviation.
        std: standard deviation of the noise.
        eps: bound of the noise.
        generator: source of the noise, on the device of the images.

    Raises:
        ValueError: std or eps below 0 or no number, images that are not floating-point.

    Example:
        >>> import torch
        >>> from proto_core.metrics import perturb_images
        >>> noisy = perturb_images(torch.zeros(1, 3, 8, 8), generator=torch.Generator().manual_seed(0))
        >>> noisy.abs().max()
        tensor(0.2500)
    """
    if not (std >= 0 and eps >= 0):
        raise ValueError(f"std, eps: found {std} and {eps}, needed at least 0")
    if not images.is_floating_point():
        raise ValueError(f"images: found {images.dtype}, needed normalised floating-point images")
    noise = torch.empty_like(images).normal_(generator=generator).mul_(std)
    return images + noise.clamp_(-eps, eps)


class PartPrototypeScores(Metric):
    """Consistency and stability over all batches; exact for any split and under DDP.

    Args:
        num_classes: C.
        prototypes_per_class: K.
        num_parts: M.
        threshold: share of images a part must be met in.

    Raises:
        ValueError: a size below 1; on ``update``: shapes that do not fit, targets outside 0..C-1; on ``compute``: no
            image.

    Example:
        >>> import torch
        >>> from proto_core.metrics import PartPrototypeScores
        >>> scores = PartPrototypeScores(num_classes=2, prototypes_per_class=1, num_parts=3)
        >>> met = torch.tensor([[[True, False, False]]])
        >>> scores.update(met, torch.ones(1, 3), torch.tensor([1]), assignment_perturbed=met)
        >>> scores.compute()
        {'consistency': 100.0, 'stability': 100.0}
    """

    full_state_update = False
    met: Tensor
    shown: Tensor
    images: Tensor
    stable: Tensor
    compared: Tensor

    def __init__(
        self,
        num_classes: int,
        prototypes_per_class: int,
        num_parts: int,
        *,
        threshold: float = 0.8,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_positive(num_classes=num_classes, prototypes_per_class=prototypes_per_class, num_parts=num_parts)
        self.threshold = threshold
        shapes = {
            "met": (num_classes, prototypes_per_class, num_parts),
            "shown": (num_classes, num_parts),
            "images": (num_classes,),
            "stable": (num_classes, prototypes_per_class),
            "compared": (num_classes,),
        }
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self,
        assignment: Shaped[Tensor, "N K M"],
        part_visible: Shaped[Tensor, "N M"],
        targets: Int[Tensor, "N"],
        assignment_perturbed: Shaped[Tensor, "N K M"] | None = None,
    ) -> None:
        """Add images: parts met, parts shown, classes, and the parts met under perturbation where stability counts."""
        classes, prototypes, parts = self.met.shape
        samples = len(targets)
        perturbed = assignment if assignment_perturbed is None else assignment_perturbed
        shapes = [tuple(x.shape) for x in (assignment, part_visible, targets, perturbed)]
        if shapes != [(samples, prototypes, parts), (samples, parts), (samples,), (samples, prototypes, parts)]:
            raise ValueError(
                "assignment, part_visible, targets, assignment_perturbed: found shapes "
                f"{', '.join(map(str, shapes))}, needed [N, {prototypes}, {parts}], [N, {parts}], [N] and the first"
            )
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise ValueError(f"targets: found {targets.dtype}, needed integers")
        if samples and not bool(((targets >= 0) & (targets < classes)).all()):
            low, high = int(targets.min()), int(targets.max())
            raise ValueError(f"targets: found values from {low} to {high}, needed 0 to {classes - 1}")
        found, targets = assignment != 0, targets.long()
        self.met.index_add_(0, targets, found.long())
        self.shown.index_add_(0, targets, (part_visible != 0).long())
        self.images.index_add_(0, targets, torch.ones_like(targets, dtype=torch.long))
        if assignment_perturbed is not None:
            same = (found == (assignment_perturbed != 0)).all(dim=2)
            self.stable.index_add_(0, targets, same.long())
            self.compared.index_add_(0, targets, torch.ones_like(targets, dtype=torch.long))

    def compute(self) -> dict[str, float]:
        """``consistency`` and, where perturbed images came too, ``stability``; both in percent."""
        known, compared = self.images > 0, self.compared > 0
        if not bool(known.any()):
            raise ValueError("PartPrototypeScores: found no image, needed one at least")
        consistent = (self.shares() >= self.threshold).any(dim=2)[known]
        scores = {"consistency": 100 * consistent.double().mean().item()}
        if bool(compared.any()):
            scores["stability"] = 100 * self.kept()[compared].mean().item()
        return scores

    def shares(self) -> Float[Tensor, "C K M"]:
        """In which share of the images that show a part each prototype meets it; 0 where none shows it."""
        return self.met.double() / self.shown.clamp_min(1).unsqueeze(1)

    def kept(self) -> Float[Tensor, "C K"]:
        """In which share of the images each prototype meets the same parts under perturbation; 0 without an image."""
        return self.stable.double() / self.compared.clamp_min(1).unsqueeze(1)
