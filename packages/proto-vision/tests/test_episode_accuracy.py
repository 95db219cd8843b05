"""Few-shot accuracy of frozen features: episodes, both classifiers against plain loops, what is refused."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from proto_core.data import EpisodeSampler
from proto_vision import episode_accuracy
from proto_vision.few_shot import confidence_interval


def blobs(classes=8, each=12, features=6, spread=1.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes * each) % classes
    centres = spread * torch.randn(classes, features, generator=g)
    return centres[labels] + torch.randn(len(labels), features, generator=g), labels


def by_hand(features, labels, ways, shots, queries, episodes, classifier, normalize, C=1.0, seed=0):
    """Episode by episode."""
    x = features.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True) if normalize else x
    y = labels.numpy()
    accuracies = []
    for rows in EpisodeSampler(labels, ways, shots, queries, episodes, seed):
        known, asked = np.split(rows.numpy(), [ways * shots])
        if classifier == "logistic":
            said = LogisticRegression(C=C, max_iter=1000).fit(x[known], y[known]).predict(x[asked])
        else:
            means = {c: x[known[y[known] == c]].mean(0) for c in set(y[known])}
            said = [min(means, key=lambda c: np.linalg.norm(means[c] - x[row])) for row in asked]
        accuracies.append(np.mean(np.array(said) == y[asked]))
    return accuracies


@pytest.mark.parametrize("classifier", ["logistic", "nearest_mean"])
@pytest.mark.parametrize(("shots", "normalize"), [(1, True), (3, True), (2, False)])
def test_accuracies_are_those_of_a_loop_over_episodes(classifier, shots, normalize):
    features, labels = blobs()
    options = {"ways": 4, "shots": shots, "queries": 5, "episodes": 10, "normalize": normalize, "seed": 3}
    found = episode_accuracy(features, labels, classifier=classifier, **options)
    expected = by_hand(features, labels, classifier=classifier, **options)
    assert found.accuracies.tolist() == pytest.approx(expected)
    assert (found.mean, found.half_width) == pytest.approx(confidence_interval(expected))
    assert found.accuracies.dtype == torch.float64
    assert 0.3 < found.mean < 1


def test_penalty_reaches_the_regression():
    features, labels = blobs(spread=0.7)
    options = {"ways": 4, "shots": 5, "queries": 7, "episodes": 12, "normalize": False}
    weak, strong = (episode_accuracy(features, labels, C=C, **options).accuracies.tolist() for C in (100.0, 1e-3))
    assert weak != strong
    assert weak == pytest.approx(by_hand(features, labels, classifier="logistic", C=100.0, **options))


def test_groups_of_episodes_make_no_difference():
    """More episodes than are in memory at once; the first ones are those of a shorter run."""
    features, labels = blobs()
    steps = []

    def progress(groups, text):
        steps.append((len(groups), text))
        return groups

    many = episode_accuracy(features, labels, episodes=130, queries=5, classifier="nearest_mean", progress=progress)
    few = episode_accuracy(features, labels, episodes=50, queries=5, classifier="nearest_mean")
    assert steps == [(3, "5-way 1-shot")]
    assert many.accuracies.shape == (130,)
    assert many.accuracies[:50].tolist() == few.accuracies.tolist()
    other = episode_accuracy(features, labels, episodes=50, queries=5, classifier="nearest_mean", seed=1)
    assert other.accuracies.tolist() != few.accuracies.tolist()


def test_length_of_features_counts_only_where_it_is_kept():
    features, labels = blobs()
    scaled = features * torch.linspace(0.1, 10, len(features))[:, None]
    for classifier in ("logistic", "nearest_mean"):
        options = {"queries": 5, "episodes": 8, "classifier": classifier}
        assert episode_accuracy(scaled, labels, **options).mean == episode_accuracy(features, labels, **options).mean
        plain = [episode_accuracy(x, labels, normalize=False, **options).mean for x in (scaled, features)]
        assert plain[0] < plain[1]


def test_half_precision_and_labels_of_any_kind():
    features, labels = blobs()
    options = {"queries": 5, "episodes": 6, "classifier": "nearest_mean"}
    known = episode_accuracy(features.bfloat16(), labels, **options)
    assert episode_accuracy(features.bfloat16(), labels * 7 - 9, **options).mean == known.mean
    assert episode_accuracy(features.bfloat16(), labels.int(), **options).mean == known.mean
    assert known.mean > 0.5


def test_features_without_any_difference_are_right_by_chance():
    accuracy = episode_accuracy(torch.ones(40, 3), torch.arange(40) % 4, ways=4, queries=9, episodes=3)
    assert accuracy == (0.25, 0.0, accuracy.accuracies)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ways": 9}, "labels: found 8 classes, needed at least n_way = 9"),
        ({"shots": 8}, r"labels: found 12 samples of class 0, needed 13 \(n_shot \+ n_query\)"),
        ({"ways": 1}, "ways: found 1, needed 2 or more"),
        ({"shots": 0}, "shots: found 0"),
        ({"queries": 0}, "queries: found 0"),
        ({"episodes": 0}, "episodes: found 0"),
        ({"C": 0.0}, "C: found 0.0"),
        ({"classifier": "svm"}, "classifier: found 'svm'"),
    ],
)
def test_bad_settings_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        episode_accuracy(*blobs(), **{"queries": 5} | options)


@pytest.mark.bad_input
def test_bad_features_are_refused():
    features, labels = blobs()
    for x, y, says in [
        (features, labels[:-1], "features, labels: found shapes"),
        (features[0], labels, "features, labels: found shapes"),
        (features.long(), labels, "features: found torch.int64"),
        (features, labels.float(), "labels: found torch.float32"),
        (features.index_fill(0, torch.tensor([3]), torch.nan), labels, "found NaN or infinite values, first in row 3"),
        (features.index_fill(0, torch.tensor([5]), torch.inf), labels, "first in row 5"),
    ]:
        with pytest.raises(ValueError, match=says):
            episode_accuracy(x, y)
