"""ProtoECGNet against its definitions: every public function next to a slow loop, and the edges of each."""

import inspect
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import butter, filtfilt

import proto_ecg.protoecgnet as system
from proto_core.losses import (
    DiversityLoss,
    MultiLabelClusterLoss,
    MultiLabelSeparationLoss,
    PrototypeContrastiveLoss,
)
from proto_core.training import enter_stage
from proto_ecg.data.module import ECGBatch
from proto_ecg.protoecgnet import (
    PTBXL_ALL,
    PTBXL_DIFFUSE,
    PTBXL_MORPHOLOGY,
    PTBXL_RHYTHM,
    Branch1d,
    Branch2d,
    LossWeights,
    ProtoECGBranch1d,
    ProtoECGBranch2d,
    ProtoECGLoss,
    ProtoECGNet,
    Schedule,
    class_pos_weight,
    global_cosine_similarity,
    init_classifier_weight,
    label_cooccurrence,
    log_similarity,
    pool_windows,
    project_global,
    project_windows,
    prototype_class_matrix,
    remove_baseline_wander,
    window_l2_distance,
    window_similarity,
)

SMALL_1D = {"proto_dim": 16, "backbone": "resnet1d10_narrow"}
SMALL_2D = {"proto_dim": 16, "backbone": "resnet10_narrow"}
seeds = st.integers(0, 10_000)

SIGNATURES = {
    "label_cooccurrence": "targets",
    "class_pos_weight": "targets",
    "prototype_class_matrix": "num_classes, per_class, per_pair=0",
    "init_classifier_weight": "prototype_class, correct=1.0, incorrect=-0.5",
    "global_cosine_similarity": "features, prototypes",
    "window_similarity": "features, prototypes, eps=0.0001",
    "pool_windows": "s, mode='mean', k=5",
    "window_l2_distance": "features, prototypes",
    "log_similarity": "d, eps=0.0001",
    "ProtoECGLoss": "lam_cluster=0.004, lam_separation=0.0004, lam_diversity=250.0, lam_contrastive=300.0, "
    "lam_sparsity=0.0, masking='reference'",
    "ProtoECGBranch1d": "num_classes, prototypes_per_class=5, proto_dim=512, backbone='resnet1d18', add_on='linear', "
    "in_channels=12",
    "ProtoECGBranch2d": "num_classes, prototypes_per_class, proto_dim=512, window=3, backbone='resnet18', "
    "add_on='linear', dropout=0.0, pooling='mean', pretrained=False",
    "ProtoECGNet": "rhythm, morphology, diffuse, num_classes=71",
    "project_global": "features, targets, prototypes, prototype_class",
    "project_windows": "features, targets, prototypes, prototype_class",
    "remove_baseline_wander": "x, sampling_rate=100, cutoff=0.5, order=1",
    "macro_auroc": "scores, targets",
}

RHYTHM = "1AVB IVCD 3AVB 2AVB SR AFIB STACH SARRH SBRAD PACE SVARR BIGU AFLT SVTAC PSVT TRIGU"
MORPHOLOGY = (
    "NDT NST_ LNGQT IMI ASMI LVH LAFB ISC_ IRBBB ISCAL CRBBB CLBBB ILMI LAO/LAE AMI ALMI ISCIN INJAS LMI ISCIL LPFB "
    "ISCAS INJAL ISCLA RVH ANEUR RAO/RAE WPW ILBBB IPLMI ISCAN IPMI SEHYP INJIN INJLA PMI INJIL ABQRS PVC STD_ VCLVH "
    "QWAVE LOWT NT_ PAC LPR INVT LVOLT HVOLT TAB_ STE_ PRC(S)"
)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(g, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=g, dtype=dtype)


def multi_hot(g, *shape, share=0.4):
    return (torch.rand(*shape, generator=g) < share).double()


def identity_of(g, prototypes, classes):
    """Prototypes of one to all classes; some classes have none."""
    identity = multi_hot(g, prototypes, classes)
    identity[identity.sum(1) == 0, 0] = 1
    return identity


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_fixed(name):
    parameters = inspect.signature(getattr(system, name)).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    found = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in positional]
    assert ", ".join(found) == SIGNATURES[name]


def test_labels_and_their_branches():
    assert " ".join(PTBXL_RHYTHM) == RHYTHM
    assert " ".join(PTBXL_MORPHOLOGY) == MORPHOLOGY
    assert PTBXL_DIFFUSE == ("DIG", "NORM", "EL")
    # the file's order weaves the groups: the three of "diffuse", then rhythm's four among the diagnoses, then the rest
    places = {"NDT": 0, "DIG": 2, "NORM": 4, "1AVB": 11, "IVCD": 12, "EL": 31, "3AVB": 41, "SR": 59, "TRIGU": 70}
    assert {code: PTBXL_ALL.index(code) for code in places} == places


def test_defaults_are_the_authors():
    weights, schedule = LossWeights(), Schedule()
    lambdas = [weights.cluster, weights.separation, weights.diversity, weights.contrastive, weights.sparsity]
    assert lambdas == [0.004, 0.0004, 250, 300, 0]
    assert (schedule.lr, schedule.classifier_lr, schedule.weight_decay, schedule.l1) == (1e-4, 1e-3, 1.7e-4, 1e-4)
    assert (schedule.joint_epochs, schedule.patience, schedule.scheduler) == (200, 10, "cosine")
    assert (Branch1d().prototypes_per_class, Branch2d().prototypes_per_class, Branch2d().window) == (5, 18, 3)


def slow_gram(prototypes):
    flat = [p.flatten() for p in prototypes]
    return [[(a @ b) / (a.norm() * b.norm()) for b in flat] for a in flat]


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 6), st.integers(1, 4), st.sampled_from([(3,), (2, 1, 3), (1,)]))
def test_prototype_terms_are_their_definitions(seed, count, classes, shape):
    g = generator(seed)
    prototypes, identity = randn(g, count, *shape), identity_of(g, count, classes)
    cooccurrence = torch.rand(classes, classes, generator=g, dtype=torch.float64)  # not symmetric: nothing assumes it
    gram = slow_gram(prototypes)
    diversity = related = unrelated = positive = negative = 0.0
    for p in range(count):
        for q in range(count):
            diversity += (gram[p][q] - float(p == q)) ** 2 / count**2
            alike = sum(
                identity[p, c] * cooccurrence[c, d] * identity[q, d] for c in range(classes) for d in range(classes)
            )
            clamped = min(max(float(gram[p][q]), -1 + 1e-6), 1 - 1e-6)
            related, unrelated = related + alike, unrelated + 1 - alike
            positive, negative = positive + clamped * alike, negative + clamped * (1 - alike)
    contrastive = -(positive / (related + 1e-6) - negative / (unrelated + 1e-6)) / math.sqrt(count)
    torch.testing.assert_close(DiversityLoss()(prototypes), torch.as_tensor(diversity), rtol=1e-9, atol=1e-12)
    found = PrototypeContrastiveLoss()(prototypes, identity, cooccurrence)
    torch.testing.assert_close(found, torch.as_tensor(contrastive), rtol=1e-9, atol=1e-9)


def test_contrast_of_a_single_class_has_no_other_side():
    loss = PrototypeContrastiveLoss()
    for count in (1, 5, 7):  # a single prototype is nothing but diagonal, whose gradient the clamp takes away
        prototypes, ones = randn(generator(count), count, 8).requires_grad_(), torch.ones(count, 1)
        value = loss(prototypes, ones, torch.ones(1, 1))
        value.backward()
        expected = -float(np.mean(slow_gram(prototypes.detach()))) / math.sqrt(count)
        assert value.item() == pytest.approx(expected, abs=3e-6)
        assert prototypes.grad.any() == (count > 1)
        assert loss(prototypes.float(), ones, torch.ones(1, 1)).item() == pytest.approx(expected, abs=3e-6)


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.booleans())
def test_total_is_the_weighted_sum_of_the_definitions(seed, samples, classes, count, weighted):
    g = generator(seed)
    logits, targets, similarities = randn(g, samples, classes), multi_hot(g, samples, classes), randn(g, samples, count)
    prototypes, identity = randn(g, count, 3), identity_of(g, count, classes)
    cooccurrence = label_cooccurrence(multi_hot(g, 9, classes))
    pos_weight = 5 * torch.rand(classes, generator=g, dtype=torch.float64) if weighted else None
    bce = cluster = separation = sparsity = 0.0
    for n in range(samples):
        sparsity += sum(max(float(s), 0) for s in similarities[n]) / samples
        for c in range(classes):
            probability = 1 / (1 + math.exp(-float(logits[n, c])))
            weight = float(pos_weight[c]) if weighted else 1.0
            y = float(targets[n, c])
            bce -= (weight * y * math.log(probability) + (1 - y) * math.log(1 - probability)) / (samples * classes)
            mask = [float(identity[p, c]) * y for p in range(count)]
            cluster -= max(float(similarities[n, p]) * mask[p] for p in range(count)) / (samples * classes)
            separation += max(float(similarities[n, p]) * (1 - mask[p]) for p in range(count)) / (samples * classes)
    expected = bce + 0.1 * cluster + 0.2 * separation + 0.5 * sparsity
    expected += 0.3 * DiversityLoss()(prototypes)
    expected += 0.4 * PrototypeContrastiveLoss()(prototypes, identity, cooccurrence)
    loss = ProtoECGLoss(0.1, 0.2, 0.3, 0.4, 0.5, "reference")
    named = {"prototype_class": identity.bool(), "cooccurrence": cooccurrence, "pos_weight": pos_weight}
    found = loss(logits, targets, similarities=similarities, prototypes=prototypes, **named)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_class_without_prototypes():
    s, y = torch.tensor([[0.5, 0.2]]), torch.tensor([[1.0, 1.0]])
    identity = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert MultiLabelClusterLoss()(s, y, identity).item() == pytest.approx(-0.25)
    assert MultiLabelClusterLoss("strict")(s, y, identity).item() == pytest.approx(-0.5)
    assert MultiLabelSeparationLoss()(s, y, identity).item() == pytest.approx(0.25)
    assert MultiLabelSeparationLoss("strict")(s, y, identity).item() == 0


# -- labels, classes, classifier


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 12), st.integers(2, 5))
def test_label_statistics_are_their_definitions(seed, samples, classes):
    targets = multi_hot(generator(seed), samples, classes)
    rows = targets.tolist()
    total = sum(map(sum, rows))
    found, weight = label_cooccurrence(targets), class_pos_weight(targets)
    for i in range(classes):
        n_i = sum(row[i] for row in rows)
        if 0 < n_i < total:
            assert weight[i].item() == pytest.approx((total - n_i) / n_i, rel=1e-6)
        elif n_i == 0:
            assert weight[i] == 1
        for j in range(classes):
            n_j, n_ij = sum(row[j] for row in rows), sum(row[i] * row[j] for row in rows)
            assert found[i, j].item() == pytest.approx(n_ij / max(n_i + n_j - n_ij, 1e-6), rel=1e-6)


@pytest.mark.parametrize(("classes", "per_class", "per_pair"), [(1, 2, 3), (3, 2, 0), (4, 1, 2), (3, 0, 1)])
def test_class_matrix_is_class_major_then_pairs(classes, per_class, per_pair):
    owners = [(c,) for c in range(classes) for _ in range(per_class)]
    owners += [pair for pair in combinations(range(classes), 2) for _ in range(per_pair)]
    matrix = prototype_class_matrix(classes, per_class, per_pair)
    assert matrix.dtype == torch.float32
    assert matrix.tolist() == [[float(c in owner) for c in range(classes)] for owner in owners]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.float64])
def test_classifier_starts_with_fractions_whatever_the_type_of_the_identity(dtype):
    identity = prototype_class_matrix(2, 1, 1).to(dtype)
    weight = init_classifier_weight(identity)
    assert weight.dtype == (dtype if dtype.is_floating_point else torch.float32)
    assert weight.tolist() == [[1, -0.5, 1], [-0.5, 1, 1]]
    other = init_classifier_weight(identity, correct=0.1, incorrect=-0.2)
    assert other[0].tolist() == torch.tensor([0.1, -0.2, 0.1], dtype=weight.dtype).tolist()


# -- similarities


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(1, 7), st.integers(1, 6), st.data())
def test_window_similarities_are_their_definitions(seed, samples, count, channels, steps, data):
    width = data.draw(st.integers(1, steps))
    g = generator(seed)
    features = randn(g, samples, channels, steps, 1).transpose(2, 3)  # not contiguous
    prototypes = randn(g, count, channels, width, 1).transpose(2, 3)
    features[0, :, :, 0] = 0
    found, distance = window_similarity(features, prototypes), window_l2_distance(features, prototypes)
    assert found.shape == distance.shape == (samples, count, steps - width + 1)
    scale = math.floor(math.sqrt(channels * width)) / width
    for n in range(samples):
        for p in range(count):
            b = prototypes[p].flatten()
            row = []
            for i in range(steps - width + 1):
                a = features[n, :, :, i : i + width].flatten()
                norms = math.sqrt(float(a @ a) + 1e-4) * math.sqrt(float(b @ b) + 1e-4)
                row.append(scale * float(a @ b) / norms)
                assert distance[n, p, i].item() == pytest.approx(float((a - b).norm()), rel=1e-9, abs=1e-12)
            assert found[n, p].tolist() == pytest.approx(row, rel=1e-9, abs=1e-12)
            k = min(2, len(row))
            assert pool_windows(found)[n, p].item() == pytest.approx(sum(row) / len(row), abs=1e-12)
            assert pool_windows(found, "max")[n, p].item() == pytest.approx(max(row), abs=1e-12)
            best = sorted(row)[-k:]
            assert pool_windows(found, mode="topk", k=k)[n, p].item() == pytest.approx(sum(best) / k, abs=1e-12)


def test_scale_of_the_papers_windows():
    for width, scale in ((3, 13.0), (32, 4.0)):
        ones = torch.ones(1, 512, 1, width, dtype=torch.float64)
        assert window_similarity(ones, ones).item() == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projected_window_is_at_distance_zero(dtype):
    """Where log((d + 1) / (d + 1e-4)) is steepest, rounding of a difference of squares would show."""
    features = torch.rand(16, 64, 1, 12, generator=generator(0), dtype=dtype)
    places = torch.arange(16) % 9
    prototypes = torch.stack([features[i, :, :, k : k + 3] for i, k in enumerate(places)]).requires_grad_()
    distance = window_l2_distance(features, prototypes)
    own = distance[range(16), range(16), places]
    assert not own.any()
    similarity = log_similarity(own)
    torch.testing.assert_close(similarity, torch.full_like(own, math.log(1e4)))
    similarity.sum().backward()
    assert not prototypes.grad.any()
    assert log_similarity(own.bfloat16()).dtype == torch.float32


# -- projection


def slow_projection(scores, targets, identity):
    """``scores [N][P][K]`` -> record and window of each prototype: strictly better replaces."""
    found = []
    for p in range(identity.shape[0]):
        best, where = -math.inf, (-1, -1)
        for n in range(len(targets)):
            if not any(identity[p, c] and targets[n, c] for c in range(identity.shape[1])):
                continue
            for k in range(scores.shape[2]):
                if scores[n, p, k] > best:
                    best, where = scores[n, p, k], (n, k)
        found.append(where)
    return found


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 8), st.integers(1, 6), st.integers(1, 4))
def test_projections_are_their_definitions(seed, samples, count, classes):
    g = generator(seed)
    targets, identity = multi_hot(g, samples, classes), identity_of(g, count, classes)
    features, prototypes = randn(g, samples, 5), torch.nn.Parameter(randn(g, count, 5))
    expected = slow_projection(global_cosine_similarity(features, prototypes)[..., None], targets, identity)
    vectors, index = project_global(features.requires_grad_(), targets.bool(), prototypes, identity.bool())
    assert index.tolist() == [n for n, _ in expected]
    assert not vectors.requires_grad
    for p, (n, _) in enumerate(expected):
        assert torch.equal(vectors[p], prototypes[p] if n < 0 else features[n])

    maps, windows = randn(g, samples, 3, 1, 6), randn(g, count, 3, 1, 2)
    expected = slow_projection(window_similarity(maps, windows), targets, identity)
    vectors, index, window = project_windows(maps, targets, windows, prototype_class=identity)
    assert list(zip(index.tolist(), window.tolist())) == expected
    for p, (n, k) in enumerate(expected):
        assert torch.equal(vectors[p], windows[p] if n < 0 else maps[n, :, :, k : k + 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_first_of_equal_records_wins_though_products_round_differently(dtype):
    """Copies of a record meet other kernels of the matrix product at other rows; they are ties all the same."""
    for seed in range(20):
        g = generator(seed)
        kind = torch.randint(0, 5, (37,), generator=g)
        first = [(kind == k).nonzero()[0].item() if (kind == k).any() else None for k in range(5)]
        features, prototypes = randn(g, 5, 19, dtype=dtype)[kind], randn(g, 11, 19, dtype=dtype)
        _, index = project_global(features, torch.ones(37, 1), prototypes, torch.ones(11, 1))
        assert all(n == first[kind[n]] for n in index.tolist())
        flat = features[:, :, None, None].expand(-1, -1, 1, 13)
        windows = randn(g, 11, 19, 1, 3, dtype=dtype)
        _, index, window = project_windows(flat, torch.ones(37, 1), windows, torch.ones(11, 1))
        assert all(n == first[kind[n]] for n in index.tolist())
        assert not window.any()


# -- signals


@pytest.mark.parametrize(("rate", "cutoff", "order"), [(100, 0.5, 1), (500, 0.5, 1), (250, 0.67, 3)])
def test_baseline_filter_is_zero_phase_butterworth(rate, cutoff, order):
    x = np.cumsum(np.random.default_rng(0).normal(size=(2, 3, 317)), axis=-1)
    before = x.copy()
    b, a = butter(order, cutoff / (rate / 2), "highpass")
    found = remove_baseline_wander(x, sampling_rate=rate, cutoff=cutoff, order=order)
    np.testing.assert_allclose(found, filtfilt(b, a, x, axis=-1), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_allclose(remove_baseline_wander(x[0, 1], rate, cutoff, order), found[0, 1], rtol=1e-9, atol=1e-12)


# -- the networks


def test_steps_of_the_1d_backbone():
    lengths = []
    backbone = ProtoECGBranch1d(1, 1).backbone.eval()
    backbone.stem[0].register_forward_hook(lambda *x: lengths.append(x[2].shape[-1]))
    for part in (backbone.stem, *backbone.stages):
        part.register_forward_hook(lambda *x: lengths.append(x[2].shape[-1]))
    with torch.no_grad():
        assert backbone(torch.randn(1, 12, 1000)).shape == (1, 512)
    assert lengths == [500, 250, 250, 125, 63, 32]


def test_branches_start_as_defined_and_answer_named_tuples():
    torch.manual_seed(0)
    one, two = ProtoECGBranch1d(3, 40, **SMALL_1D), ProtoECGBranch2d(3, 40, window=2, **SMALL_2D)
    for branch, x in ((one, torch.randn(2, 12, 311)), (two, torch.randn(2, 1, 12, 311))):
        assert abs(branch.prototypes.mean()) < 0.1
        assert branch.prototypes.std().item() == pytest.approx(1, abs=0.1)
        assert branch.classifier.bias is None
        assert torch.equal(branch.class_identity, prototype_class_matrix(3, 40))
        assert "class_identity" in {name.rpartition(".")[2] for name, _ in branch.named_buffers()}
        features = branch.eval().features(x)
        assert ((features > 0) & (features < 1)).all()
        logits, similarities = branch(x)
        assert branch(x)._fields == ("logits", "similarities")
        torch.testing.assert_close(logits, similarities @ init_classifier_weight(branch.class_identity).T)
        compare = global_cosine_similarity if branch is one else window_similarity
        direct = compare(features, branch.prototypes).reshape(*similarities.shape, -1).mean(-1)
        torch.testing.assert_close(similarities, direct)
    first, second = (layer for layer in two.add_on if isinstance(layer, torch.nn.Conv2d))
    assert not first.bias.any()
    assert not second.bias.any()
    assert second.weight.std().item() == pytest.approx(math.sqrt(2 / 16), rel=0.2)  # kaiming normal, fan out


@pytest.mark.parametrize("kind", ["rhythm", "morphology"])
def test_dropout_is_heard(kind):
    torch.manual_seed(0)
    if kind == "rhythm":
        branch, x = ProtoECGBranch1d(1, 1, dropout=0.5, **SMALL_1D), torch.randn(2, 12, 200)
    else:
        branch, x = ProtoECGBranch2d(1, 1, dropout=0.5, **SMALL_2D), torch.randn(2, 1, 12, 200)
    branch.eval()
    assert torch.equal(branch.features(x), branch.features(x))
    branch.backbone.dropout.train()
    assert not torch.equal(branch.features(x), branch.features(x))


def test_l1_is_on_wrong_class_weights_of_a_branch_and_on_all_of_the_fusion():
    def loss(l1, stage):
        torch.manual_seed(0)
        net = ProtoECGNet(Branch1d(2, **SMALL_1D), None, None, label_names=["SR", "AFIB"], schedule=Schedule(l1=l1))
        enter_stage(net, next(item for item in net.stages if item.name == stage))
        net.train()
        g = generator(0)
        batch = ECGBatch(randn(g, 2, 12, 200, dtype=torch.float32), multi_hot(g, 2, 2).float(), torch.arange(2))
        return net.training_step(batch, 0).item(), net

    plain, net = loss(0.0, "rhythm.classifier")
    assert loss(1.0, "rhythm.classifier")[0] - plain == pytest.approx(4 * 0.5, rel=1e-5)
    plain, _ = loss(0.0, "fusion")
    assert loss(1.0, "fusion")[0] - plain == pytest.approx(net.classifier.weight.abs().sum().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_network_of_another_precision_and_a_strided_record(dtype):
    torch.manual_seed(0)
    net = ProtoECGNet(
        rhythm=ProtoECGBranch1d(1, 1, **SMALL_1D),
        morphology=ProtoECGBranch2d(2, 1, window=1, **SMALL_2D),
        diffuse=ProtoECGBranch2d(1, 1, window=32, **SMALL_2D),
        num_classes=4,
    )
    x = torch.randn(1, 1, 12, 2000)[..., ::2]
    expected = net(x)
    found = net.to(dtype)(x.to(dtype))
    assert found.logits.dtype == dtype
    tolerance = {torch.float64: 1e-4, torch.bfloat16: 0.2}[dtype]
    torch.testing.assert_close(found.similarities.float(), expected.similarities, rtol=tolerance, atol=tolerance)
