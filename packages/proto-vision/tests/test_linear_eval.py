"""Linear evaluation: curves of both heads on the same subsets, features of networks and files, what is refused."""

import csv
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn

from proto_core.classifiers import make_gaussian_mixture
from proto_vision import (
    CaseBasedModule,
    Digits,
    EvalProtoPNetModule,
    LinearEvaluation,
    ProbPSENNModule,
    STProtoPNetModule,
    UNPGModule,
)
from proto_vision.data.protocols import UnseenClasses
from proto_vision.disc_vs_gen import (
    FrozenFeatures,
    LearningCurves,
    draw_learning_curves,
    fold_features,
    frozen_features,
    image_set_features,
    read_features,
    read_test_features,
    write_features,
)
from proto_vision.disc_vs_gen.evaluation import RangeScaled
from proto_vision.disc_vs_gen.features import create_frozen

CPU = torch.device("cpu")


def blobs(samples=30, classes=3, features=4, seed=0):
    """Classes of unit variance around points that are three apart."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(samples * classes) % classes
    return torch.randn(len(y), features, generator=g) + 3 * torch.eye(classes, features)[y], y


# -- the evaluation


def test_heads_say_what_the_authors_and_scikit_learn_say(golden_dir):
    golden = np.load(golden_dir / "disc_vs_gen.npz")
    count = int(golden["num_batches"])
    x, y = (torch.from_numpy(np.concatenate([golden[f"batch{i}/{name}"] for i in range(count)])) for name in "xy")
    test, classes = torch.from_numpy(golden["test/x"]), int(y.max()) + 1
    heads = LinearEvaluation(eps=float(golden["eps"])).heads(x.shape[1], classes, CPU)
    assert heads["naive_bayes"]().fit(x, y).predict(test).tolist() == golden["test/pred"].tolist()
    keep = golden["sklearn/keep"]
    for penalty in (1, 10):
        made = LinearEvaluation(C=float(penalty)).heads(len(keep), classes, CPU)["logistic_regression"]()
        found = made.fit(x[:, keep], y)(test[:, keep]).softmax(1)
        np.testing.assert_allclose(found.detach().numpy(), golden[f"logreg/C{penalty}/proba"], atol=1e-4)


def test_a_curve_is_the_accuracy_on_its_own_subsets():
    (x, y), (x_test, y_test) = blobs(40), blobs(50, seed=1)
    curves = LinearEvaluation([2, 40], repeats=2, eps=1e-3, C=0.5)(x, y, x_test, y_test)
    assert (curves.samples_per_class, curves.samples) == ([2, 40], [6, 120])
    assert {name: tuple(found.shape) for name, found in curves.accuracy.items()} == {
        "naive_bayes": (2, 2),
        "logistic_regression": (2, 2),
    }
    # all samples make one subset, so that the last column is known
    known = LogisticRegression(C=0.5, tol=1e-8, max_iter=1000).fit(x, y).score(x_test, y_test)
    assert curves.accuracy["logistic_regression"][:, -1].tolist() == pytest.approx([known] * 2)
    variance = torch.stack([x[y == c].var(0, correction=0) for c in range(3)]).mean(0) + 1e-3
    means = torch.stack([x[y == c].mean(0) for c in range(3)])
    expected = ((x_test[:, None] - means).square() / variance).sum(-1).argmin(1)
    share = (expected == y_test).double().mean().item()
    assert curves.accuracy["naive_bayes"][:, -1].tolist() == pytest.approx([share] * 2)


def test_both_heads_see_the_same_subsets_and_every_class(monkeypatch):
    seen = {}

    class Spy:
        def __init__(self, name):
            self.name = name

        def fit(self, x, y):
            seen.setdefault(self.name, []).append(x[:, 0].tolist())
            assert set(y.tolist()) == {0, 1, 2}

        def predict(self, x):
            return torch.zeros(len(x), dtype=torch.long)

    both = {name: (lambda name=name: Spy(name)) for name in ("naive_bayes", "logistic_regression")}
    monkeypatch.setattr(LinearEvaluation, "heads", lambda self, *sizes: both)
    evaluation, steps = LinearEvaluation([1, 3], repeats=2), []
    curves = evaluation(
        *blobs(), *blobs(seed=1), progress=lambda sizes, text: (steps.append((list(sizes), text)), sizes)[1]
    )
    assert seen["naive_bayes"] == seen["logistic_regression"]
    assert [len(subset) for subset in seen["naive_bayes"]] == [3, 3, 9, 9]
    assert len({tuple(subset) for subset in seen["naive_bayes"]}) == 4
    assert steps == [([3, 9], "heads")]
    torch.testing.assert_close(curves.accuracy["naive_bayes"], torch.full((2, 2), 1 / 3, dtype=torch.float64))


def test_naive_bayes_needs_fewer_samples_of_many_features():
    train, test = make_gaussian_mixture(200, 2, 300, seed=0), make_gaussian_mixture(200, 2, 500, seed=1)
    curves = LinearEvaluation([3, 300])(*train, *test)
    few = {name: found[:, 0].mean().item() for name, found in curves.accuracy.items()}
    assert few["naive_bayes"] > 0.99
    assert few["naive_bayes"] > few["logistic_regression"] + 0.05
    assert curves.accuracy["logistic_regression"][:, 1].mean() > 0.99


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4000), st.integers(2, 20))
def test_default_sizes_rise_to_all_samples(per_class, classes):
    found = LinearEvaluation().sizes(per_class * classes + classes - 1, classes)
    assert found[-1] == per_class
    assert found == sorted(set(found))
    assert all(str(count).rstrip("0") in ("1", "2", "5") for count in found[:-1])


def test_it_is_a_value():
    evaluation = LinearEvaluation([1, 2], repeats=3, seed=4, eps=0.1, C=2.0, max_iter=50, scaling="minmax")
    assert repr(LinearEvaluation(**evaluation.settings())) == repr(evaluation)
    assert repr(pickle.loads(pickle.dumps(evaluation))) == repr(evaluation)
    assert "scaling='minmax'" in repr(evaluation)


def test_range_is_that_of_the_subset():
    x = torch.tensor([[0.0, 5.0], [10.0, 5.0]])

    class Keep:
        def fit(self, x, y):
            self.fitted = x

        def predict(self, x):
            self.asked = x
            return torch.zeros(len(x), dtype=torch.long)

    scaled = RangeScaled(Keep()).fit(x, torch.tensor([0, 1]))
    assert scaled.head.fitted.tolist() == [[0.0, 0.0], [1.0, 0.0]]
    assert scaled.predict(torch.tensor([[20.0, 6.0]])).tolist() == [0]
    assert scaled.head.asked.tolist() == [[2.0, 1.0]]
    (x, y), (x_test, y_test) = blobs(20), blobs(20, seed=1)
    curves = [
        LinearEvaluation([20], repeats=1, scaling=scaling, C=1e6)(x * scale + 7, y, x_test * scale + 7, y_test)
        for scaling, scale in (("minmax", 1.0), ("minmax", 1000.0))
    ]
    for name in curves[0].accuracy:
        assert curves[0].accuracy[name].item() == pytest.approx(curves[1].accuracy[name].item(), abs=0.02)


@pytest.mark.bad_input
def test_bad_settings_and_features_are_refused():
    for sizes in ([], [0, 1], [2, 1], [2, 2]):
        with pytest.raises(ValueError, match="samples_per_class: found"):
            LinearEvaluation(sizes)
    for name, value in {"repeats": 0, "C": 0.0, "max_iter": 0, "eps": -1.0, "scaling": "zscore"}.items():
        with pytest.raises(ValueError, match=f"{name}: found"):
            LinearEvaluation(**{name: value})
    (x, y), evaluation = blobs(), LinearEvaluation([31])
    with pytest.raises(ValueError, match=r"samples_per_class: found 31 for 90 training .* of 3 classes, needed 30"):
        evaluation(x, y, x, y)
    evaluation = LinearEvaluation([1], repeats=1)
    for wrong, message in (
        ((x, y[:-1], x, y), "x_train, y_train: found shapes"),
        ((x, y, x[:, :2], y), "x_test, y_test: found shapes"),
        ((x, y, x[:0], y[:0]), "x_test, y_test: found shapes"),
        ((torch.full_like(x, torch.nan), y, x, y), "x_train, y_train: found NaN"),
        ((x, y * 0, x, y), r"y_train: found classes \[0\], needed two"),
        ((x, y - 1, x, y), "y_train: found classes"),
        ((x, y, x, y + 1), r"y_test: found classes that training has not, such as \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation(*wrong)


def test_a_class_that_is_no_number_from_zero_on_is_never_said():
    x, y = blobs()
    curves = LinearEvaluation([30], repeats=1, eps=1e-3)(x[y != 1], y[y != 1], x[y != 1], y[y != 1])
    assert all(found.item() > 0.9 for found in curves.accuracy.values())


# -- curves


def made(bayes, logistic):
    accuracy = {
        "naive_bayes": torch.tensor([bayes]).double(),
        "logistic_regression": torch.tensor([logistic]).double(),
    }
    return LearningCurves([1, 2, 4], [3, 6, 12], accuracy)


@pytest.mark.parametrize(
    ("bayes", "logistic", "crossing"),
    [
        ([0.5, 0.6, 0.7], [0.4, 0.7, 0.8], 2),
        ([0.5, 0.6, 0.7], [0.6, 0.5, 0.8], 4),
        ([0.5, 0.6, 0.7], [0.6, 0.7, 0.8], 1),
        ([0.5, 0.6, 0.7], [0.6, 0.7, 0.7], None),
    ],
)
def test_where_curves_cross_for_good(bayes, logistic, crossing):
    assert made(bayes, logistic).crossing() == crossing


def test_rows_of_curves():
    rows = list(made([0.5, 0.6, 0.7], [0.4, 0.7, 0.8]).rows())
    assert len(rows) == 6
    assert rows[4] == {
        "head": "logistic_regression",
        "samples_per_class": 2,
        "samples": 6,
        "repeat": 0,
        "accuracy": pytest.approx(0.7),
    }


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_curves_are_drawn(tmp_path, kind):
    with (tmp_path / "curves").open("wb") as file:
        draw_learning_curves(made([0.5, 0.6, 0.7], [0.4, 0.7, 0.8]), file, kind, "pixels")
    if kind == "png":
        assert Image.open(tmp_path / "curves").size == (936, 598)
    else:
        assert "from 2 per class" in (tmp_path / "curves").read_text()


# -- features


def test_features_of_any_system():
    images = torch.rand(3, 1, 16, 16)
    common = {"image_size": 16, "in_channels": 1}
    unpg = UNPGModule("conv2", 5, embedding_dim=6, **common).eval()
    parts = EvalProtoPNetModule("conv3", 5, prototype_channels=7, **common).eval()
    two = STProtoPNetModule("conv2", 5, prototype_channels=7, prototypes_per_class=2, **common).eval()
    latent = CaseBasedModule(5, num_prototypes=4, **common).eval()
    loose = ProbPSENNModule(5, image_size=32).eval()
    with torch.no_grad():
        torch.testing.assert_close(frozen_features(unpg, images), unpg.embed(images))
        _, deep = parts.network.backbone(images)
        torch.testing.assert_close(frozen_features(parts, images), parts.network.addon(deep).mean((2, 3)))
        assert frozen_features(two, images).shape == (3, 14)
        expected = latent.network.encode(images * 0.5 + 0.5)
        torch.testing.assert_close(frozen_features(latent, images), expected)
        larger = torch.rand(2, 1, 32, 32)
        expected = loose.network.encode(loose.inputs(larger))
        torch.testing.assert_close(frozen_features(loose, larger), expected)


def test_features_of_any_module():
    images = torch.rand(2, 3, 8, 8)
    assert frozen_features(nn.Flatten(), images).shape == (2, 192)
    torch.testing.assert_close(frozen_features(nn.Identity(), images), images.mean((2, 3)))
    assert frozen_features(nn.Flatten().bfloat16(), images.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"network: gave \(2, 3, 64\), needed features"):
        frozen_features(nn.Flatten(2), images)


def test_backbones_by_name():
    data = Digits(image_size=8)
    assert isinstance(create_frozen("pixels", data), nn.Flatten)
    assert frozen_features(create_frozen("conv2", data), torch.zeros(2, 1, 8, 8)).shape == (2, 64)
    with pytest.raises(ValueError, match="pretrained: there are no weights for 'pixels'"):
        create_frozen("pixels", data, pretrained=True)


def test_image_sets_are_evaluated_unaugmented_and_in_evaluation_mode():
    data, steps = Digits(image_size=8, batch_size=200, augment="flip"), []
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5)).train()
    found = image_set_features(network, data, progress=lambda batches, text: (steps.append(text), batches)[1])
    assert network[1].training
    assert steps == ["training images", "test images"]
    plain = Digits(image_size=8)
    for x, y, fold in ((found.x_train, found.y_train, "train"), (found.x_test, found.y_test, "test")):
        rows = plain.rows(fold)
        assert y.tolist() == plain.table.targets[rows].tolist()
        image = plain.model_input(plain.record_ids[int(rows[3])])
        torch.testing.assert_close(x[3], image.flatten())
    assert found.class_names == [str(digit) for digit in range(10)]
    with pytest.raises(ValueError, match="4 classes without training images, such as"):
        image_set_features(nn.Flatten(), Digits(image_size=8, protocol=UnseenClasses(4)))


def test_one_fold_of_classes_that_never_train():
    data, steps = Digits(image_size=8, batch_size=200, augment="flip", protocol=UnseenClasses(4)), []
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5)).train()
    progress = lambda batches, text: (steps.append(text), batches)[1]  # noqa: E731
    for fold in ("test", "val"):
        found, rows = fold_features(network, data, fold, progress=progress), data.rows(fold)
        assert found.y_test.tolist() == data.table.targets[rows].tolist()
        assert (found.x_train.shape, found.y_train.shape) == ((0, 64), (0,))
        image = data.model_input(data.record_ids[int(rows[3])])
        torch.testing.assert_close(found.x_test[3], image.flatten())
        assert found.class_names == data.table.class_names
    assert steps == ["test images", "val images"]
    assert network[1].training


# -- files


def example():
    x, y = blobs(4)
    return FrozenFeatures(x[:8], y[:8], x[8:], y[8:], ["b", "c", "d"])


def test_files_are_read_as_they_were_written(tmp_path):
    write_features(tmp_path / "f.npz", example())
    found = read_features(tmp_path / "f.npz")
    for one, two in zip(found[:4], example()[:4]):
        assert torch.equal(one, two)
    assert found.class_names == ["b", "c", "d"]


def test_tables_and_numbers_as_labels(tmp_path):
    with (tmp_path / "f.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["record", "e0", "label", "e1"])
        writer.writerows([f"r{n}", n, "cat" if n % 2 else "dog", -n] for n in range(10))
    found = read_features(tmp_path / "f.csv", test_fraction=0.4, seed=1)
    assert (len(found.y_train), len(found.y_test)) == (6, 4)
    assert sorted(found.y_test.tolist()) == [0, 0, 1, 1]
    assert torch.equal(found.x_train[:, 0], -found.x_train[:, 1])
    assert [found.class_names[y] for y in found.y_train] == [
        "cat" if n % 2 else "dog" for n in found.x_train[:, 0].int()
    ]
    again = read_features(tmp_path / "f.csv", test_fraction=0.4, seed=2)
    assert not torch.equal(again.x_test, found.x_test)
    np.savez(tmp_path / "n.npz", features=np.eye(4), labels=[10, 7, 10, 7], fold=["train", "train", "test", ""])
    found = read_features(tmp_path / "n.npz")
    assert (found.class_names, found.y_train.tolist(), found.y_test.tolist()) == (["7", "10"], [1, 0], [1])
    assert found.x_train.dtype == torch.float32


def test_test_samples_alone(tmp_path):
    write_features(tmp_path / "f.npz", example())
    found = read_test_features(tmp_path / "f.npz")
    assert torch.equal(found.x_test, example().x_test)
    assert (found.x_train.shape, found.class_names) == ((0, 4), ["b", "c", "d"])
    write_features(tmp_path / "f.npz", found)
    again = read_test_features(tmp_path / "f.npz")
    assert torch.equal(again.y_test, found.y_test)
    (tmp_path / "f.csv").write_text("label,a\ncat,1\ndog,2\n")
    assert read_test_features(tmp_path / "f.csv").x_test.tolist() == [[1], [2]]
    (tmp_path / "f.csv").write_text("label,fold,a\ncat,train,1\ndog,val,2\n")
    with pytest.raises(ValueError, match=r"f\.csv': found no test sample, needed some"):
        read_test_features(tmp_path / "f.csv")


@pytest.mark.bad_input
def test_bad_files_are_refused(tmp_path):
    def text(content, name="f.csv"):
        (tmp_path / name).write_text(content)
        return tmp_path / name

    def arrays(**values):
        np.savez(tmp_path / "f.npz", **values)
        return tmp_path / "f.npz"

    cases = [
        (tmp_path / "none.csv", r"none\.csv' cannot be read"),
        (tmp_path / "none.npz", r"none\.npz' cannot be read"),
        (tmp_path / "f.parquet", r"needed a file that ends in \.npz or \.csv"),
        (text("no archive", "bad.npz"), r"bad\.npz' cannot be read"),
    ]
    for path, message in cases:
        with pytest.raises(ValueError, match=message):
            read_features(path)
    for content, message in (
        ("", "found columns"),
        ("a,b\n1,2\n", "needed label"),
        ("label\ncat\n", "needed label, features"),
        ("label,a\ncat,1\ndog\n", "line 3: found 1 columns, needed 2"),
        ("label,a\ncat,x\n", "a feature is no number"),
        ("label,a\ncat,nan\ndog,1\n", "sample 0 .* NaN"),
        ("label,fold,a\ncat,train,1\ndog,train,2\n", "2 training and 0 test samples"),
    ):
        with pytest.raises(ValueError, match=message):
            read_features(text(content))
    x = np.eye(4)
    for values, message in (
        ({"features": x}, r"lacks \['labels'\]"),
        ({"features": x, "labels": np.zeros(3, int)}, "found features"),
        ({"features": x, "labels": np.zeros(4)}, "needed numbers, and texts or whole numbers"),
        ({"features": x, "labels": np.zeros(4, int), "fold": ["train"]}, "fold"),
        ({"features": np.array([{}] * 4), "labels": np.zeros(4, int)}, "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            read_features(arrays(**values))
