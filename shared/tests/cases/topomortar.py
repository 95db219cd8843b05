"""The eight segmentation losses of TopoMortar."""

import torch
from torch import Tensor

from proto_core.losses import (
    CBDiceLoss,
    CEDiceLoss,
    CESkeletonRecallLoss,
    CLDiceLoss,
    RegionWiseLoss,
    TopoLoss,
    TopoWinLoss,
    WarpingLoss,
)
from shared.tests.loss_case import LossCase

HOST = "distances, skeletons or components are found by SciPy and scikit-image on the host"


def masks(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    noise = torch.rand(4, 1, 16, 18, generator=g)
    target = (torch.nn.functional.avg_pool2d(noise, 3, 1, 1) > 0.52).long()
    logits = torch.randn(4, 2, 16, 18, generator=g, dtype=torch.float64)
    return logits + 2 * torch.cat([1 - target, target], dim=1), target


def distances(seed: int) -> tuple[Tensor, Tensor]:
    logits, target = masks(seed)
    return logits[:, 1:] * 3, target


HOSTED = {"graph_break": HOST, "host_sync": HOST}
CASES = [
    LossCase("CEDiceLoss", CEDiceLoss, masks),
    LossCase("CEDiceLoss[weights]", lambda: CEDiceLoss(weights=(0.5, 2.0)), masks),
    LossCase("CLDiceLoss", CLDiceLoss, masks),
    LossCase("RegionWiseLoss", RegionWiseLoss, masks, **HOSTED),
    LossCase("CESkeletonRecallLoss", CESkeletonRecallLoss, masks, **HOSTED),
    LossCase("CBDiceLoss", CBDiceLoss, masks, **HOSTED),
    LossCase("WarpingLoss", WarpingLoss, masks, **HOSTED),
    LossCase("TopoLoss", lambda: TopoLoss(topo_size=9), masks, **HOSTED),
    LossCase("TopoWinLoss", lambda: TopoWinLoss(window=9, d_max=3, d_min=1), distances, **HOSTED),
]
