"""Multi-similarity as a system: batches of P x K, its losses, Recall@K of unseen classes, and list files."""

import csv

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from proto_core.cli.training import WritePredictions
from proto_core.losses import MultiSimilarityLoss
from proto_core.metrics import recall_at_k
from proto_core.training import Curriculum, enter_stage
from proto_vision import Glyphs, ImageList, MultiSimilarityModule
from proto_vision.backbones import create_backbone
from proto_vision.data import batches as batches_module
from proto_vision.data.batches import ClassBalanced, SharedBatches
from proto_vision.data.class_split import ClassSplit
from proto_vision.multi_similarity import MultiSimilaritySchedule

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def module(**changed):
    torch.manual_seed(0)
    small = {"image_size": 16, "in_channels": 1, "embedding_dim": 16, "freeze_norm": False}
    return MultiSimilarityModule("conv4", **small | changed)


def glyphs(per_class):
    split = ClassSplit(val=["Latin/[a-e]"], test=["Greek/*"])
    sampling = ClassBalanced(classes=8, images=3, batches=25)
    return Glyphs(image_size=16, per_class=per_class, batch_size=128, protocol=split, sampling=sampling)


@pytest.fixture(scope="module")
def data():
    return glyphs(per_class=5)


# -- batches of P classes with K images


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=3, max_size=6), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_batches_hold_p_classes_with_k_images(sizes, classes, images, seed):
    targets = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)) * 3
    targets = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))]
    sampling = ClassBalanced(classes, images, batches=20, seed=seed)
    found = list(sampling("train", targets))
    assert len(found) == 20
    for rows in found:
        groups = targets[rows].view(classes, images)
        assert (groups == groups[:, :1]).all()
        assert len(groups.unique()) == classes
        for label, group in zip(groups[:, 0].tolist(), rows.view(classes, images)):
            assert len(group.unique()) == min(images, sizes[label // 3]), "one comes twice only where there are too few"
    assert sampling("val", targets) is None


def test_no_image_comes_again_before_its_class_is_used_up():
    targets = torch.arange(4).repeat_interleave(6)
    rows = torch.stack(list(ClassBalanced(classes=4, images=3, batches=4)("train", targets)))
    assert len(rows[:2].unique()) == 24
    assert len(rows[2:].unique()) == 24
    few = torch.stack(list(ClassBalanced(classes=1, images=4, batches=3)("train", torch.zeros(2).long())))
    assert [len(row.unique()) for row in few] == [2, 2, 2], "all of a small class, filled up"


def test_epochs_differ_and_ranks_share_them(monkeypatch):
    targets = torch.arange(6).repeat_interleave(4)
    sampling = ClassBalanced(classes=2, images=2, batches=5, seed=3)
    first = sampling("train", targets)
    whole = list(first)
    assert all(map(torch.equal, whole, first))
    first.set_epoch(1)
    assert not all(map(torch.equal, whole, first))
    assert len(ClassBalanced(classes=2, images=2)("train", targets)) == 6
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(batches_module, "is_distributed", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        loader = sampling("train", targets)
        shares.append(list(loader))
        assert len(loader) == len(shares[-1]) == 3
        assert len(list(SharedBatches(lambda epoch, count: iter(range(count)), 5, even=False))) == 3 - rank
    joined = [batch for pair in zip(*shares) for batch in pair]
    assert all(map(torch.equal, whole, joined)), "the ranks together see what one process would"


@pytest.mark.bad_input
def test_too_few_classes_are_refused():
    with pytest.raises(ValueError, match="sampling: found 2 classes in the train fold, needed 3"):
        ClassBalanced(classes=3)("train", torch.tensor([0, 1, 1]))
    for changed in ({"classes": 0}, {"images": 0}, {"batches": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(changed))}: found 0"):
            ClassBalanced(**changed)


# -- the system


def test_loss_and_recall_are_the_authors(golden_dir):
    golden = np.load(golden_dir / "multi_similarity.npz")
    for case in ("c0", "c1", "c2", "c3"):
        alpha, beta, base, margin = map(float, golden[f"{case}_hp"])
        mining = bool(golden[f"{case}_mining"])
        net = module(alpha=alpha, beta=beta, base=base, margin=margin, mining=mining)
        x, y = torch.from_numpy(golden[f"{case}_x"]), torch.from_numpy(golden[f"{case}_y"])
        tolerance = {"rel": 2e-4, "abs": 1e-5} if x.dtype == torch.float32 else {"rel": 1e-6, "abs": 1e-8}
        assert float(net.pair_loss(x, y)) == pytest.approx(float(golden[f"{case}_loss"]), **tolerance)
    net = module(ranks=[int(k) for k in golden["rec_k"]])
    found = net.figures(torch.from_numpy(golden["rec_x"]), torch.from_numpy(golden["rec_y"]))
    assert list(found) == [f"recall@{k}" for k in golden["rec_k"]]
    assert list(found.values()) == pytest.approx(golden["rec"].tolist())
    parts = [torch.from_numpy(golden[f"rec2_{name}"]) for name in ("q", "yq", "g", "yg")]
    assert list(net.figures(*parts).values()) == pytest.approx(golden["rec2"].tolist())


@pytest.mark.parametrize("loss", ["contrastive", "triplet", "lifted_structure", "binomial_deviance", "n_pair"])
def test_other_pair_losses_have_their_gradients(golden_dir, loss):
    golden = np.load(golden_dir / "multi_similarity.npz")
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(12, 5, dtype=torch.float64)).requires_grad_()
    y = torch.arange(12) % 4
    module(loss=loss).pair_loss(x, y).backward()
    from proto_core.losses import pair_weights

    weights = pair_weights((x @ x.T).detach(), y, loss)
    signed = torch.where(y[:, None] == y, -weights, weights) / 12
    torch.testing.assert_close(x.grad, (signed + signed.T) @ x.detach(), rtol=1e-5, atol=1e-7)
    assert f"pw_{loss}" in golden


def test_a_step_is_the_loss_of_unit_embeddings(data):
    batch = next(iter(data.train_dataloader()))
    assert batch.target.view(8, 3).unique(dim=1).shape == (8, 1)
    net = module()
    embeddings = net.embed(batch.image)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(24))
    raw = net.projection(net.backbone(batch.image).mean(dim=(2, 3)))
    torch.testing.assert_close(embeddings, raw / raw.norm(dim=1, keepdim=True))
    expected = MultiSimilarityLoss()(embeddings, batch.target)
    torch.testing.assert_close(net.training_step(batch, 0), expected)
    views = batch._replace(image=torch.stack([batch.image, batch.image.flip(-1)], 1))
    joint = MultiSimilarityLoss()(net.embed(torch.cat([batch.image, batch.image.flip(-1)])), batch.target.repeat(2))
    torch.testing.assert_close(net.training_step(views, 0), joint)


def test_batch_norm_keeps_its_statistics_where_asked(data):
    batch = next(iter(data.train_dataloader()))
    for freeze in (True, False):
        net = module(freeze_norm=freeze).train()
        norms = [layer for layer in net.backbone.modules() if isinstance(layer, nn.BatchNorm2d)]
        assert norms
        assert all(layer.training != freeze for layer in norms)
        before = norms[0].running_mean.clone()
        net.training_step(batch, 0).backward()
        assert torch.equal(norms[0].running_mean, before) == freeze
        assert norms[0].weight.grad.any(), "its weights train"


def test_schedule_is_the_authors():
    net = module(schedule=MultiSimilaritySchedule(backbone_lr_factor=0.1))
    (stage,) = net.stages
    assert (stage.max_epochs, stage.lr, stage.weight_decay, stage.gamma) == (30, 3e-5, 5e-4, 0.1)
    assert tuple(stage.milestones) == (12, 24)
    assert stage.monitor is None
    enter_stage(net, stage)
    optimizer = net.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    backbone, projection = optimizer.param_groups
    assert (backbone["lr"], backbone["lr_scale"]) == pytest.approx((3e-6, 0.1))
    assert (projection["lr"], projection["weight_decay"]) == (3e-5, 5e-4)
    assert module(ranks=[5, 1], schedule=MultiSimilaritySchedule(keep="best")).stages[0].monitor == "val/recall@5"


def test_training_retrieves_classes_it_never_saw(tmp_path):
    data = glyphs(per_class=20)  # 440 images of the test classes: from 0.12 to 0.26, give or take 0.02
    net = module(schedule=MultiSimilaritySchedule(epochs=2, lr=2e-3, milestones=(), keep="best"))
    table = WritePredictions(tmp_path / "embeddings.csv")
    trainer = pl.Trainer(**QUIET, default_root_dir=tmp_path, callbacks=[Curriculum()])
    trainer.test(net, datamodule=data, verbose=False)
    before = net.test_results["summary"]["recall@1"]
    trainer.fit(net, datamodule=data)
    assert all(0 < item["val/recall@1"] <= 1 for item in trainer.callbacks[0].history)
    trainer.test(net, datamodule=data, verbose=False)
    found = net.test_results
    assert found["summary"]["recall@1"] > before + 0.06
    assert found["records"] == len(data.rows("test"))
    again = MultiSimilarityModule.from_checkpoint(tmp_path / "checkpoints" / "final.ckpt")
    assert again.settings() == net.settings()
    predict = pl.Trainer(**QUIET, default_root_dir=tmp_path, callbacks=[table])
    predict.predict(again, datamodule=data, return_predictions=False)
    with (tmp_path / "embeddings.csv").open() as file:
        rows = list(csv.DictReader(file))
    embeddings = torch.tensor([[float(row[f"e{n}"]) for n in range(16)] for row in rows])
    targets = data.targets[torch.tensor([data.find_row(row["record"]) for row in rows])]
    assert recall_at_k(embeddings, targets, k=(1,))[1] == pytest.approx(found["summary"]["recall@1"], abs=0.01)


def test_googlenet_gives_its_last_map():
    network, channels = create_backbone("torchvision/googlenet")
    assert channels == (1024,)
    for mode in (True, False):
        with torch.no_grad():
            assert network.train(mode)(torch.zeros(2, 3, 64, 64)).shape == (2, 1024, 2, 2)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"loss": "circle"}, "loss: found 'circle'"),
        ({"ranks": ()}, r"ranks: found \[\], needed one at least"),
        ({"ranks": (0, 1)}, "none below 1"),
        ({"alpha": 0.0}, "alpha: found 0"),
        ({"margin": -0.1}, "margin: found -0.1"),
        ({"embedding_dim": 0}, "embedding_dim: found 0"),
        ({"schedule": MultiSimilaritySchedule(backbone_lr_factor=0.0)}, "backbone_lr_factor: found 0"),
    ],
)
def test_bad_settings_are_named(changed, says):
    with pytest.raises(ValueError, match=says):
        module(**changed)


def test_a_query_without_its_like_is_refused():
    with pytest.raises(ValueError, match="found"):
        module().figures(torch.eye(3), torch.tensor([0, 0, 1]))


# -- list files


def lists(root, **files):
    files = files or {
        "train": ["a/1.png,12", "a/2.png,12", "b/1.png,7"],
        "test": ["c/1.png, 3", "", "c,x/2.png,3"],
        "gallery": ["d/1.png,3", "d/2.png,5"],
    }
    for name, lines in files.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
        for line in filter(None, lines):
            path = root / line.rpartition(",")[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (6, 6), (100, 0, 0)).save(path)
    return root


def test_list_files_are_folds(tmp_path):
    data = ImageList(lists(tmp_path), image_size=4)
    assert data.record_ids == ["a/1.png", "a/2.png", "b/1.png", "c/1.png", "c,x/2.png"]
    assert data.class_names == ["12", "7"]
    assert data.table.class_names == ["12", "7", "3"]
    assert data.table.fold.tolist() == ["train"] * 3 + ["test"] * 2
    assert [b.image.shape for b in data.test_dataloader()] == [(2, 3, 4, 4)]
    assert data.val_dataloader() == []


def test_queries_are_tested_against_a_gallery(tmp_path):
    data = ImageList(lists(tmp_path), gallery="gallery.txt", image_size=16, in_channels=1, predict_fold="all")
    queries, gallery = data.test_dataloader()
    assert next(iter(queries)).target.tolist() == [2, 2]
    assert next(iter(gallery)).target.tolist() == [2, 3]
    net = module(ranks=(1,))
    pl.Trainer(**QUIET, default_root_dir=tmp_path).test(net, datamodule=data, verbose=False)
    assert net.test_results["summary"] == {"recall@1": 1.0}
    assert net.test_results["records"] == 4
    assert len(data.predict_set) == 7


@pytest.mark.bad_input
def test_bad_lists_are_named(tmp_path):
    root = lists(tmp_path)
    for text, says in [
        ("a/1.png\n", r"train\.txt, line 1: found 'a/1\.png', needed a path, a comma and a label"),
        ("a/1.png,1\n,2\n", r"train\.txt, line 2"),
        ("a/1.png,1\na/2.png,\n", r"train\.txt, line 2"),
        ("\n", r"train\.txt: found no line"),
        ("a/9.png,1\n", r"1 images of the lists are missing, such as \['a/9\.png'\]"),
        ("a/1.png,1\nc/1.png,3\n", r"found 'c/1\.png' in the lists more than once"),
    ]:
        (root / "train.txt").write_text(text)
        with pytest.raises(ValueError, match=says):
            _ = ImageList(root).table
    (root / "train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"train\.txt': cannot be read"):
        _ = ImageList(root).table
    with pytest.raises(ValueError, match=r"none\.txt': cannot be read"):
        _ = ImageList(root, train="none.txt").table
