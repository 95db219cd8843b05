"""Several prototypes per class detect digits that were never seen better than one per class.

It does NOT hold at this size. The loss equals the authors' to 1e-7 in values, gradients and prototypes, and the card's
figures of five seeds (FPR95 0.299 against 0.374) are within their noise: seeds 5 to 24 gave FPR95 0.338 with six
prototypes and 0.310 with one, difference 0.029 with a standard error of 0.025, and AUROC 0.933 and 0.945. Three classes
of two digits each do not need mixtures; the paper's gain is on CIFAR-100.
"""

from statistics import mean

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

from proto_core.losses import PALMLoss
from proto_core.metrics import auroc, fpr_at_tpr
from proto_core.ood import MahalanobisOOD

SEEDS = range(5)


def detection(seed: int, per_class: int, top_k: int) -> tuple[float, float]:
    """AUROC and FPR95 of known digits 0 to 5 (as three classes of two) against unknown 6 to 9."""
    digits = load_digits()
    x, digit = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    known, unknown = x[digit < 6], x[digit >= 6]
    names = digit[digit < 6]
    train, test = train_test_split(range(len(known)), test_size=0.3, stratify=names, random_state=seed)
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    loss = PALMLoss(3, 32, per_class, momentum=0.99, top_k=top_k)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=1e-3)
    rows = torch.tensor(train)
    for _ in range(40):
        for batch in rows[torch.randperm(len(rows))].split(128):
            noisy = known[batch] + 0.1 * torch.randn(len(batch), 64)
            optimizer.zero_grad()
            loss(F.normalize(head(encoder(noisy))), names[batch] // 2).backward()
            optimizer.step()
    with torch.no_grad():
        detector = MahalanobisOOD().fit(encoder(known[rows]))
        inside, outside = detector.score(encoder(known[test])), detector.score(encoder(unknown))
    return auroc(inside, outside), fpr_at_tpr(inside, outside)


@pytest.mark.claim
def test_mixture_detects_better_than_one_prototype(claim_record):
    mixture, single = ([detection(seed, *size) for seed in SEEDS] for size in ((6, 5), (1, 1)))
    verdicts = []
    for which, metric, margin in [
        (1, "FPR95 of unknown digits, six prototypes per class against one", "lower"),
        (0, "AUROC of unknown digits, six prototypes per class against one", "not lower by 0.005"),
    ]:
        method, baseline = [run[which] for run in mixture], [run[which] for run in single]
        better = mean(method) < mean(baseline) if which else mean(method) > mean(baseline) - 0.005
        verdicts.append((metric, better))
        claim_record("palm", metric=metric, method=method, baseline=baseline, margin=margin, holds=better)
    assert all(holds for _, holds in verdicts), (mixture, single)
