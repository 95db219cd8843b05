"""Image data sets: every kind of file, every layout, and what is wrong with bad ones."""

import csv
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from proto_vision import Digits, ImageFolder
from proto_vision.data.augmentation import Augmentation
from proto_vision.data.dataset import split_rows
from proto_vision.data.images import ArrayReader, find_images, read_image
from proto_vision.data.protocols import UnseenClasses

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


def paint(path, value=128, size=(10, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255 - value)).save(path)
    return path


# -- files


def rgb(image):
    assert image.mode == "RGB"
    return np.asarray(image)


def test_grey_sixteen_bit_palette_and_transparent_images_become_rgb(tmp_path):
    expected = np.repeat(GREY[..., None], 3, 2)
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(rgb(read_image(tmp_path / "grey.png")), expected)
    Image.fromarray(GREY.astype(np.uint16) * 256 + 77).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(rgb(read_image(tmp_path / "deep.png")), expected)
    Image.fromarray(GREY.astype(np.uint16) * 256 + 77).save(tmp_path / "deep.tif")
    np.testing.assert_array_equal(rgb(read_image(tmp_path / "deep.tif")), expected)
    Image.fromarray(GREY > 100).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(rgb(read_image(tmp_path / "bits.png"))[..., 0], (GREY > 100) * 255)
    Image.fromarray(expected).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    np.testing.assert_array_equal(rgb(read_image(tmp_path / "palette.png")), expected)
    clear = np.dstack([expected, np.where(GREY > 100, 255, 0).astype(np.uint8)])
    Image.fromarray(clear).save(tmp_path / "clear.png")
    over_white = np.where(GREY[..., None] > 100, expected, 255)
    np.testing.assert_array_equal(rgb(read_image(tmp_path / "clear.png")), over_white)
    Image.fromarray(clear[..., [0, 3]]).save(tmp_path / "la.png")
    np.testing.assert_array_equal(rgb(read_image(tmp_path / "la.png")), over_white)
    Image.fromarray(expected).convert("CMYK").save(tmp_path / "ink.tif")
    assert np.abs(rgb(read_image(tmp_path / "ink.tif")).astype(int) - expected).max() <= 1


def test_a_dark_sixteen_bit_image_is_not_taken_for_an_eight_bit_one(tmp_path):
    Image.fromarray(np.full((2, 2), 200, np.uint16)).save(tmp_path / "dark.png")
    assert rgb(read_image(tmp_path / "dark.png")).max() == 0


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", ["cut", "text", "empty", "missing", "folder"])
def test_a_bad_file_is_named(tmp_path, kind):
    path = tmp_path / "x.png"
    if kind == "cut":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "text":
        path.write_text("<html>not found</html>")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(ValueError, match=r"image '.*x\.png'"):
        read_image(path)


@pytest.mark.bad_input
def test_float_images_and_a_bomb_are_refused(tmp_path, monkeypatch):
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif.*needed 8 or 16 bits"):
        read_image(tmp_path / "float.tif")
    paint(tmp_path / "large.png", size=(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"large\.png"):
        read_image(tmp_path / "large.png")


def test_boxes_are_cut_out_within_the_image(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    np.testing.assert_array_equal(rgb(read_image(tmp_path / "a.png", (1, 0, 3, 2)))[..., 0], GREY[0:2, 1:3])
    np.testing.assert_array_equal(rgb(read_image(tmp_path / "a.png", (-5, 1, 99, 99)))[..., 0], GREY[1:])
    with pytest.raises(ValueError, match="holds no pixel of its 4 x 3"):
        read_image(tmp_path / "a.png", (4, 0, 9, 9))


def test_files_are_found_by_ending_and_hidden_ones_are_not(tmp_path):
    for name in ("b.JPG", "a/c.webp", ".hidden.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in find_images(tmp_path)] == ["c.webp", "b.JPG"]


@pytest.mark.bad_input
def test_array_reader_wants_bytes():
    with pytest.raises(ValueError, match="needed uint8"):
        ArrayReader(np.zeros((2, 4, 4)))


# -- shares


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0, 0.99), st.integers(0, 5))
def test_shares_are_of_every_class_and_leave_one(labels, fraction, seed):
    targets = np.array(labels)
    chosen = split_rows(targets, fraction, seed)
    assert len(set(chosen.tolist())) == len(chosen)
    for c in set(labels):
        count = int((targets == c).sum())
        drawn = int((targets[chosen] == c).sum())
        assert drawn == int(fraction * count + 1e-9) < count
    np.testing.assert_array_equal(chosen, split_rows(targets, fraction, seed))


@pytest.mark.bad_input
def test_a_share_is_below_one():
    with pytest.raises(ValueError, match="val_fraction: found 1"):
        split_rows(np.zeros(3, int), 1.0, 0, argument="val_fraction")


# -- folders


def folds(data):
    return {name: sorted(np.array(data.record_ids)[data.table.fold == name]) for name in ("train", "val", "test")}


def test_flat_folder_is_shared_out(tmp_path):
    for c in "ab":
        for n in range(10):
            paint(tmp_path / c / f"{n}.png", n * 20)
    data = ImageFolder(tmp_path, image_size=8, val_fraction=0.25, test_fraction=0.2)
    data.setup()
    assert data.class_names == ["a", "b"]
    assert {name: len(ids) for name, ids in folds(data).items()} == {"train": 12, "val": 4, "test": 4}
    batch = next(iter(data.test_dataloader()))
    assert batch.image.shape == (4, 3, 8, 8)
    assert [data.describe(int(i))[1] for i in batch.index] == [[data.class_names[t]] for t in batch.target]
    assert folds(ImageFolder(tmp_path, val_fraction=0.25, seed=1)) != folds(data)


def test_split_folders_are_taken_as_they_are(tmp_path):
    for fold in ("train", "valid", "test"):
        for c in "ab":
            paint(tmp_path / fold / c / "deep" / "1.png")
    data = ImageFolder(tmp_path)
    assert folds(data)["val"] == ["valid/a/deep/1.png", "valid/b/deep/1.png"]
    assert folds(data)["test"] == ["test/a/deep/1.png", "test/b/deep/1.png"]


def test_imagenet_layout_tests_on_val(tmp_path):
    for n in range(10):
        paint(tmp_path / "train" / "n01" / f"{n}.png")
    paint(tmp_path / "val" / "n01" / "x.png")
    found = folds(ImageFolder(tmp_path, val_fraction=0.1))
    assert found["test"] == ["val/n01/x.png"]
    assert len(found["val"]) == 1
    assert folds(ImageFolder(tmp_path, val_fraction=0))["val"] == []


def test_a_class_of_one_image_trains(tmp_path):
    paint(tmp_path / "a" / "1.png")
    for n in range(4):
        paint(tmp_path / "b" / f"{n}.png")
    data = ImageFolder(tmp_path, test_fraction=0.5, val_fraction=0.5)
    assert folds(data)["train"] == ["a/1.png", *[i for i in folds(data)["train"] if i[0] == "b"]]


def test_table_of_labels(tmp_path):
    for n in range(4):
        paint(tmp_path / f"{n}.png", n)
    table = tmp_path / "labels.csv"
    table.write_text("image,label,split\n0.png,cat,train\n1.png,dog,\n2.png,dog,val\n3.png,cat,test\n")
    data = ImageFolder(tmp_path, labels=table, image_size=4)
    assert folds(data) == {"train": ["0.png", "1.png"], "val": ["2.png"], "test": ["3.png"]}
    assert data.targets.tolist() == [0, 1, 1, 0]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\n0.png,cat\n", r"columns \['file', 'label'\], needed image, label"),
        ("image,label\n", "columns"),
        ("image,label\n9.png,cat\n", r"1 images of .* are not in .*9\.png"),
        ("image,label\n0.png,\n", "line 2"),
        ("image,label,split\n0.png,cat,evaluation\n", "line 2"),
        ("image,label\n0.png,cat\n0.png,dog\n", "twice"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, message):
    paint(tmp_path / "0.png")
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        _ = ImageFolder(tmp_path, labels=tmp_path / "labels.csv").table


@pytest.mark.bad_input
def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        _ = ImageFolder(tmp_path / "none").table
    with pytest.raises(ValueError, match="needed one per class"):
        _ = ImageFolder(tmp_path).table
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=r"a: found no image"):
        _ = ImageFolder(tmp_path).table
    paint(tmp_path / "a" / "1.png")
    paint(tmp_path / "A" / "1.png")
    with pytest.raises(ValueError, match="letter case"):
        _ = ImageFolder(tmp_path).table


@pytest.mark.bad_input
def test_classes_that_differ_between_splits_are_refused(tmp_path):
    paint(tmp_path / "train" / "cat" / "1.png")
    paint(tmp_path / "test" / "Cat" / "1.png")
    with pytest.raises(ValueError, match=r"classes that train lacks: \['Cat'\] \('cat' there\)"):
        _ = ImageFolder(tmp_path).table
    with pytest.raises(ValueError, match=r"labels: .* cannot be read"):
        _ = ImageFolder(tmp_path, labels=tmp_path / "none.csv").table


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_size": 0}, "image_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_workers": -1}, "num_workers"),
        ({"in_channels": 4}, "in_channels"),
        ({"augment": "spin"}, "augment"),
        ({"mean": [0.5]}, "mean: found 1 values for 3"),
        ({"std": [0.5, 0.0, 1.0]}, "std"),
    ],
)
def test_bad_settings_are_refused(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        ImageFolder(tmp_path, **changed)


def corrupt_folder(tmp_path):
    root = tmp_path / "images"
    for n in range(6):
        paint(root / "a" / f"{n}.png")
        paint(root / "b" / f"{n}.png")
    (root / "a" / "bad.png").write_text("no image")
    return root


@pytest.mark.bad_input
def test_a_corrupt_image_is_an_error_that_names_it(tmp_path):
    data = ImageFolder(corrupt_folder(tmp_path), image_size=4, val_fraction=0, test_fraction=0.1)
    with pytest.raises(ValueError, match=r"bad\.png.*not an image"):
        list(data.train_dataloader())


def test_corrupt_images_are_left_out_and_listed_on_demand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ImageFolder(corrupt_folder(tmp_path), image_size=4, val_fraction=0, test_fraction=0.2, skip_corrupt=True)
    with pytest.warns(UserWarning, match="1 images cannot be read"):
        data.prepare_data()
    data.setup("fit")
    assert not any("bad" in i for fold in folds(data).values() for i in fold)
    assert len(list(data.train_dataloader())) == 1
    with (tmp_path / "skipped_images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["a/bad.png"]
    assert "not an image" in rows[0]["problem"]


def test_images_of_any_size_and_augmentation_have_the_model_s_size(tmp_path):
    paint(tmp_path / "a" / "wide.png", size=(40, 3))
    paint(tmp_path / "a" / "dot.png", size=(1, 1))
    paint(tmp_path / "b" / "tall.png", size=(3, 40))
    for resize in ("stretch", "crop"):
        for augment in get_args(Augmentation):
            for channels in (1, 3):
                data = ImageFolder(
                    tmp_path,
                    image_size=12,
                    resize=resize,
                    augment=augment,
                    in_channels=channels,
                    val_fraction=0,
                    test_fraction=0,
                )
                batch = next(iter(data.train_dataloader()))
                assert batch.image.shape == (3, channels, 12, 12), (resize, augment)
                assert batch.image.isfinite().all()


def test_normalisation_view_and_ids(tmp_path):
    paint(tmp_path / "a" / "1.png", 255)
    data = ImageFolder(tmp_path, image_size=4, val_fraction=0, test_fraction=0)
    x = data.model_input("a/1.png")
    expected = (torch.tensor([1.0, 0, 0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(x[:, 0, 0], expected)
    assert data.view(tmp_path / "a" / "1.png").size == (4, 4)
    assert data.find_image("a/1.png") == "a/1.png"
    assert data.find_image(str(tmp_path / "a" / "1.png")) == tmp_path / "a" / "1.png"
    with pytest.raises(ValueError, match="neither a file"):
        data.find_image("b.png")


def test_digits_are_the_same_in_memory_and_one_by_one():
    data = Digits(image_size=8)
    whole, one = data.test_set[5], data.eval_transform()(data.reader()(int(data.rows("test")[5])))
    torch.testing.assert_close(whole.image, one)
    assert {name: len(ids) for name, ids in folds(data).items()} == {"train": 724, "val": 177, "test": 896}
    batch = data.test_set.__getitems__([3, 1])
    assert torch.equal(data.test_set.collate(batch).image[1], data.test_set[1].image)


# -- views and protocols


def test_further_views_are_other_changes_of_the_same_image():
    data = Digits(image_size=16, batch_size=8, augment="none", views=("shift", "simclr"))
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape == (8, 3, 1, 16, 16)
    for n, row in enumerate(batch.index.tolist()):
        torch.testing.assert_close(batch.image[n, 0], data.model_input(data.record_ids[row]))
    assert not torch.equal(batch.image[:, 0], batch.image[:, 1])
    assert batch.trusted.all()
    assert next(iter(data.val_dataloader())).image.ndim == 4
    with pytest.raises(ValueError, match="views: found 'blur', needed one of"):
        Digits(views=("blur",))


@pytest.mark.parametrize("tested", [False, True])
def test_unseen_classes_come_last_and_are_tested_only(tested):
    plain = Digits(image_size=8).table
    data = Digits(image_size=8, protocol=UnseenClasses(classes=["2", "7"], seen_tested=tested))
    table = data.table
    assert data.class_names == ["0", "1", "3", "4", "5", "6", "8", "9"]
    assert table.class_names == [*data.class_names, "2", "7"]
    names = np.array(table.class_names)[table.targets]
    assert (names == np.array(plain.class_names)[plain.targets]).all()
    unseen = np.isin(names, ["2", "7"])
    assert set(table.fold[unseen]) == {"test"}
    seen = table.fold[~unseen]
    assert (seen == "test").sum() == ((plain.fold[~unseen] == "test").sum() if tested else 0)
    assert plain.class_names[2] == "2", "the source's own table stays as it is"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needed one of them"),
        ({"count": 10}, "count: found 10, needed 1 to 9"),
        ({"classes": ["x"]}, r"classes: found \['x'\]"),
    ],
)
def test_classes_that_cannot_be_left_out_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        _ = Digits(image_size=8, protocol=UnseenClasses(**settings)).table
