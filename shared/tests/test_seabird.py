"""Dice, its noise analysis and the detection terms (SeaBird): the authors' values, Monte Carlo, MONAI, edge cases."""

import math

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss as PeerDice
from torch.nn import functional as F

from proto_core.losses import (
    DiceLoss,
    HeatmapFocalLoss,
    MaskedBCELoss,
    MaskedSmoothL1Loss,
    gather_map,
    gradient_variance,
    regression_gradient,
)


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "seabird.npz")


def near(found, expected, rtol=1e-8, atol=1e-10):
    np.testing.assert_allclose(torch.as_tensor(found).detach().numpy(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", ["dice0", "dice1"])
@pytest.mark.parametrize(("name", "options"), [("a", ()), ("b", (0.0, 1e-5, 1e-4))])
def test_dice_equals_the_authors_code(golden, case, name, options):
    logits = torch.from_numpy(golden[f"{case}/logits"]).requires_grad_()
    target = torch.from_numpy(golden[f"{case}/target"])
    found = DiceLoss(*options)(logits, target)
    near(found, golden[f"{case}/{name}_loss"])
    near(torch.autograd.grad(found, logits)[0], golden[f"{case}/{name}_grad"])
    near(DiceLoss(*options, from_logits=False)(logits.sigmoid(), target), golden[f"{case}/{name}_loss"])


@pytest.mark.parametrize("case", ["det0", "det1"])
def test_detection_terms_equal_the_authors_code(golden, case):
    def value(name):
        return torch.from_numpy(golden[f"{case}/{name}"])

    logits = value("hm_logits").requires_grad_()
    found = HeatmapFocalLoss()(logits.sigmoid().clamp(1e-3, 1 - 1e-3), value("hm_target"))
    near(found, golden[f"{case}/hm_loss"])
    near(torch.autograd.grad(found, logits)[0], golden[f"{case}/hm_grad"])
    index, mask = value("index"), value("mask")
    map = value("reg_map").requires_grad_()
    found = MaskedSmoothL1Loss()(map, index, mask, value("reg_target"))
    near(found, golden[f"{case}/reg_loss"])
    near(torch.autograd.grad(found, map)[0], golden[f"{case}/reg_grad"])
    logits = value("theta_logits").requires_grad_()
    found = MaskedBCELoss()(logits.sigmoid(), index, mask, value("theta_target"))
    near(found, golden[f"{case}/theta_loss"])
    near(torch.autograd.grad(found, logits)[0], golden[f"{case}/theta_grad"])


NAMES = ["l1", "l2", "smooth_l1", "dice_4", "dice_12"]


@pytest.mark.parametrize("name", NAMES)
def test_noise_analysis_equals_the_reference(golden, name):
    loss, length = (name, None) if "dice" not in name else ("dice", float(name.split("_")[1]))
    error, sigma = (torch.from_numpy(golden[f"noise0/{what}"]) for what in ("error", "sigma"))
    near(regression_gradient(error, loss, length), golden[f"noise0/grad_{name}"])
    near(gradient_variance(sigma, loss, length), golden[f"noise0/var_{name}"])


def test_gradients_are_those_of_the_losses():
    error = torch.tensor([-3.0, -0.4, 0.6, 2.5], dtype=torch.float64, requires_grad=True)
    overlap = (1 - error.abs() / 2).clamp_min(0)  # two segments of length 2
    for loss, value in {"l1": error.abs(), "l2": error**2 / 2, "dice": 1 - overlap}.items():
        near(regression_gradient(error.detach(), loss, 2.0), torch.autograd.grad(value.sum(), error)[0].numpy())
    peer = F.smooth_l1_loss(error, torch.zeros_like(error), reduction="sum")
    near(regression_gradient(error.detach(), "smooth_l1"), torch.autograd.grad(peer, error)[0].numpy())


def test_dice_on_one_class_is_monais():
    logits = torch.randn(3, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = (torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(1)) < 0.4).double()
    peer = PeerDice(sigmoid=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)
    near(DiceLoss(clip=0.0)(logits, target), peer(logits, target).item())


def test_dice_of_nothing_is_finite():
    nothing = torch.zeros(1, 2, 3, 3, requires_grad=True)
    calm = DiceLoss()(nothing - 100, torch.zeros(1, 2, 3, 3))
    assert calm.item() == pytest.approx(1 - 1 / (9e-3 + 1), abs=1e-6)
    strict = DiceLoss(0.0, 1e-5, 0.0)(nothing - 1000, torch.zeros(1, 2, 3, 3))
    assert strict == 1
    assert torch.autograd.grad(strict, nothing)[0].isfinite().all()
    assert DiceLoss(0.0, 0.0, 0.0, from_logits=False)(nothing.detach(), torch.zeros(1, 2, 3, 3)) == 1


def test_heatmap_without_centres_and_at_the_ends():
    prob = torch.tensor([[[[0.0, 1.0, 0.25]]]], dtype=torch.float64, requires_grad=True)
    value = HeatmapFocalLoss()(prob, torch.tensor([[[[1.0, 0.0, 0.5]]]], dtype=torch.float64))
    assert value.isfinite()
    assert torch.autograd.grad(value, prob)[0].isfinite().all()
    alone = HeatmapFocalLoss()(torch.full((1, 1, 1, 2), 0.5), torch.tensor([[[[0.5, 0.5]]]]))
    assert alone.item() == pytest.approx(2 * 0.5**4 * 0.25 * math.log(2))


def test_gathered_values_stand_where_they_say():
    map = torch.arange(24.0).reshape(2, 1, 3, 4)
    found = gather_map(map, torch.tensor([[5, 0], [11, 3]]))
    assert found[..., 0].tolist() == [[5, 0], [23, 15]]


X = torch.full((1, 2, 2, 2), 0.5)
PLACES, M = torch.tensor([[0, 3]]), torch.ones(1, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DiceLoss(-1.0), "numerator_smooth: found -1.0"),
        (lambda: DiceLoss(clip=0.5), "clip: found 0.5"),
        (lambda: DiceLoss()(X, X[:, :1]), "input, target: found shapes"),
        (lambda: DiceLoss()(X, X + 1), "target: found values from 1.5 to 1.5"),
        (lambda: HeatmapFocalLoss()(X, X[:, :1]), "prob, target: found shapes"),
        (lambda: HeatmapFocalLoss()(X, X - 1), "target: found values from -0.5"),
        (lambda: gather_map(X, torch.tensor([[4]])), "index: found values from 4 to 4, needed 0 to 3"),
        (lambda: gather_map(X[0], PLACES), "map, index: found shapes"),
        (lambda: MaskedSmoothL1Loss()(X, PLACES, M[:, :1], torch.ones(1, 2, 2)), "index, mask, target: found shapes"),
        (lambda: MaskedBCELoss()(X, PLACES, M, torch.ones(1, 2, 1)), "index, mask, target: found shapes"),
        (lambda: regression_gradient(torch.ones(1), "huber"), "loss: found 'huber'"),
        (lambda: regression_gradient(torch.ones(1), "dice"), "length: found None"),
        (lambda: gradient_variance(torch.ones(1), "dice", 0.0), "length: found 0.0"),
        (lambda: regression_gradient(torch.ones(1), "l1", -1.0), "length: found -1.0"),
        (lambda: gradient_variance(torch.zeros(1), "l1"), "sigma: found 0.0"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
