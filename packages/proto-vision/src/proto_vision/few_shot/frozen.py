"""Few-shot accuracy of any network's frozen features: in each episode a small classifier learns from a few supports.

Source: "Rethinking Few-Shot Image Classification: a Good Embedding Is All You Need?" (RFS), ECCV 2020, arXiv
2003.11539: logistic regression on normalised features. Difference from the authors' code: supports are taken as they
are, where theirs adds augmented copies; the interval is 1.96 standard errors, where theirs asks the t distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn import functional as F

from proto_core.checks import check_embeddings, check_option, check_positive
from proto_core.data import EpisodeSampler
from proto_vision.few_shot.network import confidence_interval

__all__ = ["FewShotAccuracy", "episode_accuracy"]

Progress = Callable[[Iterable[Any], str], Iterable[Any]]

_TOGETHER = 64
"""Episodes whose features are in memory at once."""


class FewShotAccuracy(NamedTuple):
    """Accuracy on the queries of episodes.

    Attributes:
        mean: over the episodes.
        half_width: of its 95 % confidence interval, ``1.96 std / sqrt(episodes)``.
        accuracies: ``[episodes]`` float64.
    """

    mean: float
    half_width: float
    accuracies: Float64[Tensor, " episodes"]


def episode_accuracy(
    features: Float[Tensor, "N D"],
    labels: Int[Tensor, "N"],
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    episodes: int = 600,
    classifier: Literal["logistic", "nearest_mean"] = "logistic",
    normalize: bool = True,
    C: float = 1.0,
    seed: int = 0,
    progress: Progress = lambda steps, text: steps,
) -> FewShotAccuracy:
    """Accuracy of a classifier that learns ``ways`` classes from ``shots`` samples of each, mean over many episodes.

    An episode draws its classes and, of each, supports and queries, none of them twice. The same seed draws the same
    episodes, whatever the features are: two networks are compared on the same ones.

    Args:
        features: of images of classes that the network was not trained on.
        labels: their classes, any integers.
        ways: classes of an episode.
        shots: supports of a class.
        queries: of a class, which the accuracy is measured on.
        episodes: how many.
        classifier: ``"logistic"``: multinomial logistic regression (scikit-learn's); ``"nearest_mean"``: the class
            whose supports' mean is nearest (Euclidean).
        normalize: whether each sample's features are first brought to length 1.
        C: inverse strength of logistic regression's penalty.
        seed: of the draws.
        progress: called with groups of episodes and what is done, gives the groups back one by one.

    Raises:
        ValueError: shapes or types that do not fit, NaN, a number below 1 (``ways``: below 2), an unknown classifier,
            fewer classes than ``ways``, a class with fewer samples than ``shots + queries``.

    Source:
        arXiv 2003.11539, section 3.

    Example:
        >>> import torch
        >>> from proto_vision.few_shot import episode_accuracy
        >>> labels = torch.arange(140) % 7
        >>> features = torch.randn(140, 16, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(7, 16)[labels]
        >>> found = [episode_accuracy(features, labels, shots=shots, episodes=20) for shots in (1, 5)]
        >>> [round(accuracy.mean, 1) for accuracy in found], found[0].accuracies.shape
        ([0.7, 0.9], torch.Size([20]))
    """
    check_embeddings(features, labels, "features")
    check_option("classifier", classifier, "logistic", "nearest_mean")
    check_positive(shots=shots, queries=queries, episodes=episodes, C=C)
    if ways < 2:
        raise ValueError(f"ways: found {ways}, needed 2 or more")
    if not bool(features.isfinite().all()):
        row = int((~features.isfinite().all(dim=1)).nonzero()[0])
        raise ValueError(f"features: found NaN or infinite values, first in row {row}, needed numbers")
    drawn = torch.stack(list(EpisodeSampler(labels, ways, shots, queries, episodes, seed))).to(features.device)
    decide = _nearest_mean if classifier == "nearest_mean" else _logistic(C)
    found = []
    for rows in progress(drawn.split(_TOGETHER), f"{ways}-way {shots}-shot"):
        some = features[rows].double()
        some = F.normalize(some, dim=-1) if normalize else some
        supports, asked = some.tensor_split([ways * shots], dim=1)
        right = torch.arange(ways, device=features.device).repeat_interleave(queries)
        found.append((decide(supports.unflatten(1, (ways, shots)), asked) == right).double().mean(1))
    accuracies = torch.cat(found).cpu()
    return FewShotAccuracy(*confidence_interval(accuracies), accuracies)


def _nearest_mean(
    supports: Float64[Tensor, "episodes W S D"], queries: Float64[Tensor, "episodes Q D"]
) -> Int[Tensor, "episodes Q"]:
    """Class of every query, from 0 on."""
    return torch.cdist(queries, supports.mean(2)).argmin(-1)


def _logistic(C: float) -> Callable[[Tensor, Tensor], Tensor]:
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    def decide(
        supports: Float64[Tensor, "episodes W S D"], queries: Float64[Tensor, "episodes Q D"]
    ) -> Int[Tensor, "episodes Q"]:
        """Class of every query, from 0 on; one regression for each episode, in one thread as they are small."""
        ways, shots = supports.shape[1:3]
        labels = torch.arange(ways).repeat_interleave(shots).numpy()
        with threadpool_limits(1):
            answers = [
                LogisticRegression(C=C, max_iter=1000).fit(x, labels).predict(asked)
                for x, asked in zip(supports.flatten(1, 2).cpu().numpy(), queries.cpu().numpy())
            ]
        return torch.from_numpy(np.stack(answers)).to(queries.device)

    return decide
