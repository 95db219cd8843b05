"""MNIST and its kin: IDX files written here, plain and compressed, whole and broken."""

import gzip
import struct

import numpy as np
import pytest

from proto_vision import MNIST
from proto_vision.data.idx import read_idx


def packed(array):
    magic = {1: 2049, 3: 2051}[array.ndim]
    return struct.pack(f">{array.ndim + 1}i", magic, *array.shape) + array.astype(np.uint8).tobytes()


def write(root, *, end="", mark="-", train=30, test=10, size=(6, 5)):
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    made = {}
    for part, count in (("train", train), ("t10k", test)):
        made[part] = rng.integers(0, 256, (count, *size)), np.arange(count) % 10
        for array, kind in zip(made[part], ("images", "labels")):
            name = f"{part}-{kind}{mark}idx{array.ndim}-ubyte{end}"
            content = packed(array)
            (root / name).write_bytes(gzip.compress(content) if end else content)
    return made


@pytest.mark.parametrize(
    ("folder", "end", "mark"), [("", "", "-"), ("", ".gz", "-"), ("MNIST/raw", "", "-"), ("", "", ".")]
)
def test_files_as_they_lie_on_disk(tmp_path, folder, end, mark):
    made = write(tmp_path / folder, end=end, mark=mark)
    data = MNIST(tmp_path, val_count=10, image_size=6, mean=[0.0], std=[1.0])
    assert data.class_names == [str(digit) for digit in range(10)]
    assert {name: len(data.rows(name)) for name in ("train", "val", "test")} == {"train": 20, "val": 10, "test": 10}
    assert data.record_ids[0] == "train-00000"
    assert data.record_ids[30:32] == ["test-00000", "test-00001"]
    np.testing.assert_array_equal(data.rows("val"), np.arange(20, 30))  # the last of the training set
    np.testing.assert_array_equal(data.targets[:30], made["train"][1])
    np.testing.assert_array_equal(np.asarray(data.reader()(3))[..., 0], made["train"][0][3])
    np.testing.assert_array_equal(np.asarray(data.reader()(33))[..., 1], made["t10k"][0][3])


def test_batches_and_class_names(tmp_path):
    made = write(tmp_path, size=(28, 28))
    data = MNIST(tmp_path, "FashionMNIST", val_count=10, batch_size=8, mean=[0.0], std=[1.0])
    data.setup("fit")
    assert data.class_names[0] == "T-shirt/top"
    batch = next(iter(data.test_dataloader()))
    assert batch.image.shape == (8, 1, 28, 28)
    np.testing.assert_allclose(batch.image[:, 0] * 255, made["t10k"][0][:8], atol=1e-4)
    assert len(next(iter(data.train_dataloader())).target) == 8


@pytest.mark.bad_input
def test_broken_files_are_named(tmp_path):
    write(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    whole = file.read_bytes()
    cases = [
        (whole[:10], "found 10 bytes, needed a header of 16"),
        (whole[:-1], "found 899 bytes after the header, needed 900 for 30 x 6 x 5"),
        (whole + b"x", "found 901 bytes"),
        (whole[::-1], "found magic number"),
        ((tmp_path / "train-labels-idx1-ubyte").read_bytes(), "found magic number 2049, needed 2051"),
        (struct.pack("<4i", 2051, 30, 6, 5) + whole[16:], "found magic number 50855936"),
        (packed(np.zeros((29, 6, 5))), "found 30 labels, needed one for each of 29 images"),
        (packed(np.zeros((30, 5, 5))), r"found images of \(5, 5\) and \(6, 5\) pixels"),
    ]
    for content, message in cases:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            _ = MNIST(tmp_path, val_count=10).table
    file.write_bytes(whole)
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    labels.write_bytes(packed(np.array([0, 1, 10, 3, 4, 5, 6, 7, 8, 9])))
    with pytest.raises(ValueError, match="found label 10 in row 2, needed 0 to 9"):
        _ = MNIST(tmp_path, val_count=10).table
    labels.unlink()
    with pytest.raises(ValueError, match=r"found no 't10k-labels-idx1-ubyte' .*--data\.download true"):
        _ = MNIST(tmp_path, val_count=10).table
    compressed = tmp_path / "cut-idx1-ubyte.gz"
    for content in (gzip.compress(packed(np.arange(1000) % 10))[:-9], b"no gzip"):
        compressed.write_bytes(content)
        with pytest.raises(ValueError, match=r"cut-idx1-ubyte\.gz': cannot be read"):
            read_idx(compressed, 1)


@pytest.mark.bad_input
def test_bad_arguments_are_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match="name: found 'EMNIST'"):
        MNIST(tmp_path, "EMNIST")
    with pytest.raises(ValueError, match="val_count: found -1"):
        MNIST(tmp_path, val_count=-1)
    with pytest.raises(ValueError, match="val_count: found 5000, needed fewer than the 30 training images"):
        _ = MNIST(tmp_path).table
    write(tmp_path, test=0)
    with pytest.raises(ValueError, match="needed at least one image"):
        _ = MNIST(tmp_path, val_count=10).table


def test_download_is_asked_of_torchvision(tmp_path, monkeypatch):
    from torchvision import datasets

    asked = []
    monkeypatch.setattr(datasets, "MNIST", lambda root, download: asked.append((root, download)))
    write(tmp_path)
    MNIST(tmp_path, val_count=10).prepare_data()
    assert asked == []
    MNIST(tmp_path, val_count=10, download=True).prepare_data()
    assert asked == [(str(tmp_path), True)]

    def fails(root, download):
        raise RuntimeError("no net")

    monkeypatch.setattr(datasets, "MNIST", fails)
    with pytest.raises(ValueError, match=r"download: MNIST could not be fetched .* \(no net\)"):
        MNIST(tmp_path, val_count=10, download=True).prepare_data()
