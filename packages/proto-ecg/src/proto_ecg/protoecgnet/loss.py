"""The training objective of ProtoECGNet (2025, arXiv 2504.08713): weighted binary cross-entropy and prototype terms.

``L = BCE + lam_cluster L_cluster + lam_separation L_separation + lam_diversity L_diversity
+ lam_contrastive L_contrastive + lam_sparsity L_sparsity``. It differs from the authors' code in nothing but names
("reference" masking); "strict" masking leaves masked entries out instead of counting them as 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from proto_core.distributed import joint_mean
from proto_core.losses import (
    MultiLabelClusterLoss,
    MultiLabelSeparationLoss,
    contrastive_of_gram,
    diversity_of_gram,
    prototype_gram,
)
from proto_core.precision import full_precision

__all__ = ["ProtoECGLoss"]


class ProtoECGLoss(nn.Module):
    """Total loss of a branch. Half precision in, float32 inside.

    Args:
        lam_cluster: weight of the cluster term.
        lam_separation: weight of the separation term.
        lam_diversity: weight of the diversity term.
        lam_contrastive: weight of the prototype contrast.
        lam_sparsity: weight of ``mean_n sum_p max(s[n, p], 0)``.
        masking: ``"reference"`` or ``"strict"``, of the cluster and separation terms.
        gather_distributed: divide by the joint batch's counts, so that DDP's mean over ranks is the joint batch's loss
            also when ranks hold batches of different size.

    Raises:
        ValueError: unknown masking; shapes that do not fit.

    Example:
        >>> import torch
        >>> from proto_ecg.protoecgnet.loss import ProtoECGLoss
        >>> loss = ProtoECGLoss(lam_diversity=1.0, lam_contrastive=0.0)
        >>> identity = torch.eye(2)
        >>> batch = (torch.zeros(3, 2), torch.ones(3, 2), torch.zeros(3, 2), identity, identity, identity)
        >>> loss(*batch)
        tensor(0.6931)
        >>> sorted(loss.terms(*batch))
        ['bce', 'cluster', 'contrastive', 'diversity', 'separation', 'sparsity']
    """

    def __init__(
        self,
        lam_cluster: float = 0.004,
        lam_separation: float = 0.0004,
        lam_diversity: float = 250.0,
        lam_contrastive: float = 300.0,
        lam_sparsity: float = 0.0,
        masking: str = "reference",
        *,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.weights = {
            "bce": 1.0,
            "cluster": lam_cluster,
            "separation": lam_separation,
            "diversity": lam_diversity,
            "contrastive": lam_contrastive,
            "sparsity": lam_sparsity,
        }
        self.cluster = MultiLabelClusterLoss(masking=masking, gather_distributed=gather_distributed)
        self.separation = MultiLabelSeparationLoss(masking=masking, gather_distributed=gather_distributed)
        self.gather_distributed = gather_distributed

    def extra_repr(self) -> str:
        """Weights of the terms."""
        return ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items())

    def forward(
        self,
        logits: Float[Tensor, "N C"],
        targets: Shaped[Tensor, "N C"],
        similarities: Float[Tensor, "N P"],
        prototypes: Float[Tensor, "P *features"],
        prototype_class: Shaped[Tensor, "P C"],
        cooccurrence: Float[Tensor, "C C"],
        pos_weight: Float[Tensor, "C"] | None = None,
    ) -> Float[Tensor, ""]:
        """Weighted sum of the terms of a batch."""
        return self.total(
            self.terms(logits, targets, similarities, prototypes, prototype_class, cooccurrence, pos_weight)
        )

    def terms(
        self,
        logits: Float[Tensor, "N C"],
        targets: Shaped[Tensor, "N C"],
        similarities: Float[Tensor, "N P"],
        prototypes: Float[Tensor, "P *features"],
        prototype_class: Shaped[Tensor, "P C"],
        cooccurrence: Float[Tensor, "C C"],
        pos_weight: Float[Tensor, "C"] | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """Unweighted terms of a batch, by name: bce, cluster, separation, diversity, contrastive, sparsity."""
        if logits.shape != targets.shape:
            raise ValueError(
                f"logits, targets: found shapes {tuple(logits.shape)} and {tuple(targets.shape)}, needed [N, C] twice"
            )
        if pos_weight is not None and tuple(pos_weight.shape) != tuple(targets.shape[1:]):
            raise ValueError(f"pos_weight: found shape {tuple(pos_weight.shape)}, needed {tuple(targets.shape[1:])}")
        cluster = self.cluster(similarities, targets, prototype_class)
        separation = self.separation(similarities, targets, prototype_class)
        gram = prototype_gram(prototypes)
        logits = full_precision(logits)
        weight = None if pos_weight is None else pos_weight.to(logits)
        bce = F.binary_cross_entropy_with_logits(logits, targets.to(logits), pos_weight=weight, reduction="sum")
        return {
            "bce": self._mean(bce, logits.numel()),
            "cluster": cluster,
            "separation": separation,
            "diversity": diversity_of_gram(gram),
            "contrastive": contrastive_of_gram(gram, prototype_class, cooccurrence),
            "sparsity": self._mean(full_precision(similarities).clamp_min(0).sum(), len(similarities)),
        }

    def total(self, terms: dict[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
        """Weighted sum of terms; a term of weight 0 takes no part."""
        weighted = [self.weights[name] * term for name, term in terms.items() if self.weights[name] != 0]
        return torch.stack(weighted).sum()

    def _mean(self, total: Tensor, count: int) -> Tensor:
        if self.gather_distributed:
            return joint_mean(total, torch.full((), count, device=total.device))
        return total / max(count, 1)
