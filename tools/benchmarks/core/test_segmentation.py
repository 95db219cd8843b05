"""Segmentation losses (forward and backward) and measures on 4 masks of 256 x 256, against peers."""

from collections.abc import Callable

import gudhi
import numpy as np
import pytest
import torch
from monai.losses import DiceLoss as MonaiDice
from monai.losses.cldice import SoftclDiceLoss
from py_sod_metrics import MAE, Emeasure, Fmeasure, Smeasure, WeightedFmeasure
from skimage.measure import label as skimage_label
from torch import Tensor
from torch.nn import functional as F

from proto_core.losses import CEDiceLoss, CLDiceLoss, DiceLoss
from proto_core.losses.spanning import component_pairs
from proto_core.metrics import betti_numbers, saliency_metrics


def masks(count: int = 4, size: int = 256) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    smooth = F.avg_pool2d(torch.rand(count, 1, size, size, generator=g), 9, 1, 4)
    target = (smooth > smooth.median()).long()
    logits = torch.randn(count, 2, size, size, generator=g) + torch.cat([1 - target, target], dim=1)
    return logits.requires_grad_(), target


def step(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Tensor:
    return torch.autograd.grad(loss(logits, target), logits)[0]


@pytest.mark.parametrize("kind", ["proto", "monai"])
def test_cldice(benchmark, kind):
    benchmark.group, benchmark.name = "cldice 4x256x256", f"cldice_{kind}"
    peer = SoftclDiceLoss(iter_=3)

    def monai(logits: Tensor, target: Tensor) -> Tensor:
        return peer(torch.cat([1 - target, target], dim=1).float(), logits.softmax(dim=1))

    benchmark(step, CLDiceLoss(alpha=1.0) if kind == "proto" else monai, *masks())


@pytest.mark.parametrize("kind", ["proto", "monai"])
def test_dice(benchmark, kind):
    benchmark.group, benchmark.name = "dice 4x256x256", f"dice_{kind}"
    logits, target = masks()
    both = torch.cat([1 - target, target], dim=1).float()
    benchmark(step, DiceLoss(clip=0.0) if kind == "proto" else MonaiDice(sigmoid=True, batch=True), logits, both)


@pytest.mark.parametrize("kind", ["proto", "monai"])
def test_ce_dice(benchmark, kind):
    benchmark.group, benchmark.name = "cedice 4x256x256", f"cedice_{kind}"
    dice = MonaiDice(softmax=True, to_onehot_y=True)

    def monai(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target[:, 0]) + dice(logits, target)

    benchmark(step, CEDiceLoss() if kind == "proto" else monai, *masks())


@pytest.mark.parametrize("kind", ["proto", "gudhi"])
def test_component_pairs(benchmark, kind):
    benchmark.group, benchmark.name = "component pairs 50x50", f"pairs_{kind}"
    f = masks(1, 50)[0].softmax(dim=1)[0, 0].detach().numpy()

    def peer() -> list:
        found = gudhi.CubicalComplex(top_dimensional_cells=f)
        found.compute_persistence()
        return found.cofaces_of_persistence_pairs()

    benchmark(lambda: component_pairs(f)) if kind == "proto" else benchmark(peer)


@pytest.mark.parametrize("kind", ["proto", "skimage"])
def test_betti(benchmark, kind):
    benchmark.group, benchmark.name = "betti 256x256", f"betti_{kind}"
    mask = masks()[1][0, 0]

    def peer() -> tuple[int, int]:
        values = np.pad(mask.numpy(), 1)
        background = skimage_label(values == 0, connectivity=1, return_num=True)[1]
        return skimage_label(values, connectivity=2, return_num=True)[1], background - 1

    benchmark(betti_numbers, mask) if kind == "proto" else benchmark(peer)


@pytest.mark.parametrize("kind", ["proto", "pysodmetrics"])
def test_saliency(benchmark, kind):
    benchmark.group, benchmark.name = "saliency 4x256x256", f"saliency_{kind}"
    logits, target = masks()
    preds = logits.softmax(dim=1)[:, 1].detach()

    def peer() -> None:
        measures = [MAE(), Fmeasure(), Smeasure(), Emeasure(), WeightedFmeasure()]
        for p, m in zip(preds, target[:, 0]):
            for measure in measures:
                measure.step(pred=(p * 255).numpy().astype(np.uint8), gt=m.numpy().astype(np.uint8) * 255)

    benchmark(saliency_metrics, preds, target[:, 0]) if kind == "proto" else benchmark(peer)
