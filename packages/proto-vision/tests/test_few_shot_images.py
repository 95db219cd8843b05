"""Data of OPL's other experiments: RFS's files of few-shot learning, domains in folders, pickles that are not run."""

import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from proto_vision import DomainFolder, FewShotImages
from proto_vision.backbones import create_backbone
from proto_vision.data.plain_pickle import read_plain_pickle

MINI = "miniImageNet_category_split_"


def test_the_resnet_of_rfs():
    network, channels = create_backbone("resnet12_640", in_channels=1, shallow=True)
    assert channels == (64, 640)
    with torch.no_grad():
        maps = network.eval()(torch.zeros(1, 1, 32, 32))
    assert [tuple(part.shape) for part in maps] == [(1, 64, 16, 16), (1, 640, 2, 2)]
    # three 3 x 3 convolutions and one of 1 x 1 with batch norm in each block
    widths = [(1, 64), (64, 160), (160, 320), (320, 640)]
    expected = sum(10 * a * b + 18 * b * b + 4 * 2 * b for a, b in widths)
    assert sum(value.numel() for value in network.parameters()) == expected
    with pytest.raises(ValueError, match="no weights for 'resnet12_640'"):
        create_backbone("resnet12_640", pretrained=True)


# -- pickles


def pickled(path, value, protocol=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_containers_are_what_they_were(tmp_path, protocol):
    value = {
        "data": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "other order": np.arange(3, dtype=">i4"),
        "flags": np.array([True, False]),
        "nothing": np.zeros((0, 5), np.float32),
        "labels": [1, np.int64(2), np.float64(0.5), (None, "name", b"bytes", True)],
        3: {"deep": [np.zeros(())]},
    }
    found = read_plain_pickle(pickled(tmp_path / "a.pickle", value, protocol))
    assert list(found) == list(value)
    for name in ("data", "columns", "other order", "flags", "nothing"):
        assert found[name].dtype.newbyteorder("=") == value[name].dtype.newbyteorder("=")
        np.testing.assert_array_equal(found[name], value[name])
    assert found["labels"] == [1, 2, 0.5, (None, "name", b"bytes", True)]
    assert found[3]["deep"][0].shape == ()


def test_an_array_of_python_2(tmp_path):
    """There, the bytes of an array, its type and a dictionary's keys were text alike."""
    raw = bytes([0, 127, 128, 255])
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01K\x02K\x02\x86"
        b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x04" + raw
    )
    (tmp_path / "old.pickle").write_bytes(b"\x80\x02}U\x04data" + array + b"tbs.")
    assert read_plain_pickle(tmp_path / "old.pickle")["data"].tolist() == [[0, 127], [128, 255]]
    assert list(read_plain_pickle(tmp_path / "old.pickle", encoding="bytes")) == [b"data"]


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.bad_input
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_nothing_of_a_pickle_is_run(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    evils = [
        Evil(os.system, "touch owned"),
        Evil(eval, "open('owned', 'w')"),
        Evil(np.load, "owned"),
        Evil(bytes, 10**15),
        Evil(np.ndarray, (2, 2)),
        np.array([Evil(os.system, "touch owned")], dtype=object),
        np.array(["text"]),
        np.zeros(2, dtype=[("a", int)]),
        np.dtype("u1"),
        {1, 2},
        Evil,
    ]
    for evil in evils:
        pickled(tmp_path / "evil.pickle", {"data": [evil]}, protocol)
        with pytest.raises(ValueError, match=r"^root: .*evil\.pickle' is no pickle of plain data \("):
            read_plain_pickle(tmp_path / "evil.pickle", argument="root")
    assert not (tmp_path / "owned").exists()


@pytest.mark.bad_input
def test_files_that_are_no_pickles_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"^file: .*none' cannot be read"):
        read_plain_pickle(tmp_path / "none")
    endless = []
    endless.append(endless)
    for content in (b"", b"no pickle", pickle.dumps({"data": np.zeros(40)})[:-60], pickle.dumps(endless)):
        (tmp_path / "cut").write_bytes(content)
        with pytest.raises(ValueError, match=r"cut' is no pickle of plain data"):
            read_plain_pickle(tmp_path / "cut")


# -- RFS's files


def pixels(labels, size=6):
    """Images whose grey value is ten times their label."""
    return np.broadcast_to(np.uint8(10) * np.array(labels, np.uint8)[:, None, None, None], (len(labels), size, size, 3))


def part(labels, listed=True):
    return {"data": np.ascontiguousarray(pixels(labels)), "labels": labels if listed else np.array(labels)}


def mini(root):
    pickled(root / f"{MINI}train_phase_train.pickle", part([5, 5, 1, 1, 5, 1]))
    pickled(root / f"{MINI}val.pickle", part([2, 3]))
    pickled(root / f"{MINI}test.pickle", part([9, 7, 7], listed=False))
    return root


def fold(data, name):
    return [data.record_ids[row] for row in np.flatnonzero(data.table.fold == name)]


def test_base_classes_train_and_new_ones_are_tested(tmp_path):
    data = FewShotImages(mini(tmp_path), val_fraction=0.34)
    assert (data.class_names, data.table.class_names, data.image_size) == (["1", "5"], ["1", "5", "7", "9"], 84)
    assert data.targets.tolist() == [1, 1, 0, 0, 1, 0, 3, 2, 2]
    assert fold(data, "test") == ["test-000000", "test-000001", "test-000002"]
    held = np.flatnonzero(data.table.fold == "val")
    assert sorted(data.targets[held].tolist()) == [0, 1]
    reader = data.reader()
    for row, label in enumerate([5, 5, 1, 1, 5, 1, 9, 7, 7]):
        image = reader(row)
        assert (image.mode, image.size, image.getpixel((0, 5))) == ("RGB", (6, 6), (10 * label,) * 3)
    other = FewShotImages(tmp_path, val_fraction=0.34, seed=1)
    assert fold(other, "train") != fold(data, "train")
    batch = next(iter(FewShotImages(tmp_path, image_size=4, augment="jitter", batch_size=4).train_dataloader()))
    assert batch.image.shape == (4, 3, 4, 4)


def test_other_images_of_the_base_classes_validate(tmp_path):
    pickled(mini(tmp_path) / f"{MINI}train_phase_val.pickle", part([1, 5]))
    data = FewShotImages(tmp_path)
    assert fold(data, "val") == ["val-000000", "val-000001"]
    assert len(fold(data, "train")) == 6
    assert data.reader()(int(data.rows("val")[1])).getpixel((0, 0)) == (50, 50, 50)
    assert data.class_names == ["1", "5"]


def test_settings_are_chosen_by_classes_of_their_own(tmp_path):
    data = FewShotImages(mini(tmp_path), novel="val", val_fraction=0.0)
    assert data.table.class_names == ["1", "5", "2", "3"]
    assert len(fold(data, "test")) == 2
    assert data.val_dataloader() == []


def test_cifar_fs(tmp_path):
    for name, labels in {"train": [30, 40, 30, 40], "test": [2, 11]}.items():
        pickled(tmp_path / f"CIFAR_FS_{name}.pickle", part(labels))
    data = FewShotImages(tmp_path, "CIFAR-FS")
    assert (data.image_size, data.table.class_names) == (32, ["30", "40", "2", "11"])
    assert data.test_set[1].image.shape == (3, 32, 32)


def tiered(root):
    for name, labels in {"train": [4, 6, 6], "test": [8, 8]}.items():
        pickled(root / f"{name}_labels.pkl", {"labels": labels})
        np.savez(root / f"{name}_images.npz", images=pixels(labels))
    return root


def test_tiered_imagenet_reads_images_when_they_are_asked_for(tmp_path):
    data = FewShotImages(tiered(tmp_path), "tieredImageNet", val_fraction=0.0)
    images = (tmp_path / "train_images.npz").read_bytes()
    (tmp_path / "train_images.npz").unlink()
    assert data.table.class_names == ["4", "6", "8"]
    with pytest.raises(ValueError, match=r"train_images\.npz' cannot be read .*, needed the array images"):
        data.reader()
    (tmp_path / "train_images.npz").write_bytes(images)
    assert [data.reader()(row).getpixel((0, 0))[0] for row in range(5)] == [40, 60, 60, 80, 80]


@pytest.mark.bad_input
def test_bad_files_of_rfs_are_named(tmp_path):
    with pytest.raises(ValueError, match="name: found 'imagenet', needed one of"):
        FewShotImages(tmp_path, "imagenet")
    with pytest.raises(ValueError, match="novel: found 'train', needed 'test' or 'val'"):
        FewShotImages(tmp_path, novel="train")
    with pytest.raises(ValueError, match=r"train_phase_train\.pickle' cannot be read"):
        _ = FewShotImages(tmp_path).table
    train = mini(tmp_path) / f"{MINI}train_phase_train.pickle"
    for value, says in [
        ([1, 2], r"train_phase_train\.pickle: found list, needed a dictionary with labels"),
        ({"data": 1}, r"found \['data'\], needed a dictionary with labels"),
        ({"labels": []}, r"found labels float64 \(0,\), needed whole numbers"),
        ({"labels": ["dog"]}, r"found labels <U3 \(1,\)"),
        ({"labels": [[1], [1, 2]]}, r"found labels object \(\)"),
        ({"labels": [1, 2]}, "found images NoneType, needed uint8"),
        ({"labels": [1, 2], "data": np.zeros((2, 6, 6, 3))}, r"found images float64 \(2, 6, 6, 3\)"),
        ({"labels": [1, 2], "data": np.zeros((2, 6, 6), np.uint8)}, r"found images uint8 \(2, 6, 6\)"),
        ({"labels": [1, 2], "data": pixels([1, 2, 3])}, "found 3 images and 2 labels"),
        (part([1, 9]), r"found 1 classes in .*train\.pickle and .*test\.pickle, such as \[9\]"),
        (Evil(os.system, "touch owned"), r"train_phase_train\.pickle' is no pickle of plain data"),
    ]:
        pickled(train, value)
        with pytest.raises(ValueError, match=says):
            _ = FewShotImages(tmp_path).table
    pickled(mini(tmp_path) / f"{MINI}train_phase_val.pickle", part([1, 2]))
    with pytest.raises(ValueError, match=r"train_phase_val\.pickle: found 1 classes that .* lacks, such as \[2\]"):
        _ = FewShotImages(tmp_path).table
    data = FewShotImages(tiered(tmp_path), "tieredImageNet")
    np.savez(tmp_path / "test_images.npz", images=pixels([8]))
    with pytest.raises(ValueError, match=r"test_images\.npz: found 1 images and 2 labels"):
        data.reader()
    np.savez(tmp_path / "test_images.npz", images=np.array([{}]))
    with pytest.raises(ValueError, match=r"test_images\.npz' cannot be read"):
        data.reader()


# -- domains


def domains(root, count=10, **left_out):
    for domain, grey in {"photo": 0, "cartoon": 100, "sketch": 200}.items():
        for label in sorted({"dog", "horse"} - {left_out.get(domain)}):
            for number in range(count):
                path = root / domain / label / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (4, 4), (grey, 0, 0)).save(path)
    return root


def test_one_domain_is_left_out(tmp_path):
    data = DomainFolder(domains(tmp_path), "cartoon", image_size=4, val_fraction=0.2)
    assert data.class_names == ["dog", "horse"]
    assert {name.split("/")[0] for name in fold(data, "test")} == {"cartoon"}
    assert len(fold(data, "test")) == 20
    held = ["/".join(name.split("/")[:2]) for name in fold(data, "val")]
    assert sorted(held) == sorted(f"{d}/{c}" for d in ("photo", "sketch") for c in ("dog", "horse") for _ in range(2))
    for row, name in enumerate(data.record_ids):
        assert data.class_names[data.targets[row]] == name.split("/")[1]
    assert data.view(fold(data, "test")[0]).getpixel((0, 0)) == (100, 0, 0)
    two = DomainFolder(tmp_path, "photo", ["sketch", "photo"])
    assert {name.split("/")[0] for name in two.record_ids} == {"sketch", "photo"}


@pytest.mark.bad_input
def test_bad_folders_of_domains_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere' is no folder, needed one that holds a folder for each domain"):
        _ = DomainFolder(tmp_path / "nowhere", "photo").table
    root = domains(tmp_path / "all", count=1)
    for given, says in [
        (("Photo",), r"found \['Photo'\], needed folders of .*: \['cartoon', 'photo', 'sketch'\]"),
        (("photo", ["photo", "art"]), r"found \['art'\]"),
        (("photo", ["photo"]), "needed one of two domains or more, none twice"),
        (("photo", ["photo", "sketch", "sketch"]), "none twice"),
        (("photo", ["cartoon", "sketch"]), "found 'photo' and"),
    ]:
        with pytest.raises(ValueError, match=says):
            _ = DomainFolder(root, *given).table
    lacking = domains(tmp_path / "lacking", count=1, sketch="horse")
    with pytest.raises(ValueError, match=r"domains that lack classes, \{'sketch': \['horse'\]\}, needed the same"):
        _ = DomainFolder(lacking, "photo").table
    (lacking / "sketch" / "horse").mkdir()
    with pytest.raises(ValueError, match=r"sketch/horse: found no image, needed at least one"):
        _ = DomainFolder(lacking, "photo").table
    (tmp_path / "bare" / "a").mkdir(parents=True)
    (tmp_path / "bare" / "b").mkdir()
    with pytest.raises(ValueError, match="domains that lack classes"):
        _ = DomainFolder(tmp_path / "bare", "a").table
