"""Lists of pairs, packed pairs and templates: what they say, and what is refused; nothing in a pickle is run."""

import io
import os
import pickle
import pickletools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from proto_vision.data.pairs import PairList, read_packed_pairs, read_pairs, read_templates


def jpeg(grey):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (grey, grey, grey)).save(file, format="jpeg", quality=100)
    return file.getvalue()


@pytest.fixture
def faces(tmp_path):
    for name in ("s1/1.jpg", "s1/2.jpg", "s2/1.jpg", "s2/with space.jpg"):
        path = tmp_path / "faces" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(10 * int(name[1])))
    return tmp_path / "faces"


def written(faces, text, name="pairs.txt"):
    path = faces.parent / name
    path.write_text(text, encoding="utf-8")
    return path


# -- lists


def test_spaces_tabs_comments_and_empty_lines(faces):
    text = "\ufeff# Q1\n\ns1/1.jpg s1/2.jpg 1\r\n  s1/1.jpg   s2/1.jpg  0\ns2/1.jpg\ts2/with space.jpg\t1\n"
    pairs = read_pairs(written(faces, text), faces)
    assert pairs.names == ["s1/1.jpg", "s1/2.jpg", "s2/1.jpg", "s2/with space.jpg"]
    assert (pairs.first.tolist(), pairs.second.tolist(), pairs.same.tolist()) == ([0, 0, 2], [1, 2, 3], [1, 0, 1])
    assert pairs.read(2).getpixel((3, 3)) == (20, 20, 20)
    assert pairs.people().tolist() == [0, 0, 1, 1]


def test_people_are_only_known_where_every_label_agrees(faces):
    pairs = read_pairs(written(faces, "s1/1.jpg s1/2.jpg 0\ns1/1.jpg s2/1.jpg 1\n"), faces)
    assert pairs.people() is None
    flat = PairList(["a.jpg", "b.jpg"], np.array([0]), np.array([1]), np.array([1]))
    assert flat.people() is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s1/1.jpg s1/2.jpg 1\ns1/1.jpg s2/1.jpg\n", r"line 2: found 2 columns, needed 'path1 path2 label'"),
        ("s1/1.jpg s2/with space.jpg 1\n", r"line 1: found 4 columns.*tabs"),
        ("s1/1.jpg s1/2.jpg yes\n", r"line 1: found label 'yes', needed 1 .* or 0"),
        ("s1/1.jpg s1/2.jpg 1\n", "1 pairs of one identity and 0 of two, needed both kinds"),
        ("s1/1.jpg s2/1.jpg 0\n", "0 pairs of one identity and 1 of two, needed both kinds"),
        ("# nothing\n", "holds no line"),
        ("s1/1.jpg s9/2.jpg 1\ns1/1.jpg s8/1.jpg 0\n", r"names 2 files of 3 that are not in .*s9/2\.jpg"),
    ],
)
def test_bad_lists_are_refused(faces, text, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(written(faces, text), faces)


def test_files_that_cannot_be_read_are_named(faces):
    with pytest.raises(ValueError, match=r"none\.txt' cannot be read"):
        read_pairs(faces / "none.txt", faces)
    (faces / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.txt' cannot be read \(not a text\)"):
        read_pairs(faces / "binary.txt", faces)
    with pytest.raises(ValueError, match="is no folder"):
        read_pairs(written(faces, "a b 1\na c 0\n"), faces / "nowhere")


# -- packed pairs


def pack(path, images, same, protocol=4):
    path.write_bytes(pickle.dumps((images, same), protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", ["bytes", "arrays", "numpy flags", "flag array", "tuples"])
def test_packed_pairs_of_any_maker(tmp_path, protocol, kind):
    images, same = [jpeg(10), jpeg(20), jpeg(30), jpeg(40)], [True, False]
    if kind == "arrays":
        images = [np.frombuffer(image, dtype=np.uint8) for image in images]
    elif kind == "numpy flags":
        same = [np.bool_(flag) for flag in same]
    elif kind == "flag array":
        same = np.array(same)
    elif kind == "tuples":
        images, same = tuple(images), tuple(same)
    pairs = read_packed_pairs(pack(tmp_path / "lfw.bin", images, same, protocol))
    assert (pairs.first.tolist(), pairs.second.tolist(), pairs.same.tolist()) == ([0, 2], [1, 3], [1, 0])
    assert [pairs.read(row).getpixel((0, 0))[0] for row in range(4)] == [10, 20, 30, 40]
    assert pairs.names[3] == "lfw.bin:3"
    assert pairs.people() is None


def test_packed_pairs_of_python_2(tmp_path):
    """There, bytes were text: opcodes of protocol 2 that Python 3 no longer writes."""
    image = jpeg(50)
    text = b"T" + len(image).to_bytes(4, "little") + image
    data = b"\x80\x02]q\x00(" + text * 4 + b"e]q\x01(\x88\x89e\x86q\x02."
    pickletools.dis(data, out=io.StringIO())
    (tmp_path / "old.bin").write_bytes(data)
    assert read_packed_pairs(tmp_path / "old.bin").read(2).getpixel((0, 0)) == (50, 50, 50)


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "evil",
    [
        Evil(os.system, "touch owned"),
        Evil(eval, "open('owned', 'w')"),
        Evil(open, "owned", "w"),
        Evil(getattr, (), "count"),
        Evil(np.load, "owned"),
        Evil(bytes, 10**15),
        Evil(bytearray, 10**15),
        np.array([Evil(os.system, "touch owned")], dtype=object),
        np.zeros(3),
        {1: 2}.keys,
    ],
    ids=["system", "eval", "open", "getattr", "numpy", "bytes", "bytearray", "object array", "float array", "method"],
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_nothing_of_a_pickle_is_run(tmp_path, monkeypatch, evil, protocol):
    monkeypatch.chdir(tmp_path)
    path = pack(tmp_path / "evil.bin", [evil, b""], [True, False], protocol)
    with pytest.raises(ValueError, match=r"evil\.bin"):
        read_packed_pairs(path)
    assert not (tmp_path / "owned").exists()


def test_a_changed_array_type_is_not_built(tmp_path):
    """Flags of a dtype decide how numpy reads an array's bytes: the state of neither reaches numpy."""
    data = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01b\x87"
        b"R(K\x01K\x01\x85cnumpy\ndtype\n(X\x02\x00\x00\x00O8K\x00K\x01\x87Rb\x89C\x08AAAAAAAAtb."
    )
    (tmp_path / "flags.bin").write_bytes(data)
    with pytest.raises(ValueError, match=r"flags\.bin"):
        read_packed_pairs(tmp_path / "flags.bin")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_refused_with_the_files_name(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "any.bin"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"any\.bin"):
        read_packed_pairs(path)


@pytest.mark.parametrize(
    ("images", "same", "message"),
    [
        ([b"a"] * 3, [True, False], "3 images and 2 flags, needed two"),
        ([], [], "0 images and 0 flags"),
        ([b"a"] * 4, [True, 7], "among them 7"),
        (["text"] * 4, [True, False], "among them str"),
        ({1: 2}, [True], "holds dict and list"),
        ([b"a"] * 4, [True, True], "2 pairs of one identity and 0 of two"),
    ],
)
def test_bad_packed_pairs_are_refused(tmp_path, images, same, message):
    with pytest.raises(ValueError, match=message):
        read_packed_pairs(pack(tmp_path / "bad.bin", images, same))


def test_packed_files_that_hold_something_else(tmp_path):
    (tmp_path / "one.bin").write_bytes(pickle.dumps([1, 2, 3]))
    with pytest.raises(ValueError, match="holds list, needed a list of images"):
        read_packed_pairs(tmp_path / "one.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        read_packed_pairs(tmp_path / "none.bin")
    pairs = read_packed_pairs(pack(tmp_path / "cut.bin", [b"no jpeg"] * 4, [True, False]))
    with pytest.raises(ValueError, match=r"cut\.bin, image 2: cannot be read \(7 bytes\)"):
        pairs.read(2)


# -- templates


def test_templates_and_their_pairs(faces):
    images = written(faces, "s1/1.jpg 7 1\ns1/2.jpg 7 1\ns2/1.jpg 3 1\n", "tid.txt")
    templates, pairs = read_templates(images, written(faces, "7 7 1\n7 3 0\n"), faces)
    assert (templates.templates.tolist(), templates.medias.tolist()) == ([7, 7, 3], [1, 1, 1])
    assert pairs.names == ["3", "7"]
    assert (pairs.first.tolist(), pairs.second.tolist(), pairs.same.tolist()) == ([1, 1], [1, 0], [1, 0])
    assert templates.read(2).getpixel((0, 0)) == (20, 20, 20)


@pytest.mark.parametrize(
    ("images", "pairs", "message"),
    [
        ("s1/1.jpg 7 1\n", "7 7 1\n7 9 0\n", r"names 1 templates without an image in .*\[9\]"),
        ("s1/1.jpg seven 1\n", "7 7 1\n", r"line 1: found 'seven', needed a whole number"),
        ("s1/1.jpg 7 1\ns9/1.jpg 3 1\n", "7 7 1\n7 3 0\n", "names 1 files of 2"),
        ("s1/1.jpg 7\n", "7 7 1\n", "needed 'image template media'"),
        ("s1/1.jpg 7 1\n", "7 7 1\n", "needed both kinds"),
        ("s1/1.jpg 7 1\n", "7 7 1 1\n", "needed 'template1 template2 label'"),
    ],
)
def test_bad_templates_are_refused(faces, images, pairs, message):
    with pytest.raises(ValueError, match=message):
        read_templates(written(faces, images, "tid.txt"), written(faces, pairs), faces)
