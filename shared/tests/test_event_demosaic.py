"""Charbonnier and pixel-focus loss, PSNR and SSIM: the reference's values, limits, peers, what they refuse."""

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import peak_signal_noise_ratio

from proto_core.losses import CharbonnierLoss, PixelFocusLoss
from proto_core.metrics import psnr, ssim
from proto_core.structural import ssim_map


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "event_demosaic.npz")


def near(found, expected):
    np.testing.assert_allclose(torch.as_tensor(found).detach().numpy(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("charb", CharbonnierLoss()),
        ("power1", PixelFocusLoss()),
        ("power2", PixelFocusLoss("power", 2.0)),
        ("exp5", PixelFocusLoss("exp", 5.0)),
    ],
)
def test_losses_equal_the_reference(golden, name, loss):
    pred = torch.from_numpy(golden["l_pred"]).requires_grad_()
    found = loss(pred, torch.from_numpy(golden["l_target"]))
    near(found, golden[f"l_{name}"])
    near(torch.autograd.grad(found, pred)[0], golden[f"l_{name}_grad"])


def test_metrics_equal_the_authors_code_and_the_reference(golden):
    pred, target = (torch.from_numpy(golden[f"l_{name}"]) for name in ("pred", "target"))
    near(psnr(pred, target), golden["l_psnr"])
    near(ssim(pred, target), golden["l_ssim"])


@pytest.mark.parametrize("kind", ["power", "exp"])
def test_gamma_zero_is_charbonnier_and_large_gamma_the_largest_error(kind):
    pred, target = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double().split(1)
    near(PixelFocusLoss(kind, 0.0)(pred, target), CharbonnierLoss()(pred, target).item())
    largest = ((pred - target) ** 2 + 1e-6).sqrt().max().item()
    assert PixelFocusLoss(kind, 500.0)(pred, target).item() == pytest.approx(largest, rel=1e-3)
    values = [PixelFocusLoss(kind, gamma)(pred, target).item() for gamma in (0.0, 0.5, 1.0, 3.0)]
    assert values == sorted(values)


@pytest.mark.parametrize("kind", ["power", "exp"])
def test_identical_images(kind):
    x = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    value = PixelFocusLoss(kind)(x, x.detach())
    near(value, 1e-3)
    assert (torch.autograd.grad(value, x)[0] == 0).all()
    huge = PixelFocusLoss("exp", 5.0)(torch.tensor([1e4, 0.0]), torch.zeros(2))
    assert huge.item() == pytest.approx(1e4)


def test_metrics_agree_with_their_peers_where_they_mean_the_same():
    g = np.random.default_rng(0)
    x, y = g.random((40, 36)), g.random((40, 36))
    y = 0.7 * x + 0.3 * y
    _, peer = structural_similarity(
        x, y, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    ours = ssim_map(torch.from_numpy(x)[None, None], torch.from_numpy(y)[None, None])[0, 0].numpy()
    np.testing.assert_allclose(ours[5:-5, 5:-5], peer[5:-5, 5:-5], atol=1e-6)  # inside, where no border counts
    found = psnr(torch.from_numpy(x), torch.from_numpy(y), eps=0.0)
    peer_psnr = peak_signal_noise_ratio(torch.from_numpy(x), torch.from_numpy(y), data_range=1.0)
    assert found.item() == pytest.approx(peer_psnr.item(), rel=1e-6)
    assert psnr(torch.ones(3), torch.ones(3)).item() == pytest.approx(100)


X = torch.ones(1, 1, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CharbonnierLoss(0.0), "eps: found 0.0"),
        (lambda: CharbonnierLoss()(X, X[..., 1:]), "pred, target: found shapes"),
        (lambda: PixelFocusLoss("log"), "kind: found 'log'"),
        (lambda: PixelFocusLoss(gamma=-1.0), "gamma: found -1.0"),
        (lambda: PixelFocusLoss()(X[:0], X[:0]), "pred, target: found shapes"),
        (lambda: psnr(X, X[..., 1:]), "pred, target: found shapes"),
        (lambda: ssim(X[0], X[0]), "x, y: found shapes"),
        (lambda: ssim_map(X, X, window_size=4), "window_size: found 4"),
        (lambda: ssim_map(X, X, sigma=0.0), "sigma: found 0.0"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
