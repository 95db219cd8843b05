"""Sharpness-aware training for free: SAF and MESA (NeurIPS 2022, arXiv 2205.14083).

Sharp minima show as sudden drops of the loss along training. Both methods hold the output for a sample to what it was:
SAF some epochs ago (kept in a buffer, hardly any cost), MESA according to a moving average of the network (a forward
pass more). SAF is no optimiser but an auxiliary loss, and it needs to know WHICH samples are in the batch: see
:class:`IndexedDataset`.

Unlike the authors' code: any lag, memory for the real data set only, and an epoch per stored output, so that stale or
never stored rows are left out instead of being taken for uniform predictions. Under DDP give each sample to the same
rank in every epoch: what another rank stored is not seen, and such rows are left out.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from proto_core.checks import check_positive, readable
from proto_core.precision import full_precision
from proto_core.systems import Paper

__all__ = ["MESA", "IndexedDataset", "TrajectoryLoss", "trajectory_kl"]

NEVER = -1


def trajectory_kl(
    logits: Float[Tensor, "N C"], past_logits: Float[Tensor, "N C"], temperature: float = 5.0
) -> Float[Tensor, ""]:
    """``T^2 mean_i KL(softmax(past / T) | softmax(now / T))``; the past gets no gradient.

    Args:
        logits: now.
        past_logits: earlier, of the same samples.
        temperature: T.

    Raises:
        ValueError: temperature not positive, shapes that differ.

    Example:
        >>> import torch
        >>> from proto_core.optim import trajectory_kl
        >>> trajectory_kl(torch.zeros(2, 3), torch.zeros(2, 3))
        tensor(0.)
    """
    check_positive(temperature=temperature)
    if logits.ndim != 2 or logits.shape != past_logits.shape:
        shapes = f"{tuple(logits.shape)} and {tuple(past_logits.shape)}"
        raise ValueError(f"logits, past_logits: found shapes {shapes}, needed one [N, C]")
    return _kl(logits, past_logits, temperature).sum() / max(len(logits), 1)


def _kl(logits: Tensor, past: Tensor, temperature: float) -> Tensor:
    """``T^2 KL`` of each sample."""
    log_p = (full_precision(logits) / temperature).log_softmax(dim=1)
    log_q = (past.detach().to(log_p) / temperature).log_softmax(dim=1)
    q = log_q.exp()
    return temperature**2 * torch.where(q > 0, q * (log_q - log_p), 0).sum(dim=1)


class TrajectoryLoss(nn.Module):
    """SAF: ``lam T^2 KL`` between a sample's output ``lag`` epochs ago and now.

    Call it in every training step of every epoch, also before it is active: it stores the outputs. Do not combine it
    with mixup or cutmix, where an index is no longer one sample.

    Args:
        num_samples: size of the data set.
        num_classes: C.
        lam: weight.
        temperature: T.
        lag: epochs to look back.
        start_epoch: the first active epoch is the one after.
        end_epoch: from here on it is inactive; ``None``: never.
        storage_dtype: of the stored outputs, ``num_samples x (lag + 1) x C`` numbers; float16 halves them.

    Raises:
        ValueError: a negative lam, temperature not positive, a lag below 1, ``start_epoch < lag - 1`` (nothing would
            have been stored), sizes below 1; shapes that do not fit, an index that there is not.

    Example:
        >>> import torch
        >>> from proto_core.optim import TrajectoryLoss
        >>> saf = TrajectoryLoss(4, 3, lag=1, start_epoch=0)
        >>> rows = torch.arange(4)
        >>> _ = saf(torch.zeros(4, 3), rows, epoch=0)
        >>> saf(torch.eye(4)[:, :3], rows, epoch=1) > 0
        tensor(True)
    """

    paper: ClassVar[Paper] = Paper(
        title="Sharpness-Aware Training for Free",
        year=2022,
        arxiv="2205.14083",
        code="AngusDujw/SAF@6e85600",
        evidence="code",
        summary="flat minima for free: outputs are held to what they were some epochs ago, or to a moving average",
        claim="with noisy labels both generalise better than SGD, at hardly any cost",
    )
    past: Tensor
    stored_epoch: Tensor

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        lam: float = 0.3,
        temperature: float = 5.0,
        lag: int = 3,
        start_epoch: int = 5,
        end_epoch: int | None = None,
        storage_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_positive(num_samples=num_samples, num_classes=num_classes, temperature=temperature)
        _check_lam(lam)
        if lag < 1:
            raise ValueError(f"lag: found {lag}, needed at least 1")
        if start_epoch < lag - 1:
            raise ValueError(f"start_epoch: found {start_epoch}, needed at least lag - 1 = {lag - 1}")
        self.lam = lam
        self.temperature = temperature
        self.lag = lag
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.register_buffer("past", torch.zeros(lag + 1, num_samples, num_classes, dtype=storage_dtype))
        self.register_buffer("stored_epoch", torch.full((lag + 1, num_samples), NEVER, dtype=torch.long))

    def extra_repr(self) -> str:
        """Sizes and settings."""
        _, samples, classes = self.past.shape
        return (
            f"{samples}, {classes}, lam={self.lam}, temperature={self.temperature}, lag={self.lag}, "
            f"start_epoch={self.start_epoch}, end_epoch={self.end_epoch}"
        )

    def is_active(self, epoch: int) -> bool:
        """Whether the term counts: strictly after ``start_epoch`` and before ``end_epoch``."""
        return self.start_epoch < epoch and (self.end_epoch is None or epoch < self.end_epoch)

    def forward(self, logits: Float[Tensor, "N C"], indices: Int[Tensor, "N"], epoch: int) -> Float[Tensor, ""]:
        """Store this epoch's outputs; give the term, 0 where it is inactive or nothing of that epoch is stored."""
        _, samples, classes = self.past.shape
        if logits.ndim != 2 or logits.shape[1] != classes or indices.shape != logits.shape[:1]:
            shapes = f"{tuple(logits.shape)} and {tuple(indices.shape)}"
            raise ValueError(f"logits, indices: found shapes {shapes}, needed [N, {classes}] and [N]")
        if readable(indices) and len(indices) and not bool(((indices >= 0) & (indices < samples)).all()):
            wrong = indices[(indices < 0) | (indices >= samples)][0]
            raise ValueError(f"indices: found {int(wrong)}, needed 0 to {samples - 1}")
        self._store(logits.detach(), indices, epoch)
        if not self.is_active(epoch):
            return full_precision(logits).sum() * 0
        slot = (epoch - self.lag) % (self.lag + 1)
        past = self.past[slot].index_select(0, indices)
        valid = self.stored_epoch[slot].index_select(0, indices) == epoch - self.lag
        past = torch.where(valid.unsqueeze(1), past, 0)  # what is unknown may be NaN, and would reach the gradient
        terms = torch.where(valid, _kl(logits, past, self.temperature), 0)
        return self.lam * terms.sum() / valid.sum().clamp_min(1)

    @torch.no_grad()
    def _store(self, logits: Tensor, indices: Tensor, epoch: int) -> None:
        slot = epoch % (self.lag + 1)
        stored = logits.to(self.past.dtype)  # which may be too narrow for a large output
        known = stored.isfinite().all(dim=1)
        # the last of equal indices wins: what is stored does not depend on the order of writes
        place = torch.arange(len(indices), device=indices.device)
        last = torch.full((self.past.shape[1],), NEVER, device=indices.device, dtype=torch.long)
        last = last.scatter_reduce_(0, indices, place, "amax").index_select(0, indices)
        self.past[slot].index_copy_(0, indices, stored.index_select(0, last))
        epochs = torch.where(known.index_select(0, last), epoch, NEVER)
        self.stored_epoch[slot].index_copy_(0, indices, epochs)


class MESA(nn.Module):
    """``lam T^2 KL`` between the outputs of a moving average of the network and its own.

    Call :meth:`update` after every optimiser step, from the first one on. Predict with the network, not with the
    average.

    Args:
        model: network to follow; the teacher starts as a copy of it.
        lam: weight.
        temperature: T.
        decay: of the average.
        start_epoch: the first active epoch is the one after.
        end_epoch: from here on it is inactive; ``None``: never.

    Attributes:
        teacher: the average: parameters and buffers, in evaluation mode, without gradients.

    Raises:
        ValueError: a negative lam, temperature not positive, decay outside [0, 1).

    Example:
        >>> import torch
        >>> from proto_core.optim import MESA
        >>> model, x = torch.nn.Linear(2, 3), torch.ones(1, 2)
        >>> mesa = MESA(model, start_epoch=0)
        >>> mesa(x, model(x), epoch=1).item()  # still its own copy
        0.0
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lam: float = 0.8,
        temperature: float = 5.0,
        decay: float = 0.9998,
        start_epoch: int = 5,
        end_epoch: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        _check_lam(lam)
        if not 0 <= decay < 1:
            raise ValueError(f"decay: found {decay}, needed a number in [0, 1)")
        self.lam = lam
        self.temperature = temperature
        self.decay = decay
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.teacher = deepcopy(model).requires_grad_(False).eval()

    def extra_repr(self) -> str:
        """Settings."""
        return (
            f"lam={self.lam}, temperature={self.temperature}, decay={self.decay}, start_epoch={self.start_epoch}, "
            f"end_epoch={self.end_epoch}"
        )

    def train(self, mode: bool = True) -> MESA:
        """The teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def is_active(self, epoch: int) -> bool:
        """Whether the term counts: strictly after ``start_epoch`` and before ``end_epoch``."""
        return self.start_epoch < epoch and (self.end_epoch is None or epoch < self.end_epoch)

    def forward(self, inputs: Any, logits: Float[Tensor, "N C"], epoch: int) -> Float[Tensor, ""]:
        """The term for these inputs and the network's own outputs for them; 0 where it is inactive."""
        if not self.is_active(epoch):
            return full_precision(logits).sum() * 0
        with torch.no_grad():
            past = self.teacher(inputs)
        return self.lam * trajectory_kl(logits, past, self.temperature)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """``teacher <- decay teacher + (1 - decay) model`` for floating entries; others are copied.

        Raises:
            ValueError: a model with other entries.
        """
        own, other = self.teacher.state_dict(), model.state_dict()
        if own.keys() != other.keys():
            odd = sorted(own.keys() ^ other.keys())[0]
            raise ValueError(f"model: found other entries than the teacher's, such as {odd!r}")
        for name, mine in own.items():
            if not isinstance(mine, Tensor):
                continue
            if mine.is_floating_point():
                mine.lerp_(other[name].to(mine), 1 - self.decay)
            else:
                mine.copy_(other[name])


class IndexedDataset(Dataset):
    """``(index, *item)`` of a data set whose items are tuples; ``(index, item)`` otherwise.

    Args:
        dataset: with ``__len__`` and ``__getitem__``.

    Example:
        >>> import torch
        >>> from proto_core.optim import IndexedDataset
        >>> data = torch.utils.data.TensorDataset(torch.ones(3, 2), torch.zeros(3))
        >>> IndexedDataset(data)[2][0]
        2
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        item = self.dataset[index]
        return (index, *item) if isinstance(item, tuple | list) else (index, item)


def _check_lam(lam: float) -> None:
    if not lam >= 0:
        raise ValueError(f"lam: found {lam}, needed at least 0")
