"""Projection of prototypes onto real cases: one streaming pass, best value and where.

A prototype is replaced by the most similar training feature among the samples that carry at least one of its classes,
and remembers that sample as its case. Memory is that of one batch and one candidate per prototype, whatever the size
of the training set. Strictly better is needed to replace, so the first sample wins ties, on one process or many; what
differs by the rounding of a matrix product, as two copies of a record do, is a tie.

Source: "push" of ProtoPNet-type networks; ProtoECGNet (arXiv 2504.08713), projection stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from proto_core.prototypes.layers import PrototypeLayer

__all__ = ["CaseSearch", "Projection", "ProjectsPrototypes", "project_layer", "project_prototypes"]


class Projection(NamedTuple):
    """Where each prototype found its case.

    Attributes:
        vectors: ``[P, ...]`` the features found; the old prototype where nothing was eligible.
        sample_index: ``[P]`` index of the training sample, -1 where nothing was eligible.
        position: ``[P]`` flat position inside the sample's feature map, -1 where nothing was eligible.
        similarity: ``[P]`` similarity of the unprojected prototype to its case, ``-inf`` where there is none.
    """

    vectors: Tensor
    sample_index: Tensor
    position: Tensor
    similarity: Tensor


_ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-13}


def _reach(best: Tensor) -> Tensor:
    """The lowest similarity that is as good as ``best``, but for rounding."""
    return best - _ROUNDING[best.dtype] * best.abs().clamp_min(1)


class CaseSearch:
    """Running best match of every prototype while training samples stream by.

    Args:
        prototypes: ``[P, ...]`` the prototypes as they are before projection.
        class_identity: ``[P, C]``.
    """

    def __init__(self, prototypes: Tensor, class_identity: Shaped[Tensor, "P C"]) -> None:
        count, device = len(prototypes), prototypes.device
        if len(class_identity) != count:
            raise ValueError(f"class_identity: found {len(class_identity)} rows for {count} prototypes")
        self.identity = (class_identity != 0).to(torch.float32)
        self.vectors = prototypes.detach().clone()
        self.sample_index = torch.full((count,), -1, dtype=torch.long, device=device)
        self.position = torch.full((count,), -1, dtype=torch.long, device=device)
        dtype = torch.promote_types(prototypes.dtype, torch.float32)
        self.similarity = torch.full((count,), -torch.inf, dtype=dtype, device=device)

    def eligible(self, targets: Shaped[Tensor, "n C"]) -> Bool[Tensor, "n P"]:
        """Which samples carry at least one class of which prototype."""
        if targets.ndim != 2 or targets.shape[1] != self.identity.shape[1]:
            raise ValueError(f"targets: found shape {tuple(targets.shape)}, needed [N, {self.identity.shape[1]}]")
        return (targets != 0).to(torch.float32) @ self.identity.T > 0

    def update(
        self,
        active: Int[Tensor, " A"],
        scores: Float[Tensor, "n A K"],
        eligible: Bool[Tensor, "n A"],
        sample_index: Int[Tensor, " n"],
        take: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """Take in one batch.

        Args:
            active: indices of the prototypes that ``scores`` speaks of.
            scores: similarity of sample n to active prototype a at position k.
            eligible: sample may serve as a case of the prototype.
            sample_index: index of each sample in the training set.
            take: ``(rows [B], positions [B]) -> vectors [B, ...]``, reads features of this batch.
        """
        samples, _, positions = scores.shape
        if samples == 0 or len(active) == 0:
            return
        scores = scores.to(self.similarity.dtype).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        masked = scores.masked_fill(~eligible.unsqueeze(-1), -torch.inf)
        flat = masked.transpose(0, 1).reshape(len(active), samples * positions)
        where = (flat >= _reach(flat.amax(dim=1, keepdim=True))).to(torch.uint8).argmax(dim=1)
        best = flat.gather(1, where.unsqueeze(1)).squeeze(1)
        rows, places = where // positions, where % positions
        index = sample_index.to(self.sample_index.device)[rows]
        known, known_index = self.similarity[active], self.sample_index[active]
        tied = (best >= _reach(known)) & (best > -torch.inf) & (index < known_index)
        better = ((_reach(best) > known) | tied).nonzero().flatten()  # once: each mask would wait for the GPU again
        target = active[better]
        self.similarity[target] = best[better]
        self.sample_index[target] = index[better]
        self.position[target] = places[better]
        self.vectors[target] = take(rows[better], places[better]).to(self.vectors.dtype)

    def synchronize(self) -> None:
        """Merge the candidates of all ranks; afterwards every rank holds the same result."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        keys: list[tuple[Tensor, Tensor, Tensor]] = []
        for rank in range(dist.get_world_size()):
            candidate = (self.similarity.clone(), self.sample_index.clone(), self.position.clone())
            for tensor in candidate:
                dist.broadcast(tensor, src=rank)
            keys.append(candidate)
        similarity = torch.stack([key[0] for key in keys])
        index = torch.stack([key[1] for key in keys])
        top = similarity.max(dim=0).values
        order = torch.where(similarity >= _reach(top), index, torch.iinfo(torch.long).max)
        winner = order.argmin(dim=0)
        everyone = torch.arange(len(winner), device=winner.device)
        mine = (winner == dist.get_rank()).reshape(-1, *[1] * (self.vectors.ndim - 1))
        vectors = torch.where(mine, self.vectors, torch.zeros_like(self.vectors)).contiguous()
        dist.all_reduce(vectors)
        self.vectors = vectors
        self.similarity, self.sample_index = similarity[winner, everyone], index[winner, everyone]
        self.position = torch.stack([key[2] for key in keys])[winner, everyone]

    def result(self) -> Projection:
        """The best cases so far."""
        return Projection(self.vectors, self.sample_index, self.position, self.similarity)


def stream(
    search: CaseSearch, layer: PrototypeLayer, features: Tensor, targets: Tensor, sample_index: Int[Tensor, " n"]
) -> None:
    """Feed one batch of a layer's features to its search; only prototypes with an eligible sample are compared."""
    eligible = search.eligible(targets)
    active = eligible.any(dim=0).nonzero().flatten()
    if len(active):
        scores = layer.match(features, active)
        search.update(active, scores, eligible[:, active], sample_index, lambda r, k: layer.take(features, r, k))


@torch.no_grad()
def project_layer(
    layer: PrototypeLayer, batches: Iterable[tuple[Tensor, Tensor]], *, overwrite: bool = True
) -> Projection:
    """Project one layer from batches of features; every sample is numbered in the order it comes.

    Args:
        layer: the prototypes.
        batches: ``(features [n, ...], targets [n, C])`` of the training set, in evaluation mode.
        overwrite: also write vectors into the layer.

    Returns:
        Cases of all prototypes. Ids and labels of the samples are not known here; see :func:`project_prototypes`.
    """
    search, seen = CaseSearch(layer.prototypes, layer.class_identity), 0
    for features, targets in batches:
        index = torch.arange(seen, seen + len(features), device=features.device)
        stream(search, layer, features, targets, index)
        seen += len(features)
    found = search.result()
    if overwrite:
        layer.prototypes.copy_(found.vectors)
    return found


class ProjectsPrototypes(Protocol):
    """What a module offers so that its prototypes can be projected."""

    def prototype_layers(self) -> dict[str, PrototypeLayer]:
        """The layers to project now, by name."""

    def prototype_features(self, batch: object) -> dict[str, tuple[Tensor, Tensor]]:
        """For each layer: features ``[n, ...]`` and the layer's targets ``[n, C]`` of this batch."""

    def batch_index(self, batch: object) -> Tensor:
        """Index ``[n]`` of the batch's samples in the training set."""


@torch.no_grad()
def project_prototypes(
    module: nn.Module,
    batches: Iterable[object],
    describe: Callable[[int], tuple[str, Sequence[str]]],
    progress: Callable[[], None] | None = None,
    *,
    overwrite: bool = True,
) -> dict[str, Projection]:
    """Project all prototype layers of a module in one pass over the training set, and give them their cases.

    The module is put into evaluation mode for the pass and back afterwards. Under torch.distributed each rank passes
    its own share of the batches; all ranks end with the same prototypes and cases.

    Args:
        module: offers :class:`ProjectsPrototypes`.
        batches: batches of the training set, un-augmented, already on the module's device.
        describe: ``sample index -> (sample id, label names)``; asked once per case, not per sample.
        progress: called after each batch.
        overwrite: prototypes become their cases; otherwise they keep their vectors and only remember the cases.

    Returns:
        The cases by layer name.
    """
    source: ProjectsPrototypes = module  # type: ignore[assignment]
    layers = source.prototype_layers()
    searches = {name: CaseSearch(layer.prototypes, layer.class_identity) for name, layer in layers.items()}
    modes = {name: child.training for name, child in module.named_modules()}
    module.eval()
    try:
        for batch in batches:
            index = source.batch_index(batch)
            for name, (features, targets) in source.prototype_features(batch).items():
                stream(searches[name], layers[name], features, targets, index)
            if progress is not None:
                progress()
    finally:
        for name, child in module.named_modules():
            child.training = modes[name]
    results = {}
    for name, search in searches.items():
        search.synchronize()
        results[name] = search.result()
        found = results[name]
        vectors = found.vectors if overwrite else layers[name].prototypes
        layers[name].assign_cases(vectors, found.sample_index, found.position, describe)
    return results
