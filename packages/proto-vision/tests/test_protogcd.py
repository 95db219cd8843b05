"""ProtoGCD's losses, head, scores: the authors' values, the card's edge cases, values known by hand."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from proto_core.metrics import cluster_accuracy, ood_metrics
from proto_vision.protogcd import (
    DAPLLoss,
    EntropyRegularizationLoss,
    ProtoGCD,
    ProtoGCDHead,
    ProtoGCDLoss,
    PrototypeSeparationLoss,
    estimate_num_classes,
    outlier_score,
    prototype_score,
    supervised_contrastive_loss,
    view_contrastive_loss,
)

TERMS = ("total", "dapl", "entropy", "separation", "contrastive", "cls", "sup_contrastive")


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "protogcd.npz")


def arrays_of(golden, prefix):
    keys = [key for key in golden.files if key.startswith(prefix)]
    return {key.removeprefix(prefix): torch.from_numpy(golden[key]) for key in keys}


def near(found, expected, rtol=1e-8, atol=1e-10):
    found = found.detach().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
    np.testing.assert_allclose(found, np.asarray(expected), rtol=rtol, atol=atol)


def leaf(x):
    return x.clone().requires_grad_()


def loss_of(a):
    sup, entropy, separation = a["weights"].tolist()
    epochs = {name: int(a[f"{name}_epochs"]) for name in ("num", "ramp", "wait")}
    ratios = {name: float(a[name]) for name in ("init_ratio", "final_ratio")}
    return ProtoGCDLoss(
        epochs["num"],
        weight_sup=sup,
        weight_entropy=entropy,
        weight_separation=separation,
        wait_epochs=epochs["wait"],
        ramp_epochs=epochs["ramp"],
        **ratios,
    )


# -- the authors' values


@pytest.mark.parametrize("case", ["loss_a/", "loss_b/"])
def test_pseudo_labels_equal_the_authors_code(golden, case):
    a = arrays_of(golden, case)
    dapl = loss_of(a).dapl
    assert [dapl.ratio(epoch) for epoch in range(int(a["num_epochs"]))] == a["ratios"].tolist()
    for epoch in a["epochs"].tolist():
        logits = leaf(a["logits"])
        loss = dapl(logits, epoch)
        near(loss, a[f"dapl_epoch{epoch}"])
        loss.backward()
        near(logits.grad, a[f"dapl_epoch{epoch}_grad"])


@pytest.mark.parametrize("case", ["loss_a/", "loss_b/"])
def test_all_terms_equal_the_authors_code(golden, case):
    a = arrays_of(golden, case)
    loss, inputs = loss_of(a), [leaf(a[name]) for name in ("projections", "logits", "prototypes")]
    projections, logits, prototypes = inputs
    found = loss(*inputs, a["labels"], a["labelled"], int(a["epochs"][-1]))
    assert tuple(found) == TERMS
    for name in TERMS:
        near(found[name], a[name])
    of = {"entropy": logits, "separation": prototypes, "contrastive": projections, "sup_contrastive": projections}
    for name, x in of.items():
        near(torch.autograd.grad(found[name], x, retain_graph=True)[0], a[f"{name}_grad"])
    for name, grad in zip(("projections", "logits", "prototypes"), torch.autograd.grad(found["total"], inputs)):
        near(grad, a[f"grad_{name}"])
    known = a["labelled"].bool().repeat(2)
    alone = supervised_contrastive_loss(a["projections"][known], a["labels"].repeat(2)[known])
    near(alone, a["sup_contrastive"])
    near(EntropyRegularizationLoss()(a["logits"]), a["entropy"])
    near(PrototypeSeparationLoss()(a["prototypes"]), a["separation"])
    near(view_contrastive_loss(a["projections"]), a["contrastive"])


def test_temperatures_go_where_they_belong(golden):
    a = arrays_of(golden, "temp/")
    ratio = float(a["ratio"])
    loss = ProtoGCDLoss(
        temperature=float(a["temperature"]),
        teacher_temperature=float(a["teacher_temperature"]),
        init_ratio=ratio,
        final_ratio=ratio,
    )
    found = loss(a["projections"], a["logits"], a["prototypes"], a["labels"], a["labelled"], 5)
    for name in TERMS:
        near(found[name], a[name])


def test_confidence_is_the_quotient_of_the_first_two(golden):
    a = arrays_of(golden, "conf/")
    ratio, logits = float(a["ratio"]), leaf(a["logits"])
    loss = DAPLLoss(init_ratio=ratio, final_ratio=ratio)(logits, 0)
    near(loss, a["dapl"])
    loss.backward()
    near(logits.grad, a["dapl_grad"])


def test_three_views_teach_each_other(golden):
    a = arrays_of(golden, "views3/")
    ratio, logits, projections = float(a["ratio"]), leaf(a["logits"]), leaf(a["projections"])
    loss = DAPLLoss(init_ratio=ratio, final_ratio=ratio, num_views=3)(logits, 0)
    near(loss, a["dapl"])
    loss.backward()
    near(logits.grad, a["dapl_grad"])
    loss = view_contrastive_loss(projections, num_views=3)
    near(loss, a["contrastive"])
    loss.backward()
    near(projections.grad, a["contrastive_grad"])


def test_anchors_without_a_positive_stay_in_the_mean(golden):
    a = arrays_of(golden, "lone/")
    x = leaf(a["embeddings"])
    loss = supervised_contrastive_loss(x, a["labels"])
    near(loss, a["sup_contrastive"])
    loss.backward()
    near(x.grad, a["sup_contrastive_grad"], rtol=1e-6, atol=1e-7)


def test_head_equals_the_authors_code(golden):
    a = arrays_of(golden, "head/")
    (classes, dim), hidden = a["prototype_weight"].shape, len(a["mlp1_bias"])
    head = ProtoGCDHead(dim, classes, hidden_dim=hidden, bottleneck_dim=len(a["mlp3_bias"])).double()
    assert [type(part) for part in head.mlp] == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    with torch.no_grad():
        head.prototypes.copy_(a["prototype_weight"])
        for number, layer in enumerate(head.mlp[::2], 1):
            layer.weight.copy_(a[f"mlp{number}_weight"])
            layer.bias.copy_(a[f"mlp{number}_bias"])
    x = leaf(a["x"])
    out = head(x)
    for name in ("projections", "logits", "prototypes"):
        near(getattr(out, name), a[name])
    sum((getattr(out, name) * a[f"cotangent_{name}"]).sum() for name in out._fields).backward()
    near(x.grad, a["grad_x"])
    near(head.prototypes.grad, a["grad_prototype_weight"])


@pytest.mark.parametrize("case", ["acc_a/", "acc_b/", "acc_c/"])
def test_cluster_accuracy_equals_the_authors_code(golden, case):
    a = arrays_of(golden, case)
    y, p, old = a["y_true"], a["y_pred"], a["old"]
    near(cluster_accuracy(y, p, old), a["acc"])
    near(cluster_accuracy(y, p, old.bool(), balanced=True), a["acc_balanced"])
    near(cluster_accuracy(y, p), a["acc_plain"])
    if "acc_plain_balanced" in a:
        near(cluster_accuracy(y, p, balanced=True), a["acc_plain_balanced"])


@pytest.mark.parametrize("kind", ["msp", "mls", "energy", "xent", "proto", "margin"])
def test_outlier_scores_equal_the_authors_code(golden, kind):
    a = arrays_of(golden, "ood/")
    near(outlier_score(a["logits"], kind), a[kind])


@pytest.mark.parametrize("case", ["ood/", "oodfew/", "oodten/"])
def test_ood_metrics_equal_the_authors_code(golden, case):
    a = arrays_of(golden, case)
    found = ood_metrics(a["in_scores"], a["out_scores"])
    near(list(found), a["measures"])


def test_number_of_classes_by_the_criterion(golden):
    a = arrays_of(golden, "kscore/")
    scores = {
        k: prototype_score(a["features"], a[f"prototypes_{k}"], a["labels"], a["labelled"])
        for k in a["candidates"].tolist()
    }
    near(list(scores.values()), a["scores"])
    assert estimate_num_classes(scores) == int(a["best"])
    longer = a["prototypes_7"] * torch.arange(1, 8)[:, None]
    near(prototype_score(a["features"] * 3, longer, a["labels"], a["labelled"].bool()), scores[7])


def test_every_golden_array_is_compared(golden):
    assert {key.partition("/")[0] for key in golden.files} == {
        *("loss_a", "loss_b", "temp", "conf", "views3", "lone", "head", "acc_a", "acc_b", "acc_c"),
        *("ood", "oodfew", "oodten", "kscore"),
    }


# -- by definition and by hand


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6), st.integers(2, 5), st.integers(2, 3), st.floats(0, 1))
def test_pseudo_labels_are_their_definition(seed, n, k, views, ratio):
    g = torch.Generator().manual_seed(seed)
    logits = torch.rand(views * n, k, generator=g, dtype=torch.float64)
    parts = list(logits.split(n))
    labels = []
    for part in parts:
        q = (part / 0.05).softmax(1)
        top = q.sort(1, descending=True).values
        sure = (top[:, 0] / (top[:, 1] + 1e-6)).argsort(descending=True)[: int(n * ratio)]
        q[sure] = F.one_hot(q[sure].argmax(1), k).double()
        labels.append(q)
    terms = [
        -(labels[a] * (parts[b] / 0.1).log_softmax(1)).sum(1).mean()
        for a in range(views)
        for b in range(views)
        if a != b
    ]
    loss = DAPLLoss(init_ratio=ratio, final_ratio=ratio, num_views=views)
    near(loss(logits, 7), torch.stack(terms).mean())


def test_no_hard_label_below_one_row():
    logits = torch.rand(8, 3)
    none, some = (DAPLLoss(init_ratio=r, final_ratio=r) for r in (0.2499, 0.25))
    assert torch.equal(none(logits, 0), DAPLLoss(final_ratio=0)(logits, 0))
    assert not torch.equal(some(logits, 0), none(logits, 0))


def test_schedule_reaches_both_ends_and_waits():
    loss = DAPLLoss(8, wait_epochs=2, ramp_epochs=3, init_ratio=0.2, final_ratio=0.8)
    assert [loss.ratio(e) for e in range(8)] == [0, 0, 0.2, 0.5, 0.8, 0.8, 0.8, 0.8]
    assert isinstance(loss.ratio(3), float)
    assert DAPLLoss(3, ramp_epochs=0, final_ratio=0.7).ratio(0) == 0.7
    assert DAPLLoss(3, ramp_epochs=1, init_ratio=0.3, final_ratio=0.7).ratio(0) == 0.3


def test_entropy_is_zero_for_uniform_and_log_k_for_one_cluster():
    loss = EntropyRegularizationLoss()
    near(loss(torch.zeros(5, 4)), 0, atol=1e-6)
    near(loss(torch.eye(4) * 30), 0, atol=1e-6)
    one = torch.zeros(5, 4)
    one[:, 2] = 1e4
    near(loss(one), np.log(4), rtol=1e-6)
    one.requires_grad_()
    loss(one).backward()
    assert one.grad.isfinite().all()
    near(loss(torch.rand(3, 1)), 0, atol=1e-6)


def test_separation_takes_prototypes_as_they_are():
    p = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    gram = (p @ p.T).numpy() / 0.5
    rows = [np.log((np.exp(gram[i]).sum() - np.exp(gram[i, i])) / 2) for i in range(3)]
    near(PrototypeSeparationLoss(0.5, 0.1)(p), np.mean(rows) * 5, rtol=1e-6)
    one = torch.rand(1, 4, requires_grad=True)
    loss = PrototypeSeparationLoss()(one)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not one.grad.any()


def batch(n=6, k=4, labelled=(1, 1, 0, 0, 0, 0)):
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(size, generator=g) for size in ((2 * n, 5), (2 * n, k), (k, 3))]
    return [*map(leaf, parts), torch.arange(n) % k, torch.tensor(labelled[:n])]


@pytest.mark.parametrize("count", [0, 1])
def test_no_or_one_labelled_image(count):
    inputs = batch(labelled=(*[1] * count, *[0] * (6 - count)))
    terms = ProtoGCDLoss()(*inputs, 3)
    assert float(terms["sup_contrastive"].detach()) == 0
    assert (float(terms["cls"].detach()) == 0) == (count == 0)
    for name in ("cls", "sup_contrastive", "total"):
        grads = torch.autograd.grad(terms[name], inputs[:2], retain_graph=True, allow_unused=True)
        assert all(grad is None or grad.isfinite().all() for grad in grads)
        assert any(grad is not None for grad in grads)


def test_labels_of_unlabelled_images_are_not_looked_at():
    inputs = batch()
    first = ProtoGCDLoss()(*inputs, 3)
    labels = torch.where(inputs[4].bool(), inputs[3], 99)
    for mask in (inputs[4], inputs[4].bool(), inputs[4].double()):
        again = ProtoGCDLoss()(*inputs[:3], labels, mask, 3)
        for name in TERMS:
            assert torch.equal(first[name], again[name])


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.int8])
def test_labels_may_be_any_integers(kind):
    inputs = batch()
    first, again = (ProtoGCDLoss()(*inputs[:3], labels, inputs[4], 3) for labels in (inputs[3], inputs[3].to(kind)))
    assert all(torch.equal(first[name], again[name]) for name in TERMS)


def test_supervised_contrast_of_few_rows_is_zero_with_a_graph():
    for rows in (0, 1):
        x = torch.rand(rows, 3, requires_grad=True)
        loss = supervised_contrastive_loss(x, torch.zeros(rows, dtype=torch.long))
        loss.backward()
        assert float(loss.detach()) == 0
    pair = supervised_contrastive_loss(torch.rand(2, 3), torch.tensor([1, 1]))
    near(pair, 0, atol=1e-6)
    strangers = torch.rand(3, 3, requires_grad=True)
    supervised_contrastive_loss(strangers, torch.arange(3)).backward()
    assert not strangers.grad.any()


def test_empty_batches_give_zero():
    none = torch.zeros(0, 4, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.long)
    terms = ProtoGCDLoss()(none, none, torch.eye(4), labels, labels, 0)
    terms["total"].backward()
    for name in ("dapl", "entropy", "contrastive", "cls", "sup_contrastive"):
        assert float(terms[name].detach()) == 0


def test_half_precision_is_computed_in_full():
    inputs = batch()
    half = [part.detach().bfloat16() for part in inputs[:3]]
    full = [part.float() for part in half]
    found, expected = (ProtoGCDLoss()(*parts, *inputs[3:], 120) for parts in (half, full))
    with torch.autocast("cpu", torch.bfloat16):
        cast = ProtoGCDLoss()(*full, *inputs[3:], 120)
    for name in TERMS:
        assert found[name].dtype == cast[name].dtype == torch.float32
        near(found[name], expected[name], rtol=1e-6)
        near(cast[name], expected[name], rtol=1e-6)


def test_a_feature_without_direction_has_logits_zero():
    head = ProtoGCDHead(4, 3, hidden_dim=8, bottleneck_dim=2)
    x = torch.zeros(2, 4, requires_grad=True)
    out = head(x)
    assert not out.logits.any()
    out.logits.sum().backward()
    assert not x.grad.any()
    assert torch.equal(head(x.detach().bfloat16()).logits, out.logits)
    assert head(x.detach().double()).logits.dtype == torch.float64


def test_head_starts_as_the_paper_says():
    torch.manual_seed(0)
    head = ProtoGCDHead(400, 50, hidden_dim=300, bottleneck_dim=20)
    assert head.prototypes.abs().max() <= 1 / 20
    near(head.prototypes.std(), 1 / 20 / 3**0.5, rtol=0.02)
    for layer in head.mlp[::2]:
        near(layer.weight.std(), 0.02, rtol=0.05)
        assert not layer.bias.any()
    assert [type(part) for part in ProtoGCDHead(4, 3, bottleneck_dim=2, num_layers=1).mlp] == [nn.Linear]
    assert [part.out_features for part in ProtoGCDHead(4, 3, num_layers=2).mlp[::2]] == [2048, 256]


def test_the_network_is_backbone_and_head():
    net = ProtoGCD(nn.Flatten(), ProtoGCDHead(4, 3, hidden_dim=8, bottleneck_dim=2))
    images = torch.rand(5, 1, 2, 2)
    near(net(images).logits, net.head(images.flatten(1)).logits.detach())
    again = copy.deepcopy(net)
    with torch.no_grad():
        again.head.prototypes.mul_(7)
    near(again(images).logits, net(images).logits.detach(), rtol=1e-5, atol=1e-6)


def test_outlier_scores_use_their_temperatures():
    logits = torch.tensor([[0.2, 0.1, -0.3]])
    near(outlier_score(logits, temperature=0.5), -(logits / 0.5).softmax(1).max(), rtol=1e-6)
    near(outlier_score(logits, "energy", energy_temperature=0.5), -0.5 * (logits / 0.5).logsumexp(1), rtol=1e-6)
    near(outlier_score(logits, "xent", temperature=0.5), logits.mean(1) / 0.5 - (logits / 0.5).logsumexp(1), rtol=1e-6)
    assert outlier_score(torch.zeros(0, 3)).shape == (0,)
    assert outlier_score(logits[:, :1], "mls").shape == (1,)


def test_ties_take_the_smaller_number():
    assert estimate_num_classes({12: 1.0, 7: 1.0, 9: 0.5}) == 7


# -- what is refused


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DAPLLoss(50), "num_epochs, wait_epochs, ramp_epochs: found 50, 0 and 100"),
        (lambda: DAPLLoss(wait_epochs=150), "found 200, 150 and 100"),
        (lambda: DAPLLoss(0, ramp_epochs=0), "at least 1 epoch"),
        (lambda: DAPLLoss(init_ratio=1.1), r"init_ratio: found 1\.1"),
        (lambda: DAPLLoss(final_ratio=-0.1), r"final_ratio: found -0\.1"),
        (lambda: DAPLLoss(num_views=1), "num_views: found 1"),
        (lambda: DAPLLoss(temperature=0), "temperature: found 0"),
        (lambda: DAPLLoss().ratio(200), "epoch: found 200, needed 0 to 199"),
        (lambda: DAPLLoss()(torch.rand(4, 3), -1), "epoch: found -1"),
        (lambda: DAPLLoss()(torch.rand(5, 3), 0), r"logits: found shape \(5, 3\)"),
        (lambda: DAPLLoss()(torch.rand(4, 1), 0), "found 1 classes, needed 2"),
        (lambda: EntropyRegularizationLoss(0), "temperature"),
        (lambda: EntropyRegularizationLoss()(torch.rand(4)), r"needed \[N, K\]"),
        (lambda: PrototypeSeparationLoss(base_temperature=-1), "base_temperature: found -1"),
        (lambda: PrototypeSeparationLoss()(torch.rand(4)), r"needed \[K, D\]"),
        (lambda: view_contrastive_loss(torch.rand(4, 2), num_views=1), "num_views: found 1"),
        (lambda: view_contrastive_loss(torch.rand(5, 2)), "multiple of 2"),
        (lambda: view_contrastive_loss(torch.rand(4, 2), temperature=0), "temperature"),
        (lambda: supervised_contrastive_loss(torch.rand(4, 2), torch.zeros(3).long()), r"found shapes \(4, 2\)"),
        (lambda: supervised_contrastive_loss(torch.rand(4, 2), torch.zeros(4)), "needed integers"),
        (lambda: ProtoGCDLoss()(*batch()[:3], torch.zeros(6), torch.ones(6), 0), "labels: found torch.float32"),
        (lambda: ProtoGCDLoss(weight_sup=1.5), r"weight_sup: found 1\.5"),
        (lambda: ProtoGCDLoss(weight_entropy=-1), "weight_entropy: found -1"),
        (lambda: ProtoGCDLoss(weight_separation=-1), "weight_separation: found -1"),
        (lambda: outlier_score(torch.rand(2, 3), "max"), "kind: found 'max'"),
        (lambda: outlier_score(torch.rand(2, 1), "proto"), "K at least 2"),
        (lambda: outlier_score(torch.rand(2, 1), "margin"), "K at least 2"),
        (lambda: outlier_score(torch.rand(3)), r"needed \[N, K\]"),
        (lambda: outlier_score(torch.rand(2, 3), energy_temperature=0), "energy_temperature"),
        (lambda: estimate_num_classes({}), "scores: found none"),
        (lambda: estimate_num_classes({3: float("nan")}), r"found NaN for \[3\]"),
        (lambda: ProtoGCDHead(0, 3), "in_dim: found 0"),
        (lambda: ProtoGCDHead(3, 3, num_layers=0), "num_layers: found 0"),
        (lambda: ProtoGCDHead(3, 3)(torch.rand(2, 4)), r"needed \[N, 3\]"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.bad_input
def test_the_sum_refuses_wrong_labels_and_shapes():
    inputs = batch()
    for wrong in (4, -1):
        labels = torch.where(inputs[4].bool(), wrong, inputs[3])
        with pytest.raises(ValueError, match=f"labels: found {wrong}, needed classes 0 to 3"):
            ProtoGCDLoss()(*inputs[:3], labels, inputs[4], 0)
    with pytest.raises(ValueError, match="projections, logits, labels, labelled"):
        ProtoGCDLoss()(inputs[0][:4], *inputs[1:], 0)
    with pytest.raises(ValueError, match="projections, logits, labels, labelled"):
        ProtoGCDLoss()(*inputs[:4], inputs[4][:3], 0)
    one = [inputs[0], inputs[1][:, :1], inputs[2][:1], torch.zeros(6).long(), inputs[4]]
    with pytest.raises(ValueError, match="found 1 classes"):
        ProtoGCDLoss()(*one, 0)


@pytest.mark.bad_input
def test_the_criterion_refuses_what_it_cannot_judge():
    x, labels, known = torch.rand(4, 3), torch.arange(4), torch.tensor([1, 0, 0, 1])
    with pytest.raises(ValueError, match="prototypes: found 1"):
        prototype_score(x, x[:1], labels, known)
    with pytest.raises(ValueError, match="no labelled sample"):
        prototype_score(x, x, labels, known * 0)
    with pytest.raises(ValueError, match="found shapes"):
        prototype_score(x, x[:, :2], labels, known)
