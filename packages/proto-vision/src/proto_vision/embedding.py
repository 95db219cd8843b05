"""What systems that embed images do alike: collect the embeddings of a fold over batches and ranks; predict them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from proto_core.metrics.fold import FoldScores
from proto_vision.data.dataset import ImageBatch
from proto_vision.image_system import ImageSystem

__all__ = ["EmbeddingModule", "FoldEmbeddings"]


class FoldEmbeddings(FoldScores):
    """Embeddings and targets of a whole fold, however it was split into batches and ranks (torchmetrics).

    ``update(embeddings [N, D], targets [N], index [N])`` collects; ``gathered()`` gives those of all ranks in the order
    of the data set, samples seen twice (the padding of a distributed sampler) once.

    Example:
        >>> import torch
        >>> from proto_vision.embedding import FoldEmbeddings
        >>> fold = FoldEmbeddings()
        >>> fold.update(torch.eye(2), torch.tensor([5, 6]), torch.tensor([1, 0]))
        >>> fold.gathered()[1]
        tensor([6, 5])
    """

    def update(self, embeddings: Float[Tensor, "N D"], targets: Int[Tensor, "N"], index: Int[Tensor, "N"]) -> None:
        """Collect a batch; ``index`` are the samples' rows in the data set."""
        if embeddings.ndim != 2 or targets.shape != embeddings.shape[:1]:
            shapes = f"{tuple(embeddings.shape)} and {tuple(targets.shape)}"
            raise ValueError(f"embeddings, targets: found shapes {shapes}, needed [N, D] and [N]")
        self.collect(embeddings, targets, index)

    def compute(self) -> tuple[Float[Tensor, "N D"], Int[Tensor, "N"]]:
        """Embeddings and targets, once each."""
        return self.fold()


class EmbeddingModule(ImageSystem, ABC):
    """Evaluation of embeddings over whole folds; a system adds its network, its loss, :meth:`embed`, :meth:`figures`.

    The validation and the test fold are embedded batch by batch, gathered over all ranks, and only then judged. A test
    of two loaders is one of queries (the first) against a gallery (the second).

    Args:
        image_size: height and width of the input, in pixels.
        in_channels: of the input.
    """

    def __init__(self, image_size: int, in_channels: int) -> None:
        super().__init__(image_size, in_channels)
        self.val_fold, self.test_fold, self.gallery_fold = FoldEmbeddings(), FoldEmbeddings(), FoldEmbeddings()

    @abstractmethod
    def embed(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N D"]:
        """Embeddings of a batch, as they are compared."""

    def forward(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N D"]:
        """Embeddings."""
        return self.embed(images)

    def figures(
        self,
        embeddings: Float[Tensor, "N D"],
        targets: Int[Tensor, "N"],
        gallery: Float[Tensor, "G D"] | None = None,
        gallery_targets: Int[Tensor, "G"] | None = None,
    ) -> Mapping[str, float]:
        """Names and values of what a fold's embeddings are judged by; logged as ``val/NAME`` and ``test/NAME``. None
        by default, for systems that judge otherwise.

        Args:
            embeddings: of the fold, or of its queries.
            targets: their classes.
            gallery: what queries are compared with; ``None``: each other.
            gallery_targets: classes of the gallery.
        """
        return {}

    def result_rows(self, figures: Mapping[str, float]) -> list[dict[str, Any]]:
        """Rows of the table that ``test`` prints, made of its figures."""
        return [{"figure": name, "value": value} for name, value in figures.items()]

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Collect the embeddings of the validation fold."""
        self.val_fold.update(self.embed(batch.image), batch.target, batch.index)

    def on_validation_epoch_end(self) -> None:
        """Log the figures of the whole fold; the first also beside the progress."""
        embeddings, targets = (part.to(self.device) for part in self.val_fold.gathered())
        for place, (name, value) in enumerate(self.figures(embeddings, targets).items()):
            self.log(f"val/{name}", value, prog_bar=place == 0)
        self.val_fold.reset()

    def test_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect the embeddings of the test fold, or of its queries (loader 0) and its gallery (loader 1)."""
        fold = self.gallery_fold if dataloader_idx else self.test_fold
        fold.update(self.embed(batch.image), batch.target, batch.index)

    def on_test_epoch_end(self) -> None:
        """The figures of the whole fold, kept in ``test_results`` and logged."""
        folds = (self.test_fold, self.gallery_fold) if self.gallery_fold.collected else (self.test_fold,)
        parts = [part.to(self.device) for fold in folds for part in fold.gathered()]
        found = dict(self.figures(*parts))
        self.test_results = {"summary": found, "labels": self.result_rows(found), "records": sum(map(len, parts[1::2]))}
        for name, value in found.items():
            self.log(f"test/{name}", value)
        for fold in folds:
            fold.reset()

    def predict_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Embeddings ``[N, D]`` and sample indices."""
        return {"index": batch.index, "embeddings": self.embed(batch.image).float()}
