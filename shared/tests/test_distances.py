"""Distances: golden arrays of the harmonic card (values and gradients through its loss), edges and precision."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proto_core.distances import METRICS, cosine_similarity, euclidean, hamming, mahalanobis, sq_euclidean
from proto_core.precision import unit_vectors

HEADS = {
    "sqeuclidean": ("sq_euclidean", {}),
    "manhattan": ("manhattan", {}),
    "cosine_stable": ("cosine", {}),
    "cosine_unstable": ("cosine", {"stable": False}),
    "minkowski_p1.5": ("minkowski", {"p": 1.5}),
    "minkowski_p3": ("minkowski", {"p": 3.0}),
    "hamming_soft": ("hamming", {"variant": "soft", "temperature": 1.0}),
    "hamming_gumbel_eval": ("hamming", {"variant": "gumbel", "temperature": 0.5}),
    "hamming_hard": ("hamming", {"variant": "hard", "temperature": 0.1}),
    "chebyshev_max": ("chebyshev", {}),
    "chebyshev_softmax": ("chebyshev", {"variant": "softmax"}),
    "chebyshev_smooth": ("chebyshev", {"variant": "smooth"}),
    "canberra_standard": ("canberra", {}),
    "canberra_robust": ("canberra", {"variant": "robust", "min_denom": 1e-2}),
    "canberra_weighted": ("canberra", {"variant": "weighted", "weight_power": 0.5}),
    "bray_curtis_standard": ("bray_curtis", {}),
    "bray_curtis_abs": ("bray_curtis", {"variant": "abs"}),
    "bray_curtis_normalized": ("bray_curtis", {"variant": "normalized"}),
    "euclidean": ("euclidean", {}),
}
CHUNKED = sorted(set(METRICS) - {"sq_euclidean", "euclidean", "cosine"})


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, Tensor]:
    with np.load(golden_dir / "harmonic.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def options_of(name: str, features: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    if name != "mahalanobis":
        return {}
    root = torch.randn(features, features, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return {"precision": (root @ root.T + torch.eye(features)).to(dtype)}


def points(seed: int = 0, samples: int = 6, centres: int = 4, features: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, features, generator=generator, dtype=torch.float64) for rows in (samples, centres))


@pytest.mark.parametrize("head", HEADS)
def test_distances_are_the_authors(golden: dict[str, Tensor], head: str) -> None:
    name, options = HEADS[head]
    x, c = golden["x"].clone().requires_grad_(), golden["centers"].clone().requires_grad_()
    distances = METRICS[name](x, c, **options)
    torch.testing.assert_close(distances, golden[f"{head}/distances"], rtol=1e-6, atol=1e-8)
    eps = 1e-3 if name == "bray_curtis" else 1e-4
    for n, exponent in enumerate(golden["exponents"].tolist()):
        if f"{head}/n{n}/grad_x" not in golden:
            continue
        log_probs = (-exponent * (distances + eps).log()).log_softmax(dim=1)
        torch.testing.assert_close(log_probs, golden[f"{head}/n{n}/log_probs"], rtol=1e-6, atol=1e-8)
        loss = torch.nn.functional.nll_loss(log_probs, golden["targets"])
        for gradient, of in zip(torch.autograd.grad(loss, (x, c), retain_graph=True), ("x", "centers")):
            torch.testing.assert_close(gradient, golden[f"{head}/n{n}/grad_{of}"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("variant", ["standard", "diagonal", "cholesky"])
def test_mahalanobis_is_the_authors(golden: dict[str, Tensor], variant: str) -> None:
    eps, identity = 1e-4, torch.eye(5, dtype=torch.float64)
    if variant == "standard":
        given_precision = golden["precision"] + 1e-2 * identity
        precision = (given_precision + given_precision.T) / 2 + 10 * eps * identity
    elif variant == "diagonal":
        precision = golden["log_diag"].clamp(-10, 10).exp() + eps
    else:
        lower = golden["chol"].tril(-1) + golden["chol"].diagonal().clamp_min(eps).diag()
        precision = lower @ lower.T + eps * identity
    x, c = golden["x"].clone().requires_grad_(), golden["centers"].clone().requires_grad_()
    distances = mahalanobis(x, c, precision)
    torch.testing.assert_close(distances, golden[f"mahalanobis_{variant}/distances"], rtol=1e-6, atol=1e-8)
    log_probs = (-golden["exponents"][0] * (distances + eps).log()).log_softmax(dim=1)
    torch.nn.functional.nll_loss(log_probs, golden["targets"]).backward()
    for tensor, of in ((x, "x"), (c, "centers")):
        torch.testing.assert_close(
            tensor.grad, golden[f"mahalanobis_{variant}/n0/grad_{of}"].clone(), rtol=1e-6, atol=1e-8
        )


def test_cosine_similarity_is_the_authors(golden_dir: Path) -> None:
    with np.load(golden_dir / "protoecgnet.npz") as arrays:
        golden = {name[3:]: torch.from_numpy(arrays[name]) for name in arrays if name.startswith("g1_")}
    x, c = golden["features"].requires_grad_(), golden["prototypes"].requires_grad_()
    similarity = cosine_similarity(x, c)
    torch.testing.assert_close(similarity, golden["similarity"], rtol=1e-6, atol=1e-8)
    (similarity * golden["upstream"]).sum().backward()
    torch.testing.assert_close(x.grad, golden["grad_features"], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(c.grad, golden["grad_prototypes"], rtol=1e-6, atol=1e-8)
    distance = euclidean(x, c)
    torch.testing.assert_close(distance, golden["l2_distance"], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        ((distance + 1) / (distance + 1e-4)).log(), golden["l2_log_similarity"], rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("name", METRICS)
def test_on_a_centre_and_at_zero_everything_is_finite(name: str) -> None:
    x, c = points()
    x[0], x[1], c[1] = c[0], 0, 0
    x, c = x.requires_grad_(), c.requires_grad_()
    distances = METRICS[name](x, c, **options_of(name, 5))
    assert (distances >= 0).all()
    assert distances[0].argmin() == 0
    assert distances.isfinite().all()
    for gradient in torch.autograd.grad(distances.sum(), (x, c)):
        assert gradient.isfinite().all()


def test_zero_vector_has_no_direction() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    similarity = cosine_similarity(x, torch.eye(2))
    assert similarity.tolist() == [[0, 0], [pytest.approx(0.6), pytest.approx(0.8)]]
    similarity.sum().backward()
    assert x.grad is not None
    assert x.grad[0].tolist() == [0, 0]
    assert METRICS["cosine"](x, torch.eye(2))[0].tolist() == [1, 1]
    tiny = unit_vectors(torch.tensor([1e-13, 0.0], dtype=torch.float64))
    assert tiny.tolist() == [pytest.approx(0.1), 0]


def test_euclidean_gradient_at_zero_is_zero() -> None:
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    euclidean(x, torch.tensor([[1.0, 2.0]])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 0]]


def test_far_from_the_origin_squared_distances_keep_their_digits() -> None:
    x, c = points()
    far = 1000.0
    expected = (x.unsqueeze(1) - c).square().sum(-1)
    # 1e-3 is what float32 coordinates of size 1000 are good for; without moving the origin the error is about 1
    torch.testing.assert_close(
        sq_euclidean((x + far).float(), (c + far).float()).double(), expected, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", METRICS)
def test_half_precision_and_autocast_are_float32_inside(name: str) -> None:
    x, c = (tensor.bfloat16() for tensor in points())
    options = options_of(name, 5, torch.float32)
    half = METRICS[name](x, c, **options)
    assert half.dtype == torch.float32
    wide = METRICS[name](x.double(), c.double(), **options)
    torch.testing.assert_close(half.double(), wide, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(METRICS[name](x.double(), c, **options), wide)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(METRICS[name](x.float(), c.float(), **options), half, rtol=0, atol=0)


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_chunks_give_the_same_values_and_gradients(name: str, chunk_size: int) -> None:
    x, c = (tensor.requires_grad_() for tensor in points())
    options = options_of(name, 5)
    whole, chunked = (METRICS[name](x, c, **options, chunk_size=size) for size in (None, chunk_size))
    torch.testing.assert_close(chunked, whole)
    for part, expected in zip(
        torch.autograd.grad(chunked.square().sum(), (x, c)), torch.autograd.grad(whole.square().sum(), (x, c))
    ):
        torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000))
def test_leading_dimensions_and_order_of_centres(name: str, seed: int) -> None:
    x, c = points(seed)
    options = options_of(name, 5)
    distances = METRICS[name](x, c, **options)
    torch.testing.assert_close(METRICS[name](x.reshape(2, 3, 5), c, **options), distances.reshape(2, 3, 4))
    torch.testing.assert_close(METRICS[name](x[0], c, **options), distances[0])
    torch.testing.assert_close(METRICS[name](x, c.flip(0), **options), distances.flip(1))


def test_gumbel_noise_is_drawn_once_a_vector_and_only_in_training() -> None:
    x, c = points()
    settled = hamming(x, c, variant="gumbel")
    torch.testing.assert_close(settled, hamming(x, c, variant="soft"))
    torch.manual_seed(0)
    noisy = hamming(x, c, variant="gumbel", training=True)
    assert not torch.allclose(noisy, settled)
    torch.manual_seed(0)
    torch.testing.assert_close(hamming(x, c, variant="gumbel", training=True, chunk_size=1), noisy)
    # one noise a vector: distances stay a metric, so the triangle inequality holds through any x
    triangle = noisy[0, :, None] + noisy[0, None, :]
    other = (noisy[1, :, None] - noisy[1, None, :]).abs()
    assert (triangle >= other - 1e-9).all()


def test_hard_bits_that_agree_have_no_gradient() -> None:
    x = torch.tensor([[0.9, 0.1, 0.7]], requires_grad=True)
    hamming(x, torch.tensor([[0.8, 0.9, 0.2]]), variant="hard", temperature=0.1).sum().backward()
    assert x.grad is not None
    assert x.grad[0, 0] == 0
    assert x.grad[0, 1] < 0 < x.grad[0, 2]


@pytest.mark.bad_input
@pytest.mark.parametrize("name", METRICS)
def test_feature_sizes_that_do_not_fit(name: str) -> None:
    x, c = points()
    for wrong in ((x[:, :-1], c), (x, c[0]), (x.new_zeros(()), c)):
        with pytest.raises(ValueError, match="x, c: found shapes"):
            METRICS[name](*wrong, **options_of(name, 5))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosine", {"eps": 0.0}, "eps: found 0.0"),
        ("minkowski", {"p": 0.5}, "p: found 0.5"),
        ("minkowski", {"eps": -1.0}, "eps: found -1.0"),
        ("hamming", {"temperature": 0.0}, "temperature: found 0.0"),
        ("hamming", {"variant": "firm"}, "variant: found 'firm', needed one of 'soft', 'gumbel', 'hard'"),
        ("chebyshev", {"variant": "min"}, "variant: found 'min'"),
        ("canberra", {"variant": "min"}, "variant: found 'min'"),
        ("canberra", {"min_denom": 0.0}, "min_denom: found 0.0"),
        ("bray_curtis", {"variant": "min"}, "variant: found 'min'"),
        ("mahalanobis", {"precision": torch.ones(4)}, "precision: found shape"),
        ("manhattan", {"chunk_size": 0}, "chunk_size: found 0"),
    ],
)
def test_options_that_do_not_fit(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METRICS[name](*points(), **options)


@pytest.mark.bad_input
def test_one_feature_has_no_standard_deviation() -> None:
    with pytest.raises(ValueError, match="found 1 feature"):
        METRICS["chebyshev"](torch.ones(2, 1), torch.ones(3, 1), variant="smooth")
