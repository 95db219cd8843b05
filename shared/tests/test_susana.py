"""SuSana Distancia: the authors' values, slow loops, episodes, and what the card says of edge cases."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_core.data import EpisodeSampler
from proto_core.losses import ICNNLoss, ProtoTripletLoss
from proto_core.metrics import icnn_score


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "susana.npz")


def tensor(golden, name):
    return torch.from_numpy(np.asarray(golden[name])).clone()


@pytest.mark.parametrize("case", ["i0", "i1", "i2", "i3"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_icnn_equals_the_authors_code(golden, case, chunk_size):
    x, y = tensor(golden, f"{case}_x").requires_grad_(), tensor(golden, f"{case}_y")
    ipc = int(golden[f"{case}_ipc"])
    further = {"instances_per_class": None if ipc < 0 else ipc}
    wanted = {"grad": x}
    if f"{case}_t" in golden:
        further |= {
            "targets": tensor(golden, f"{case}_t").requires_grad_(),
            "target_labels": tensor(golden, f"{case}_yt"),
        }
        wanted["grad_t"] = further["targets"]
    k = int(golden[f"{case}_k"])
    score = icnn_score(x, y, k=k, chunk_size=chunk_size, **further)
    loss = ICNNLoss(k, chunk_size=chunk_size)(x, y, **further)
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if x.dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-5}
    np.testing.assert_allclose(score.detach(), golden[f"{case}_score"], **tolerance)
    np.testing.assert_allclose(loss.detach(), golden[f"{case}_loss"], **tolerance)
    for name, gradient in zip(wanted, torch.autograd.grad(loss, list(wanted.values()))):
        np.testing.assert_allclose(gradient, golden[f"{case}_{name}"], err_msg=name, **tolerance)


def test_original_equals_the_authors_code(golden):
    k, p, q, r = golden["o0_kpqr"].tolist()
    found = icnn_score(tensor(golden, "o0_x"), tensor(golden, "o0_y"), k=k, variant="original", p=p, q=q, r=r)
    np.testing.assert_allclose(found, golden["o0_score"], rtol=1e-6)


@pytest.mark.parametrize("case", ["p0", "p1"])
def test_triplet_equals_the_authors_code(golden, case):
    queries, prototypes = (tensor(golden, f"{case}_{name}").requires_grad_() for name in ("q", "p"))
    labels = tensor(golden, f"{case}_yp")
    loss = ProtoTripletLoss(float(golden[f"{case}_margin"]))(queries, tensor(golden, f"{case}_yq"), prototypes, labels)
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if queries.dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-5}
    np.testing.assert_allclose(loss.detach(), golden[f"{case}_loss"], **tolerance)
    for name, gradient in zip(("q", "p"), torch.autograd.grad(loss, (queries, prototypes))):
        np.testing.assert_allclose(gradient, golden[f"{case}_grad_{name}"], **tolerance)
    if case == "p0":
        torch.testing.assert_close(ProtoTripletLoss()(queries, tensor(golden, "p0_yq"), prototypes), loss)


def slow_icnn(x, y, t, yt, k, ipc, use=None):
    """The modified score anchor by anchor."""
    eps, count = 1e-7, len(t)
    if k + 2 >= count:
        k = count - 2
    ipc = k + 1 if ipc is None else ipc
    inner, outer, shares, rows = [], [], [], []
    for i in range(len(x)):
        d = np.sqrt(((t - x[i]) ** 2).sum(1) + 1e-6)
        order = np.argsort(d, kind="stable")[1 : ipc + 1]
        rows.append((d[order], yt[order] == y[i]))
    largest = max([d[j] for d, s in rows for j in range(k) if not s[j]], default=0.0)
    for d, s in rows:
        others = d[~s]
        n = d[:k] / (others.min() + eps) if len(others) else np.zeros(k)
        n = n / max(1.0, n.max())
        c = s[:k].sum()
        shares.append(c / k)
        if c:
            inner.append(n[s[:k]].sum() / (c + eps))
        if c < k:
            outer.append((d[:k][~s[:k]] / (largest + eps)).sum() / (k - c + eps))
    a = 1 - sum(inner) / (len(inner) + eps)
    b = sum(outer) / (len(outer) + eps) if outer else 1.0
    gamma = np.mean(shares) if k + 2 < count else 1.0
    return ((a + b) / 2 + gamma) / 2


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(3, 12), k=st.integers(1, 6), extra=st.integers(0, 4))
def test_icnn_equals_its_definition(seed, count, k, extra):
    g = np.random.default_rng(seed)
    x, y = g.normal(size=(count, 3)), g.integers(0, 3, count)
    kept = min(k, count - 2)
    ipc = min(kept + extra, count - 1)
    found = icnn_score(torch.from_numpy(x), torch.from_numpy(y), k=k, instances_per_class=ipc)
    assert found.item() == pytest.approx(slow_icnn(x, y, x, y, k, ipc), rel=1e-9)
    t, yt = g.normal(size=(count + 1, 3)), g.integers(0, 3, count + 1)
    found = icnn_score(*map(torch.from_numpy, (x, y, t, yt)), k=k)
    assert found.item() == pytest.approx(slow_icnn(x, y, t, yt, k, None), rel=1e-9)
    assert 0 < found.item() <= 1 + 1e-6


def test_clean_clusters_and_lonely_samples():
    x = torch.tensor([[0.0], [0.1], [0.2], [9.0], [9.1], [9.2]], dtype=torch.float64)
    one = icnn_score(x, torch.zeros(6, dtype=torch.long), k=2)
    assert one.item() == pytest.approx(1.0)  # no other class at all: A = B = gamma = 1
    alone = icnn_score(x, torch.arange(6), k=2)
    assert 0 < alone.item() < 0.8
    assert icnn_score(x[:3], torch.tensor([0, 0, 1]), k=4).isfinite()


def test_original_with_omega_by_hand():
    x = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(8) % 2
    d = ((x[:, None] - x).square().sum(-1) + 1e-6).sqrt()
    near = d.argsort(dim=1)[:, 1:4]
    d, same = d.gather(1, near), y[near] == y[:, None]
    scaled = (d - d.amin(1, True)) / (d.amax(1, True) - d.amin(1, True) + 1e-6)
    close = torch.where(same, 1 - scaled, scaled).sum(1)
    parts = [
        (close / (close.max() + 1e-6)).pow(1 / 3).mean(),
        (same.double().mean(1)).pow(1 / 4).mean(),
        (1 - (scaled * same).flatten().var() - (scaled * ~same).flatten().var()).pow(1 / 2),
    ]
    for omega, expected in ((False, sum(parts[:2]) / 2), (True, sum(parts) / 3)):
        found = icnn_score(x, y, k=3, variant="original", p=3, q=2, r=4, use_omega=omega)
        torch.testing.assert_close(found, expected)
    assert icnn_score(x, y, k=9, variant="original") == icnn_score(x, y, k=3, variant="original")


def test_query_on_its_prototype():
    p = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    q = p[:1].clone().requires_grad_()
    loss = ProtoTripletLoss(1.0)(q, torch.tensor([0]), p)
    assert loss.item() == pytest.approx(1e-3 - math.sqrt(1 + 1e-6) + 1.0, abs=1e-6)
    assert torch.autograd.grad(loss, q)[0].isfinite().all()


def test_query_on_its_prototype_far_from_the_others_in_float32():
    p = 10 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for labels, margin in ((torch.arange(5), 60.0), (torch.tensor([4, 2, 0, 3, 1]), 200.0)):
        found = ProtoTripletLoss(margin)(p, labels, p[labels.argsort()], torch.arange(5))
        exact = ProtoTripletLoss(margin)(p.double(), labels, p[labels.argsort()].double(), torch.arange(5))
        apart = torch.cdist(p.double(), p.double()).fill_diagonal_(torch.inf).amin(dim=1)
        torch.testing.assert_close(exact, (1e-3 + margin - apart).clamp_min(0).mean(), rtol=1e-9, atol=1e-8)
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-5)
    on = ProtoTripletLoss(0.5)(p, torch.arange(5), p + torch.tensor([[1e-3] + [0.0] * 63]))
    assert on == 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), shot=st.integers(1, 3), query=st.integers(0, 4))
def test_episodes(seed, shot, query):
    labels = torch.randint(3, 9, (200,), generator=torch.Generator().manual_seed(seed))
    sampler = EpisodeSampler(labels, 4, shot, query, 3, seed=seed)
    episodes = list(sampler)
    assert len(sampler) == len(episodes) == 3
    for episode in episodes:
        assert episode.dtype == torch.long
        assert len(episode.unique()) == len(episode) == 4 * (shot + query)
        support = labels[episode[: 4 * shot]].reshape(4, shot)
        queries = labels[episode[4 * shot :]].reshape(4, query)
        assert (support == support[:, :1]).all()
        assert (queries == support[:, :1]).all()
        assert len(support[:, 0].unique()) == 4
    assert all(torch.equal(a, b) for a, b in zip(episodes, sampler))
    assert not torch.equal(episodes[0], episodes[1])


def test_episodes_without_a_seed_follow_torch():
    sampler = EpisodeSampler([0, 0, 0, 1, 1, 1, 2, 2, 2] * 5, 2, 1, 1, 4)
    torch.manual_seed(5)
    first = list(sampler)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(first, sampler))
    assert not all(torch.equal(a, b) for a, b in zip(first, sampler))


@pytest.mark.bad_input
def test_bad_input_is_named():
    x, y = torch.randn(6, 3), torch.arange(6) % 2
    for call, says in [
        (lambda: ProtoTripletLoss(-0.1), "margin: found -0.1"),
        (lambda: ProtoTripletLoss()(x, y, x[:1]), "prototypes: found shape"),
        (lambda: ProtoTripletLoss()(x, y + 5, x[:2]), "query_labels: found label 5 with 0 prototypes"),
        (lambda: ProtoTripletLoss()(x, y, x[:2], torch.tensor([0, 0])), "found label 0 with 2 prototypes"),
        (lambda: ProtoTripletLoss()(x, y, x[:2], torch.tensor([0])), "prototype_labels: found shape"),
        (lambda: ICNNLoss(0), "k: found 0"),
        (lambda: icnn_score(x, y, variant="new"), "variant: found 'new'"),
        (lambda: icnn_score(x[:2], y[:2]), "targets: found 2, needed at least 3"),
        (lambda: icnn_score(x, y, x), "found one of them"),
        (lambda: icnn_score(x, y, x[:, :2], y), "targets: found 2 features"),
        (lambda: icnn_score(x, y, k=2, instances_per_class=6), "instances_per_class: found 6"),
        (lambda: icnn_score(x, y, k=3, instances_per_class=2), "instances_per_class: found 2"),
        (lambda: icnn_score(x, y, variant="original", p=0), "p: found 0"),
        (lambda: icnn_score(x[:3], y[:3], k=5, variant="original"), "k: found 3 with 3 targets"),
        (lambda: EpisodeSampler(y, 3, 1, 1, 1), "labels: found 2 classes"),
        (lambda: EpisodeSampler(y, 2, 2, 2, 1), "found 3 samples of class 0, needed 4"),
        (lambda: EpisodeSampler(y, 2, 0, 1, 1), "n_shot: found 0"),
        (lambda: EpisodeSampler([], 1, 1, 1, 1), "labels: found shape"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
