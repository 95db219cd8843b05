"""What every single-label image classifier of this package does alike: evaluate a fold, predict, be stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.metrics import FoldAccuracy, classification_figures
from proto_core.training import Stage, check_label_names
from proto_vision.data.dataset import ImageBatch
from proto_vision.image_system import ImageSystem

__all__ = ["ImageClassifier", "adam_by_part", "class_names_or_numbers"]


class ImageClassifier(ImageSystem):
    """Evaluation of logits over whole folds; a system adds its network, its loss and its settings.

    Args:
        num_classes: number of classes C; taken from ``class_names`` where these are given.
        class_names: names of the classes in the order of the targets.
        image_size: height and width of the input, in pixels.
        in_channels: of the input.

    Raises:
        ValueError: a class name twice, or fewer than one class.
    """

    def __init__(self, num_classes: int, class_names: Sequence[str] | None, image_size: int, in_channels: int) -> None:
        super().__init__(image_size, in_channels)
        self.class_names = class_names_or_numbers(class_names, num_classes)
        self.num_classes = len(self.class_names)
        self.val_fold, self.test_fold = FoldAccuracy(), FoldAccuracy()

    @property
    def label_names(self) -> list[str]:
        """Names of the classes, as tables of predictions call them."""
        return self.class_names

    def class_logits(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N C"]:
        """The logits that decide."""
        return self(images).logits

    def input_settings(self) -> dict[str, Any]:
        """Those of the settings that every classifier has."""
        return {
            "num_classes": self.num_classes,
            "class_names": list(self.class_names),
            **super().input_settings(),
        }

    def check_settings(self, found: dict[str, Any]) -> None:
        """Refuse a checkpoint of other classes or another kind of input.

        Raises:
            ValueError: names what differs.
        """
        check_label_names(found["class_names"], self.class_names)
        super().check_settings(found)

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Collect the scores of the validation fold."""
        logits = self.class_logits(batch.image).float()
        self.note("val/loss", F.cross_entropy(logits, batch.target), batch)
        self.val_fold.update(logits.softmax(1), batch.target, batch.index)

    def on_validation_epoch_end(self) -> None:
        """Accuracy over the whole fold."""
        self.log("val/accuracy", self.val_fold.compute(), prog_bar=True)
        self.val_fold.reset()

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Collect the scores of the test fold."""
        self.test_fold.update(self.class_logits(batch.image).float().softmax(1), batch.target, batch.index)

    def on_test_epoch_end(self) -> None:
        """All figures over the whole fold, kept in ``test_results`` and logged."""
        scores, targets = self.test_fold.gathered()
        self.test_results = classification_figures(scores, targets, self.class_names)
        for name, value in self.test_results["summary"].items():
            self.log(f"test/{name}", value)
        self.test_fold.reset()

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """Probabilities ``[N, C]``, decisions ``[N, C]`` (one class each) and sample indices."""
        probabilities = self.class_logits(batch.image).float().softmax(1)
        decisions = F.one_hot(probabilities.argmax(1), self.num_classes).bool()
        return {"index": batch.index, "probabilities": probabilities, "decisions": decisions}


def adam_by_part(network: nn.Module, stage: Stage, parts: Mapping[str, tuple[float, float]]) -> torch.optim.Adam:
    """Adam over what the stage trains, with a rate and a weight decay for each part of a network.

    Args:
        network: whose parameters are named.
        stage: its rate is the one that the curriculum changes; the parts' rates change with it.
        parts: first letters of parameter names -> learning rate, weight decay; the first that fits counts.

    Raises:
        ValueError: a trained parameter of no part.
    """
    groups: dict[str, dict[str, Any]] = {
        name: {"params": [], "lr": lr, "lr_scale": lr / stage.lr, "weight_decay": decay}
        for name, (lr, decay) in parts.items()
    }
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            part = next((key for key in groups if name.startswith(key)), None)
            if part is None:
                raise ValueError(f"parts: {name!r} belongs to none of {list(parts)}")
            groups[part]["params"].append(parameter)
    return torch.optim.Adam([group for group in groups.values() if group["params"]], lr=stage.lr)


def class_names_or_numbers(names: Sequence[str] | None, count: int) -> list[str]:
    """The names as a list, or ``class 0`` and so on.

    Raises:
        ValueError: a name twice, or no class.
    """
    names = [f"class {number}" for number in range(count)] if names is None else list(names)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"class_names: needed at least one name and no name twice, found {names}")
    return names
