"""The hybrid segmentation loss and the metrics of salient objects (BASNet): the authors' values, peers, edges."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from proto_core.losses import HybridSegmentationLoss
from proto_core.metrics import SaliencyMetrics, saliency_metrics


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "basnet.npz")


def near(found, expected, tolerance=1e-8):
    np.testing.assert_allclose(torch.as_tensor(found).detach().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", ["a", "b", "c", "sat", "lg", "em"])
def test_loss_equals_the_authors_code(golden, case):
    pred, target = (torch.from_numpy(golden[f"{case}_{name}"]) for name in ("pred", "target"))
    pred.requires_grad_()
    loss = HybridSegmentationLoss(from_logits=case == "lg")
    found = loss(pred, target)
    near(found, golden[f"{case}_loss"])
    for name, value in loss.terms.items():
        near(value, golden[f"{case}_{name}"])
    (gradient,) = torch.autograd.grad(found, pred)
    assert gradient.isfinite().all()
    if f"{case}_grad" in golden:
        near(gradient, golden[f"{case}_grad"])


def test_several_outputs_and_other_settings_equal_the_reference(golden):
    maps, target = torch.from_numpy(golden["multi_pred"]), torch.from_numpy(golden["multi_target"])
    near(HybridSegmentationLoss()(list(maps), target), golden["multi_loss"])
    pred, target = (torch.from_numpy(golden[f"em_{name}"]) for name in ("pred", "target"))
    near(HybridSegmentationLoss(0.5, 2.0, 0.7, window_size=7, sigma=1.0)(pred, target), golden["em_loss_w"])


def test_loss_is_what_its_parts_are():
    target = (torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.4).double()
    logits = torch.randn(2, 1, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = logits.sigmoid()
    bce = HybridSegmentationLoss(ssim_weight=0, iou_weight=0)
    near(bce(p, target), F.binary_cross_entropy(p, target).item())
    near(HybridSegmentationLoss(from_logits=True)(logits, target), HybridSegmentationLoss()(p, target).item())
    hard = (p > 0.5).double()
    overlap = [float((h * t).sum() / ((h + t) > 0).sum()) for h, t in zip(hard, target)]
    near(HybridSegmentationLoss(bce_weight=0, ssim_weight=0)(hard, target), 1 - np.mean(overlap))
    assert HybridSegmentationLoss()(target, target).item() == pytest.approx(0, abs=1e-12)


def test_nothing_predicted_and_nothing_there_is_perfect():
    nothing = torch.zeros(2, 1, 16, 16, requires_grad=True)
    loss = HybridSegmentationLoss()
    value = loss(nothing, torch.zeros(2, 1, 16, 16))
    assert value == 0
    assert torch.autograd.grad(value, nothing)[0].isfinite().all()


X = torch.full((1, 1, 4, 4), 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HybridSegmentationLoss(bce_weight=-1.0), "bce_weight: found -1.0"),
        (lambda: HybridSegmentationLoss(window_size=4), "window_size: found 4"),
        (lambda: HybridSegmentationLoss(sigma=0.0), "sigma: found 0.0"),
        (lambda: HybridSegmentationLoss()([], X), "pred: found an empty sequence"),
        (lambda: HybridSegmentationLoss()(X, X[..., 1:]), "pred, target: found shapes"),
        (lambda: HybridSegmentationLoss()(X.repeat(1, 2, 1, 1), X.repeat(1, 2, 1, 1)), "pred, target: found shapes"),
        (lambda: HybridSegmentationLoss()(X, X + 1), "target: found values from 1.5"),
        (lambda: HybridSegmentationLoss()(X - 1, X), "pred: found values from -0.5"),
    ],
)
def test_loss_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


SCALARS = ["mae", "maxf_dataset", "maxf_image", "adpf", "s_measure", "e_adaptive", "e_max", "e_mean", "weighted_f"]
SCALARS += ["relaxed_precision", "relaxed_recall", "relaxed_f"]
KEYS = [*SCALARS, "precision_curve", "recall_curve"]


def test_metrics_equal_the_reference(golden):
    preds, masks = (torch.from_numpy(golden[f"m_{name}"]) for name in ("pred", "target"))
    found = saliency_metrics(preds, masks)
    assert set(found) == set(KEYS)
    for name in KEYS:
        near(found[name], golden[f"m_{name}"], 1e-6)
    other = saliency_metrics(preds, masks, beta2=1, rho=1, threshold=0.3)
    for name in ("adpf", "maxf_image", "maxf_dataset", "relaxed_precision", "relaxed_recall", "relaxed_f"):
        near(other[name], golden[f"m2_{name}"], 1e-6)


def test_metrics_of_strange_images_equal_the_reference(golden):
    preds, masks = (torch.from_numpy(golden[f"n_{name}"]) for name in ("pred", "target"))
    for i in range(len(preds)):
        found = saliency_metrics(preds[i : i + 1], masks[i : i + 1])
        for name in KEYS:
            np.testing.assert_allclose(found[name].numpy(), golden[f"n_{name}"][i], rtol=1e-6, atol=1e-6, err_msg=name)


def pictures(seed: int, count: int = 5):
    g = torch.Generator().manual_seed(seed)
    smooth = F.avg_pool2d(torch.rand(count, 1, 30, 34, generator=g), 5, 1, 2)[:, 0]
    masks = smooth > smooth.flatten(1).median(dim=1).values[:, None, None]
    return (0.6 * smooth + 0.4 * torch.rand(count, 30, 34, generator=g)).clamp(0, 1), masks


def test_metrics_equal_their_peer():
    from py_sod_metrics import MAE, Emeasure, Fmeasure, Smeasure, WeightedFmeasure

    preds, masks = pictures(3)
    preds = (preds * 255).round().double() / 255
    peers = {"mae": MAE(), "s": Smeasure(), "e": Emeasure(), "f": Fmeasure(), "wf": WeightedFmeasure()}
    for p, m in zip(preds, masks):
        for peer in peers.values():
            peer.step(pred=(p * 255).round().numpy().astype(np.uint8), gt=m.numpy().astype(np.uint8) * 255)
    ours = saliency_metrics(preds, masks)
    results = {name: peer.get_results() for name, peer in peers.items()}
    for name, expected in {
        "mae": results["mae"]["mae"],
        "s_measure": results["s"]["sm"],
        "e_adaptive": results["e"]["em"]["adp"],
        "e_max": results["e"]["em"]["curve"].max(),
        "e_mean": results["e"]["em"]["curve"].mean(),
        "maxf_image": results["f"]["fm"]["curve"].max(),
        "adpf": results["f"]["fm"]["adp"],
        "weighted_f": results["wf"]["wfm"],
    }.items():
        assert ours[name].item() == pytest.approx(float(expected), abs=1e-6), name


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 5), max_size=3))
def test_any_split_gives_the_same(seed, cuts):
    preds, masks = pictures(seed)
    whole, split = SaliencyMetrics(), SaliencyMetrics()
    whole.update(preds, masks)
    edges = [0, *sorted(cuts), 5]
    for a, b in itertools.pairwise(edges):
        if b > a:
            split.update(preds[a:b], masks[a:b])
    for name, value in whole.compute().items():
        torch.testing.assert_close(split.compute()[name], value)


def test_a_perfect_map_and_a_shifted_boundary():
    mask = torch.zeros(1, 20, 20, dtype=torch.bool)
    mask[0, 5:15, 5:15] = True
    perfect = saliency_metrics(mask.float(), mask)
    assert perfect["mae"] == 0
    assert perfect["relaxed_f"] == perfect["maxf_dataset"] == 1
    moved = torch.roll(mask, 2, dims=2).float()
    assert saliency_metrics(moved, mask, rho=2)["relaxed_f"] == 1
    assert saliency_metrics(moved, mask, rho=1)["relaxed_f"] < 0.7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: saliency_metrics(X[0], X[0, :, 1:]), "preds, masks: found shapes"),
        (lambda: saliency_metrics(X[0, 0], X[0, 0]), "preds, masks: found shapes"),
        (lambda: saliency_metrics(X[0, :0], X[0, :0]), "preds, masks: found shapes"),
        (lambda: saliency_metrics(X[0] + 1, X[0]), "preds: found values from 1.5"),
        (lambda: SaliencyMetrics(beta2=0.0), "beta2: found 0.0"),
        (lambda: SaliencyMetrics(rho=-1.0), "rho: found -1.0"),
        (lambda: SaliencyMetrics(threshold=2.0), "threshold: found 2.0"),
        (lambda: SaliencyMetrics().compute(), "found no image"),
    ],
)
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_metrics_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()
