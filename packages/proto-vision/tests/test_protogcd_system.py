"""ProtoGCD as a system: what is labelled, how batches are drawn, what a step and an epoch do, what a test reports."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image

from proto_core.metrics import cluster_accuracy
from proto_core.training import Curriculum, enter_stage
from proto_vision import Digits, PartlyLabelled, ProtoGCDModule
from proto_vision.data.augmentation import augmentation
from proto_vision.data.batches import ClassBalanced
from proto_vision.data.dataset import ImageBatch
from proto_vision.data.discovery import CategoryDiscovery, HalfLabelled, new_names
from proto_vision.protogcd import ProtoGCDLoss, ProtoGCDSchedule, prototype_score

SMALL = {"image_size": 8, "in_channels": 1, "trained": "all", "hidden_dim": 16, "bottleneck_dim": 8}


def digits(**changed):
    settings = {
        "image_size": 8,
        "augment": "tilt",
        "views": ["tilt"],
        "batch_size": 64,
        "val_fraction": 0.2,
        "protocol": CategoryDiscovery(old=5),
        "sampling": HalfLabelled(),
    }
    return Digits(**settings | changed)


def module(**changed):
    torch.manual_seed(0)
    return ProtoGCDModule("mlp", **SMALL | {"class_names": list("0123456789")} | changed)


def trainer(folder, **changed):
    return pl.Trainer(
        **{"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        | {"enable_model_summary": False, "default_root_dir": folder, "num_sanity_val_steps": 0}
        | changed
    )


def views(n=6, k=10, labelled=3):
    g = torch.Generator().manual_seed(0)
    rows = torch.arange(n)
    return ImageBatch(torch.rand(n, 2, 1, 8, 8, generator=g), rows % k, rows, rows < labelled)


# -- data


def test_half_of_the_old_training_images_are_labelled_and_nothing_else():
    plain, data = Digits(image_size=8), digits()
    table = data.table
    assert np.array_equal(table.fold, plain.table.fold)
    assert np.array_equal(table.targets, plain.table.targets)
    for c in range(10):
        rows = (table.targets == c) & (table.fold == "train")
        assert table.trusted[rows].sum() == (rows.sum() // 2 if c < 5 else 0)
    assert not table.trusted[table.fold != "train"].any()
    same, other = (CategoryDiscovery(old=5, seed=seed)(plain.table).trusted for seed in (0, 1))
    assert np.array_equal(same, table.trusted)
    assert not np.array_equal(other, table.trusted)


def test_old_classes_come_first_whatever_their_names():
    plain = Digits(image_size=8).table
    table = CategoryDiscovery(classes=["7", "3"], labelled=1)(plain)
    assert table.class_names == ["3", "7", "0", "1", "2", "4", "5", "6", "8", "9"]
    names = np.array(table.class_names)[table.targets]
    assert np.array_equal(names, np.array(plain.class_names)[plain.targets])
    assert np.array_equal(table.trusted, np.isin(names, ["3", "7"]) & (table.fold == "train"))


def test_a_class_keeps_one_label_at_least():
    table = CategoryDiscovery(old=5, labelled=1e-6)(Digits(image_size=8).table)
    assert np.bincount(table.targets[table.trusted], minlength=10).tolist() == [1] * 5 + [0] * 5


def test_half_of_the_draws_are_labelled():
    data = digits(views=[], augment="none")
    loader = data.train_dataloader()
    trusted = torch.cat([batch.trusted for _ in range(3) for batch in loader])
    assert len(trusted) == 3 * len(data.rows("train"))
    assert abs(float(trusted.float().mean()) - 0.5) < 0.05
    loader.sampler.set_epoch(1)
    one, again = (torch.cat([batch.index for batch in loader]) for _ in range(2))
    assert torch.equal(one, again)
    loader.sampler.set_epoch(2)
    assert not torch.equal(one, torch.cat([batch.index for batch in loader]))
    assert torch.equal(next(iter(data.test_dataloader())).index, torch.from_numpy(data.rows("test")[:64]))
    full = digits(views=[], augment="none", drop_last=True).train_dataloader()
    assert {len(batch.image) for batch in full} == {64}


@pytest.mark.parametrize("kind", [True, False])
def test_images_of_one_kind_have_equal_chances(kind):
    assert HalfLabelled().chances("train", torch.full((4,), kind)).tolist() == [1.0] * 4


def test_other_samplings_draw_no_single_images():
    assert ClassBalanced().chances("train", torch.ones(3, dtype=torch.bool)) is None
    assert HalfLabelled().chances("val", torch.ones(3, dtype=torch.bool)) is None


@pytest.mark.parametrize("name", ["window", "tilt"])
def test_augmentations_keep_the_size_and_change_the_image(name):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    image = Image.fromarray(pixels)
    step = augmentation(name, Digits(image_size=16)._geometry(), 16)
    found = [image, image]
    for place in range(2):
        for change in step:
            found[place] = change(found[place])
    assert found[0].size == (16, 16)
    assert np.asarray(found[0]).tolist() != np.asarray(found[1]).tolist()


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    for place in ("cat/a", "cat", "dog", "unlabelled/x", "unlabelled", ".", "other"):
        (root / place).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).save(root / place / "1.png")
    return root


def test_folders_of_classes_and_unlabelled_images(folder, tmp_path):
    data = PartlyLabelled(folder, image_size=8, num_classes=5)
    table = data.table
    known = dict(zip(table.record_ids, np.array(table.class_names)[table.targets]))
    assert known == {
        **{"cat/1.png": "cat", "cat/a/1.png": "cat", "dog/1.png": "dog", "other/1.png": "other"},
        **dict.fromkeys(("1.png", "unlabelled/1.png", "unlabelled/x/1.png"), "unlabelled"),
    }
    assert dict(zip(table.record_ids, table.trusted)) == {name: label != "unlabelled" for name, label in known.items()}
    assert data.class_names == ["cat", "dog", "other", "new 1", "new 2"]
    assert data.num_classes == 5
    assert PartlyLabelled(folder).num_classes == 6
    assert len(data.predict_set) == 7
    assert sum(len(batch.image) for batch in data.train_dataloader()) == 7
    within = PartlyLabelled(folder, unlabelled=folder / "cat" / "a").table
    assert within.record_ids.count("cat/a/1.png") == 1
    assert not within.trusted[within.record_ids.index("cat/a/1.png")]
    elsewhere = PartlyLabelled(folder, unlabelled=folder / "other")
    assert elsewhere.known_names == ["cat", "dog", "unlabelled"]
    assert elsewhere.table.class_names == ["cat", "dog", "unlabelled", "unlabelled"]
    outside = tmp_path / "outside"
    (folder / "other").rename(outside)
    apart = PartlyLabelled(folder, unlabelled=outside)
    assert str(outside / "1.png") in apart.record_ids
    assert apart.model_input(str(outside / "1.png")).shape == (3, 224, 224)


def test_a_table_of_labels(folder, tmp_path):
    csv = tmp_path / "labels.csv"
    csv.write_text("image,label\ncat/1.png,tom\n1.png,\ndog/1.png, \n", encoding="utf-8")
    table = PartlyLabelled(folder, labels=csv).table
    assert (table.record_ids, table.trusted.tolist()) == (["cat/1.png", "1.png", "dog/1.png"], [True, False, False])
    assert table.class_names == ["tom", "unlabelled"]


def test_new_classes_get_names_that_nobody_has():
    assert new_names(["new 1", "cat"], 3) == ["new 2", "new 3", "new 4"]
    assert new_names([], 0) == []


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda _: CategoryDiscovery(), "old, classes: needed one of them"),
        (lambda _: CategoryDiscovery(5, ["a"]), "old, classes: needed one of them"),
        (lambda _: CategoryDiscovery(5, labelled=0), r"labelled: found 0, needed a share in \(0, 1\]"),
        (lambda _: digits(protocol=CategoryDiscovery(10)).table, "old: found 10, needed 1 to 9 of 10"),
        (lambda _: digits(protocol=CategoryDiscovery(classes=["x"])).table, r"classes: found \['x'\]"),
        (lambda f: PartlyLabelled(f / "none").table, "root: .*none' is no folder"),
        (lambda f: PartlyLabelled(f, unlabelled=f / "none").table, "unlabelled: .*none' is no folder"),
        (lambda f: PartlyLabelled(f, unlabelled=f).table, "found {'labelled': 0"),
        (lambda f: PartlyLabelled(f / "dog").table, "found {'labelled': 0, 'unlabelled': 1} images"),
        (lambda f: PartlyLabelled(f, num_classes=2).class_names, "num_classes: found 2, needed at least 3"),
        (lambda f: PartlyLabelled(f, labels=f / "none.csv").table, r"none.csv' cannot be read"),
        (lambda f: PartlyLabelled(f, labels=listed(f, "image,class\n1.png,a\n")).table, "needed image and label"),
        (lambda f: PartlyLabelled(f, labels=listed(f, "image,label\n9.png,a\n")).table, r"such as \['9.png'\]"),
        (lambda f: PartlyLabelled(f, labels=listed(f, "image,label\n1.png,a\n1.png,\n")).table, "1 images twice"),
        (lambda f: PartlyLabelled(f, labels=listed(f, "image,label\n1.png,a\n")).table, "'unlabelled': 0"),
        (lambda _: ProtoGCDModule("mlp", 1, **SMALL), "num_classes: found 1, needed 2"),
        (lambda _: ProtoGCDModule("mlp", 5, num_prototypes=1, **SMALL), "num_prototypes: found 1"),
        (lambda _: ProtoGCDModule("mlp", 5, **SMALL | {"trained": "last"}), "has no blocks"),
        (lambda _: module().training_step(views()._replace(image=torch.rand(6, 1, 8, 8)), 0), "two views"),
        (lambda _: module().training_step(views()._replace(image=torch.rand(6, 3, 1, 8, 8)), 0), "two views"),
    ],
)
def test_bad_input_is_refused(call, message, folder):
    with pytest.raises(ValueError, match=message):
        call(folder)


def listed(folder, text):
    (folder / "listed.csv").write_text(text, encoding="utf-8")
    return folder / "listed.csv"


# -- training


def test_one_step_is_the_loss_on_view_major_rows():
    net, batch = module(schedule=ProtoGCDSchedule(epochs=8)), views()
    found = net.training_step(batch, 0)
    stacked = torch.cat([batch.image[:, 0], batch.image[:, 1]])
    out = net.network(stacked)
    loss = ProtoGCDLoss(8, ramp_epochs=4)
    expected = loss(out.projections, out.logits, out.prototypes, batch.target, batch.trusted, 0)["total"]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(net.class_logits(stacked), out.logits / 0.1)


def test_schedule_and_optimiser_are_the_authors():
    net = ProtoGCDModule("mlp", 10, **SMALL)
    (stage,) = net.stages
    assert (stage.max_epochs, stage.lr, stage.scheduler, stage.floor) == (200, 0.1, "cosine", 1e-3)
    assert (stage.monitor, stage.patience) == (None, None)
    loss = net.loss
    assert (loss.weight_sup, loss.weight_entropy, loss.weight_separation) == (0.35, 2.0, 0.1)
    assert (loss.dapl.ramp_epochs, loss.dapl.init_ratio, loss.dapl.final_ratio) == (100, 0.0, 1.0)
    enter_stage(net, stage)
    matrices, vectors = net.configure_optimizers().param_groups
    assert (matrices["momentum"], matrices["weight_decay"], vectors["weight_decay"]) == (0.9, 5e-5, 0.0)
    assert any(p is net.network.head.prototypes for p in matrices["params"])
    assert {p.ndim for p in vectors["params"]} == {1}
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(net.parameters()))


def test_the_last_block_trains_and_nothing_before_it():
    net = ProtoGCDModule("vit_tiny_patch16_224", 10, image_size=32, hidden_dim=8, bottleneck_dim=4)
    enter_stage(net, net.stages[0])
    names = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert {name for name in names if ".head." not in name} == {
        name for name, _ in net.named_parameters() if name.startswith("network.backbone.blocks.11.")
    }
    assert "network.head.prototypes" in names


def test_an_epoch_keeps_its_last_weights_and_knows_the_old_classes(tmp_path):
    data, net = digits(drop_last=True), module(schedule=ProtoGCDSchedule(epochs=2, lr=0.05))
    curriculum = Curriculum()
    run = trainer(tmp_path, callbacks=[curriculum], max_epochs=-1)
    run.fit(net, datamodule=data)
    assert net.old.tolist() == [True] * 5 + [False] * 5
    assert net.label_names == ["0", "1", "2", "3", "4", "new 1", "new 2", "new 3", "new 4", "new 5"]
    assert {"train/loss", "train/dapl", "train/sup_contrastive", "val/all", "val/old", "val/new"} <= set(
        run.callback_metrics
    )
    again = ProtoGCDModule.from_checkpoint(tmp_path / "checkpoints" / "final.ckpt")
    assert again.label_names == net.label_names
    for one, other in zip(again.parameters(), net.parameters()):
        assert torch.equal(one, other)
    found = net.discover(data)
    rows = data.rows("train")
    assert np.array_equal(found.rows, rows)
    images = torch.stack([data.model_input(data.record_ids[row]) for row in rows])
    with torch.no_grad():
        torch.testing.assert_close(found.features, net.features(images))
        torch.testing.assert_close(found.probabilities, net.class_logits(images).softmax(1))
    assert torch.equal(found.labelled, torch.from_numpy(data.table.trusted[rows]))
    expected = prototype_score(found.features, net.network.head.prototypes.detach(), found.targets, found.labelled)
    assert net.fit_score(found) == pytest.approx(expected)
    run.test(net, datamodule=data, verbose=False)
    figures = net.test_results["summary"]
    free = ~found.labelled
    inside = cluster_accuracy(found.targets[free], found.probabilities[free].argmax(1), found.targets[free] < 5)
    assert [figures[f"unlabelled_{name}"] for name in ("all", "old", "new")] == pytest.approx(inside)
    test_rows = data.rows("test")
    with torch.no_grad():
        images = torch.stack([data.model_input(data.record_ids[row]) for row in test_rows])
        places = net(images).logits.argmax(1)
    targets = data.targets[torch.from_numpy(test_rows)]
    assert [figures[name] for name in ("all", "old", "new")] == pytest.approx(
        cluster_accuracy(targets, places, targets < 5)
    )
    rows = net.test_results["labels"]
    assert [row["images"] for row in rows] == places.bincount(minlength=10).tolist()
    for k, row in enumerate(rows):
        own = targets[places == k].bincount(minlength=10)
        assert (row["class"], row["share"]) == (
            (str(int(own.argmax())), pytest.approx(float(own.max() / own.sum()))) if len(own) and own.sum() else ("", 0)
        )


@pytest.mark.parametrize("count", [7, 13])
def test_another_number_of_prototypes_than_classes(count, tmp_path):
    data, net = digits(), module(num_prototypes=count, schedule=ProtoGCDSchedule(epochs=1))
    assert net.num_classes == count
    run = trainer(tmp_path, max_steps=1, limit_val_batches=1)
    run.fit(net, datamodule=data)
    run.test(net, datamodule=data, verbose=False)
    assert net.label_names == [*"01234", *(f"new {n}" for n in range(1, count - 4))]
    assert ProtoGCDModule.from_settings(net.settings()).class_names == net.class_names
    assert np.isfinite(list(net.test_results["summary"].values())).all()
    with pytest.raises(ValueError, match="num_classes: found 4, needed 5: those with labels"):
        run.fit(module(num_prototypes=4, schedule=ProtoGCDSchedule(epochs=1)), datamodule=data)


def test_without_unlabelled_images_all_classes_are_old(tmp_path):
    data = digits(protocol=None)
    net = module(schedule=ProtoGCDSchedule(epochs=1))
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(net, datamodule=data)
    run.test(net, datamodule=data, verbose=False)
    summary = net.test_results["summary"]
    assert set(summary) == {"all", "old", "new"}
    assert summary["all"] == summary["old"]
    assert np.isnan(summary["new"])
