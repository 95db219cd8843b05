"""PALM: the authors' values over two steps, its rules by hand, the OOD score and metrics with scikit-learn beside."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.nn import functional as F

from proto_core.losses import PALMLoss
from proto_core.metrics import OODDetection, auroc, fpr_at_tpr, ood_metrics
from proto_core.ood import MahalanobisOOD
from proto_core.prototypes import MixturePrototypes

EXACT = {"rtol": 1e-7, "atol": 1e-9}


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "palm.npz")


def from_golden(golden, case, dtype=torch.float64):
    momentum, temperature, weight, epsilon = golden[f"{case}_hyper"].tolist()
    further = {
        name: golden[f"{case}_{name}"].item()
        for name in ("proto_temperature", "sinkhorn_iterations")
        if f"{case}_{name}" in golden
    }
    start = torch.from_numpy(golden[f"{case}_prototypes_init"])
    loss = PALMLoss(
        int(golden[f"{case}_num_classes"]),
        start.shape[1],
        int(golden[f"{case}_per_class"]),
        momentum,
        temperature,
        lambda_pcon=weight,
        epsilon=epsilon,
        top_k=int(golden[f"{case}_top_k"]),
        **further,
    ).to(dtype)
    loss.prototypes.set_(start)
    return loss


@pytest.mark.parametrize("case, dtype", [(c, torch.float64) for c in "abcde"] + [("e", torch.float32)])
def test_two_steps_equal_the_authors_code(golden, case, dtype):
    loss = from_golden(golden, case, dtype)
    tolerance = EXACT if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-5}
    for step in range(int(golden[f"{case}_steps"])):

        def check(value, name, step=step):
            if f"{case}_{name}_s{step}" in golden:
                np.testing.assert_allclose(value.detach(), golden[f"{case}_{name}_s{step}"], err_msg=name, **tolerance)

        z = torch.from_numpy(golden[f"{case}_emb_s{step}"]).to(dtype).requires_grad_()
        labels = torch.from_numpy(golden[f"{case}_lab_s{step}"])
        check(loss.prototypes.assign(z), "assign")
        check(loss.prototypes.update(z, labels)[1].long(), "selected")
        before = loss.prototypes.prototypes.clone()
        loss.eval()
        resting = loss(z, labels)
        assert torch.equal(loss.prototypes.prototypes, before)
        check(torch.autograd.grad(resting, z)[0], "grad")
        loss.train()
        found = loss(z, labels)
        assert found == resting
        check(found, "loss")
        check(loss.terms["mle"], "mle")
        check(loss.terms["proto_contrast"], "pcon")
        check(torch.autograd.grad(found, z)[0], "grad")
        check(loss.prototypes.prototypes, "protos")
        check(loss.prototypes.assign(z, torch.from_numpy(golden[f"{case}_protos_s{step}"])), "assign_new")


def test_rows_are_interleaved_and_unreached_prototypes_stay():
    layer = MixturePrototypes(3, 4, 2, top_k=1)
    assert layer.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(layer.class_identity.argmax(1), layer.labels)
    torch.testing.assert_close(layer.prototypes.norm(dim=1), torch.ones(6))
    assert (layer.prototypes >= 0).all()
    z = F.normalize(torch.randn(5, 4))
    moved, selected = layer.update(z, torch.tensor([0, 0, 1, 1, 1]))
    assert torch.equal(moved[[2, 5]], layer.prototypes[[2, 5]])
    assert (selected.sum(1) == 1).all()
    assert torch.equal(selected, selected & (layer.class_identity.T[torch.tensor([0, 0, 1, 1, 1])] > 0))
    for unreached in (~selected.any(0)).nonzero().flatten():
        assert torch.equal(moved[unreached], layer.prototypes[unreached])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), epsilon=st.sampled_from([0.1, 0.5, 2.0]))
def test_assignments_are_shares(seed, epsilon):
    torch.manual_seed(seed)
    layer = MixturePrototypes(3, 4, 2, epsilon=epsilon).double()
    share = layer.assign(F.normalize(torch.randn(7, 4).double()))
    assert (share >= 0).all()
    torch.testing.assert_close(share.sum(1), torch.ones(7).double())


@pytest.mark.parametrize("epsilon", [0.5, 0.05, 0.01])
def test_sums_below_the_floor_are_divided_by_it(epsilon):
    torch.manual_seed(0)
    layer = MixturePrototypes(2, 4, 2, epsilon=epsilon, sinkhorn_iterations=4).double()
    z = F.normalize(torch.rand(6, 4).double())
    layer.set_(torch.cat([F.normalize(torch.rand(3, 4).double()), -z[:1]]))
    share = (z @ layer.prototypes.T / epsilon).exp().T
    share = share / share.sum()
    floored = bool(share.sum(1).min() < 1e-12)
    for _ in range(4):
        share = share / share.sum(1, keepdim=True).clamp_min(1e-12) / 4
        share = share / share.sum(0, keepdim=True).clamp_min(1e-12) / 6
    assert floored == (epsilon < 0.5)
    torch.testing.assert_close(layer.assign(z), (share * 6).T, rtol=1e-9, atol=0)


def test_one_sample_a_missing_class_and_zero_rows():
    loss = PALMLoss(3, 4, 2)
    for z in (F.normalize(torch.randn(1, 4)), torch.zeros(2, 4)):
        z.requires_grad_()
        found = loss(z, torch.zeros(len(z), dtype=torch.long))
        assert found.isfinite()
        assert torch.autograd.grad(found, z)[0].isfinite().all()


def test_bfloat16_is_computed_in_float32():
    torch.manual_seed(0)
    loss = PALMLoss(3, 4, 2)
    z, labels = F.normalize(torch.randn(6, 4)).bfloat16(), torch.arange(6) % 3
    other = copy.deepcopy(loss)
    found = loss(z, labels)
    assert found.dtype == torch.float32
    assert loss.prototypes.prototypes.dtype == torch.float32
    torch.testing.assert_close(found, other(z.float(), labels))


def test_state_survives():
    torch.manual_seed(0)
    loss, other = PALMLoss(3, 4, 2), PALMLoss(3, 4, 2)
    assert not list(loss.parameters())
    other.load_state_dict(loss.state_dict())
    z, labels = F.normalize(torch.randn(6, 4)), torch.arange(6) % 3
    assert torch.equal(copy.deepcopy(loss)(z, labels), loss(z, labels))
    assert other(z, labels).isfinite()
    assert torch.equal(other.prototypes.prototypes, loss.prototypes.prototypes)
    torch.testing.assert_close(other.prototypes(z), z @ other.prototypes.prototypes.T)
    assert "top_k=2" in repr(loss)


@pytest.mark.parametrize("legacy", [True, False])
def test_mahalanobis_equals_the_authors_code(golden, legacy):
    detector = MahalanobisOOD(legacy).fit(torch.from_numpy(golden["ood_train"]))
    end = "_code" if legacy else ""
    scores = {name: detector.score(torch.from_numpy(golden[f"ood_{name}"])) for name in ("test", "ood", "tiny")}
    for name, score in scores.items():
        tolerance = {"rtol": 1e-6} if name == "tiny" else EXACT
        np.testing.assert_allclose(score, golden[f"ood_score_{name}{end}"], **tolerance)
    kind = "" if legacy else "_std"
    assert auroc(scores["test"], scores["ood"]) == pytest.approx(float(golden[f"ood_auroc{kind}"]))
    assert fpr_at_tpr(scores["test"], scores["ood"]) == pytest.approx(float(golden[f"ood_fpr95{kind}"]))


def test_singular_features_equal_the_reference(golden):
    found = MahalanobisOOD().fit(torch.from_numpy(golden["sing_train"])).score(torch.from_numpy(golden["sing_test"]))
    np.testing.assert_allclose(found, golden["sing_score"], rtol=1e-6)
    assert MahalanobisOOD().fit(torch.ones(5, 3)).score(torch.zeros(1, 3)).isfinite().all()


def test_ties_at_the_threshold(golden):
    known, unknown = golden["tie_id"], golden["tie_ood"]
    assert auroc(known, unknown) == pytest.approx(float(golden["tie_auroc"]))
    assert fpr_at_tpr(known, unknown) == pytest.approx(float(golden["tie_fpr95"]))
    assert fpr_at_tpr(known, unknown, 0.8) == pytest.approx(float(golden["tie_fpr80"]))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_metrics_agree_with_scikit_learn_and_any_split(seed):
    g = np.random.default_rng(seed)
    known, unknown = g.integers(0, 9, 25) / 4 + 1, g.integers(0, 9, 15) / 4
    labels, scores = np.r_[np.ones(25), np.zeros(15)], np.r_[known, unknown]
    found = ood_metrics(-known, -unknown)
    assert found.auroc == pytest.approx(roc_auc_score(labels, scores))
    assert found.aupr_in == pytest.approx(average_precision_score(labels, scores))
    assert found.aupr_out == pytest.approx(average_precision_score(1 - labels, -scores))
    metric = OODDetection()
    order, cut = g.permutation(40), int(g.integers(0, 41))
    for rows in (order[:cut], order[cut:]):
        metric.update(torch.from_numpy(scores[rows]), torch.from_numpy(labels[rows]))
    expected = {"auroc": found.auroc, "aupr_in": found.aupr_in, "aupr_out": found.aupr_out}
    assert metric.compute() == pytest.approx(expected | {"fpr": fpr_at_tpr(known, unknown)})


def test_recall_nearest_to_the_level():
    """Six positives: recalls 1, 5/6, ...; 1 is nearest to 0.95, at the highest threshold that has it."""
    known = np.array([1.0, 2, 3, 4, 5, 6])
    assert ood_metrics(-known, -np.array([0.5, 0.9, 1.0, 1.5])).fpr_in == 0.5
    many = np.arange(1.0, 41)  # 38 of 40 is 0.95, at the thresholds 2.5 and 3; the lower one is met first
    assert ood_metrics(-many, -np.array([0.5, 2.5, 3.0, 9.0])).fpr_in == 0.75


@pytest.mark.bad_input
def test_bad_input_is_named():
    z, y = torch.randn(4, 3), torch.arange(4) % 2
    loss, fitted = PALMLoss(2, 3), MahalanobisOOD().fit(z)
    for call, says in [
        (lambda: loss(z, y + 1), "targets: found 2"),
        (lambda: loss(z, y.float()), "targets: found torch.float32"),
        (lambda: loss(z, y.bool()), "targets: found torch.bool"),
        (lambda: loss(z[:0], y[:0]), "embeddings, targets: found shapes"),
        (lambda: loss(z[:, :2], y), "embeddings: found shape"),
        (lambda: loss.prototypes.assign(z, z), "prototypes: found shape"),
        (lambda: loss.prototypes.set_(z), "prototypes: found shape"),
        (lambda: PALMLoss(1), "num_classes: found 1"),
        (lambda: PALMLoss(2, 0), "embedding_dim: found 0"),
        (lambda: PALMLoss(2, prototypes_per_class=0), "prototypes_per_class: found 0"),
        (lambda: PALMLoss(2, top_k=-1), "top_k: found -1"),
        (lambda: PALMLoss(2, sinkhorn_iterations=0), "sinkhorn_iterations: found 0"),
        (lambda: PALMLoss(2, epsilon=0.0), "epsilon: found 0.0"),
        (lambda: PALMLoss(2, temperature=0.0), "temperature: found 0.0"),
        (lambda: PALMLoss(2, proto_temperature=0.0), "proto_temperature: found 0.0"),
        (lambda: PALMLoss(2, momentum=1.1), "momentum: found 1.1"),
        (lambda: PALMLoss(2, lambda_pcon=-1.0), "lambda_pcon: found -1.0"),
        (lambda: MahalanobisOOD().fit(z[:0]), "train_features: found shape"),
        (lambda: MahalanobisOOD().fit(z * torch.nan), "train_features: found 4 rows with NaN"),
        (lambda: fitted.score(z[:, :2]), "features: found shape"),
        (lambda: auroc([], [1.0]), "id_scores: found shape"),
        (lambda: auroc([1.0], [math.nan]), "ood_scores: found 1 NaN"),
        (lambda: fpr_at_tpr([1.0], [1.0], 0.0), "tpr: found 0.0"),
        (lambda: OODDetection(tpr=2.0), "tpr: found 2.0"),
        (lambda: OODDetection().compute(), "no batch"),
        (lambda: OODDetection().update(z, y), "scores, known: found shapes"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
    with pytest.raises(RuntimeError, match="fit comes before score"):
        MahalanobisOOD().score(z)
