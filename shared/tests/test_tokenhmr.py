"""Scaling below a threshold and the codebook of TokenHMR: the reference's values, its updates step by step, errors."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from proto_core.losses import ThresholdAdaptiveLossScaling
from proto_core.prototypes import VectorQuantizerEMAReset


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "tokenhmr.npz")


def near(found, expected, rtol=1e-8, atol=1e-10):
    np.testing.assert_allclose(torch.as_tensor(found).detach().numpy(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", ["tals0", "tals1"])
def test_keypoints_equal_the_reference(golden, case):
    def value(name):
        return torch.from_numpy(golden[f"{case}/kp/{name}"])

    pred, target = value("pred").requires_grad_(), value("target")
    confidence = target[..., 2]
    difference = pred - target[..., :2]
    error = confidence * difference.square().sum(-1)
    scaling = ThresholdAdaptiveLossScaling(float(golden[f"{case}/scale"]))
    found = scaling(difference.abs().sum(-1), error, value("threshold"), weight=confidence)
    assert torch.equal(error.detach() > value("threshold"), value("full_mask"))
    near(found, golden[f"{case}/kp/loss"])
    near(torch.autograd.grad(found, pred)[0], golden[f"{case}/kp/grad"])


@pytest.mark.parametrize("case", ["tals0", "tals1"])
def test_rotations_equal_the_reference(golden, case):
    def value(name):
        return torch.from_numpy(golden[f"{case}/rot/{name}"])

    pred = value("pred").requires_grad_()
    scaling = ThresholdAdaptiveLossScaling(float(golden[f"{case}/scale"]))
    found = scaling(
        (pred - value("target")).square().sum(dim=(-2, -1)),
        value("angle"),
        value("threshold"),
        weight=value("has").unsqueeze(1),
        trusted=value("trusted").unsqueeze(1),
    )
    near(found, golden[f"{case}/rot/loss"])
    near(torch.autograd.grad(found, pred)[0], golden[f"{case}/rot/grad"])


def test_comparison_is_strict_and_trust_does_not_beat_a_weight_of_zero():
    scaling = ThresholdAdaptiveLossScaling(0.25)
    loss = torch.tensor([1.0, 1.0, 1.0, 1.0])
    error = torch.tensor([0.5, 0.6, 0.1, 0.1])
    trusted, weight = torch.tensor([False, False, True, True]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert scaling(loss, error, torch.tensor(0.5)) == 0.25 + 1 + 0.25 + 0.25
    assert scaling(loss, error, torch.tensor(0.5), weight, trusted) == 0.25 + 1 + 1
    zero = torch.zeros(3, requires_grad=True)
    value = scaling(zero.abs(), zero, torch.tensor(0.0), weight=torch.zeros(3))
    assert value == 0
    assert (torch.autograd.grad(value, zero)[0] == 0).all()


@pytest.mark.parametrize("case", ["ema0", "ema1"])
def test_codebook_equals_the_reference(golden, case):
    width = golden[f"{case}/s0/x"].shape[1]
    quantizer = VectorQuantizerEMAReset(int(golden[f"{case}/K"]), width, float(golden[f"{case}/mu"])).double()
    for step in range(int(golden[f"{case}/steps"])):
        found = quantizer(torch.from_numpy(golden[f"{case}/s{step}/x"]))
        for name in ("indices", "quantized", "commit_loss", "perplexity"):
            near(getattr(found, name), golden[f"{case}/s{step}/{name}"])
        for name in ("codebook", "code_sum", "code_count"):
            near(getattr(quantizer, name), golden[f"{case}/s{step}/{name}"])


@pytest.mark.parametrize("case", ["tok0", "tok1"])
def test_lookup_of_the_tokenizer_equals_the_reference(golden, case):
    codebook, latent = (torch.from_numpy(golden[f"{case}/{name}"]) for name in ("codebook", "latent"))
    quantizer = VectorQuantizerEMAReset(*codebook.shape).double().eval()
    quantizer.codebook.copy_(codebook)
    quantizer.initialized.fill_(True)
    found = quantizer(latent)
    near(found.indices, golden[f"{case}/indices"])
    near(found.commit_loss, golden[f"{case}/commit_loss"])
    near(found.perplexity, golden[f"{case}/perplexity"])
    near(found.quantized.transpose(1, 2), codebook[found.indices])
    assert torch.equal(quantizer.decode(found.indices), codebook[found.indices])
    probs = torch.from_numpy(golden[f"{case}/probs"])
    near(quantizer.decode_soft(probs), probs.numpy() @ codebook.numpy())
    near(quantizer.codebook, codebook.numpy())


def test_gradients_go_straight_through():
    quantizer = VectorQuantizerEMAReset(4, 3)
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = quantizer(x)
    assert found.indices.shape == (2, 5)
    (through,) = torch.autograd.grad((found.quantized * 3).sum(), x, retain_graph=True)
    assert (through == 3).all()
    (pulled,) = torch.autograd.grad(found.commit_loss, x)
    near(pulled, (2 * (x - found.quantized) / x.numel()).detach().numpy(), rtol=1e-5, atol=1e-7)
    assert not list(quantizer.parameters())


def test_few_rows_are_repeated_with_noise():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    one, two = (VectorQuantizerEMAReset(5, 2) for _ in range(2))
    for quantizer in (one, two):
        quantizer(x, generator=torch.Generator().manual_seed(3))
    assert torch.equal(one.codebook, two.codebook)
    assert (one.code_sum - x.repeat(3, 1)[:5]).abs().max() < 0.1
    assert len(one.codebook.unique(dim=0)) == 5


def test_unused_codes_come_back_to_life():
    quantizer = VectorQuantizerEMAReset(2, 1, decay=0.5)
    quantizer(torch.tensor([[0.0], [100.0]]))
    for _ in range(3):
        found = quantizer(torch.tensor([[0.0], [1.0]]))
    assert found.perplexity.item() == pytest.approx(2, abs=1e-3)
    assert sorted(quantizer.codebook.flatten().tolist())[1] < 2


def test_state_survives_and_evaluation_changes_nothing(tmp_path):
    torch.manual_seed(0)
    quantizer = VectorQuantizerEMAReset(4, 3)
    for _ in range(3):
        quantizer(torch.randn(20, 3))
    torch.save(quantizer.state_dict(), tmp_path / "state.pt")
    other = VectorQuantizerEMAReset(4, 3)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    x = torch.randn(20, 3)
    twin = copy.deepcopy(quantizer)
    for one, two, three in zip(quantizer(x), other(x), twin(x)):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    assert torch.equal(quantizer.codebook, other.codebook)
    before = copy.deepcopy(other.state_dict())
    other.eval()(x)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    other.reset_parameters()
    with pytest.raises(ValueError, match="found no codes yet"):
        other(x)
    assert "num_codes=4, code_dim=3" in repr(other)


def test_half_precision_is_looked_up_in_float32():
    quantizer = VectorQuantizerEMAReset(4, 3)
    x = torch.randn(20, 3).bfloat16()
    found = quantizer(x)
    assert found.quantized.dtype == torch.bfloat16
    assert found.commit_loss.dtype == torch.float32
    full = VectorQuantizerEMAReset(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(full(x.float()).indices, found.indices)


@pytest.mark.unchecked
def test_compiles():
    torch.manual_seed(0)
    plain = nn.Sequential(VectorQuantizerEMAReset(4, 3))
    traced = copy.deepcopy(plain)
    x = torch.randn(20, 3)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for one, two in zip(compiled(x), plain(x)):
            torch.testing.assert_close(one, two)
    torch.testing.assert_close(traced[0].codebook, plain[0].codebook)


ONE = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ThresholdAdaptiveLossScaling(1.5), "scale: found 1.5"),
        (lambda: ThresholdAdaptiveLossScaling()(ONE, ONE, torch.tensor(-1.0)), "threshold: found -1.0"),
        (lambda: ThresholdAdaptiveLossScaling()(ONE, torch.ones(2), ONE), r"error: found shape \(2,\)"),
        (lambda: ThresholdAdaptiveLossScaling()(ONE, ONE, ONE, trusted=torch.ones(2, 3)), "trusted: found shape"),
        (lambda: VectorQuantizerEMAReset(0, 2), "num_codes: found 0"),
        (lambda: VectorQuantizerEMAReset(2, 2, 1.5), "decay: found 1.5"),
        (lambda: VectorQuantizerEMAReset(2, 2)(torch.ones(3, 3)), r"x: found shape \(3, 3\)"),
        (lambda: VectorQuantizerEMAReset(2, 2)(torch.ones(0, 2)), r"x: found shape \(0, 2\)"),
        (lambda: VectorQuantizerEMAReset(2, 2).decode(torch.tensor([2])), "indices: found values"),
        (lambda: VectorQuantizerEMAReset(2, 2).decode_soft(torch.ones(3)), "probs: found shape"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
