"""PRD: the authors' values, loops over anchors and prototypes, pytorch-metric-learning, the continual metrics."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import losses as peer
from torch.nn import functional as F

from proto_core.losses import PrototypePullLoss, PrototypeRelationDistillationLoss, SupConLoss
from proto_core.metrics import ContinualMetrics

VALUE, GRADIENT = {"rtol": 1e-9, "atol": 1e-9}, {"rtol": 1e-7, "atol": 1e-9}


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "prd.npz")


def tensor(golden, name):
    return torch.from_numpy(np.asarray(golden[name])).clone()


@pytest.mark.parametrize("case", ["supcon0", "supcon1", "supconv"])
def test_supervised_contrast_equals_the_authors_code(golden, case):
    x = tensor(golden, f"{case}_embeddings").requires_grad_()
    temperature = float(golden[f"{case}_temperature"]) if f"{case}_temperature" in golden else 0.1
    loss = SupConLoss(temperature)(x, tensor(golden, f"{case}_labels"))
    np.testing.assert_allclose(loss.detach(), golden[f"{case}_loss"], **VALUE)
    np.testing.assert_allclose(torch.autograd.grad(loss, x)[0], golden[f"{case}_grad"], **GRADIENT)


@pytest.mark.parametrize("case", ["rel0", "rel1", "relp"])
def test_distillation_equals_the_reference(golden, case):
    features, prototypes = (tensor(golden, f"{case}_{n}").requires_grad_() for n in ("features", "prototypes"))
    old = [tensor(golden, f"{case}_{name}") for name in ("old_features", "old_prototypes")]
    relation = "samples" if case == "relp" else "classes"
    heads = prototypes if case == "relp" else list(prototypes)
    old_heads = old[1] if case == "relp" else list(old[1])
    loss = PrototypeRelationDistillationLoss(float(golden[f"{case}_temperature"]), relation)(
        features, heads, old[0], old_heads
    )
    np.testing.assert_allclose(loss.detach(), golden[f"{case}_loss"], **VALUE)
    for name, gradient in zip(("features", "prototypes"), torch.autograd.grad(loss, (features, prototypes))):
        np.testing.assert_allclose(gradient, golden[f"{case}_grad_{name}"], **GRADIENT)


def test_pull_equals_the_authors_code(golden):
    x, prototypes = (
        tensor(golden, "pull_embeddings").requires_grad_(),
        tensor(golden, "pull_prototypes").requires_grad_(),
    )
    loss = PrototypePullLoss()(x, tensor(golden, "pull_labels"), prototypes)
    np.testing.assert_allclose(loss.detach(), golden["pull_loss"], **VALUE)
    x_gradient, gradient = torch.autograd.grad(loss, (x, prototypes), allow_unused=True)
    np.testing.assert_allclose(gradient, golden["pull_grad_prototypes"], **GRADIENT)
    assert x_gradient is None
    moving = PrototypePullLoss(stop_gradient=False)(x, tensor(golden, "pull_labels"), prototypes)
    assert torch.autograd.grad(moving, x)[0].abs().sum() > 0


def test_a_step_from_its_parts(golden):
    """Total of supervised contrast, pull and distillation over two old heads, from the golden networks."""

    def net(which, x):
        feature = F.linear(x, tensor(golden, f"{which}_enc_weight"), tensor(golden, f"{which}_enc_bias"))
        hidden = F.linear(feature, *(tensor(golden, f"{which}_proj0_{n}") for n in ("weight", "bias"))).relu()
        return feature, F.linear(hidden, *(tensor(golden, f"{which}_proj2_{n}") for n in ("weight", "bias")))

    views = torch.cat([tensor(golden, "step_view1"), tensor(golden, "step_view2")])
    task, per_task = int(golden["step_task_id"]), int(golden["step_classes_per_task"])
    labels = tensor(golden, "step_labels").repeat(2)
    feature, projected = net("step_new", views)
    prototypes, old = tensor(golden, "step_new_prototypes"), tensor(golden, "step_old_prototypes")
    total = SupConLoss(float(golden["step_supcon_temperature"]))(projected, labels)
    total += float(golden["step_prototypes_coef"]) * PrototypePullLoss()(
        feature, labels - task * per_task, prototypes[task]
    )
    total += float(golden["step_distill_coef"]) * PrototypeRelationDistillationLoss()(
        feature, list(prototypes[:task]), net("step_old", views)[0], list(old[:task])
    )
    np.testing.assert_allclose(total, golden["step_total"], **VALUE)


def loop(x, labels, temperature, base):
    x, values = F.normalize(x), []
    for i in range(len(x)):
        others = [k for k in range(len(x)) if k != i]
        positives = [k for k in others if labels[k] == labels[i]]
        if positives:
            s = x @ x[i] / temperature
            values.append(s[others].logsumexp(0) - s[positives].mean())
    return temperature / base * torch.stack(values).mean() if values else x.sum() * 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 10))
def test_supervised_contrast_equals_its_definition(seed, count):
    g = torch.Generator().manual_seed(seed)
    x, labels = torch.randn(count, 4, generator=g).double(), torch.randint(-3, 3, (count,), generator=g)
    torch.testing.assert_close(SupConLoss(0.2, 0.3)(x, labels), loop(x, labels, 0.2, 0.3), rtol=1e-10, atol=1e-12)


def test_supervised_contrast_agrees_with_pytorch_metric_learning():
    x, labels = torch.randn(24, 6, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 5
    torch.testing.assert_close(SupConLoss(0.1, 0.1)(x, labels), peer.SupConLoss(temperature=0.1)(x, labels))


def test_views_are_samples_of_one_label():
    x, labels = torch.randn(4, 3, 5).double(), torch.tensor([0, 1, 1, 2])
    flat = torch.cat([x[:, v] for v in range(3)])
    torch.testing.assert_close(SupConLoss()(x, labels), SupConLoss()(flat, labels.repeat(3)))


def test_without_any_positive_the_loss_is_zero():
    x = torch.randn(3, 2, requires_grad=True)
    loss = SupConLoss()(x, torch.arange(3))
    assert loss == 0
    assert (torch.autograd.grad(loss, x)[0] == 0).all()


def test_samples_of_one_give_nothing_to_distil():
    x, prototypes = torch.randn(1, 3).double(), torch.randn(4, 3).double()
    loss = PrototypeRelationDistillationLoss(0.1, "samples")
    assert loss(x, prototypes, x + 1, prototypes + 1) == 0
    assert PrototypeRelationDistillationLoss()(x, [], x, []) == 0


def test_direction_and_axis_of_the_divergence():
    f, old = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 3.0]])
    p, p_old = torch.tensor([[1.0, 0.0], [0.0, 5.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    new_scores, old_scores = f @ F.normalize(p).T, old @ F.normalize(p_old).T
    expected = F.kl_div(new_scores.log_softmax(1), old_scores.log_softmax(1), reduction="batchmean", log_target=True)
    torch.testing.assert_close(PrototypeRelationDistillationLoss()(f, p, old, p_old), expected)
    twice = PrototypeRelationDistillationLoss()(f, [p, p], old, [p_old, p_old])
    torch.testing.assert_close(twice, 2 * expected)
    new_scores, old_scores = F.normalize(f) @ F.normalize(p).T, F.normalize(old) @ F.normalize(p_old).T
    expected = F.kl_div(new_scores.log_softmax(0), old_scores.log_softmax(0), reduction="sum", log_target=True)
    torch.testing.assert_close(PrototypeRelationDistillationLoss(relation="samples")(f, p, old, p_old), expected)


def test_zero_prototypes_have_score_zero_and_finite_gradients():
    x, p = torch.randn(3, 2, requires_grad=True), torch.zeros(2, 2, requires_grad=True)
    for loss in (
        PrototypeRelationDistillationLoss()(x, p, x + 1, torch.ones(2, 2)),
        PrototypePullLoss()(x, torch.tensor([0, 1, 1]), p),
    ):
        assert loss.isfinite()
        assert all(g is None or g.isfinite().all() for g in torch.autograd.grad(loss, (x, p), allow_unused=True))
    assert PrototypePullLoss()(x, torch.tensor([0, 1, 1]), p) == 1


def test_metrics_equal_the_reference(golden):
    found = ContinualMetrics.from_matrix(golden["cm_matrix"], golden["cm_random_accuracy"]).compute()
    assert len(found) == 7
    for name, value in found.items():
        np.testing.assert_allclose(value, golden[f"cm_{name}"], rtol=1e-9, err_msg=name)


def test_metrics_by_hand():
    metrics = ContinualMetrics(3, [0.1, 0.2, 0.3])
    rows = [[0.9], [0.5, 0.8], [0.7, 0.6, 1.0]]
    for task, row in enumerate(rows):
        metrics.update(task, row)
    assert rows == [[0.9], [0.5, 0.8], [0.7, 0.6, 1.0]]
    found = metrics.compute()
    expected = {
        "average_accuracy": 2.3 / 3,
        "average_incremental_accuracy": (0.9 + 0.65 + 2.3 / 3) / 3,
        "backward_transfer": (-0.2 - 0.2) / 2,
        "forgetting": (0.2 + 0.2) / 2,
        "forgetting_nonnegative": 0.2,
        "forgetting_all_tasks": 0.2 * 2 / 3,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name
    assert np.isnan(found["forward_transfer"])
    metrics.update(0, [0.9, 0.3, 0.3])
    metrics.update(1, torch.tensor([0.5, 0.8, 0.4]))
    assert metrics.compute()["forward_transfer"] == pytest.approx(0.1)
    assert metrics.compute()["forgetting"] == pytest.approx(0.2)  # what came before training does not count
    one = ContinualMetrics(1)
    one.update(0, [0.5])
    assert one.compute()["average_accuracy"] == 0.5
    assert sum(np.isnan(value) for value in one.compute().values()) == 5
    better = ContinualMetrics.from_matrix([[0.5, 0.0], [0.8, 1.0]]).compute()
    assert better["forgetting"] == pytest.approx(-0.3)
    assert better["forgetting_nonnegative"] == 0


@pytest.mark.bad_input
def test_bad_input_is_named():
    x, y, p = torch.randn(4, 3), torch.arange(4) % 2, torch.randn(2, 3)
    distil = PrototypeRelationDistillationLoss()
    for call, says in [
        (lambda: SupConLoss(0.0), "temperature: found 0.0"),
        (lambda: SupConLoss(base_temperature=-1.0), "base_temperature: found -1.0"),
        (lambda: SupConLoss()(x, y[:2]), "embeddings, labels: found shapes"),
        (lambda: PrototypePullLoss()(x, y + 1, p), "targets: found 2"),
        (lambda: PrototypePullLoss()(x, y, p[:, :2]), "embeddings, prototypes: found shapes"),
        (lambda: PrototypeRelationDistillationLoss(relation="rows"), "relation: found 'rows'"),
        (lambda: PrototypeRelationDistillationLoss(0.0), "temperature: found 0.0"),
        (lambda: distil(x, p, x[:2], p), "features, old_features: found shapes"),
        (lambda: distil(x, p, x, p[:1]), "prototypes, old_prototypes: found shapes"),
        (lambda: distil(x, [p, p], x, [p]), "old_prototypes: found 1 heads, needed 2"),
        (lambda: distil(x, p[:, :2], x, p[:, :2]), "in head 0"),
        (lambda: ContinualMetrics(0), "num_tasks: found 0"),
        (lambda: ContinualMetrics(2, [0.1]), "random_accuracy: found shape"),
        (lambda: ContinualMetrics(2).update(2, [0.1]), "after_task: found 2"),
        (lambda: ContinualMetrics(2).update(1, [0.1]), "accuracies: found shape"),
        (lambda: ContinualMetrics(2).update(0, [0.1] * 3), "accuracies: found shape"),
        (lambda: ContinualMetrics.from_matrix([[0.1, 0.2]]), "matrix: found shape"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
