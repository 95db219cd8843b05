"""Noisy labels, trusted shots, and folders from the web beside trusted ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from proto_vision import Digits, WebFolder
from proto_vision.data.dataset import ImageTable
from proto_vision.data.noise import CIFAR10_CONFUSIONS, AsymmetricNoise, SymmetricNoise, TrustedShots

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def table_of(count=1000, names=CIFAR10):
    targets = np.arange(count) % len(names)
    fold = np.where(np.arange(count) // len(names) % 5 == 0, "test", "train").astype("<U5")
    return ImageTable([str(n) for n in range(count)], targets, fold, list(names))


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 0.9), st.integers(0, 1000))
def test_symmetric_noise_changes_a_share_of_training_labels_alone(rate, seed):
    table = table_of()
    found = SymmetricNoise(rate, true_class=False, seed=seed)(table)
    wrong, train = found.targets != table.targets, table.fold == "train"
    assert wrong.sum() == round(rate * train.sum())
    assert not wrong[~train].any()
    assert np.array_equal(found.true_targets, table.targets)
    assert found._replace(targets=table.targets, true_targets=None) == table
    again = SymmetricNoise(rate, true_class=False, seed=seed)(table)
    assert np.array_equal(again.targets, found.targets)


def test_drawing_over_all_classes_leaves_a_tenth_of_the_drawn_right():
    table = table_of(20_000)
    found = SymmetricNoise(0.5)(table)
    train = table.fold == "train"
    assert (found.targets != table.targets)[train].mean() == pytest.approx(0.45, abs=0.01)
    wrong = train & (found.targets != table.targets)
    confusion = np.zeros((10, 10))
    np.add.at(confusion, (table.targets[wrong], found.targets[wrong]), 1)
    off = confusion[~np.eye(10, dtype=bool)]
    assert off.min() > 0.7 * off.mean()
    assert off.max() < 1.3 * off.mean()


def test_asymmetric_noise_takes_classes_for_those_of_the_paper():
    table = table_of(2000)
    found = AsymmetricNoise(0.4)(table)
    train = table.fold == "train"
    assert set(CIFAR10_CONFUSIONS.items()) == {
        ("truck", "automobile"),
        ("bird", "airplane"),
        ("deer", "horse"),
        ("cat", "dog"),
        ("dog", "cat"),
    }
    for k, name in enumerate(CIFAR10):
        own = train & (table.targets == k)
        wrong = own & (found.targets != k)
        assert wrong.sum() == (round(0.4 * own.sum()) if name in CIFAR10_CONFUSIONS else 0)
        assert {CIFAR10[c] for c in found.targets[wrong]} == ({CIFAR10_CONFUSIONS[name]} if wrong.any() else set())


def test_asymmetric_noise_goes_round_without_confusions():
    found = AsymmetricNoise(0.5, {})(table_of(30, ["x", "y", "z"]))
    wrong = found.targets != found.true_targets
    assert wrong.any()
    assert np.array_equal(found.targets[wrong], (found.true_targets[wrong] + 1) % 3)


def test_noise_upon_noise_remembers_what_was_true_at_first():
    table = table_of()
    found = AsymmetricNoise(0.4)(SymmetricNoise(0.3)(table))
    assert np.array_equal(found.true_targets, table.targets)


def test_shots_have_the_right_label_and_are_counted_by_it():
    table = table_of()
    found = TrustedShots(3, SymmetricNoise(0.8, true_class=False), seed=1)(table)
    assert found.trusted.sum() == 30
    assert np.bincount(table.targets[found.trusted]).tolist() == [3] * 10
    assert np.array_equal(found.targets[found.trusted], table.targets[found.trusted])
    assert set(table.fold[found.trusted]) == {"train"}
    others = (table.fold == "train") & ~found.trusted
    assert (found.targets != table.targets)[others].mean() > 0.78
    plain = TrustedShots(10_000)(table)
    assert np.array_equal(plain.trusted, table.fold == "train")
    assert not np.array_equal(TrustedShots(3, seed=2)(table).trusted, found.trusted)


def test_any_source_takes_noise_and_batches_know_their_trust():
    data = Digits(image_size=8, batch_size=1000, protocol=TrustedShots(2, SymmetricNoise(0.5)))
    batch = next(iter(data.train_dataloader()))
    assert int(batch.trusted.sum()) == 20
    true = data.table.true_targets[batch.index.numpy()]
    assert (batch.target.numpy() != true).mean() == pytest.approx(0.45, abs=0.05)
    assert data.class_names == [str(k) for k in range(10)]


@pytest.mark.bad_input
def test_bad_noise_is_refused():
    table = table_of()
    for kind in (SymmetricNoise, AsymmetricNoise):
        with pytest.raises(ValueError, match=r"rate: found 1\.2"):
            kind(1.2)
    with pytest.raises(ValueError, match="shots: found 0"):
        TrustedShots(0)
    with pytest.raises(ValueError, match=r"confusions: found \['wolf'\]"):
        AsymmetricNoise(0.4, {"dog": "wolf"})(table)
    with pytest.raises(ValueError, match=r"no training image to \['bird'\]"):
        AsymmetricNoise(1.0, {"bird": "airplane"})(table)
    with pytest.raises(ValueError, match="true_class: found 1 class"):
        SymmetricNoise(0.5, true_class=False)(table_of(20, ["one"]))


# -- folders from the web


def paint(folder, classes, count=4):
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            Image.new("RGB", (6, 6), (40 * k, 20 * n, 99)).save(folder / name / f"{n}.png")
    return folder


def test_web_images_train_and_trusted_ones_are_shots_and_tests(tmp_path):
    web, real = paint(tmp_path / "web", "abc", 5), paint(tmp_path / "real", "cab", 6)
    data = WebFolder(web, real, shots=2, test_fraction=0.5, image_size=6, batch_size=100)
    table = data.table
    train = table.fold == "train"
    assert data.class_names == ["a", "b", "c"]
    assert (train & ~table.trusted).sum() == 15
    assert np.bincount(table.targets[train & table.trusted]).tolist() == [2, 2, 2]
    assert np.bincount(table.targets[table.fold == "test"]).tolist() == [3, 3, 3]
    assert table.trusted[table.fold == "test"].all()
    assert (table.fold == "").sum() == 3
    batch = next(iter(data.train_dataloader()))
    assert (len(batch.image), int(batch.trusted.sum())) == (21, 6)
    for name, target in zip(table.record_ids, table.targets):
        assert name.split("/")[-2] == table.class_names[target]
    everything = WebFolder(web, real, test_fraction=0.0, image_size=6)
    assert (everything.table.fold == "train").all()


def test_folds_of_the_trusted_folder_are_kept_and_those_of_the_web_all_train(tmp_path):
    web, real = tmp_path / "web", tmp_path / "real"
    paint(web / "train", "ab", 3)
    paint(web / "test", "ab", 2)
    paint(real / "train", "ab", 4)
    paint(real / "val", "ab", 1)
    paint(real / "test", "ab", 2)
    table = WebFolder(web, real, shots=3, image_size=6).table
    kinds = [(fold, trusted) for fold in ("train", "val", "test", "") for trusted in (True, False)]
    counts = {(fold, t): int(((table.fold == fold) & (table.trusted == t)).sum()) for fold, t in kinds}
    assert counts == {
        ("train", False): 6,
        ("train", True): 6,
        ("val", False): 0,
        ("val", True): 2,
        ("test", False): 0,
        ("test", True): 4,
        ("", False): 4,
        ("", True): 2,
    }


@pytest.mark.bad_input
def test_bad_web_folders_are_refused(tmp_path):
    web, real = paint(tmp_path / "web", "ab"), paint(tmp_path / "real", "ab")
    with pytest.raises(ValueError, match=r"trusted: .* is no folder"):
        WebFolder(web, tmp_path / "none").table  # noqa: B018
    with pytest.raises(ValueError, match=r"root: .* is no folder"):
        WebFolder(tmp_path / "none", real).table  # noqa: B018
    with pytest.raises(ValueError, match="shots: found 0"):
        WebFolder(web, real, shots=0)
    with pytest.raises(ValueError, match=r"no training image of 1 classes, such as \['c'\]"):
        WebFolder(paint(tmp_path / "three", "abc"), real).table  # noqa: B018
    with pytest.raises(ValueError, match=r"lacks: \['c'\]"):
        WebFolder(web, paint(tmp_path / "more", "abc")).table  # noqa: B018
