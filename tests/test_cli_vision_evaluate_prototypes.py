"""``proto-vision evaluate-prototypes`` on a small made-up folder in the layout of CUB-200-2011, and without parts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from proto_core.metrics import assign_parts, consistency_score, perturb_images, stability_score
from proto_core.prototypes import PartPrototypes
from proto_core.training import load_system, save_checkpoint
from proto_vision import CUB200, CaseBasedModule, RobustPBNModule
from proto_vision.explanation import PartEvidence, prototype_records
from proto_vision.quality import AnnotatedImages, class_heat, deletion_scores, measure_prototypes
from proto_vision.quality.samples import place_parts
from tests.cli_runs import QUIET, refused, rows
from tests.test_cli_vision import call

BIRDS = {"001.Red_<b>": (220, 40, 40), "002.Blue": (40, 40, 220)}
PARTS = {"head": (0.5, 0.2), "tail & feet": (0.5, 0.8)}
SMALL = ["--model.prototypes_per_class", "2", "--model.prototype_channels", "8", "--data.val_fraction", "0"]


def birds(root: Path, *, parts: bool = True, count: int = 10) -> Path:
    """A coloured body with a white head and a dark tail on a wide picture; every other image trains."""
    rng = np.random.default_rng(0)
    images, boxes, places = [], [], []
    for n in range(count):
        name = list(BIRDS)[n % 2]
        left, top = rng.integers(4, 14, 2)
        pixels = rng.integers(90, 110, (44, 60, 3), np.uint8)
        pixels[top : top + 20, left : left + 24] = BIRDS[name]
        pixels[top + 1 : top + 7, left + 9 : left + 15] = 250
        pixels[top + 13 : top + 19, left + 9 : left + 15] = 10
        images.append(f"{name}/bird_{n}.png")
        (root / "images" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / "images" / images[-1])
        boxes.append((left, top, 24, 20))
        places += [(n + 1, p, left + 24 * x, top + 20 * y, int(n != p)) for p, (x, y) in enumerate(PARTS.values(), 1)]

    def write(name: str, lines: list[tuple[object, ...]]) -> None:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("".join(" ".join(map(str, line)) + "\n" for line in lines))

    write("images.txt", [(n + 1, name) for n, name in enumerate(images)])
    write("classes.txt", [(c + 1, name) for c, name in enumerate(BIRDS)])
    write("image_class_labels.txt", [(n + 1, n % 2 + 1) for n in range(count)])
    write("train_test_split.txt", [(n + 1, n // 2 % 2) for n in range(count)])
    write("bounding_boxes.txt", [(n + 1, *box) for n, box in enumerate(boxes)])
    if parts:
        write("parts/parts.txt", [(p, name) for p, name in enumerate(PARTS, 1)])
        write("parts/part_locs.txt", places)
    return root


def fit(system: str, root: Path, out: Path, *more: str) -> Path:
    epochs = ["--model.schedule.joint_epochs", "2", "--data.batch_size", "8", "--data.image_size", "24"]
    source = ["--data", "proto_vision.CUB200", "--data.root", root, "--data.in_channels", "3"]
    options = [*source, *SMALL, *epochs, *QUIET, "--trainer.default_root_dir", out, *more]
    assert call("fit", "--config", f"{system}/demo.yaml", *options) == 0
    return out / "checkpoints" / "final.ckpt"


@pytest.fixture(scope="module")
def cub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return birds(tmp_path_factory.mktemp("sets") / "CUB_200_2011")


@pytest.fixture(scope="module")
def trained(cub: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["proto-vision"])
        out = tmp_path_factory.mktemp("runs")
        support = ["--model.schedule.head_epochs", "1", "--data.crop", "false"]
        yield {
            "evalprotopnet": fit("evalprotopnet", cub, out / "eval"),
            "st_protopnet": fit("st_protopnet", cub, out / "st", *support),
        }


def test_figures_are_those_of_the_metrics(trained: dict[str, Path], cub: Path, tmp_path: Path) -> None:
    options = ["--half_size", "4", "--threshold", "0.7", "--steps", "6", "--batch_size", "16", "--std", "0.5"]
    assert call("evaluate-prototypes", "--ckpt_path", trained["evalprotopnet"], "--out", tmp_path, *options) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    figures = summary["figures"]
    assert set(figures) == {"accuracy", "consistency", "stability", "kept_place", "deletion_auc"}
    assert summary["settings"]["half_size"] == 4
    net, data = load_system(trained["evalprotopnet"], "proto-vision"), CUB200(cub, image_size=24, batch_size=16)
    images = AnnotatedImages(data, data.rows("test"))
    image, target, _, parts, visible, _ = (torch.stack(values) for values in zip(*images))
    own = target[:, None] * 2 + torch.arange(2)
    near = {"img_size": 24, "half_size": 4}
    noisy = perturb_images(image, std=0.5, generator=torch.Generator().manual_seed(0))
    met, met_noisy = (
        assign_parts(net.similarity_maps(x)[torch.arange(len(x))[:, None], own], parts, visible, **near)
        for x in (image, noisy)
    )
    assert figures["consistency"] == pytest.approx(consistency_score(met, visible, target, 2, threshold=0.7))
    assert figures["stability"] == pytest.approx(stability_score(met, met_noisy, target, 2))
    table = rows(tmp_path / "prototypes.csv")
    assert [row["prototype"] for row in table] == ["0", "1", "2", "3"]
    assert [row["classes"] for row in table] == ["001.Red_<b>"] * 2 + ["002.Blue"] * 2
    shown = visible[target == 1].sum(0)
    shares = met[target == 1].sum(0) / shown.clamp_min(1)
    for k in range(2):
        share, part = shares[k].max(0)
        assert float(table[2 + k]["share"]) == pytest.approx(float(share))
        assert table[2 + k]["part"] == list(PARTS)[int(part)]
        assert table[2 + k]["consistent"] == str(int(share >= 0.7))
    html = (tmp_path / "report.html").read_text()
    assert "<script" not in html
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    assert "001.Red_<b>" not in html
    assert "tail &amp; feet" in html


def test_two_sets_of_whole_images_are_measured_together_and_alone(
    trained: dict[str, Path], cub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate-prototypes", "--ckpt_path", trained["st_protopnet"], "--steps", "4", "--shown", "3"]
    assert call(*command, "--out", tmp_path / "a") == 0
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["masks"] == "box"
    assert set(summary["sets"]) == {"trivial", "support"}
    for name in ("consistency", "stability", "kept_place"):
        assert summary["figures"][name] == pytest.approx(np.mean([s[name] for s in summary["sets"].values()]))
    assert 0 < summary["figures"]["content_heatmap"] < 1
    assert len(summary["deletion_curve"]) == 5
    text = capsys.readouterr().out
    assert "consistency" in text
    assert "trivial" in text
    assert (tmp_path / "a" / "report.html").read_text().count('class="card"') == 3
    assert call(*command, "--out", tmp_path / "b") == 0
    assert (tmp_path / "b" / "summary.json").read_bytes() == (tmp_path / "a" / "summary.json").read_bytes()


def test_silhouettes_beside_the_data_take_the_place_of_boxes(trained: dict[str, Path], cub: Path) -> None:
    folder = cub.parent / "segmentations"
    try:
        for name in CUB200(cub).record_ids:
            path = (folder / name.removeprefix("images/")).with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            silhouette = np.zeros((44, 60), np.uint8)
            silhouette[:22] = 255
            Image.fromarray(silhouette).save(path)
        data = CUB200(cub, crop=False, image_size=24)
        images = AnnotatedImages(data, data.rows("test"))
        assert images.mask_kind == "silhouette"
        assert torch.equal(images[0].mask, (torch.arange(24) < 12)[:, None].expand(24, 24))
        cropped = AnnotatedImages(CUB200(cub, image_size=24), data.rows("test"))
        assert cropped[0].mask[:4].all()
        assert not cropped[0].mask.all()
        net = load_system(trained["st_protopnet"], "proto-vision")
        quality = measure_prototypes(net, data, prototype_records(net, data), steps=0)
        heat = class_heat(net.evaluated(torch.stack([item.image for item in images]))[1], classes_of(images), 24)
        inside = heat[:, :12].mean((1, 2)).mean()
        assert quality.figures["content_heatmap"] == pytest.approx(float(inside), rel=1e-5)
    finally:
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="lacks 'segmentations'"):
        CUB200(cub).mask(0)


def classes_of(images: AnnotatedImages) -> torch.Tensor:
    return torch.stack([item.target for item in images])


def test_heat_is_the_mean_of_the_own_class_and_deletion_goes_from_hot_to_cold(trained: dict[str, Path]) -> None:
    net = load_system(trained["st_protopnet"], "proto-vision")
    images, targets = torch.rand(3, 3, 24, 24), torch.tensor([1, 0, 1])
    _, sets = net.evaluated(images)
    small = torch.stack([(part.maps[0, 2:].mean(0)) for part in sets]).mean(0)
    large = torch.nn.functional.interpolate(small[None, None], (24, 24), mode="bicubic")[0, 0]
    expected = (large - large.min()) / (large.max() - large.min())
    heat = class_heat(sets, targets, 24)
    torch.testing.assert_close(heat[0], expected, rtol=1e-4, atol=1e-4)
    ramp = torch.arange(576.0).view(1, 24, 24).expand(3, -1, -1) / 575
    found = deletion_scores(net, images, ramp, steps=3)
    out = net(images)
    whole = (out.logits_trivial.softmax(1) + out.logits_support.softmax(1)) / 2
    torch.testing.assert_close(found[:, 0], whole.amax(1))
    cut = images.clone()
    cut[:, :, 16:] = 0  # the hottest third lies below
    with torch.no_grad():
        out = net(cut)
    after = ((out.logits_trivial.softmax(1) + out.logits_support.softmax(1)) / 2).gather(1, whole.argmax(1)[:, None])
    torch.testing.assert_close(found[:, 1:2], after)
    for steps in (0, 577):
        with pytest.raises(ValueError, match=f"steps: found {steps}"):
            deletion_scores(net, images, ramp, steps)


class _TwoSets:
    """Three classes: the first set is sure of the first, the second rules it out; light makes no difference."""

    def evaluated(self, images: torch.Tensor) -> tuple[torch.Tensor, list[PartEvidence]]:
        seen, maps = torch.ones(len(images), 3), torch.ones(len(images), 3, 1, 1)
        weights = torch.diag(torch.tensor([5.0, 0, 0])), torch.diag(torch.tensor([-6.0, 0, 0]))
        bias = None, torch.tensor([0.0, 2.0, 1.9])
        layer = PartPrototypes(3, 1, 1)
        sets = [PartEvidence(name, layer, seen, maps, w, b) for name, w, b in zip("ab", weights, bias)]
        return torch.tensor([[-1.0, 2.0, 1.9]]).expand(len(images), -1), sets


def test_deletion_follows_the_class_that_the_network_decides_for() -> None:
    found = deletion_scores(_TwoSets(), torch.rand(2, 3, 4, 4), torch.rand(2, 4, 4), steps=2)
    sets = torch.tensor([[5.0, 0, 0], [-6.0, 2.0, 1.9]]).softmax(1).mean(0)
    assert sets.argmax() == 0  # the mean of the probabilities is of another mind than the sum of the logits
    torch.testing.assert_close(found, sets[1].expand(2, 3))


def test_without_parts_and_masks_the_rest_is_measured(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = birds(tmp_path / "bare", parts=False)
    command = ["evaluate-prototypes", "--ckpt_path", trained["evalprotopnet"], "--data.root", bare, "--steps", "2"]
    assert call(*command, "--limit", "3", "--out", tmp_path / "out") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["figures"]) == {"accuracy", "kept_place", "deletion_auc"}
    assert summary["images"] == 3
    assert "no annotated parts" in capsys.readouterr().out
    assert "share" not in rows(tmp_path / "out" / "prototypes.csv")[0]
    assert "no annotated parts" in (tmp_path / "out" / "report.html").read_text()
    assert call(*command, "--limit", "1", "--std", "0", "--out", tmp_path / "one") == 0  # the other class has no image
    one = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert one["figures"]["kept_place"] == 100
    assert [row["kept_place"] for row in rows(tmp_path / "one" / "prototypes.csv")] == ["1.0", "1.0", "", ""]


def test_images_that_cannot_be_read_are_left_out_where_training_left_them_out(
    trained: dict[str, Path], tmp_path: Path
) -> None:
    root = birds(tmp_path / "torn")
    checkpoint = fit("evalprotopnet", root, tmp_path / "run", "--data.skip_corrupt", "true")
    data = CUB200(root)
    torn = data.record_ids[data.rows("test")[0]]
    (root / torn).write_bytes(b"no image")
    command = ["evaluate-prototypes", "--ckpt_path", checkpoint, "--steps", "0", "--out", tmp_path / "out"]
    with pytest.warns(UserWarning, match="1 images cannot be read"):
        assert call(*command) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["images"] == len(data.rows("test")) - 1
    assert [row["image"] for row in rows(tmp_path / "out" / "skipped_images.csv")] == [torn]


def test_parts_outside_of_a_middle_crop_are_not_visible() -> None:
    parts = torch.tensor([[0, 50], [100, 50], [199, 99]])
    placed, inside = place_parts(parts, (0, 0, 200, 100), 224, "crop")
    assert inside.tolist() == [False, True, False]
    assert placed[1].tolist() == [112, 112]
    tall, _ = place_parts(torch.tensor([[55, 110]]), (5, 10, 105, 210), 224, "crop")
    assert tall.tolist() == [[112, 112]]


@pytest.mark.bad_input
def test_bad_input_is_one_short_message(
    trained: dict[str, Path], cub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate-prototypes", "--ckpt_path", trained["evalprotopnet"], "--out", tmp_path]
    for option, value, says in [
        ("--steps", "-1", "steps: found -1"),
        ("--half_size", "-1", "half_size: found -1"),
        ("--limit", "0", "limit: found 0"),
        ("--batch_size", "0", "batch_size: found 0"),
        ("--threshold", "1.5", "threshold: found 1.5"),
        ("--std", "-1", "std, eps: found -1.0"),
        ("--fold", "val", "the val fold holds no image"),
        ("--steps", "1000", "steps: found 1000, needed 1 to 576"),
    ]:
        assert call(*command, option, value) == 2
        refused(capsys, says)
    other = tmp_path / "other"
    shutil.copytree(cub, other)
    (other / "classes.txt").write_text("1 001.Red_<b>\n2 002.Green\n")
    assert call(*command, "--data.root", other) == 2
    refused(capsys, "are not the 2 of the network: number 2, found '002.Green', needed '002.Blue'")
    shared = RobustPBNModule("conv3", class_names=list(BIRDS), image_size=24)
    data = CUB200(cub, image_size=24)
    with pytest.raises(ValueError, match="prototypes of several classes"):
        measure_prototypes(shared, data, prototype_records(shared, data), progress=lambda batches: 1 / 0)
    save_checkpoint(CaseBasedModule(image_size=16, in_channels=1), tmp_path / "case.ckpt")
    assert call("evaluate-prototypes", "--ckpt_path", tmp_path / "case.ckpt") == 2
    refused(capsys, "'case_based'", "no part prototypes, needed one that has")
