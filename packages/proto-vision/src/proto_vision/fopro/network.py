"""FoPro's networks and one training step: six losses, cleaned labels, polished prototypes, a queue of keys.

Source: "FoPro: Few-Shot Guided Robust Webly-Supervised Prototypical Learning", AAAI 2023, arXiv 2212.00465. Differences
from the authors' code: the caller's labels are not changed; a class without a visit keeps its density; several
processes polish and take means on the joint batch (theirs shuffle images for batch norm); the queue wraps around. As
there, the weights of the low-dimensional classifier are not normalised, and the relation scores are trained by a
softmax and read through a sigmoid. New layers start as PyTorch's linear layers do (Kaiming uniform of slope sqrt 5).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.checks import check_class_targets, check_option, check_positive
from proto_core.distributed import gather_with_grad, joint_mean
from proto_core.modes import evaluation_mode
from proto_core.precision import full_precision, no_autocast, unit_vectors
from proto_vision.data.dataset import ImageBatch
from proto_vision.fopro.prototypes import initial_prototypes, polish_prototypes, prototype_density

__all__ = ["Cleaning", "FoPro", "FoProStep", "RelationModule"]

Cleaning = Literal["none", "confidence", "relation", "fusion"]


class RelationModule(nn.Module):
    """Learnt score of every pair of embedding and prototype: two linear layers on the two side by side.

    Args:
        dim: length D of an embedding.
        hidden: units between the layers.

    Shapes:
        ``[N, D]``, ``[K, D]`` -> ``[N, K]``.

    Source:
        arXiv 2212.00465, equation 8.

    Example:
        >>> import torch
        >>> from proto_vision.fopro import RelationModule
        >>> RelationModule(4)(torch.zeros(2, 4), torch.zeros(3, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, dim: int, hidden: int = 128) -> None:
        super().__init__()
        check_positive(dim=dim, hidden=hidden)
        self.fc1 = nn.Linear(2 * dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, 1, bias=False)

    def forward(self, embeddings: Float[Tensor, "N D"], prototypes: Float[Tensor, "K D"]) -> Float[Tensor, "N K"]:
        """Scores; the first layer acts on both parts of a pair by itself, so that no pair is written out."""
        embeddings = full_precision(embeddings)
        first, second = self.fc1.weight.to(embeddings.dtype).chunk(2, dim=1)
        hidden = (embeddings @ first.mT).unsqueeze(1) + (prototypes.to(embeddings.dtype) @ second.mT)
        return F.linear(hidden.relu(), self.fc2.weight.to(embeddings.dtype)).squeeze(2)


@dataclass(frozen=True, eq=False)
class FoProStep:
    """What came of a batch.

    Attributes:
        total: sum of the losses.
        losses: ``cls``, ``proto``, ``inst``, ``low_dim``, ``reconstruction``, ``relation``.
        labels: ``[N]`` after correction.
        clean: ``[N]`` which rows took part.
        soft_targets: ``[N, K]`` p.
        gt_score: ``[N]`` p of the label as it was given.
        low_dim_rows: ``[N]`` rows of the low-dimensional classifier's loss.
        relation_rows: ``[N]`` rows of the relation's loss.
    """

    total: Tensor
    losses: dict[str, Tensor]
    labels: Tensor
    clean: Tensor
    soft_targets: Tensor
    gt_score: Tensor
    low_dim_rows: Tensor
    relation_rows: Tensor


class FoPro(nn.Module):
    """Encoder, its slow copy, projector and classifiers, and the prototypes that a few trusted images begin.

    Args:
        encoder: images -> features ``[N, feature_dim]``.
        feature_dim: B.
        num_classes: K.
        low_dim: length D of an embedding.
        projection_hidden: units of the projector's hidden layer; ``None``: it is one linear layer.
        relation_hidden: units of the relation module.
        queue_size: Q, keys kept for the contrast of instances.
        encoder_momentum: of the slow copy.
        prototype_momentum: of the prototypes.
        temperature: of similarities.
        use_density: whether each prototype's logits are divided by its density, not by the temperature.
        margin: taken off the similarity of a trusted image to its class; 0: no margin.
        alpha: share of the classifier in soft targets, that of the prototypes being the rest.
        threshold: gamma, score above which a label is corrected.
        distance_threshold: to a class, below which an image trains the low-dimensional classifier before cleaning.
        soft_labels: whether the classifier also learns soft targets.

    Shapes:
        images -> ``[N, K]``.

    Raises:
        ValueError: sizes below 1, shares outside [0, 1].

    Source:
        arXiv 2212.00465, section 3.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from proto_vision.fopro import FoPro
        >>> net = FoPro(nn.Flatten(), 12, 2, low_dim=4, projection_hidden=None, queue_size=8)
        >>> images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 0, 1])
        >>> net.initialise_prototypes([(images, labels)])
        >>> step = net.compute_losses(images, images, labels, labels > 1, use_prototypes=True, cleaning="confidence")
        >>> bool(step.total.isfinite()), int(net.queue_ptr)
        (True, 4)
    """

    prototypes: Tensor
    visited: Tensor
    distance: Tensor
    density: Tensor
    queue: Tensor
    queue_ptr: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        feature_dim: int,
        num_classes: int,
        *,
        low_dim: int = 128,
        projection_hidden: int | None = 2048,
        relation_hidden: int = 128,
        queue_size: int = 8192,
        encoder_momentum: float = 0.999,
        prototype_momentum: float = 0.999,
        temperature: float = 0.1,
        use_density: bool = True,
        margin: float = 0.5,
        alpha: float = 0.5,
        threshold: float = 0.6,
        distance_threshold: float = 20.0,
        soft_labels: bool = True,
    ) -> None:
        super().__init__()
        check_positive(feature_dim=feature_dim, num_classes=num_classes, low_dim=low_dim, queue_size=queue_size)
        check_positive(temperature=temperature)
        shares = {"encoder_momentum": encoder_momentum, "prototype_momentum": prototype_momentum}
        for name, value in (shares | {"alpha": alpha, "threshold": threshold}).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: found {value}, needed 0 to 1")
        self.num_classes, self.temperature, self.use_density = num_classes, temperature, use_density
        self.encoder_momentum, self.prototype_momentum = encoder_momentum, prototype_momentum
        self.margin, self.alpha, self.threshold = margin, alpha, threshold
        self.distance_threshold, self.soft_labels = distance_threshold, soft_labels
        self.encoder = encoder
        self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.projector = _layers(feature_dim, projection_hidden, low_dim)
        self.reconstructor = _layers(low_dim, projection_hidden, feature_dim)
        self.classifier = nn.Linear(feature_dim, num_classes, bias=False)
        self.low_dim_classifier = nn.Linear(low_dim, num_classes, bias=False)
        self.relation = RelationModule(low_dim, relation_hidden)
        self.register_buffer("prototypes", torch.zeros(num_classes, low_dim))
        self.register_buffer("visited", torch.zeros(num_classes))
        self.register_buffer("distance", torch.zeros(num_classes))
        self.register_buffer("density", torch.full((num_classes,), float(temperature)))
        self.register_buffer("queue", F.normalize(torch.randn(low_dim, queue_size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))

    def forward(self, images: Tensor) -> Float[Tensor, "N K"]:
        """Class logits."""
        return self.classifier(self.encoder(images))

    def embed(self, features: Float[Tensor, "N B"]) -> Float[Tensor, "N D"]:
        """z, of norm 1."""
        return unit_vectors(self.projector(features.to(self.classifier.weight.dtype)))

    @torch.no_grad()
    def soft_targets(self, images: Tensor) -> Float[Tensor, "N K"]:
        """p, ``alpha softmax(o) + (1 - alpha) softmax(s')``, of images alone."""
        features = self.encoder(images)
        cosine = self._cosine(self.embed(features))
        return self._mixed(self.classifier(features), cosine / self._temperatures())

    @torch.no_grad()
    def initialise_prototypes(self, batches: Iterable[Any], *, allow_missing: bool = False) -> None:
        """Begin with the mean keys of few trusted images; visits are forgotten.

        Args:
            batches: pairs (images, labels), triples with a mask of the trusted, or :class:`ImageBatch`; images without
                strong augmentation.
            allow_missing: whether classes may lack an image; their prototype is 0, and their similarity.

        Raises:
            ValueError: a class without a trusted image, labels outside 0..K-1.
        """
        keys, labels = [], []
        with evaluation_mode(self):
            for batch in batches:
                if isinstance(batch, ImageBatch):
                    images, targets, mask = batch.image, batch.target, batch.trusted
                else:
                    images, targets, *rest = batch
                    mask = rest[0].bool() if rest else torch.ones_like(targets, dtype=torch.bool)
                device = self.prototypes.device
                images, targets, mask = images.to(self.prototypes), targets.to(device), mask.to(device)
                keys.append(self.embed(self.momentum_encoder(images[mask])))
                labels.append(targets[mask])
        if not keys:
            raise ValueError("batches: found none, needed trusted images of every class")
        joint = torch.cat(labels)
        begun = initial_prototypes(torch.cat(keys), joint, self.num_classes)
        lacking = (torch.bincount(joint, minlength=self.num_classes) == 0).nonzero().flatten().tolist()
        if lacking and not allow_missing:
            raise ValueError(f"batches: found no trusted image of {len(lacking)} classes, such as {lacking[:5]}")
        self.prototypes.copy_(begun)
        self.visited.zero_()
        self.distance.zero_()

    @torch.no_grad()
    def refresh_density(self) -> None:
        """Densities from what visited the prototypes since the last time (an epoch)."""
        self.density.copy_(prototype_density(self.distance, self.visited, previous=self.density))
        self.visited.zero_()
        self.distance.zero_()

    def compute_losses(
        self,
        images: Tensor,
        augmented: Tensor,
        labels: Int[Tensor, "N"],
        fewshot: Bool[Tensor, "N"],
        *,
        use_prototypes: bool,
        cleaning: Cleaning = "none",
        train_relation: bool = False,
        pretrain_relation: bool = False,
        update_momentum: bool = True,
    ) -> FoProStep:
        """One training step without the optimiser; changes slow copy, prototypes and queue, not its inputs.

        Args:
            images: weakly augmented.
            augmented: the same, strongly augmented.
            labels: given labels.
            fewshot: which are trusted: never relabelled, always clean.
            use_prototypes: whether they are there yet.
            cleaning: how labels are cleaned, and prototypes polished; ``"none"`` does neither.
            train_relation: whether the relation module learns.
            pretrain_relation: from all rows of the low-dimensional classifier, or only from corrected ones.
            update_momentum: whether the slow copy follows.

        Raises:
            ValueError: labels outside 0..K-1, an unknown cleaning, cleaning without prototypes, a mask of another
                length.
        """
        check_option("cleaning", cleaning, "none", "confidence", "relation", "fusion")
        if cleaning != "none" and not use_prototypes:
            raise ValueError(f"cleaning: found {cleaning!r} without prototypes, needed use_prototypes, or 'none'")
        if fewshot.shape != labels.shape:
            raise ValueError(f"fewshot: found shape {tuple(fewshot.shape)}, needed {tuple(labels.shape)}")
        fewshot = fewshot.bool()
        seen = self.encoder(images)
        check_class_targets(seen, labels, what="images", classes=self.num_classes, empty=True)
        features, labels = full_precision(seen), labels.long()
        logits, z = full_precision(self.classifier(seen)), self.embed(seen)
        z_augmented = self.embed(self.encoder(augmented))
        losses = {"reconstruction": self._reconstruction(features, z, use_prototypes)}
        key, key_augmented = self._keys(images, augmented, update_momentum)

        cosine, temperatures = self._cosine(z), self._temperatures()
        one_hot = F.one_hot(labels, self.num_classes).to(cosine.dtype)
        with_margin = (cosine - self.margin * one_hot * fewshot[:, None]) / temperatures
        with torch.no_grad():
            soft = logits.softmax(1)
            if use_prototypes:
                soft = self._mixed(logits, cosine / temperatures)
                soft = torch.where(fewshot[:, None], one_hot, soft)
            score = soft.gather(1, labels[:, None]).squeeze(1)
            new, clean, corrected = self._cleaned(labels, fewshot, soft, score, z, cleaning)

        losses["cls"] = self._class_loss(logits, new, clean, soft, score, use_prototypes)
        losses["proto"] = _mean(F.cross_entropy(with_margin, new, reduction="none"), clean & use_prototypes)
        low_dim_rows = self._low_dim_rows(labels, fewshot, score, cosine, clean, use_prototypes, cleaning)
        if cleaning != "none":
            self._polish(key, new, clean)
        losses["low_dim"] = self._low_dim(z, z_augmented, new, low_dim_rows)
        losses["inst"] = self._instance(z, key_augmented) * use_prototypes
        self._push(key_augmented)
        relation_rows = torch.zeros_like(fewshot)
        losses["relation"] = logits.new_zeros(())
        if train_relation and use_prototypes:
            chosen = corrected if cleaning != "none" else fewshot | (score > 1 / self.num_classes)
            relation_rows = low_dim_rows if pretrain_relation else chosen
            losses["relation"] = _mean(self._relation_loss(z, new), relation_rows)
        order = ("cls", "proto", "inst", "low_dim", "reconstruction", "relation")
        losses = {name: losses[name] for name in order}
        total = torch.stack(list(losses.values())).sum()
        return FoProStep(total, losses, new, clean, soft, score, low_dim_rows, relation_rows)

    # -- parts of a step, in the order of the paper

    def _temperatures(self) -> Tensor:
        return self.density if self.use_density else self.density.new_full((1,), self.temperature)

    def _cosine(self, z: Float[Tensor, "N D"]) -> Float[Tensor, "N K"]:
        """u; the prototypes carry no gradient and are not the buffer, which polishing changes."""
        with no_autocast(z):
            return z @ self.prototypes.to(z.dtype).clone().mT

    def _mixed(self, logits: Float[Tensor, "N K"], scaled: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        return self.alpha * full_precision(logits).softmax(1) + (1 - self.alpha) * scaled.softmax(1)

    def _reconstruction(self, features: Tensor, z: Tensor, use_prototypes: bool) -> Float[Tensor, ""]:
        """With prototypes only the reconstructor learns, before them the projector too."""
        known = features.detach()
        code = z.detach() if use_prototypes else self.embed(known)
        rebuilt = self.reconstructor(code.to(self.classifier.weight.dtype))
        return F.mse_loss(full_precision(rebuilt), known) if len(known) else rebuilt.sum()

    @torch.no_grad()
    def _keys(self, images: Tensor, augmented: Tensor, update_momentum: bool) -> tuple[Tensor, Tensor]:
        if update_momentum:
            for slow, fast in zip(self.momentum_encoder.parameters(), self.encoder.parameters()):
                slow.lerp_(fast, 1 - self.encoder_momentum)
        return self.embed(self.momentum_encoder(images)), self.embed(self.momentum_encoder(augmented))

    def _cleaned(
        self, labels: Tensor, fewshot: Tensor, soft: Tensor, score: Tensor, z: Tensor, cleaning: Cleaning
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Labels after correction, clean rows, corrected rows."""
        if cleaning == "none":
            return labels.clone(), torch.ones_like(fewshot), torch.zeros_like(fewshot)
        likely = score > 1 / self.num_classes
        if cleaning == "confidence":
            best, argmax = soft.max(1)
            corrected = (best > self.threshold) & ~fewshot
            return torch.where(corrected, argmax, labels), likely | corrected | fewshot, corrected
        with no_autocast(z):
            related = self.relation(z, self.prototypes).sigmoid()
        related_enough = related.gather(1, labels[:, None]).squeeze(1) > self.threshold
        best, argmax = (related if cleaning == "relation" else soft).max(1)
        corrected = (best > self.threshold) & ~fewshot & ~related_enough
        clean = related_enough | corrected | fewshot
        new = torch.where(corrected, argmax, labels)
        return new, clean | likely if cleaning == "fusion" else clean, corrected

    def _class_loss(
        self, logits: Tensor, labels: Tensor, clean: Tensor, soft: Tensor, score: Tensor, use_prototypes: bool
    ) -> Float[Tensor, ""]:
        hard = F.cross_entropy(logits, labels, reduction="none")
        if not (self.soft_labels and use_prototypes):
            return _mean(hard, clean)
        return _mean(score * hard - (1 - score) * (soft * logits.log_softmax(1)).sum(1), clean)

    def _low_dim_rows(
        self,
        labels: Tensor,
        fewshot: Tensor,
        score: Tensor,
        cosine: Tensor,
        clean: Tensor,
        use_prototypes: bool,
        cleaning: Cleaning,
    ) -> Bool[Tensor, "N"]:
        """A: clean rows; before cleaning those near their class; before prototypes those of a high score."""
        if cleaning != "none":
            return clean
        if not use_prototypes:
            return fewshot | (score > self.threshold)
        with no_autocast(cosine):
            gram = full_precision(self.prototypes) @ full_precision(self.prototypes).mT
        distance = 0.5 * (gram[labels] - cosine.detach()).abs().sum(1)
        return fewshot | (distance <= self.distance_threshold)

    @torch.no_grad()
    def _polish(self, keys: Tensor, labels: Tensor, clean: Tensor) -> None:
        """Prototypes, visits and distances, the same on all ranks."""
        keys, labels, clean = gather_with_grad(keys), gather_with_grad(labels), gather_with_grad(clean)
        new, visits, distance = polish_prototypes(self.prototypes, keys, labels, clean, self.prototype_momentum)
        self.prototypes.copy_(new)
        self.visited.add_(visits)
        self.distance.add_(distance)

    def _low_dim(self, z: Tensor, z_augmented: Tensor, labels: Tensor, rows: Tensor) -> Float[Tensor, ""]:
        both, labels, rows = torch.cat([z, z_augmented]), labels.repeat(2), rows.repeat(2)
        with no_autocast(both):
            cosine = F.linear(both, self.low_dim_classifier.weight.to(both.dtype))
        cosine = cosine - self.margin * F.one_hot(labels, self.num_classes).to(cosine.dtype)
        return _mean(F.cross_entropy(cosine / self.temperature, labels, reduction="none"), rows)

    def _instance(self, z: Tensor, key_augmented: Tensor) -> Float[Tensor, ""]:
        with no_autocast(z):
            same = (z * key_augmented).sum(1, keepdim=True)
            others = z @ self.queue.to(z.dtype).clone()
        logits = torch.cat([same, others], 1) / self.temperature
        return (logits.logsumexp(1) - logits[:, 0]).sum() / max(len(z), 1)

    @torch.no_grad()
    def _push(self, keys: Tensor) -> None:
        """Columns from the pointer on become the keys of all ranks; of more keys than columns the last ones stay."""
        keys, size = gather_with_grad(keys), self.queue.shape[1]
        kept = keys[-size:]
        start = self.queue_ptr + (len(keys) - len(kept))
        places = (start + torch.arange(len(kept), device=keys.device)) % size
        self.queue[:, places] = kept.mT.to(self.queue.dtype)
        self.queue_ptr.copy_((self.queue_ptr + len(keys)) % size)

    def _relation_loss(self, z: Tensor, labels: Tensor) -> Float[Tensor, "N"]:
        with no_autocast(z):
            scores = self.relation(z.detach(), self.prototypes.clone())
        return F.cross_entropy(scores, labels, reduction="none")


def _layers(inputs: int, hidden: int | None, outputs: int) -> nn.Sequential:
    if hidden is None:
        return nn.Sequential(nn.Linear(inputs, outputs))
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def _mean(losses: Float[Tensor, "N"], rows: Bool[Tensor, "N"]) -> Float[Tensor, ""]:
    """This rank's share of the mean over some rows of all ranks; 0 with a graph without any."""
    return joint_mean(torch.where(rows, losses, 0).sum(), rows.sum())
