"""Losses, skeletons and measures of topology (TopoMortar): the authors' values, peers, brute force, edges."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses import DiceLoss as PeerDice
from scipy.ndimage import label
from torch.nn import functional as F

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
from proto_core.losses.spanning import component_pairs, spanning_pairs
from proto_core.metrics import (
    BettiError,
    betti_error,
    betti_error_local,
    betti_numbers,
    cldice_score,
    dice_score,
    hd95,
)
from proto_core.skeleton import euler_skeleton, soft_skeleton, tubed_skeleton


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "topomortar.npz")


def inactive(loss):
    loss.active = False
    return loss


LOSSES = {
    "cedice": CEDiceLoss,
    "regionwise": RegionWiseLoss,
    "cldice": CLDiceLoss,
    "cldice_it5_a03": lambda: CLDiceLoss(iterations=5, alpha=0.3),
    "skelrecall": CESkeletonRecallLoss,
    "cbdice": CBDiceLoss,
    "warping": WarpingLoss,
    "warping_inactive": lambda: inactive(WarpingLoss()),
    "topoloss": lambda: TopoLoss(topo_size=24),
}


def compare(golden, loss, case, name):
    logits = torch.from_numpy(golden[f"{case}_logits"]).requires_grad_()
    found = loss(logits, torch.from_numpy(golden[f"{case}_target"]))
    (gradient,) = torch.autograd.grad(found, logits)
    value, slope = (1e-7, 1e-9) if "cbdice" in name else (1e-8, 1e-8)
    if "cbdice" in name and case in "cf":
        value, slope = 1e-6, 1e-8
    np.testing.assert_allclose(found.item(), golden[f"{case}_{name}"], rtol=0, atol=value)
    np.testing.assert_allclose(gradient.numpy(), golden[f"{case}_{name}_grad"], rtol=0, atol=slope)


STORED = [(case, name) for case in "ab" for name in LOSSES]
STORED += [("p", "warping"), ("c", "warping"), ("c", "topoloss")]
STORED += [("f", name) for name in ("regionwise", "cldice", "skelrecall", "cbdice", "warping", "topoloss")]


@pytest.mark.parametrize(("case", "name"), STORED)
def test_losses_equal_the_authors_code(golden, case, name):
    compare(golden, LOSSES[name](), case, name)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cedice_w", CEDiceLoss),
        ("cldice_w", CLDiceLoss),
        ("skelrecall_w", CESkeletonRecallLoss),
        ("cbdice_w", CBDiceLoss),
        ("warping_w", WarpingLoss),
        ("topoloss_w", lambda weights: TopoLoss(topo_size=24, weights=weights)),
    ],
)
def test_class_weights_equal_the_authors_code(golden, name, kind):
    compare(golden, kind(weights=golden["c_w"]), "c", name)


def test_windows_equal_the_brute_force_reference(golden):
    out = torch.from_numpy(golden["t_out"]).requires_grad_()
    found = TopoWinLoss(window=24, d_max=8, d_min=4)(out, torch.from_numpy(golden["t_target"]))
    np.testing.assert_allclose(found.item(), golden["t_topowin"], rtol=1e-8)
    np.testing.assert_allclose(torch.autograd.grad(found, out)[0].numpy(), golden["t_topowin_grad"], atol=1e-8)


@pytest.mark.parametrize("case", "ab")
def test_skeletons_equal_the_authors_code(golden, case):
    target = torch.from_numpy(golden[f"{case}_target"])
    soft = soft_skeleton(torch.from_numpy(golden[f"{case}_logits"]).softmax(dim=1), 3)
    np.testing.assert_allclose(soft.numpy(), golden[f"{case}_softskel3"], atol=1e-8)
    assert torch.equal(euler_skeleton(target), torch.from_numpy(golden[f"{case}_eulerskel"]))
    assert torch.equal(tubed_skeleton(target), torch.from_numpy(golden[f"{case}_tubeskel"]))


def test_measures_equal_the_reference(golden):
    def value(name):
        return torch.from_numpy(golden[name])

    pred, target = value("m_pred"), value("m_target")
    for masks, name in ((pred, "pred"), (target, "target")):
        assert torch.equal(torch.stack([betti_numbers(mask) for mask in masks]), value(f"m_betti_{name}"))
    assert torch.equal(betti_error(pred, target), value("m_betti_error"))
    convention = torch.stack([betti_numbers(mask) for mask in value("conv_masks")])
    assert torch.equal(convention, value("conv_betti"))
    for found, name in [
        (betti_error_local(pred, target, window=24), "m_betti_local24"),
        (dice_score(pred, target), "m_dice"),
        (hd95(pred, target), "m_hd95"),
        (hd95(pred, target, spacing=(2, 0.5)), "m_hd95_sp"),
        (cldice_score(pred, target), "m_cldice"),
        (dice_score(value("e_pred"), value("e_target")), "e_dice"),
        (hd95(value("e_pred"), value("e_target")), "e_hd95"),
        (cldice_score(value("e_pred"), value("e_target")), "e_cldice"),
        (betti_error(value("e_pred"), value("e_target")), "e_betti_error"),
    ]:
        np.testing.assert_allclose(found.numpy(), golden[name], rtol=1e-6, atol=1e-8, err_msg=name)


def picture(seed: int, height: int = 14, width: int = 17) -> np.ndarray:
    return np.random.default_rng(seed).random((height, width))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 12))
def test_pairs_of_components_are_gudhis(seed, height, width):
    import gudhi

    f = picture(seed, height, width)
    complex_ = gudhi.CubicalComplex(top_dimensional_cells=f)
    complex_.compute_persistence()
    expected = sorted(map(tuple, complex_.persistence_intervals_in_dimension(0).tolist()))
    expected = [pair for pair in expected if np.isfinite(pair[1])]
    birth, death = component_pairs(f)
    found = sorted(zip(f.reshape(-1)[birth].tolist(), f.reshape(-1)[death].tolist()))
    np.testing.assert_allclose(np.array(found).reshape(-1, 2), np.array(expected).reshape(-1, 2))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_numbers_of_components_follow_the_threshold(seed):
    f = np.round(picture(seed), 1)  # with ties
    birth, death = component_pairs(f)
    low, high = f.reshape(-1)[birth], f.reshape(-1)[death]
    for level in np.arange(0, 1.05, 0.1):
        components = label(f <= level + 1e-9, structure=np.ones((3, 3)))[1]
        alive = int(((low <= level + 1e-9) & (high > level + 1e-9)).sum()) + int(f.min() <= level + 1e-9)
        assert components == alive


def test_spanning_pairs_equal_brute_force():
    g = np.random.default_rng(0)
    nodes = 9
    edges = [(a, b) for a, b in itertools.combinations(range(nodes), 2) if g.random() < 0.5]
    one, two = (np.array(end) for end in zip(*edges))
    cost, labels = g.random(len(edges)), g.integers(0, 3, nodes)
    same, other = spanning_pairs(one, two, cost, labels)
    expected = np.zeros((2, len(edges)))

    def connected(a, b, level):
        seen, stack = {a}, [a]
        while stack:
            node = stack.pop()
            for e, (x, y) in enumerate(edges):
                if cost[e] >= level and node in (x, y):
                    stack += [n for n in (x, y) if n not in seen]
                    seen |= {x, y}
        return b in seen

    for a, b in itertools.combinations(range(nodes), 2):
        if labels[a] and labels[b]:
            for e in np.argsort(-cost):
                if connected(a, b, cost[e]):
                    expected[int(labels[a] != labels[b]), e] += 1
                    break
    np.testing.assert_array_equal(same, expected[0])
    np.testing.assert_array_equal(other, expected[1])


def test_dice_is_monais_with_another_sign():
    logits = torch.randn(2, 2, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = (torch.rand(2, 1, 9, 8, generator=torch.Generator().manual_seed(1)) < 0.4).long()
    peer = PeerDice(softmax=True, to_onehot_y=True, smooth_nr=1e-5, smooth_dr=1e-5)
    found = CEDiceLoss(lambda_ce=0)(logits, target)
    assert found.item() == pytest.approx(peer(logits, target).item() - 1, abs=1e-12)
    entropy = CEDiceLoss(lambda_dice=0)(logits, target)
    assert entropy.item() == pytest.approx(F.cross_entropy(logits, target[:, 0]).item(), abs=1e-9)


def test_perfect_masks_and_a_cut():
    target = torch.zeros(1, 1, 24, 24, dtype=torch.long)
    target[..., 8:16, 2:22] = 1
    cut = target.clone()
    cut[..., 11:13] = 0
    shaved = target.clone()
    shaved[..., 8, 2:22] = 0

    def logits(mask):
        return 4.0 * torch.cat([1 - mask, mask], dim=1).double()

    warping, base = WarpingLoss(lambd=1.0), inactive(WarpingLoss())
    assert warping(logits(shaved), target) == base(logits(shaved), target), "the topology is right: nothing is critical"
    assert warping(logits(cut), target) > base(logits(cut), target) + 0.01
    topo, plain = TopoLoss(topo_size=24), inactive(TopoLoss())
    two = target.clone()
    two[..., 11:13] = 0
    assert topo(logits(cut), two) != plain(logits(cut), two)
    for loss in (CLDiceLoss(), CESkeletonRecallLoss(), CBDiceLoss(), RegionWiseLoss()):
        assert loss(logits(target), target) < loss(logits(cut), target)


@pytest.mark.parametrize("fill", [0, 1])
def test_masks_of_one_kind_are_finite(fill):
    target = torch.full((2, 1, 12, 12), fill)
    logits = torch.randn(2, 2, 12, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for kind in (*LOSSES.values(), TopoWinLoss):
        given = logits[:, 1:] if kind is TopoWinLoss else logits
        value = kind()(given, target)
        assert value.isfinite()
        assert torch.autograd.grad(value, logits)[0].isfinite().all()
    plain = inactive(TopoLoss(topo_size=24))(logits, target)
    assert TopoLoss(topo_size=24)(logits, target) == plain


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_euler_skeleton_keeps_the_topology(seed):
    noise = torch.rand(1, 1, 24, 24, generator=torch.Generator().manual_seed(seed))
    mask = (F.avg_pool2d(noise, 5, 1, 2) > 0.5).long()
    skeleton = euler_skeleton(mask)
    assert ((skeleton == 1) <= (mask == 1)).all()
    assert torch.equal(betti_numbers(skeleton[0, 0]), betti_numbers(mask[0, 0]))


def test_betti_metric_is_the_mean_for_any_split():
    g = torch.Generator().manual_seed(0)
    pred, target = (torch.rand(2, 7, 20, 20, generator=g) > 0.6).long()
    for window, expected in ((None, betti_error(pred, target)), (8, betti_error_local(pred, target, 8))):
        metric = BettiError(window)
        for part in (slice(0, 2), slice(2, 3), slice(3, 7)):
            metric.update(pred[part], target[part])
        found = metric.compute()
        assert [found["betti0"], found["betti1"]] == pytest.approx(expected.double().mean(dim=0).tolist(), abs=1e-6)


L, T = torch.zeros(1, 2, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CEDiceLoss()(torch.zeros(1, 3, 8, 8), T), r"logits, target: found shapes \(1, 3, 8, 8\)"),
        (lambda: CLDiceLoss()(L, T.float()), "target: found torch.float32"),
        (lambda: WarpingLoss()(L, T + 2), "target: found values from 2 to 2"),
        (lambda: TopoLoss()(L, T[..., 1:]), "logits, target: found shapes"),
        (lambda: TopoWinLoss()(L, T), "logits, target: found shapes"),
        (lambda: CEDiceLoss(weights=[1.0]), "weights: found"),
        (lambda: CEDiceLoss(weights=[1.0, -1.0]), "weights: found"),
        (lambda: CLDiceLoss(iterations=-1), "iterations: found -1"),
        (lambda: TopoLoss(topo_size=0), "topo_size: found 0"),
        (lambda: TopoWinLoss(window=0), "window: found 0"),
        (lambda: soft_skeleton(L[0], 3), "prob, iterations: found"),
        (lambda: euler_skeleton(L), "mask, iterations: found"),
        (lambda: tubed_skeleton(L.long()), "target: found shape"),
        (lambda: betti_numbers(T[0]), "mask: found shape"),
        (lambda: betti_error(T[0], T[0, :, 1:]), "pred, target: found shapes"),
        (lambda: betti_error_local(T[0], T[0], window=0), "window: found 0"),
        (lambda: hd95(T[0], T[0], spacing=(1, 0)), "spacing: found"),
        (lambda: dice_score(T, T), "pred, target: found shapes"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
