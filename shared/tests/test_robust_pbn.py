"""Classification by components: the core's arrays of robust_pbn.npz (d_, i_, *_rbf_* are proto-vision's), attacks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_core.losses import GLVQLoss, ProbabilityMarginLoss, RobustnessMarginLoss, TemplateMarginLoss
from proto_core.prototypes import (
    ClassificationByComponents,
    cbc_margin_root,
    rbf_detection,
    robustness_certificate,
)

EXACT = {"rtol": 1e-7, "atol": 1e-9}


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "robust_pbn.npz")


def tensor(golden, name):
    return torch.from_numpy(np.asarray(golden[name])).clone()


def slim(golden, prefix):
    logits = tensor(golden, f"{prefix}_reasoning_logits")
    head = ClassificationByComponents(len(logits) // 2, logits.shape[1]).double()
    head.reasoning_logits.data.copy_(logits)
    return head


@pytest.mark.parametrize("case", ["s1", "s2"])
def test_slim_equals_the_authors_code(golden, case):
    head, d = slim(golden, case), tensor(golden, f"{case}_detections").requires_grad_()
    found = head(d)
    np.testing.assert_allclose(found.detach(), golden[f"{case}_probabilities"], **EXACT)
    np.testing.assert_allclose(head.reasoning.detach(), golden[f"{case}_reasoning"], **EXACT)
    gradients = torch.autograd.grad((found * tensor(golden, f"{case}_upstream")).sum(), (d, head.reasoning_logits))
    for name, gradient in zip(("detections", "reasoning_logits"), gradients):
        np.testing.assert_allclose(gradient, golden[f"{case}_grad_{name}"], **EXACT)
    targets = tensor(golden, f"{case}_targets")
    for margin, name in ((0.025, "0p025"), (0.3, "0p3")):
        p = found.detach().requires_grad_()
        loss = ProbabilityMarginLoss(margin)(p, targets)
        np.testing.assert_allclose(loss.detach(), golden[f"{case}_margin_loss_{name}"], **EXACT)
        np.testing.assert_allclose(torch.autograd.grad(loss, p)[0], golden[f"{case}_margin_loss_grad_{name}"], **EXACT)
        each = ProbabilityMarginLoss(margin, "none")(p, targets)
        np.testing.assert_allclose(each.detach(), golden[f"{case}_margin_loss_per_sample_{name}"], **EXACT)


@pytest.mark.parametrize("case", ["o", "o2"])
def test_original_equals_the_authors_code(golden, case):
    reasonings = tensor(golden, f"{case}_reasonings")
    head = ClassificationByComponents(*reasonings.shape[:2], variant="original").double()
    head.reasonings.data.copy_(reasonings)
    d = tensor(golden, f"{case}_detections").requires_grad_()
    found = head(d)
    np.testing.assert_allclose(found.detach(), golden[f"{case}_probabilities"], **EXACT)
    gradients = torch.autograd.grad((found * tensor(golden, f"{case}_upstream")).sum(), (d, head.reasonings))
    for name, gradient in zip(("detections", "reasonings"), gradients):
        expected = golden[f"{case}_grad_{name}"]
        size = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(gradient, expected, rtol=1e-7, atol=1e-9 * size, err_msg=name)
    torch.testing.assert_close(head.reasoning.sum(0), torch.ones_like(head.reasoning[0]))


def check_template(golden, loss, comparison, prefix, name):
    labels, targets = tensor(golden, f"{prefix}_template_labels"), tensor(golden, f"{prefix}_targets")
    values = tensor(golden, f"{prefix}_{comparison}").requires_grad_()
    each = loss("none")(values, labels, targets)
    np.testing.assert_allclose(each.detach(), golden[f"{prefix}_{name}"], **EXACT)
    mean = loss("mean")(values, labels, targets)
    np.testing.assert_allclose(torch.autograd.grad(mean, values)[0], golden[f"{prefix}_{name}_grad"], **EXACT)


@pytest.mark.parametrize("prefix", ["t", "t2"])
def test_templates_equal_the_authors_code(golden, prefix):
    check_template(golden, lambda r: TemplateMarginLoss(0.3, reduction=r), "similarities", prefix, "margin_similarity")
    check_template(golden, GLVQLoss, "distances", prefix, "glvq")
    if prefix == "t":
        check_template(golden, lambda r: TemplateMarginLoss(0.3, False, r), "distances", "t", "margin_distance")


@pytest.mark.parametrize("case, kernel", [("c1", "norm"), ("c2", "gaussian"), ("c3", "norm"), ("c4", "gaussian")])
def test_certificate_equals_the_reference(golden, case, kernel):
    x, components, sigma = (tensor(golden, f"{case}_{n}").requires_grad_() for n in ("x", "components", "sigma"))
    head, targets = slim(golden, case), tensor(golden, f"{case}_targets")
    detections, distances = rbf_detection(x, components, sigma, kernel)
    np.testing.assert_allclose(distances.detach(), golden[f"{case}_distances"], **EXACT)
    np.testing.assert_allclose(detections.detach(), golden[f"{case}_detections"], **EXACT)
    np.testing.assert_allclose(head(detections).detach(), golden[f"{case}_probabilities"], **EXACT)
    root = cbc_margin_root(detections, head.reasoning, targets)
    np.testing.assert_allclose(root.detach(), golden[f"{case}_root"], **EXACT)
    np.testing.assert_allclose((sigma.min() * root.log()).detach(), golden[f"{case}_signed"], **EXACT)
    radius = robustness_certificate(detections, distances, head.reasoning, sigma, targets, kernel)
    np.testing.assert_allclose(radius.detach(), golden[f"{case}_radius"], **EXACT)
    loss = RobustnessMarginLoss(float(golden[f"{case}_margin"]))(detections, head.reasoning, sigma, targets)
    np.testing.assert_allclose(loss.detach(), golden[f"{case}_loss"], **EXACT)
    wanted = {"x": x, "components": components, "sigma": sigma, "reasoning_logits": head.reasoning_logits}
    for name, gradient in zip(wanted, torch.autograd.grad(loss, list(wanted.values()))):
        np.testing.assert_allclose(gradient, golden[f"{case}_grad_{name}"], err_msg=name, **EXACT)


def test_absent_detections_and_ties_equal_the_reference(golden):
    d, sigma = tensor(golden, "z_detections").requires_grad_(), tensor(golden, "z_sigma").requires_grad_()
    reasoning, targets = tensor(golden, "z_reasoning"), tensor(golden, "z_targets")
    root = cbc_margin_root(d, reasoning, targets)
    np.testing.assert_allclose(root.detach(), golden["z_root"], rtol=1e-6)
    np.testing.assert_allclose((sigma.min() * root.log()).detach(), golden["z_signed"], rtol=1e-6, atol=1e-9)
    loss = RobustnessMarginLoss(float(golden["z_margin"]))(d, reasoning, sigma, targets)
    np.testing.assert_allclose(loss.detach(), golden["z_loss"], **EXACT)
    for name, gradient in zip(("detections", "sigma"), torch.autograd.grad(loss, (d, sigma))):
        expected = golden[f"z_grad_{name}"]
        size = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9 * size, err_msg=name)
    d, sigma = tensor(golden, "e_detections"), tensor(golden, "e_sigma")
    reasoning, targets = tensor(golden, "e_reasoning"), tensor(golden, "e_targets")
    np.testing.assert_allclose(cbc_margin_root(d, reasoning, targets), golden["e_root"], rtol=1e-6)
    radius = robustness_certificate(d, torch.zeros_like(d), reasoning, sigma, targets)
    np.testing.assert_allclose(radius, golden["e_radius"], **EXACT)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), kernel=st.sampled_from(["norm", "gaussian"]))
def test_no_shorter_perturbation_changes_the_decision(seed, kernel):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 3, generator=g).double()
    components, sigma = torch.randn(6, 3, generator=g).double(), torch.rand(6, generator=g).double() + 0.5
    torch.manual_seed(seed)
    head = ClassificationByComponents(6, 3).double()
    head.reasoning_logits.data.mul_(10)
    detections, distances = rbf_detection(x, components, sigma, kernel)
    targets = head(detections).argmax(1)
    radius = robustness_certificate(detections, distances, head.reasoning, sigma, targets, kernel)
    assert (radius >= 0).all()
    direction = torch.nn.functional.normalize(torch.randn(100, 12, 3, generator=g).double(), dim=-1)
    moved = (x + 0.999 * radius[:, None] * direction).flatten(0, 1)
    found = head(rbf_detection(moved, components, sigma, kernel)[0]).argmax(1).unflatten(0, (100, 12))
    sure = radius > 1e-9
    assert (found == targets)[:, sure].all()


def test_root_is_the_zero_of_the_bound():
    g = torch.Generator().manual_seed(0)
    d, y = torch.rand(20, 5, generator=g).double(), torch.arange(20) % 3
    r = torch.rand(2, 5, 3, generator=g).double()
    t = cbc_margin_root(d, r, y)

    def bound(n, c, t):
        a = ((r[0, :, y[n]] + r[1, :, c]) * d[n]).sum()
        b = (r[1, :, y[n]] - r[1, :, c]).sum()
        return a / t + b - ((r[1, :, y[n]] + r[0, :, c]) * d[n]).sum() * t

    for n in range(20):
        values = [bound(n, c, t[n]) for c in range(3) if c != y[n]]
        assert min(values).abs() < 1e-9


def test_states_and_empty_batches():
    for variant in ("slim", "original"):
        head = ClassificationByComponents(4, 3, variant)
        other = ClassificationByComponents(4, 3, variant)
        other.load_state_dict(head.state_dict())
        d = torch.rand(2, 4)
        assert torch.equal(other(d), head(d))
        assert head(d[:0]).shape == (0, 3)
        assert variant in repr(head)
        assert ((head(d) >= 0) & (head(d) <= 1)).all()
        assert head(d.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.int8])
def test_targets_may_be_any_integers(kind):
    d, y, s = torch.rand(5, 4), torch.arange(5) % 3, torch.ones(4)
    r = torch.rand(2, 4, 3) / 8
    for call in (
        lambda y: cbc_margin_root(d, r, y),
        lambda y: robustness_certificate(d, -d.log(), r, s, y),
        lambda y: RobustnessMarginLoss()(d, r, s, y),
        lambda y: ProbabilityMarginLoss()(d[:, :3], y),
    ):
        assert torch.equal(call(y.to(kind)), call(y))


def test_detections_of_two_precisions_take_the_finer_one():
    x, w, s = torch.rand(5, 3).double(), torch.rand(2, 3), torch.ones(2)
    for found, expected in zip(rbf_detection(x, w, s), rbf_detection(x, w.double(), s)):
        assert torch.equal(found, expected)
        assert found.dtype == torch.float64


@pytest.mark.bad_input
def test_bad_input_is_named():
    d, y, r, s = torch.rand(3, 4), torch.arange(3) % 2, torch.rand(2, 4, 2), torch.ones(4)
    labels = torch.tensor([0, 0, 1, 1])
    for call, says in [
        (lambda: ClassificationByComponents(4, 1), "num_classes: found 1"),
        (lambda: ClassificationByComponents(0, 2), "num_components: found 0"),
        (lambda: ClassificationByComponents(4, 2, "big"), "variant: found 'big'"),
        (lambda: ClassificationByComponents(4, 2)(d * 2), "detections: found numbers outside"),
        (lambda: ClassificationByComponents(4, 2)(d * torch.nan), "detections: found numbers outside"),
        (lambda: ClassificationByComponents(3, 2)(d), "detections: found shape"),
        (lambda: rbf_detection(d, d, s), "sigma: found shape"),
        (lambda: rbf_detection(d, d, torch.zeros(3)), "sigma: found 0.0"),
        (lambda: rbf_detection(d, d[:, :2], torch.ones(3)), "x, components: found shapes"),
        (lambda: rbf_detection(d, d, torch.ones(3), "cubic"), "kernel: found 'cubic'"),
        (lambda: cbc_margin_root(d, r, y + 1), "targets: found 2"),
        (lambda: cbc_margin_root(d, r[:, :, :1], y), "reasoning: found 1 class"),
        (lambda: cbc_margin_root(d, r[:1], y), "detections, reasoning: found shapes"),
        (lambda: cbc_margin_root(d[:, :2], r, y), "detections: found 2 components"),
        (lambda: cbc_margin_root(d[:0], r, y[:0]), "detections, targets: found shapes"),
        (lambda: robustness_certificate(d, d[:1], r, s, y), "distances: found shape"),
        (lambda: RobustnessMarginLoss()(d, r, s[:2], y), "sigma: found shape"),
        (lambda: RobustnessMarginLoss()(d, r, -s, y), "sigma: found -1.0"),
        (lambda: ProbabilityMarginLoss(reduction="max"), "reduction: found 'max'"),
        (lambda: ProbabilityMarginLoss()(d[:, :1], y * 0), "probabilities: found 1 class"),
        (lambda: ProbabilityMarginLoss()(d[:0], y[:0]), "probabilities, targets: found shapes"),
        (lambda: GLVQLoss()(d, labels, y + 1), "no template of its own class for target 2"),
        (lambda: TemplateMarginLoss()(d, labels * 0, y * 0), "no template of another class for target 0"),
        (lambda: TemplateMarginLoss()(d, labels[:2], y), "template_labels: found"),
        (lambda: TemplateMarginLoss()(d, labels, y[:2]), "comparisons, targets: found shapes"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
