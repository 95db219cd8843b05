"""PALM on photographs: do its features tell unknown classes from known ones better than those of cross-entropy?

The CIFAR-10 excerpt: six classes are known (700 images of each train, 300 are tested), four unknown. Same encoder,
steps, batches and pairs of views; both are judged by the Mahalanobis score of the encoder's features. ResNet-18 for 80
epochs where there is a GPU, four convolutions for 12 where there is none. The experiment of the card, on digits, stands
in ``shared/claims/test_palm.py``.

What was found: on a GPU 0.574 against 0.569 in the mean of three seeds, two of which are lower: within noise. On a CPU
it does NOT hold, since twelve epochs leave both at chance: 0.514 against 0.515.

With the six animals known and the four vehicles unknown, which is easier, cross-entropy is ahead at this size (seed 0,
CPU): 0.724 against 0.594 after 12 epochs, and 0.658 where the prototypes' momentum is 0.9; after 40 epochs 0.699
against 0.638 with 0.9. The paper's gain is for 500 epochs on all of CIFAR and other sets as unknown.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.metrics import auroc, fpr_at_tpr
from proto_core.ood import MahalanobisOOD
from proto_vision import PALM, ImageFolder

SEEDS = (0, 1, 2)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKBONE, EPOCHS = ("resnet18", 80) if DEVICE == "cuda" else ("conv4", 12)
KNOWN, BATCH, RATE = 6, 128, 1e-3
Part = tuple[Tensor, Tensor]


def photographs(archive: Path, folder: Path) -> tuple[Part, Part]:
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    data = ImageFolder(folder, image_size=32, val_fraction=0.0, test_fraction=0.3)

    def part(fold: str) -> Part:
        rows = data.rows(fold).tolist()
        images = torch.stack([data.model_input(data.record_ids[row]) for row in rows])
        return images.to(DEVICE), data.targets[rows].to(DEVICE)

    return part("train"), part("test")


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random square of a fifth to all of each image, half of them mirrored, brighter or darker, some grey."""
    draw = torch.rand(8, len(images), generator=generator).to(images.device)
    side = (0.2 + 0.8 * draw[0]).sqrt()
    mirror = torch.where(draw[1] < 0.5, -side, side)
    across, down = ((2 * share - 1) * (1 - side) for share in draw[2:4])
    zero = torch.zeros_like(side)
    turn = torch.stack([mirror, zero, across, zero, side, down], 1).view(-1, 2, 3)
    cut = F.grid_sample(images, F.affine_grid(turn, list(images.shape), align_corners=False), align_corners=False)
    grey = torch.where((draw[4] < 0.2)[:, None, None, None], cut.mean(1, keepdim=True).expand_as(cut), cut)
    contrast, brightness = 0.6 + 0.8 * draw[5], 0.8 * draw[6] - 0.4
    return grey * contrast[:, None, None, None] + brightness[:, None, None, None]


def trained(train: Part, seed: int, prototypes: bool) -> PALM:
    torch.manual_seed(seed)
    net = PALM(BACKBONE, KNOWN, image_size=32, momentum=0.99).to(DEVICE)
    linear = nn.Linear(net.head[0].in_features, KNOWN).to(DEVICE)
    optimizer = torch.optim.Adam([*net.parameters(), *linear.parameters()], RATE)
    steps = EPOCHS * -(-len(train[0]) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(train[0]), generator=generator).to(DEVICE).split(BATCH):
            images = torch.cat([view(train[0][rows], generator) for _ in range(2)])
            targets, features = train[1][rows].repeat(2), net.encoder(images)
            loss = net.loss(net.embed(features), targets) if prototypes else F.cross_entropy(linear(features), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def figures(net: PALM, train: Part, test: Part) -> tuple[float, float]:
    known, asked = (torch.cat([net.encoder(x) for x in part[0].split(500)]).cpu() for part in (train, test))
    score, among = MahalanobisOOD().fit(known).score(asked), test[1].cpu() < KNOWN
    inside, outside = score[among], score[~among]
    return auroc(inside, outside), fpr_at_tpr(inside, outside)


@pytest.mark.claim
def test_unknown_photographs(claim_record: Callable[..., None], test_data: Path, tmp_path: Path) -> None:
    (x, y), test = photographs(test_data / "cifar10-10k.zip", tmp_path)
    train = x[y < KNOWN], y[y < KNOWN]
    ours, plain = ([figures(trained(train, seed, kind), train, test) for seed in SEEDS] for kind in (True, False))
    method, baseline = ([found[0] for found in part] for part in (ours, plain))
    rates = " against ".join(f"{mean(found[1] for found in part):.3f}" for part in (ours, plain))
    holds = mean(method) > mean(baseline)
    claim_record(
        "palm",
        metric=f"AUROC of four unknown CIFAR-10 classes against six known ones, {BACKBONE}, {EPOCHS} epochs (baseline: "
        f"cross-entropy features; FPR95 {rates}, no margin)",
        method=method,
        baseline=baseline,
        margin="mean higher",
        holds=holds,
    )
    assert holds, (ours, plain)
