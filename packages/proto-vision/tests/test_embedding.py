"""Embeddings of a fold: collected whole, judged once, and written as a table."""

import csv
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from proto_core.cli.training import WritePredictions, write_predictions
from proto_vision import Digits
from proto_vision.data.dataset import ImageDataset
from proto_vision.embedding import EmbeddingModule, FoldEmbeddings

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Pixels(EmbeddingModule):
    """The image itself, and figures that show what came in."""

    def embed(self, images):
        return images.flatten(1)

    def figures(self, embeddings, targets, gallery=None, gallery_targets=None):
        self.seen = embeddings, targets, gallery, gallery_targets
        return {"rows": float(len(embeddings)), "gallery": 0.0 if gallery is None else float(len(gallery))}


def test_fold_keeps_each_sample_once_in_data_order():
    fold = FoldEmbeddings()
    fold.update(torch.tensor([[3.0], [1.0]]), torch.tensor([30, 10]), torch.tensor([3, 1]))
    fold.update(torch.tensor([[1.0], [2.0]]), torch.tensor([10, 20]), torch.tensor([1, 2]))
    embeddings, targets = fold.gathered()
    assert embeddings.flatten().tolist() == [1, 2, 3]
    assert targets.tolist() == [10, 20, 30]
    assert torch.equal(fold.compute()[0], embeddings)
    with pytest.raises(ValueError, match=r"embeddings, targets: found shapes \(2, 1\) and \(3,\)"):
        fold.update(torch.zeros(2, 1), torch.zeros(3).long(), torch.arange(2))


def test_folds_are_judged_whole(tmp_path):
    data, net = Digits(image_size=8, batch_size=50), Pixels(8, 1)
    trainer = pl.Trainer(**QUIET, default_root_dir=tmp_path)
    trainer.test(net, datamodule=data, verbose=False)
    rows = data.rows("test")
    assert net.test_results["summary"] == {"rows": len(rows), "gallery": 0}
    assert net.test_results["labels"][0] == {"figure": "rows", "value": len(rows)}
    assert net.test_results["records"] == len(rows)
    embeddings, targets, *_ = net.seen
    assert torch.equal(targets, data.targets[rows])
    assert torch.equal(embeddings[7], data.model_input(data.record_ids[rows[7]]).flatten())
    found = trainer.validate(net, datamodule=data, verbose=False)[0]
    assert found == {"val/rows": len(data.rows("val")), "val/gallery": 0}


def test_two_test_loaders_are_queries_and_gallery(tmp_path):
    data, net = Digits(image_size=8), Pixels(8, 1)
    loaders = [
        DataLoader(data._dataset(data.rows(fold)), 64, collate_fn=ImageDataset.collate) for fold in ("val", "test")
    ]
    for _ in range(2):  # the folds start empty again
        pl.Trainer(**QUIET, default_root_dir=tmp_path).test(net, loaders, verbose=False)
    sizes = [len(data.rows(fold)) for fold in ("val", "test")]
    assert net.test_results["summary"] == dict(zip(("rows", "gallery"), map(float, sizes)))
    assert net.test_results["records"] == sum(sizes)
    assert torch.equal(net.seen[3], data.targets[data.rows("test")])


def test_predicted_embeddings_become_columns(tmp_path):
    data, net = Digits(image_size=8, batch_size=64), Pixels(8, 1)
    table = WritePredictions(tmp_path / "e.csv")
    pl.Trainer(**QUIET, default_root_dir=tmp_path, callbacks=[table]).predict(
        net, datamodule=data, return_predictions=False
    )
    with (tmp_path / "e.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert table.written == len(rows) == len(data.rows("test"))
    assert list(rows[0]) == ["record", *(f"e{n}" for n in range(64))]
    expected = data.model_input(rows[3]["record"]).flatten()
    torch.testing.assert_close(torch.tensor([float(rows[3][f"e{n}"]) for n in range(64)]), expected)


def test_repeats_of_predicted_embeddings_are_dropped(tmp_path):
    joined = {"index": torch.tensor([1, 0, 1]), "embeddings": torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])}
    data = SimpleNamespace(record_ids=["a", "b"])
    assert write_predictions(joined, object(), data, tmp_path / "e.csv") == 2
    assert (tmp_path / "e.csv").read_text().split() == ["record,e0,e1", "a,3.0,4.0", "b,1.0,2.0"]


def test_a_system_says_how_it_embeds_and_is_judged():
    with pytest.raises(TypeError, match="abstract method"):
        EmbeddingModule(8, 1)
    with pytest.raises(ValueError, match="trained with image_size 16, this model has 8"):
        Pixels(8, 1).check_settings({"image_size": 16, "in_channels": 1})
