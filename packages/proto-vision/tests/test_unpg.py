"""UNPG as a system: the authors' values through its loss, iResNet's sizes, training, verification of a fold."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from proto_core.losses import UNPGLoss
from proto_core.metrics import VerificationMetrics, equal_error_rate, rank1_accuracy, tar_at_far
from proto_core.training import Curriculum
from proto_vision import Digits, ImageFolder, UNPGModule, verification
from proto_vision.data.dataset import ImageBatch
from proto_vision.data.protocols import UnseenClasses
from proto_vision.unpg import IResNet, UNPGSchedule
from proto_vision.unpg.iresnet import IResNetBlock
from proto_vision.verification import all_pairs, draw_curves, first_and_rest, pair_scores, verification_figures


def module(**changed):
    torch.manual_seed(0)
    small = {"image_size": 16, "in_channels": 1, "embedding_dim": 16, "dropout": 0.0}
    return UNPGModule("iresnet_small", 6, **small | changed)


def batch(count=12, classes=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    index = torch.arange(count)
    return ImageBatch(torch.rand(count, 1, 16, 16, generator=g), index % classes, index, index >= 0)


# -- the loss, as the system sets it up


def test_the_systems_loss_is_the_authors(golden_dir):
    golden = np.load(golden_dir / "unpg.npz")
    cases = sorted({key.partition("_")[0] for key in golden.files if key.startswith("c") and key.endswith("_W")})
    assert len(cases) >= 5
    for case in cases:
        a = {key.removeprefix(f"{case}_"): golden[key] for key in golden.files if key.startswith(f"{case}_")}
        classes, dim = a["W"].shape
        head = {key.removeprefix("h_"): float(a[key]) for key in a if key.startswith("h_")}
        net = UNPGModule(
            *("conv2", classes),
            image_size=8,
            embedding_dim=dim,
            margin=("arcface", "cosface", "magface")[int(a["kind"])],
            negatives="unified" if int(a["aux"]) else "class",
            whisker=None if float(a["wisk"]) < 0 else float(a["wisk"]),
            **head,
        )
        x = torch.from_numpy(a["x"]).requires_grad_()
        net.loss.to(x.dtype).weight.data.copy_(torch.from_numpy(a["W"]))
        net.network = nn.Flatten()
        y = torch.from_numpy(a["y"])
        loss = net.training_step(ImageBatch(x[:, :, None, None], y, y, y >= 0), 0)
        loss.backward()
        rtol, atol = (1e-6, 1e-7) if x.dtype == torch.float64 else (2e-4, 2e-4 * np.abs(a["grad_x"]).max())
        np.testing.assert_allclose(loss.detach().numpy(), a["loss"], rtol=rtol, atol=atol)
        np.testing.assert_allclose(x.grad.numpy(), a["grad_x"], rtol=rtol, atol=atol)
        scale = np.abs(a["grad_W"]).max()
        np.testing.assert_allclose(net.loss.weight.grad.numpy(), a["grad_W"], rtol=rtol, atol=max(1e-7, rtol * scale))


def test_a_step_is_the_loss_of_raw_embeddings_and_views_are_images():
    net, b = module(margin="cosface", m=0.2, s=8.0).eval(), batch()
    loss = UNPGLoss(16, 6, "cosface", 8.0, 0.2)
    loss.load_state_dict(net.loss.state_dict())
    expected = loss(net.network(b.image), b.target)
    torch.testing.assert_close(net.training_step(b, 0), expected)
    two = b._replace(image=torch.stack([b.image, b.image.flip(-1)], dim=1))
    both = loss(net.network(torch.cat([b.image, b.image.flip(-1)])), b.target.repeat(2))
    torch.testing.assert_close(net.training_step(two, 0), both)


def test_half_precision_trains():
    net = module()
    with torch.autocast("cpu", torch.bfloat16):
        loss = net.training_step(batch(), 0)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


# -- iResNet


@pytest.mark.parametrize(("name", "millions"), [("iresnet34", 34.14), ("iresnet50", 43.59), ("iresnet100", 65.16)])
def test_iresnets_have_the_size_of_face_recognitions(name, millions):
    with torch.device("meta"):
        net = IResNet(name)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(millions * 1e6, abs=5e3)


def test_a_face_is_seven_by_seven_before_the_linear_layer():
    net = IResNet("iresnet_small").eval()
    maps = net.stages(net.stem(torch.zeros(1, 3, 112, 112)))
    assert maps.shape == (1, 128, 7, 7)
    assert net.head(maps).shape == (1, 512)


def test_a_block_is_the_cards_and_nothing_acts_behind_the_sum():
    torch.manual_seed(0)
    block = IResNetBlock(4, 8, 2).eval()
    kinds = [type(layer) for layer in block.body]
    assert kinds == [nn.BatchNorm2d, nn.Conv2d, nn.BatchNorm2d, nn.PReLU, nn.Conv2d, nn.BatchNorm2d]
    assert (block.body[1].stride, block.body[4].stride, block.shortcut[0].stride) == ((1, 1), (2, 2), (2, 2))
    assert block.body[3].weight.shape == (8,)
    x = torch.randn(2, 4, 5, 5)
    found = block(x)
    assert found.shape == (2, 8, 3, 3)
    assert (found < 0).any()
    same = IResNetBlock(4, 4).eval()
    nn.init.zeros_(same.body[5].weight)
    torch.testing.assert_close(same(x), x)


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 24), st.integers(1, 3))
def test_any_size_of_image_and_of_batch(size, count):
    net = IResNet("iresnet_small", 8, in_channels=1, image_size=size).eval()
    images = torch.rand(count, 1, size, size)
    found = net(images)
    assert found.shape == (count, 8)
    torch.testing.assert_close(net(images[:1]), found[:1], rtol=1e-4, atol=1e-5)


# -- the embedding that is compared


def test_embedding_is_the_images_beside_its_mirror_images():
    net, images = module().eval(), batch().image
    with torch.no_grad():
        found, plain = net.embed(images), net.network(images)
        torch.testing.assert_close(found[:, :16], plain)
        torch.testing.assert_close(found[:, 16:], net.network(images.flip(-1)))
        torch.testing.assert_close(net.embed(images.flip(-1)), found.roll(16, dims=1))
        net.flip = False
        torch.testing.assert_close(net.embed(images), plain)


def test_other_backbones_end_in_a_linear_layer_and_batch_norm():
    net = UNPGModule("conv3", 5, image_size=16, embedding_dim=8, in_channels=1)
    assert [type(layer) for layer in net.network[1:]] == [nn.Linear, nn.BatchNorm1d]
    assert net.eval().embed(torch.rand(3, 1, 16, 16)).shape == (3, 16)


@pytest.mark.parametrize(("margin", "low", "high"), [("magface", 1 - 1e-5, 1 + 1e-5), ("arcface", 0.0, 0.99)])
def test_settings_rebuild_the_network(tmp_path, margin, low, high):
    net = module(margin=margin, whisker=None, lambda_g=20.0, schedule=UNPGSchedule(epochs=4, warmup_epochs=1)).eval()
    norms = net.loss.weight.norm(dim=1)
    assert ((norms >= low) & (norms <= high)).all() or margin == "arcface"
    net.save_pretrained(tmp_path)
    again = UNPGModule.from_pretrained(tmp_path)
    assert again.settings() == net.settings()
    assert again.loss.lambda_g == 20.0
    with torch.no_grad():
        assert torch.equal(again.embed(batch().image), net.embed(batch().image))


# -- training


def test_recipe_is_the_authors():
    net = UNPGModule("conv2", 5, image_size=8)
    (stage,) = net.stages
    assert (stage.max_epochs, stage.warmup_epochs, stage.scheduler, stage.monitor) == (20, 3, "cosine", None)
    group = net.configure_optimizers().param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 5e-4)
    assert any(p is net.loss.weight for p in group["params"])
    assert net.loss.gather_distributed


def test_it_trains_on_some_classes_and_verifies_the_others(tmp_path):
    data = Digits(image_size=8, batch_size=200, drop_last=True, protocol=UnseenClasses(4))
    assert data.num_classes == 6
    schedule = UNPGSchedule(1, 0, lr=0.05)
    net = module(image_size=8, s=16.0, m=0.2, margin="cosface", class_names=data.class_names, schedule=schedule)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[Curriculum()],
        **quiet,
    )
    trainer.fit(net, datamodule=data)
    assert set(trainer.callback_metrics) >= {"val/eer", "val/tar@0.001", "val/rank1", "train/loss"}
    trainer.test(net, datamodule=data, verbose=False)
    found, targets = net.test_results["summary"], data.targets[torch.from_numpy(data.rows("test"))]
    assert set(targets.tolist()) == {6, 7, 8, 9}
    again = UNPGModule.from_checkpoint(tmp_path / "checkpoints" / "final.ckpt")
    images = torch.cat([b.image for b in data.test_dataloader()])
    with torch.no_grad():
        scores, labels = all_pairs(again.embed(images), targets)
    assert found["eer"] == pytest.approx(equal_error_rate(scores, labels), abs=1e-3)
    assert 0 < found["eer"] < 0.5


def test_batches_that_batch_norm_cannot_take_are_refused_before_and_in_training():
    with pytest.raises(ValueError, match=r"found 1 image, needed 2 .*drop_last"):
        module().training_step(batch(1), 0)
    data = Digits(image_size=8, batch_size=5000, drop_last=True)
    with pytest.raises(ValueError, match=r"batch_size: found 5000 for 7\d\d training images"):
        data.setup("fit")
    sizes = [len(b.target) for b in Digits(image_size=8, batch_size=100, drop_last=True).train_dataloader()]
    assert set(sizes) == {100}


@pytest.mark.bad_input
def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="num_classes: found 1"):
        UNPGModule("conv2", 1)
    with pytest.raises(ValueError, match="margin: found 'cos'"):
        module(margin="cos")
    with pytest.raises(ValueError, match="negatives: found 'all'"):
        module(negatives="all")
    with pytest.raises(ValueError, match="whisker: found -1"):
        module(whisker=-1.0)
    with pytest.raises(ValueError, match="pretrained"):
        module(pretrained=True)
    with pytest.raises(ValueError, match="backbone: found 'resnet'"):
        IResNet("resnet")
    with pytest.raises(ValueError, match="dropout"):
        IResNet("iresnet_small", dropout=1.0)
    with pytest.raises(ValueError, match="another label set"):
        module().check_settings(module(class_names=list("abcdef")).settings())
    with pytest.raises(ValueError, match="warmup_epochs"):
        module(schedule=UNPGSchedule(epochs=2, warmup_epochs=3))


# -- figures of a fold


def test_figures_are_those_of_all_pairs():
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(30, 5, generator=g), torch.arange(30) % 7
    one, two = zip(*[(i, j) for i in range(30) for j in range(i + 1, 30)])
    scores, labels = all_pairs(x, y)
    expected = nn.functional.cosine_similarity(x[list(one)], x[list(two)])
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(pair_scores(x, torch.tensor(one), torch.tensor(two)), expected)
    assert labels.tolist() == [int(y[i] == y[j]) for i, j in zip(one, two)]
    found = verification_figures(x, y, fars=(0.1,), mode="nearest")
    assert found["eer"] == equal_error_rate(scores, labels)
    assert found["tar@0.1"] == tar_at_far(scores, labels, [0.1])
    assert found["rank1"] == rank1_accuracy(x[7:], y[7:], x[:7], y[:7])


def test_a_fold_of_all_ranks_is_not_gathered_once_more(monkeypatch):
    asked = []

    class OfRanks(VerificationMetrics):
        def __init__(self, *args, **options):
            def gather(part, group=None):
                asked.append(part)
                return [part, part]

            super().__init__(*args, **options, distributed_available_fn=lambda: True, dist_sync_fn=gather)

    monkeypatch.setattr(verification, "VerificationMetrics", OfRanks)
    assert verification_figures(torch.eye(4), torch.arange(4) // 2)["eer"] == 0.5
    assert not asked


def test_queries_meet_the_gallery_alone():
    x = torch.eye(3)
    found = verification_figures(x, torch.arange(3), x[[0, 1]], torch.tensor([0, 2]), fars=(0.5,))
    # six pairs: (0,0) alike and cosine 1; (2, second) alike and cosine 0; (1, second) not alike and cosine 1
    assert found["rank1"] == pytest.approx(1 / 3)
    assert found["tar@0.5"] == 0.5


def test_what_is_not_defined_is_nan():
    found = verification_figures(torch.eye(3), torch.arange(3))
    assert all(np.isnan(value) for value in found.values())
    alike = verification_figures(torch.eye(3), torch.zeros(3, dtype=torch.long))
    assert np.isnan(alike["eer"])
    assert alike["rank1"] == 1.0


def test_many_images_are_thinned_evenly():
    x, y = torch.eye(10), torch.arange(10) // 2
    thinned = verification_figures(x, y, most=5, fars=(0.5,))
    whole = verification_figures(x[[0, 2, 4, 6, 8]], y[[0, 2, 4, 6, 8]], fars=(0.5,))
    assert thinned.keys() == whole.keys()
    assert np.array_equal(list(thinned.values()), list(whole.values()), equal_nan=True)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=20))
def test_gallery_is_the_first_of_each(targets):
    known, asked = first_and_rest(torch.tensor(targets))
    assert known.tolist() == [n for n, t in enumerate(targets) if t not in targets[:n]]
    assert sorted(known.tolist() + asked.tolist()) == list(range(len(targets)))


def test_pairs_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="first, second"):
        pair_scores(torch.eye(3), torch.tensor([0]), torch.tensor([1, 2]))
    assert pair_scores(torch.eye(3), torch.zeros(0).long(), torch.zeros(0).long()).shape == (0,)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_curves_are_drawn(tmp_path, kind):
    path = tmp_path / "curves"
    with path.open("wb") as file:
        draw_curves([0.9, 0.4, 0.6, 0.1], [1, 1, 0, 0], file, kind)
    if kind == "png":
        assert Image.open(path).size == (1260, 576)
    else:
        assert "ROC: 2 pairs of one identity, 2 of two" in path.read_text()


# -- K-FACE, MS1MV2 and ORL as folders


def test_face_folders_are_identities_whatever_lies_between(tmp_path):
    for person in ("19062421", "19062422"):
        for session, light in (("S001", "L1"), ("S002", "L3")):
            folder = tmp_path / person / session / light / "E01"
            folder.mkdir(parents=True)
            for camera in (1, 7):
                Image.new("RGB", (12, 12), (camera * 9, 0, 0)).save(folder / f"C{camera}.jpg")
    data = ImageFolder(tmp_path, image_size=12, test_fraction=0.0, val_fraction=0.0)
    assert data.class_names == ["19062421", "19062422"]
    assert data.record_ids[0] == "19062421/S001/L1/E01/C1.jpg"
    assert np.bincount(data.table.targets).tolist() == [4, 4]


def test_orl_faces_train_and_unseen_people_stay_out(test_data):
    data = ImageFolder(test_data / "orl-faces", image_size=32, in_channels=1, batch_size=25, protocol=UnseenClasses(15))
    assert data.num_classes == 25
    train, test = set(data.table.targets[data.rows("train")]), set(data.table.targets[data.rows("test")])
    assert (train, test) == (set(range(25)), set(range(25, 40)))
    net = UNPGModule("iresnet_small", image_size=32, in_channels=1, embedding_dim=16, class_names=data.class_names)
    loss = net.training_step(next(iter(data.train_dataloader())), 0)
    assert loss.isfinite()
