"""A codebook that follows what it encodes, and in which no code stays unused.

The vector quantiser of T2M-GPT as TokenHMR (CVPR 2024, arXiv 2404.16752) uses it: codes are running means of what is
assigned to them, an unused code becomes a vector of the batch. Unlike in the authors' code the running sums and the
mark of initialisation are buffers, so that training goes on where a checkpoint ended, and counts and sums are those of
the joint batch of all ranks, so that codebooks stay equal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from proto_core.checks import CACHED, check_positive, readable
from proto_core.distances import sq_euclidean
from proto_core.distributed import all_reduce_sum, is_distributed
from proto_core.precision import full_precision, no_autocast

__all__ = ["Quantized", "VectorQuantizerEMAReset"]


class Quantized(NamedTuple):
    """What :class:`VectorQuantizerEMAReset` answers.

    Attributes:
        quantized: the codes, of the input's shape and type; the gradient goes straight through to the input.
        commit_loss: mean square of input minus code, gradient to the input alone.
        perplexity: ``exp`` of the entropy of the codes in use, 1 to K.
        indices: code of each vector, ``[N]`` or ``[B, T]``.
    """

    quantized: Tensor
    commit_loss: Tensor
    perplexity: Tensor
    indices: Tensor


class VectorQuantizerEMAReset(nn.Module):
    """Nearest code of K by squared Euclidean distance, codes moved by an exponential average in training.

    In training, after the codes have been looked up: with the batch's counts n and sums s, ``code_sum <- m code_sum +
    (1 - m) s``, ``code_count <- m code_count + (1 - m) n``; a code is ``code_sum / code_count`` where ``code_count`` is
    at least 1, else the row of the batch of the same number. The first batch gives the first codes. A batch of fewer
    than K rows is repeated with noise of standard deviation ``0.01 / sqrt(D)``.

    Args:
        num_codes: K.
        code_dim: D.
        decay: m.

    Attributes:
        codebook: buffer ``[K, D]``; no gradient.
        code_sum: buffer ``[K, D]``.
        code_count: buffer ``[K]``.
        initialized: buffer, whether a first batch has come.

    Raises:
        ValueError: sizes below 1, a decay outside [0, 1]; input of another width, empty input; evaluation before the
            first batch; indices outside 0..K-1.

    Shapes:
        ``[N, D]`` or ``[B, D, T]`` -> :class:`Quantized`.

    Source:
        TokenHMR (arXiv 2404.16752), tokenizer; T2M-GPT (arXiv 2301.06052).

    Example:
        >>> import torch
        >>> from proto_core.prototypes import VectorQuantizerEMAReset
        >>> quantizer = VectorQuantizerEMAReset(num_codes=4, code_dim=8)
        >>> found = quantizer(torch.randn(32, 8))
        >>> found.quantized.shape, found.indices.shape
        (torch.Size([32, 8]), torch.Size([32]))
    """

    codebook: Tensor
    code_sum: Tensor
    code_count: Tensor
    initialized: Tensor

    def __init__(self, num_codes: int, code_dim: int, decay: float = 0.99) -> None:
        super().__init__()
        check_positive(num_codes=num_codes, code_dim=code_dim)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: found {decay}, needed 0 to 1")
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.decay = decay
        self.register_buffer("codebook", torch.zeros(num_codes, code_dim))
        self.register_buffer("code_sum", torch.zeros(num_codes, code_dim))
        self.register_buffer("code_count", torch.ones(num_codes))
        self.register_buffer("initialized", torch.tensor(False))

    def reset_parameters(self) -> None:
        """Forget the codes: the next batch gives new ones."""
        self.codebook.zero_()
        self.code_sum.zero_()
        self.code_count.fill_(1)
        self.initialized.fill_(False)

    def extra_repr(self) -> str:
        """Settings."""
        return f"num_codes={self.num_codes}, code_dim={self.code_dim}, decay={self.decay}"

    def forward(self, x: Float[Tensor, "N D *T"], generator: torch.Generator | None = None) -> Quantized:
        """Codes of a batch; in training the codebook moves.

        Args:
            x: ``[N, D]`` or ``[B, D, T]``.
            generator: of the noise where a batch has fewer rows than there are codes.
        """
        if x.ndim not in (2, 3) or x.shape[1] != self.code_dim or x.numel() == 0:
            width = self.code_dim
            raise ValueError(f"x: found shape {tuple(x.shape)}, needed [N, {width}] or [B, {width}, T], not empty")
        rows = full_precision(x.movedim(1, -1).reshape(-1, self.code_dim))
        known = rows.detach().to(self.codebook.dtype)
        if self.training:
            candidates = self._candidates(known, generator)
            self._start(candidates)
        elif readable(self.initialized) and not bool(self.initialized):
            raise ValueError("VectorQuantizerEMAReset: found no codes yet, needed a batch in training first")
        indices = self._nearest(known)
        codes = self.codebook[indices].to(rows)
        commit = (rows - codes).square().mean()
        counts = torch.zeros_like(self.code_count).index_add_(0, indices, torch.ones_like(known[:, 0]))
        if self.training:
            counts = all_reduce_sum(counts)
            self._move(known, indices, counts, candidates)
        share = counts / counts.sum()
        perplexity = (-(share * (share + 1e-7).log()).sum()).exp()
        shape = (x.shape[0], *x.shape[2:])
        quantized = codes.reshape(*shape, self.code_dim).movedim(-1, 1).to(x.dtype)
        return Quantized(x + (quantized - x).detach(), commit, perplexity, indices.reshape(shape))

    def decode(self, indices: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        """The codes of indices."""
        if readable(indices) and indices.numel() and not bool(((indices >= 0) & (indices < self.num_codes)).all()):
            low, high = int(indices.min()), int(indices.max())
            raise ValueError(f"indices: found values from {low} to {high}, needed 0 to {self.num_codes - 1}")
        return self.codebook[indices]

    def decode_soft(self, probs: Float[Tensor, "*shape K"]) -> Float[Tensor, "*shape D"]:
        """Mixture of the codes, ``probs @ codebook``, with gradient to the probabilities."""
        if probs.ndim == 0 or probs.shape[-1] != self.num_codes:
            raise ValueError(f"probs: found shape {tuple(probs.shape)}, needed [..., {self.num_codes}]")
        probs = full_precision(probs)
        with no_autocast(probs):
            return probs @ self.codebook.to(probs)

    @torch.no_grad()
    def _candidates(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """K rows of the batch, the first rank's on every rank."""
        missing = self.num_codes - len(rows)
        if missing > 0:
            repeats = -(-self.num_codes // len(rows))
            noise = torch.empty(repeats * len(rows), rows.shape[1], dtype=rows.dtype, device=rows.device)
            noise.normal_(generator=generator)
            rows = rows.repeat(repeats, 1) + noise * (0.01 / rows.shape[1] ** 0.5)
        rows = rows[: self.num_codes].clone()
        if is_distributed():
            dist.broadcast(rows, src=0)
        return rows

    @torch.no_grad()
    def _start(self, candidates: Tensor) -> None:
        self.codebook.copy_(torch.where(self.initialized, self.codebook, candidates))
        self.code_sum.copy_(torch.where(self.initialized, self.code_sum, candidates))
        self.code_count.copy_(torch.where(self.initialized, self.code_count, 1))
        self.initialized.fill_(True)

    @torch.no_grad()
    def _nearest(self, rows: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return sq_euclidean(rows, self.codebook).argmin(dim=1)
        at_once = max(1, CACHED.get(rows.device.type, CACHED["cuda"]) // self.num_codes)
        return torch.cat([sq_euclidean(part, self.codebook).argmin(dim=1) for part in rows.split(at_once)])

    @torch.no_grad()
    def _move(self, rows: Tensor, indices: Tensor, counts: Tensor, candidates: Tensor) -> None:
        sums = all_reduce_sum(torch.zeros_like(self.code_sum).index_add_(0, indices, rows))
        self.code_sum.lerp_(sums, 1 - self.decay)
        self.code_count.lerp_(counts, 1 - self.decay)
        used = (self.code_count >= 1).unsqueeze(1)
        means = self.code_sum / self.code_count.clamp_min(1).unsqueeze(1)
        self.codebook.copy_(torch.where(used, means, candidates))
