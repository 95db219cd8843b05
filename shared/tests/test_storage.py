"""Systems rebuilt from checkpoints and folders: label sets that do not fit, keys that nobody knows."""

import pytest
import torch
from torch import nn

from proto_core.training import StoredSystem, check_label_names, load_system, save_checkpoint


class Toy(StoredSystem, nn.Module):
    system = "toy"

    def __init__(self, width):
        super().__init__()
        self.width, self.layer = width, nn.Linear(width, 2)

    def settings(self):
        return {"width": self.width}


def test_a_system_comes_back_from_a_checkpoint_and_a_folder(tmp_path):
    toy, x = Toy(3).eval(), torch.rand(4, 3)
    save_checkpoint(toy, tmp_path / "toy.ckpt")
    toy.save_pretrained(tmp_path / "folder")
    for again in (Toy.from_checkpoint(tmp_path / "toy.ckpt"), Toy.from_pretrained(tmp_path / "folder")):
        assert not again.training
        assert torch.equal(again.layer(x), toy.layer(x))


def test_the_catalogue_finds_the_system_of_a_checkpoint(tmp_path, monkeypatch):
    from proto_core.training import storage

    class Entry:
        @staticmethod
        def load():
            return Toy

    monkeypatch.setattr(storage, "catalogue", lambda package: {"toy": Entry(), "other": Entry()})
    save_checkpoint(Toy(2), tmp_path / "toy.ckpt")
    assert load_system(tmp_path / "toy.ckpt").width == 2


@pytest.mark.bad_input
def test_what_does_not_fit_is_named(tmp_path):
    save_checkpoint(Toy(2), tmp_path / "toy.ckpt")
    with pytest.raises(ValueError, match="holds system 'toy', needed one of"):
        load_system(tmp_path / "toy.ckpt")
    Toy(2).save_pretrained(tmp_path / "folder")

    class Other(Toy):
        system = "other"

    with pytest.raises(ValueError, match="holds system 'toy', needed 'other'"):
        Other.from_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text('{"system": "toy", "settings": {"width": 5}, "cases": {}}')
    with pytest.raises(ValueError, match="do not fit their own settings"):
        Toy.from_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cut or corrupt"):
        Toy.from_pretrained(tmp_path / "folder")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("found", "own", "message"),
    [
        (["a"], ["a", "b"], r"1 labels, this model has 2.*lacks \['b'\]"),
        (["a", "x"], ["a", "b"], r"adds \['x'\]"),
        (["b", "a"], ["a", "b"], "the order differs"),
    ],
)
def test_other_labels_are_refused(found, own, message):
    with pytest.raises(ValueError, match=message):
        check_label_names(found, own)
    check_label_names(own, own)
