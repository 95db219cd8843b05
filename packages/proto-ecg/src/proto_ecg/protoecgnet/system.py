"""ProtoECGNet: three branches of prototypes (rhythm, morphology, diffuse) under one linear classifier.

Source: "Case-Based Interpretable Deep Learning for Multi-Label ECG Classification with Contrastive Learning", 2025,
arXiv 2504.08713. Differences from the authors' code: one curriculum instead of six hand-started stages; test figures
over the whole fold instead of means over batches; the validation fold as it is instead of drawn by label weight; the
label order is always the data set's; thresholds are chosen on the validation fold; frozen branches stay in evaluation
mode; a prototype whose classes never occur keeps its vector.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float, Shaped
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.data.multilabel import choose_thresholds, class_pos_weight, label_cooccurrence
from proto_core.metrics import MacroAUROC
from proto_core.prototypes import PrototypeLayer
from proto_core.systems import Paper
from proto_core.training import Stage
from proto_ecg.data.labels import PTBXL_ALL, branch_labels
from proto_ecg.data.leads import STANDARD_LEADS
from proto_ecg.data.module import ECGBatch
from proto_ecg.protoecgnet.backbones import feature_length
from proto_ecg.protoecgnet.branches import Branch1d, Branch2d, BranchOutput, ProtoECGBranch1d, ProtoECGBranch2d
from proto_ecg.protoecgnet.curriculum import Schedule, protoecgnet_stages
from proto_ecg.protoecgnet.evaluation import evaluate
from proto_ecg.protoecgnet.explanation import ExplainsECG
from proto_ecg.protoecgnet.loss import ProtoECGLoss
from proto_ecg.protoecgnet.storage import StoresECGNet

__all__ = ["BRANCHES", "LossWeights", "ProtoECGNet"]

log = logging.getLogger(__name__)

BRANCHES = ("rhythm", "morphology", "diffuse")


@dataclass(frozen=True)
class LossWeights:
    """Weights of the joint loss; defaults are the authors'.

    Args:
        cluster: pull towards an own-class prototype.
        separation: push away from other classes' prototypes.
        diversity: spread of the prototypes.
        contrastive: prototypes of co-occurring labels close, of unrelated labels apart.
        sparsity: positive similarities.
        masking: "reference" (as the authors' code) or "strict".
        pos_weight: weight positives by the inverse label frequency.
    """

    cluster: float = 0.004
    separation: float = 0.0004
    diversity: float = 250.0
    contrastive: float = 300.0
    sparsity: float = 0.0
    masking: str = "reference"
    pos_weight: bool = True


class ProtoECGNet(ExplainsECG, StoresECGNet, LightningModule):
    """Multi-label ECG classifier whose every logit is a sum over prototypes that are real training ECGs.

    Args:
        rhythm: the rhythm branch, its settings, or ``None`` for label sets without rhythm labels.
        morphology: the morphology branch, its settings, or ``None``.
        diffuse: the diffuse branch, its settings (``window=None`` takes the whole record), or ``None``.
        num_classes: number of labels; taken from ``label_names`` where these are given.
        label_names: names of the labels in the order of the targets.
        branch_labels: labels of each branch; by default PTB-XL's groups, unknown labels to every branch.
        num_samples: length of a record in samples.
        sampling_rate: in Hz.
        loss: weights of the joint loss.
        schedule: epochs and rates of the curriculum.

    Shapes:
        ``[N, 1, leads, L]`` -> logits ``[N, C]``, similarities ``[N, P]`` in the order rhythm, morphology, diffuse.

    Raises:
        ValueError: a branch whose number of classes is not that of its labels, a branch of labels without a model,
            no branch at all, a window longer than the record.

    Example:
        >>> import torch
        >>> from proto_ecg import ProtoECGNet
        >>> from proto_ecg.protoecgnet import Branch1d, Branch2d
        >>> net = ProtoECGNet(
        ...     Branch1d(2, proto_dim=16, backbone="resnet1d10_narrow"),
        ...     Branch2d(2, proto_dim=16, backbone="resnet10_narrow"),
        ...     Branch2d(2, proto_dim=16, backbone="resnet10_narrow", window=None),
        ...     label_names=["SR", "AFIB", "PVC", "NORM"],
        ... )
        >>> net(torch.randn(2, 1, 12, 1000)).logits.shape
        torch.Size([2, 4])
    """

    system: ClassVar[str] = "protoecgnet"
    paper: ClassVar[Paper] = Paper(
        title="Case-Based Interpretable Deep Learning for Multi-Label ECG Classification with Contrastive Learning",
        year=2025,
        arxiv="2504.08713",
        code="bbj-lab/protoecgnet@27cca7a",
        evidence="code",
        summary="Three branches of prototypes (rhythm, morphology, diffuse) that explain each ECG label by real cases.",
        claim="The contrastive term makes prototypes of co-occurring labels more similar than those of unrelated "
        "labels, at little cost in AUROC.",
    )

    thresholds: Tensor
    pos_weight: Tensor
    pretrain_heads: nn.ModuleDict

    def __init__(
        self,
        rhythm: Branch1d | ProtoECGBranch1d | None,
        morphology: Branch2d | ProtoECGBranch2d | None,
        diffuse: Branch2d | ProtoECGBranch2d | None,
        num_classes: int = 71,
        *,
        label_names: Sequence[str] | None = None,
        branch_labels: Mapping[str, Sequence[str]] | None = None,
        num_samples: int = 1000,
        sampling_rate: int = 100,
        loss: LossWeights = LossWeights(),
        schedule: Schedule = Schedule(),  # noqa: B008
    ) -> None:
        super().__init__()
        given = {"rhythm": rhythm, "morphology": morphology, "diffuse": diffuse}
        self.label_names = _label_names(label_names, num_classes)
        self.num_classes = len(self.label_names)
        self.num_samples, self.sampling_rate = num_samples, sampling_rate
        self.branch_labels = self._share_labels(given, branch_labels, known=label_names is not None)
        self.weights, self.schedule = loss, schedule
        self.rhythm = self._branch("rhythm", rhythm)
        self.morphology = self._branch("morphology", morphology)
        self.diffuse = self._branch("diffuse", diffuse)
        if not self.branch_names:
            raise ValueError("needed at least one branch whose labels the data has, found none")
        sizes = [self.branch(name).layer.num_prototypes for name in self.branch_names]
        self.classifier = nn.Linear(sum(sizes), self.num_classes)
        self.pretrain_heads = nn.ModuleDict()
        if schedule.pretrain_epochs:
            for name in self.branch_names:
                width = cast(Any, self.branch(name).backbone).out_channels
                self.pretrain_heads[name] = nn.Linear(width, self.branch(name).num_classes)
        self.loss = ProtoECGLoss(
            lam_cluster=loss.cluster,
            lam_separation=loss.separation,
            lam_diversity=loss.diversity,
            lam_contrastive=loss.contrastive,
            lam_sparsity=loss.sparsity,
            masking=loss.masking,
            gather_distributed=True,
        )
        self.register_buffer("thresholds", torch.full((self.num_classes,), 0.5))
        for name in self.branch_names:
            count = self.branch(name).num_classes
            self.register_buffer(f"{name}_cooccurrence", torch.eye(count))
            self.register_buffer(f"{name}_pos_weight", torch.ones(count))
        self.register_buffer("pos_weight", torch.ones(self.num_classes))
        self.val_scores, self.test_scores = MacroAUROC(), MacroAUROC()
        self.test_results: dict[str, Any] = {}
        self.stage: Stage | None = None
        self._columns: dict[str, Tensor] = {}
        plain = [name for name in self.branch_names if isinstance(self.branch(name).add_on, nn.Identity)]
        self.stages = protoecgnet_stages(self.branch_names, schedule, without_add_on=plain)
        for name in self.branch_names:
            self.branch(name).requires_grad_(False)
        self.pretrain_heads.requires_grad_(False)
        self.train(self.training)

    # -- what the network is made of

    @property
    def branch_names(self) -> list[str]:
        """Names of the branches that there are, in order."""
        return [name for name in BRANCHES if getattr(self, name) is not None]

    def branch(self, name: str) -> ProtoECGBranch1d | ProtoECGBranch2d:
        """One branch."""
        return cast("ProtoECGBranch1d | ProtoECGBranch2d", getattr(self, name))

    def columns(self, name: str) -> list[int]:
        """Columns of the targets that a branch predicts."""
        where = {label: column for column, label in enumerate(self.label_names)}
        return [where[label] for label in self.branch_labels[name]]

    def _own(self, name: str, targets: Tensor) -> Tensor:
        known = self._columns.get(name)
        if known is None or known.device != targets.device:  # kept, since a list would wait for the GPU in every step
            known = self._columns[name] = torch.tensor(self.columns(name), device=targets.device)
        return targets.index_select(1, known)

    def _share_labels(
        self, given: Mapping[str, Any], wanted: Mapping[str, Sequence[str]] | None, *, known: bool
    ) -> dict[str, list[str]]:
        if wanted is not None:
            shared = {name: list(labels) for name, labels in wanted.items()}
        elif known:
            shared = branch_labels(self.label_names)
        else:
            shared = branch_labels(self.label_names) if tuple(self.label_names) == PTBXL_ALL else {}
        for name, branch in given.items():
            if isinstance(branch, nn.Module):
                classes = cast(Any, branch).num_classes
                labels = shared.setdefault(name, [f"{name} {i}" for i in range(classes)])
                if len(labels) != classes:
                    if known or wanted is not None:
                        raise ValueError(f"{name}: the branch has {classes} classes, its labels are {labels}")
                    shared[name] = [f"{name} {i}" for i in range(classes)]
        unknown = set(shared) - set(BRANCHES)
        if unknown:
            raise ValueError(f"branch_labels: found {sorted(unknown)}, needed some of {BRANCHES}")
        stray = sorted({label for labels in shared.values() for label in labels} - set(self.label_names))
        if stray and (known or wanted is not None):
            raise ValueError(f"branch_labels: {stray} are not among the label names")
        return shared

    def _branch(self, name: str, given: Any) -> nn.Module | None:
        if given is None or isinstance(given, nn.Module):
            return given
        labels = self.branch_labels.get(name)
        if not labels:
            log.info("no %s labels in this label set: the model has no %s branch", name, name)
            return None
        settings = asdict(given)
        if isinstance(given, Branch1d):
            return ProtoECGBranch1d(len(labels), in_channels=len(STANDARD_LEADS), **settings)
        steps = feature_length(self.num_samples)
        window = steps if given.window is None else given.window
        if window > steps:
            raise ValueError(f"{name}: a window of {window} steps is longer than the record's {steps}")
        return ProtoECGBranch2d(len(labels), **settings | {"window": window})

    def train(self, mode: bool = True) -> ProtoECGNet:
        """Training mode for the branch that the stage trains; all other branches stay in evaluation mode."""
        super().train(mode)
        active, phase = self._phase()
        for name in self.branch_names:
            self.branch(name).train(mode and name == active and phase in ("pretrain", "joint"))
        return self

    def _phase(self) -> tuple[str | None, str]:
        """Which branch the stage trains (``None``: none), and what it does: pretrain, joint, classifier, fusion."""
        name = "fusion" if getattr(self, "stage", None) is None else cast(Stage, self.stage).name
        branch, _, phase = name.partition(".")
        return (branch, "joint" if phase.startswith("joint") else phase) if phase else (None, "fusion")

    def similarities(self, x: Float[Tensor, "N 1 leads L"]) -> Float[Tensor, "N P"]:
        """Similarities to all prototypes, in the order rhythm, morphology, diffuse."""
        parts = [self.branch(name).similarities(self._input(name, x)) for name in self.branch_names]
        return torch.cat(parts, dim=1)

    @staticmethod
    def _input(name: str, x: Tensor) -> Tensor:
        return x[:, 0] if name == "rhythm" else x

    def forward(self, x: Float[Tensor, "N 1 leads L"]) -> BranchOutput:
        """Logits of all labels and the similarities that they are sums of."""
        if x.ndim != 4 or x.shape[1] != 1:
            raise ValueError(f"x: found shape {tuple(x.shape)}, needed [N, 1, leads, L]")
        similarities = self.similarities(x)
        return BranchOutput(self.classifier(similarities.to(self.classifier.weight.dtype)), similarities)

    # -- training

    def setup(self, stage: str) -> None:
        """Take co-occurrence and positive weights from the training folds."""
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and data is not None:
            rows = torch.as_tensor(data.train_set.rows)
            self.use_training_targets(torch.as_tensor(data.targets)[rows])

    def use_training_targets(self, targets: Shaped[Tensor, "N C"]) -> None:
        """Compute co-occurrence and positive weights of every branch's label set from training targets ``[N, C]``.

        Raises:
            ValueError: another number of labels.
        """
        if targets.ndim != 2 or targets.shape[1] != self.num_classes:
            raise ValueError(f"targets: found shape {tuple(targets.shape)}, needed [N, {self.num_classes}]")
        targets = targets.float()
        if self.weights.pos_weight:
            self.pos_weight.copy_(_learnable(class_pos_weight(targets)))
        for name in self.branch_names:
            own = self._own(name, targets)
            getattr(self, f"{name}_cooccurrence").copy_(label_cooccurrence(own))
            if self.weights.pos_weight:
                getattr(self, f"{name}_pos_weight").copy_(_learnable(class_pos_weight(own)))

    def training_step(self, batch: ECGBatch, batch_idx: int) -> Tensor:
        """The loss of the stage that training is in."""
        active, phase = self._phase()
        x, targets = batch.signal.unsqueeze(1), batch.targets
        if active is None:
            logits = self(x).logits
            loss = F.binary_cross_entropy_with_logits(logits.float(), targets, pos_weight=self.pos_weight)
            loss = loss + self.schedule.l1 * self.classifier.weight.abs().sum()
        else:
            loss = self._branch_loss(active, phase, self._input(active, x), self._own(active, targets))
        self._log("train/loss", loss, batch, prog_bar=True)
        return loss

    def _branch_loss(self, name: str, phase: str, x: Tensor, targets: Tensor) -> Tensor:
        branch = self.branch(name)
        pos_weight = getattr(self, f"{name}_pos_weight")
        if phase == "pretrain":
            logits = self._pretrain_logits(name, x)
            return F.binary_cross_entropy_with_logits(logits.float(), targets, pos_weight=pos_weight)
        out = branch(x)
        if phase == "classifier":
            loss = F.binary_cross_entropy_with_logits(out.logits.float(), targets, pos_weight=pos_weight)
            return loss + self.schedule.l1 * branch.off_class_l1()
        cooccurrence = getattr(self, f"{name}_cooccurrence")
        return self.loss(
            out.logits, targets, out.similarities, branch.prototypes, branch.class_identity, cooccurrence, pos_weight
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over what the stage trains; the curriculum sets the rate of each epoch."""
        stage = self.stage or self.stages[-1]
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.Adam(parameters, lr=stage.lr, weight_decay=stage.weight_decay)

    # -- evaluation

    def _pretrain_logits(self, name: str, x: Tensor) -> Tensor:
        features = self.branch(name).backbone(x)
        return self.pretrain_heads[name](features.flatten(2).mean(-1) if features.ndim == 4 else features)

    def _evaluate(self, batch: ECGBatch, scores: MacroAUROC, part: str) -> None:
        active, phase = self._phase()
        x, targets = batch.signal.unsqueeze(1), batch.targets
        if active is None or part == "test":
            logits = self(x).logits
        elif phase == "pretrain":
            logits = self._pretrain_logits(active, self._input(active, x))
            targets = self._own(active, targets)
        else:
            logits = self.branch(active)(self._input(active, x)).logits
            targets = self._own(active, targets)
        logits = logits.float()
        loss = F.binary_cross_entropy_with_logits(logits, targets)
        self._log(f"{part}/loss", loss, batch)
        scores.update(logits.sigmoid(), targets, batch.index)

    def validation_step(self, batch: ECGBatch, batch_idx: int) -> None:
        """Collect the scores of the validation fold."""
        self._evaluate(batch, self.val_scores, "val")

    def on_validation_epoch_end(self) -> None:
        """Macro-AUROC over the whole fold; in the fusion stage also the thresholds."""
        self.log("val/auroc", self.val_scores.compute(), prog_bar=True)
        if self._phase()[0] is None and not self.trainer.sanity_checking:
            scores, targets = self.val_scores.gathered()
            self.thresholds.copy_(choose_thresholds(scores, targets))
        self.val_scores.reset()

    def test_step(self, batch: ECGBatch, batch_idx: int) -> None:
        """Collect the scores of the test fold."""
        self._evaluate(batch, self.test_scores, "test")

    def on_test_epoch_end(self) -> None:
        """All figures over the whole fold, kept in ``test_results`` and logged."""
        scores, targets = self.test_scores.gathered()
        self.test_results = evaluate(scores, targets, self.thresholds.cpu(), self.label_names)
        for name, value in self.test_results["summary"].items():
            self.log(f"test/{name}", value)
        self.test_scores.reset()

    def predict_step(self, batch: ECGBatch, batch_idx: int) -> dict[str, Tensor]:
        """Probabilities ``[N, C]``, decisions at the stored thresholds, similarities ``[N, P]`` and sample indices."""
        logits, similarities = self(batch.signal.unsqueeze(1))
        probabilities = logits.float().sigmoid()
        return {
            "index": batch.index,
            "probabilities": probabilities,
            "decisions": probabilities >= self.thresholds,
            "similarities": similarities,
        }

    def _log(self, name: str, value: Tensor, batch: ECGBatch, *, prog_bar: bool = False) -> None:
        if getattr(self, "_trainer", None) is not None:
            options: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True}
            self.log(name, value, batch_size=len(batch.signal), prog_bar=prog_bar, **options)

    # -- projection (see proto_core.prototypes.projection.ProjectsPrototypes)

    def prototype_layers(self) -> dict[str, PrototypeLayer]:
        """Layers that the stage projects: those of its branch, or all."""
        active = self._phase()[0]
        return {name: self.branch(name).layer for name in self.branch_names if active in (None, name)}

    def prototype_features(self, batch: ECGBatch) -> dict[str, tuple[Tensor, Tensor]]:
        """Features and targets of each layer that the stage projects."""
        x = batch.signal.unsqueeze(1)
        return {
            name: (self.branch(name).features(self._input(name, x)), self._own(name, batch.targets))
            for name in self.prototype_layers()
        }

    def batch_index(self, batch: ECGBatch) -> Tensor:
        """Row of each record in the data set."""
        return batch.index


def _learnable(weight: Tensor) -> Tensor:
    """Weights of positives, 1 where the only label of a branch would get the formula's 0 and never be learnt."""
    return torch.where(weight > 0, weight, 1)


def _label_names(names: Sequence[str] | None, count: int) -> list[str]:
    if names is None:
        return list(PTBXL_ALL) if count == len(PTBXL_ALL) else [f"label {i}" for i in range(count)]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"label_names: needed at least one name and no name twice, found {list(names)}")
    return list(names)
