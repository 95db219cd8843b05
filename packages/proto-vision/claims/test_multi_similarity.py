"""Claim of multi-similarity on real images: characters of alphabets that were never seen are retrieved.

Omniglot (five alphabets), ConvNet-4, batches of 16 classes x 5 images, two alphabets left out of training. Baseline:
the contrastive loss of the same frame, with the same network, steps and batches. The margin is
that of the card's experiment.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import lightning.pytorch as pl
import pytest

from proto_core.training import Curriculum
from proto_vision import MultiSimilarityModule, Omniglot
from proto_vision.data.batches import ClassBalanced
from proto_vision.data.class_split import ClassSplit
from proto_vision.multi_similarity import MultiSimilaritySchedule, PairLoss

SEEDS = range(3)
UNSEEN = ["Greek/*", "Latin/*"]
MARGIN = 0.02


def run(data: Omniglot, seed: int, loss: PairLoss, folder: Path) -> float:
    """Recall@1 on unseen alphabets after 300 steps."""
    pl.seed_everything(seed, verbose=False)
    data.sampling = ClassBalanced(classes=16, images=5, batches=100, seed=seed)
    net = MultiSimilarityModule(
        "convnet4",
        image_size=28,
        in_channels=1,
        embedding_dim=64,
        freeze_norm=False,
        loss=loss,
        schedule=MultiSimilaritySchedule(epochs=3, lr=1e-3, milestones=(2,)),
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[Curriculum()],
    )
    trainer.fit(net, datamodule=data)
    trainer.test(net, datamodule=data, verbose=False)
    return net.test_results["summary"]["recall@1"]


@pytest.mark.claim
def test_unseen_characters_are_retrieved(claim_record: Callable[..., None], test_data: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(test_data / "omniglot" / "images_background_small1.zip") as archive:
        archive.extractall(tmp_path)
    data = Omniglot(tmp_path / "images_background_small1", batch_size=256, protocol=ClassSplit(test=UNSEEN))
    method = [run(data, seed, "multi_similarity", tmp_path) for seed in SEEDS]
    baseline = [run(data, seed, "contrastive", tmp_path) for seed in SEEDS]
    holds = mean(method) >= mean(baseline) + MARGIN
    claim_record(
        "multi_similarity",
        metric="Recall@1 on two unseen alphabets of Omniglot, against contrastive loss",
        method=method,
        baseline=baseline,
        margin=f"higher by at least {MARGIN}",
        holds=holds,
    )
    assert holds, (method, baseline)
