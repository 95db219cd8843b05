"""Data of few-shot learning: Omniglot and miniImageNet as they lie on disk, built-in letters, folds by classes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from proto_vision import Glyphs, MiniImageNet, Omniglot
from proto_vision.data.class_split import ClassSplit, by_fold
from proto_vision.data.dataset import FOLDS, ImageTable


def draw(path, size=(6, 6), dark=(1, 0)):
    """A white page with one dark pixel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    page = Image.new("L", size, 255)
    page.putpixel(dark, 0)
    page.save(path)


def folds(data):
    return {name: sorted(np.array(data.record_ids)[data.table.fold == name]) for name in FOLDS}


# -- Omniglot


def omniglot(root):
    for place in ("Greek/character01/a.png", "Greek/character02/b.png", "Latin/character01/c.png"):
        draw(root / place)
    return root


def test_an_excerpt_of_omniglot_trains(tmp_path):
    data = Omniglot(omniglot(tmp_path), image_size=6)
    assert data.class_names == ["Greek/character01", "Greek/character02", "Latin/character01"]
    assert folds(data)["train"] == [
        "Greek/character01/a.png",
        "Greek/character02/b.png",
        "Latin/character01/c.png",
    ]
    image = data.train_set[0].image
    assert image.shape == (1, 6, 6)
    assert (image[0, 0, 1].item(), image[0, 1, 0].item()) == (-1, 1)


def test_both_halves_of_omniglot_are_folds(tmp_path):
    omniglot(tmp_path / "images_background")
    draw(tmp_path / "images_evaluation" / "Atlantean" / "character01" / "z.png")
    data = Omniglot(tmp_path)
    assert folds(data)["test"] == ["images_evaluation/Atlantean/character01/z.png"]
    assert data.class_names == ["Greek/character01", "Greek/character02", "Latin/character01"]
    assert data.table.class_names[3:] == ["Atlantean/character01"]
    assert data.num_classes == 3


def test_turned_characters_are_classes_of_their_own(tmp_path):
    data = Omniglot(omniglot(tmp_path), rotations=True, image_size=6, protocol=ClassSplit(test=["Latin/*"]))
    assert len(data.record_ids) == 12
    assert data.num_classes == 8
    assert data.table.class_names[8:] == [f"Latin/character01{turn}" for turn in ("", "/180", "/270", "/90")]
    name = "Greek/character02/b.png"
    for turn, where in (("", (0, 1)), ("@90", (4, 0)), ("@180", (5, 4)), ("@270", (1, 5))):
        image = data.model_input(name + turn)[0]
        assert image[where] == -1, turn
        assert (image == -1).sum() == 1
        label = data.table.class_names[data.targets[data.find_row(name + turn)]]
        assert label == "Greek/character02" + turn.replace("@", "/")


@pytest.mark.bad_input
def test_bad_omniglot_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="no folder, needed one that holds Omniglot"):
        _ = Omniglot(tmp_path / "none").table
    with pytest.raises(ValueError, match="found no image, needed ALPHABET/CHARACTER"):
        _ = Omniglot(tmp_path).table
    draw(tmp_path / "Greek" / "a.png")
    with pytest.raises(ValueError, match=r"Greek/a\.png: needed images at ALPHABET/CHARACTER/NAME"):
        _ = Omniglot(tmp_path).table
    omniglot(tmp_path / "sizes")
    draw(tmp_path / "sizes" / "Latin" / "character01" / "d.png", size=(6, 7))
    with pytest.raises(ValueError, match=r"found images of \[\(6, 6\), \(7, 6\)\] pixels, needed one size"):
        Omniglot(tmp_path / "sizes").reader()
    (tmp_path / "sizes" / "Latin" / "character01" / "d.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"d\.png': not an image"):
        Omniglot(tmp_path / "sizes").reader()


# -- miniImageNet


def mini(root, label="wnid", **rows):
    rows = rows or {
        "train": [("a.jpg", "n1"), ("b.jpg", "n3")],
        "val": [("c.jpg", "n0")],
        "test": [("d.jpg", "n2"), ("e.jpg", "n2")],
    }
    root.mkdir(parents=True, exist_ok=True)
    for fold, lines in rows.items():
        text = "".join(f"{name},{wnid}\n" for name, wnid in lines)
        (root / f"{fold}.csv").write_text(f"filename,{label}\n{text}")
        for name, _ in lines:
            draw(root / "images" / name, size=(12, 8))
    return root


@pytest.mark.parametrize("label", ["wnid", "label"])
def test_mini_imagenet_as_it_lies_on_disk(tmp_path, label):
    data = MiniImageNet(mini(tmp_path / "mini", label), image_size=7)
    assert data.class_names == ["n1", "n3"]
    assert data.table.class_names == ["n1", "n3", "n0", "n2"]
    assert {fold: len(names) for fold, names in folds(data).items()} == {"train": 2, "val": 1, "test": 2}
    assert data.targets.tolist() == [0, 1, 2, 3, 3]
    assert data.train_set[1].image.shape == (3, 7, 7)
    (tmp_path / "mini" / "val.csv").unlink()
    assert MiniImageNet(tmp_path / "mini").val_dataloader() == []


@pytest.mark.bad_input
def test_bad_mini_imagenet_files_are_named(tmp_path):
    root = mini(tmp_path / "mini")
    train, good = root / "train.csv", (root / "train.csv").read_bytes()
    for text, says in [
        ("image,wnid\na.jpg,n1\n", r"train\.csv: found columns \['image', 'wnid'\], needed filename and wnid"),
        ("filename,wnid\n", r"train\.csv: found columns \[\]"),
        ("filename,wnid\na.jpg,n1\nb.jpg\n", r"train\.csv, line 3: found \('b\.jpg', ''\)"),
        ("filename,wnid\na.jpg,n1\nx.jpg,n1\n", r"1 images of the CSV files are missing, such as \['images/x\.jpg'\]"),
        ("filename,wnid\na.jpg,n2\n", r"found class 'n2' in train\.csv and test\.csv"),
    ]:
        train.write_text(text)
        with pytest.raises(ValueError, match=says):
            _ = MiniImageNet(root).table
    train.write_bytes(b"filename,wnid\n\xff\xfe,n1\n")
    with pytest.raises(ValueError, match="cannot be read"):
        _ = MiniImageNet(root).table
    train.unlink()
    with pytest.raises(ValueError, match=r"found no train\.csv"):
        _ = MiniImageNet(root).table
    train.write_bytes(good)
    (root / "images" / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.jpg': not an image"):
        _ = MiniImageNet(root).train_set[0]


# -- built-in letters


def test_glyphs_are_the_same_for_a_seed():
    one, two, other = (Glyphs(image_size=16, per_class=2, seed=seed) for seed in (3, 3, 4))
    pixels = one.reader().pixels
    assert pixels.shape == (284, 64, 64)
    np.testing.assert_array_equal(pixels, two.reader().pixels)
    assert (pixels != other.reader().pixels).any()
    assert one.record_ids[:2] == ["Armenian/ա/00", "Armenian/ա/01"]
    assert {name: len(ids) for name, ids in folds(one).items()} == {"train": 142, "val": 0, "test": 142}
    dark = (pixels < 100).reshape(len(pixels), -1).sum(1)
    assert dark.min() > 0, "each page shows a letter"


@pytest.mark.bad_input
def test_one_glyph_of_a_class_is_refused():
    with pytest.raises(ValueError, match="per_class: found 1, needed 2 or more"):
        Glyphs(per_class=1)


# -- classes of their own for each fold


def table(folds, targets, names="abcdef"):
    return ImageTable(
        [f"image {n}" for n in range(len(targets))],
        np.array(targets, dtype=np.int64),
        np.array(folds, dtype="<U5"),
        list(names[: max(targets) + 1]),
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*FOLDS, ""]), st.integers(0, 4)), min_size=1, max_size=20))
def test_classes_come_in_the_order_of_folds(rows):
    given_table = table(*zip(*rows))
    found = by_fold(given_table)
    assert sorted(found.class_names) == sorted(given_table.class_names)
    for before, after in zip(given_table.targets, found.targets):
        assert given_table.class_names[before] == found.class_names[after]
    first = [
        min((FOLDS.index(f) for f, t in zip(found.fold, found.targets) if t == c and f), default=len(FOLDS))
        for c in range(len(found.class_names))
    ]
    assert first == sorted(first)


def test_whole_classes_are_held_out():
    source = table(["train", "test", "train", "test", "train", ""], [0, 0, 1, 1, 2, 3], "abcd")
    last = ClassSplit(val=1, test=1)(source)
    assert last.class_names == ["a", "b", "c", "d"]
    assert last.fold.tolist() == ["train", "train", "train", "train", "val", ""]
    named = ClassSplit(val=["a"], test=["[cd]"])(source)
    assert named.class_names == ["b", "a", "c", "d"]
    assert named.fold.tolist() == ["val", "val", "train", "train", "test", ""]
    assert named.targets.tolist() == [1, 1, 0, 0, 2, 3]
    drawn = [ClassSplit(val=1, test=1, seed=seed)(source).fold.tolist() for seed in range(6)]
    assert drawn[0] == ClassSplit(val=1, test=1, seed=0)(source).fold.tolist()
    assert len(set(map(tuple, drawn))) > 1


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"val": -1}, "val: found -1, needed 0 or more classes"),
        ({"test": ["x*"]}, r"test: found \['x\*'\], which fit no class"),
        ({"val": ["a"], "test": ["[ab]"]}, "found 'a' in both"),
        ({"val": 2, "test": 1}, "val, test: found 3 of 3 classes to hold out"),
        ({"val": 1, "test": ["a", "b"]}, "found 1 of 1 classes to hold out"),
    ],
)
def test_splits_that_leave_nothing_are_refused(wanted, says):
    with pytest.raises(ValueError, match=says):
        ClassSplit(**wanted)(table(["train"] * 3, [0, 1, 2]))
