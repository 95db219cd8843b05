"""A plain ResNet of the same size as a ProtoECGNet: the same backbones, a linear head instead of prototypes.

The baseline that every figure of ProtoECGNet is compared with. It is trained end to end with binary cross-entropy.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.metrics import MacroAUROC
from proto_core.training import Stage
from proto_ecg.data.module import ECGBatch
from proto_ecg.protoecgnet.backbones import ResNet1d, ResNet2d
from proto_ecg.protoecgnet.evaluation import evaluate
from proto_ecg.protoecgnet.system import ProtoECGNet

__all__ = ["ECGResNet"]


class ECGResNet(LightningModule):
    """The backbones of a network under one linear layer.

    Args:
        like: the network whose backbones (kinds, widths, dropout) are taken, with fresh weights.
        lr: learning rate of Adam.
        weight_decay: of Adam.
        max_epochs: epochs at most, with a cosine schedule.
        patience: epochs without a better validation macro-AUROC before training ends.

    Shapes:
        ``[N, 1, leads, L]`` -> logits ``[N, C]``.
    """

    def __init__(
        self,
        like: ProtoECGNet,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        max_epochs: int = 10,
        patience: int | None = 10,
    ) -> None:
        super().__init__()
        self.label_names = list(like.label_names)
        self.names = like.branch_names
        self.backbones = nn.ModuleDict()
        width = 0
        for name in self.names:
            settings = like.branch(name).config
            network: ResNet1d | ResNet2d
            if name == "rhythm":
                network = ResNet1d(settings.backbone, dropout=settings.dropout)
            else:
                network = ResNet2d(settings.backbone, dropout=settings.dropout)
            self.backbones[name] = network
            width += network.out_channels
        self.head = nn.Linear(width, len(self.label_names))
        self.stages = [
            Stage("resnet", ("*",), max_epochs, lr, weight_decay, scheduler="cosine", patience=patience),
        ]
        self.stage: Stage | None = None
        self.val_scores, self.test_scores = MacroAUROC(), MacroAUROC()
        self.test_results: dict[str, Any] = {}

    def forward(self, x: Float[Tensor, "N 1 leads L"]) -> Float[Tensor, "N C"]:
        """Logits of all labels."""
        parts = []
        for name in self.names:
            features = self.backbones[name](x[:, 0] if name == "rhythm" else x)
            parts.append(features.flatten(2).mean(-1) if features.ndim == 4 else features)
        return self.head(torch.cat(parts, 1))

    def training_step(self, batch: ECGBatch, batch_idx: int) -> Tensor:
        """Binary cross-entropy."""
        loss = F.binary_cross_entropy_with_logits(self(batch.signal.unsqueeze(1)).float(), batch.targets)
        if getattr(self, "_trainer", None) is not None:
            self.log("train/loss", loss, on_step=False, on_epoch=True, sync_dist=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam; the curriculum sets the rate of each epoch."""
        stage = self.stages[0]
        return torch.optim.Adam(self.parameters(), lr=stage.lr, weight_decay=stage.weight_decay)

    def validation_step(self, batch: ECGBatch, batch_idx: int) -> None:
        """Collect the scores of the validation fold."""
        self.val_scores.update(self(batch.signal.unsqueeze(1)).float().sigmoid(), batch.targets, batch.index)

    def on_validation_epoch_end(self) -> None:
        """Macro-AUROC over the whole fold."""
        self.log("val/auroc", self.val_scores.compute(), prog_bar=True)
        self.val_scores.reset()

    def test_step(self, batch: ECGBatch, batch_idx: int) -> None:
        """Collect the scores of the test fold."""
        self.test_scores.update(self(batch.signal.unsqueeze(1)).float().sigmoid(), batch.targets, batch.index)

    def on_test_epoch_end(self) -> None:
        """All figures over the whole fold."""
        scores, targets = self.test_scores.gathered()
        half = torch.full((len(self.label_names),), 0.5)
        self.test_results = evaluate(scores, targets, half, self.label_names)
        self.log("test/auroc", self.test_results["summary"]["auroc"])
        self.test_scores.reset()
