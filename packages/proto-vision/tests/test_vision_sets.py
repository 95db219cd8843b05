"""Published image data sets as they lie on disk, made small; and real images of CIFAR-10."""

import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from proto_vision import CIFAR, CUB200, ImageFolder, StanfordCars, StanfordDogs

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


def paint(path, value=128, size=(10, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255 - value)).save(path)
    return path


def folds(data):
    return {name: sorted(np.array(data.record_ids)[data.table.fold == name]) for name in ("train", "val", "test")}


# -- fine-grained sets


def cub(root, n=4):
    species = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    (root / "parts").mkdir(parents=True)
    images = [f"{species[i % 2]}/bird_{i}.jpg" for i in range(n)]
    for name in images:
        paint(root / "images" / name, size=(40, 30))

    def write(name, rows):
        (root / name).write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))

    write("images.txt", [(i + 1, name) for i, name in enumerate(images)])
    write("classes.txt", [(c + 1, name) for c, name in enumerate(species)])
    write("image_class_labels.txt", [(i + 1, i % 2 + 1) for i in range(n)])
    write("train_test_split.txt", [(i + 1, int(i < n // 2)) for i in range(n)])
    write("bounding_boxes.txt", [(i + 1, 2.0, 3.9, 20.5, 10.0) for i in range(n)])
    (root / "parts" / "parts.txt").write_text("1 back\n2 left eye\n")
    write("parts/part_locs.txt", [(i + 1, p, 5.7 + i, 6.0, int(p == 1)) for i in range(n) for p in (1, 2)])
    return root


def test_cub_as_it_lies_on_disk(tmp_path):
    data = CUB200(cub(tmp_path / "CUB_200_2011"), image_size=8)
    assert data.class_names == ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    assert data.targets.tolist() == [0, 1, 0, 1]
    assert {name: len(ids) for name, ids in folds(data).items()} == {"train": 2, "val": 0, "test": 2}
    np.testing.assert_array_equal(data.table.boxes, [[2, 3, 22, 13]] * 4)
    assert data.reader()(0).size == (20, 10)
    assert CUB200(data.root, crop=False).reader()(0).size == (40, 30)
    parts = data.parts()
    assert parts.names == ["back", "left eye"]
    assert parts.locations[:, 0].tolist() == [[5, 6], [6, 6], [7, 6], [8, 6]]
    assert parts.visible.tolist() == [[True, False]] * 4
    assert data.val_dataloader() == []


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("bounding_boxes.txt", "1 2 3\n", "bounding_boxes.txt, line 1: found 3 columns, needed 5"),
        ("bounding_boxes.txt", "1 2 3 4 x\n", "bounding_boxes.txt: found text"),
        ("bounding_boxes.txt", "1 2 3 4 5\n", "lacks image 2"),
        ("image_class_labels.txt", "1 1\n", "image_class_labels.txt: lacks 3 images"),
        ("image_class_labels.txt", "1 7\n2 1\n3 1\n4 1\n", "lacks classes"),
        ("images.txt", "", "images.txt: found no row"),
    ],
)
def test_bad_cub_files_are_named(tmp_path, file, text, message):
    root = cub(tmp_path / "CUB")
    (root / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        _ = CUB200(root).table


@pytest.mark.bad_input
def test_bad_parts_and_missing_files_are_named(tmp_path):
    root = cub(tmp_path / "CUB")
    (root / "parts" / "part_locs.txt").write_text("1 1 2 3 1\n")
    with pytest.raises(ValueError, match=r"part_locs\.txt: found 1 rows, needed 4 images with 2 parts"):
        CUB200(root).parts()
    (root / "classes.txt").unlink()
    with pytest.raises(ValueError, match=r"lacks \['classes.txt'\]"):
        _ = CUB200(root).table


def cars(root):
    for folder in ("devkit", "cars_train", "cars_test"):
        (root / folder).mkdir(parents=True)
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": np.array(["Audi A4", "BMW X3"], dtype=object)})
    kind = [("bbox_x1", "O"), ("bbox_y1", "O"), ("bbox_x2", "O"), ("bbox_y2", "O"), ("class", "O"), ("fname", "O")]
    for file, folder in (
        ("devkit/cars_train_annos.mat", "cars_train"),
        ("cars_test_annos_withlabels.mat", "cars_test"),
    ):
        rows = np.array([(2, 3, 8, 7, c, f"{c}.jpg") for c in (1, 2)], dtype=kind)
        savemat(root / file, {"annotations": rows})
        for c in (1, 2):
            paint(root / folder / f"{c}.jpg")
    return root


def test_cars_as_they_lie_on_disk(tmp_path):
    data = StanfordCars(cars(tmp_path), image_size=4)
    assert data.class_names == ["Audi A4", "BMW X3"]
    assert data.record_ids == ["cars_train/1.jpg", "cars_train/2.jpg", "cars_test/1.jpg", "cars_test/2.jpg"]
    assert folds(data)["test"] == data.record_ids[2:]
    assert data.reader()(0).size == (7, 5)
    (tmp_path / "devkit" / "cars_meta.mat").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cars_meta\.mat: cannot be read"):
        _ = StanfordCars(tmp_path).table
    savemat(tmp_path / "devkit" / "cars_meta.mat", {"names": 1})
    with pytest.raises(ValueError, match="found no variable 'class_names'"):
        _ = StanfordCars(tmp_path).table


def test_dogs_as_they_lie_on_disk(tmp_path):
    files = ["n02085620-Chihuahua/n02085620_7.jpg", "n02085782-Japanese_spaniel/n02085782_2.jpg"]
    for name in ("train", "test"):
        listed = np.array([f.replace(".jpg", f"_{name}.jpg") for f in files], dtype=object)
        savemat(tmp_path / f"{name}_list.mat", {"file_list": listed, "labels": np.array([1, 2])})
        for file in listed:
            paint(tmp_path / "Images" / file)
            box = tmp_path / "Annotation" / file.removesuffix(".jpg")
            box.parent.mkdir(parents=True, exist_ok=True)
            corners = "<xmin>1</xmin><ymin>2</ymin><xmax>6</xmax><ymax>8</ymax>"
            box.write_text(f"<annotation><object><bndbox>{corners}</bndbox></object></annotation>")
    data = StanfordDogs(tmp_path, crop=True, image_size=4)
    assert data.class_names == ["Chihuahua", "Japanese_spaniel"]
    assert data.reader()(0).size == (5, 6)
    assert folds(data)["train"] == [f"Images/{f.replace('.jpg', '_train.jpg')}" for f in files]
    box.write_text("<annotation></annotation>")
    with pytest.raises(ValueError, match="cannot be read as a box"):
        _ = StanfordDogs(tmp_path, crop=True).table


# -- CIFAR and real images


@pytest.mark.bad_input
def test_missing_cifar_says_how_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"--data\.download gets it"):
        _ = CIFAR(tmp_path).table
    with pytest.raises(ValueError, match="classes: found 20"):
        CIFAR(tmp_path, classes=20)


def test_cifar_batches_are_read(tmp_path, monkeypatch):
    from torchvision import datasets

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    parts = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]
    for name in parts:
        content = {"data": rng.integers(0, 256, (20, 3072), np.uint8), "labels": [n % 10 for n in range(20)]}
        (folder / name).write_bytes(pickle.dumps(content))
    names = [f"kind{n}" for n in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *args: True)
    data = CIFAR(tmp_path, val_fraction=0.1)
    assert data.class_names == names
    assert {name: len(ids) for name, ids in folds(data).items()} == {"train": 90, "val": 10, "test": 20}
    first = pickle.loads((folder / "test_batch").read_bytes())["data"][0].reshape(3, 32, 32)
    np.testing.assert_array_equal(np.asarray(data.view("test-00000")).transpose(2, 0, 1), first)


@pytest.fixture(scope="session")
def cifar_folder(test_data, tmp_path_factory):
    """Forty real images of each class."""
    path = test_data / "cifar10-10k.zip"
    if not path.is_file():
        pytest.skip(f"no {path}: the real images are not here")
    root = tmp_path_factory.mktemp("cifar")
    with zipfile.ZipFile(path) as archive:
        wanted = [name for name in archive.namelist() if name.endswith(".jpg") and int(name[-8:-4]) < 40]
        archive.extractall(root, wanted)
    return root


def test_real_images_in_folders(cifar_folder):
    folder = next(path for path in [cifar_folder, *cifar_folder.rglob("*")] if (path / "airplane").is_dir())
    data = ImageFolder(folder, image_size=32)
    assert data.num_classes == 10
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape == (64, 3, 32, 32)
    assert 0.5 < float(batch.image.std()) < 2
