"""Which findings a generated ECG has: codes of PTB-XL, how often each occurs, and which occur together or never.

A record has one rhythm. The other findings are drawn one after the other; each has a probability of its own, whose odds
those drawn before it raise (strain with hypertrophy, ectopy with fibrillation) or set to zero (nobody reads an ST
segment beside a left bundle branch block). NORM is what is left: sinus rhythm and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from proto_ecg.data.labels import PTBXL_ALL

__all__ = ["DEFAULT_LABELS", "SUPPORTED_LABELS", "check_labels", "draw_findings", "probabilities"]

_RHYTHMS: dict[str, float] = {"SBRAD": 0.12, "STACH": 0.12, "AFIB": 0.13}  # SR has the rest

# In the order of drawing.
_FINDINGS: dict[str, float] = {
    "LVH": 0.08,
    "CLBBB": 0.07,
    "CRBBB": 0.08,
    "QWAVE": 0.08,
    "LVOLT": 0.09,
    "EL": 0.09,
    "DIG": 0.07,
    "STE_": 0.09,
    "STD_": 0.10,
    "INVT": 0.10,
    "PVC": 0.09,
    "1AVB": 0.07,
}

# finding -> {what is already there: factor on the odds}
_ODDS: dict[str, dict[str, float]] = {
    "CLBBB": {"LVH": 2.0, "CRBBB": 0.0},
    "CRBBB": {"CLBBB": 0.0},
    "QWAVE": {"CLBBB": 0.0, "LVH": 0.5},
    "LVOLT": {"LVH": 0.0, "CLBBB": 0.0, "CRBBB": 0.0},
    "EL": {"CLBBB": 0.0, "CRBBB": 0.0},
    "DIG": {"AFIB": 5.0, "EL": 0.0, "CLBBB": 0.0, "CRBBB": 0.0},
    "STE_": {"QWAVE": 6.0, "CLBBB": 0.0, "EL": 0.0, "DIG": 0.0, "LVH": 0.0},
    "STD_": {"LVH": 10.0, "AFIB": 2.0, "CLBBB": 0.0, "EL": 0.0, "DIG": 0.0, "STE_": 0.0},
    "INVT": {"LVH": 6.0, "STD_": 3.0, "QWAVE": 6.0, "CLBBB": 0.0, "CRBBB": 0.0, "EL": 0.0, "DIG": 0.0, "STE_": 0.0},
    "PVC": {"AFIB": 2.5, "DIG": 2.5, "LVH": 1.5},
    "1AVB": {"SBRAD": 2.5, "DIG": 3.0, "AFIB": 0.0, "STACH": 0.0},
}

SUPPORTED_LABELS: tuple[str, ...] = tuple(
    code for code in PTBXL_ALL if code in _RHYTHMS or code in _FINDINGS or code in ("SR", "NORM")
)
"""Every code that the generator knows, in the order of PTB-XL's ``scp_statements.csv``."""

DEFAULT_LABELS: tuple[str, ...] = tuple(code for code in SUPPORTED_LABELS if code not in ("LVH", "1AVB"))
"""The labels of the demonstration, 15 of :data:`SUPPORTED_LABELS`."""


def draw_findings(
    rng: np.random.Generator,
    num_records: int,
    labels: Sequence[str],
    prevalence: Mapping[str, float] | None = None,
) -> dict[str, np.ndarray]:
    """Draw what each record has; codes that are not in ``labels`` do not occur.

    Args:
        rng: source of chance.
        num_records: N.
        labels: the codes that may occur. Sinus rhythm occurs in any case.
        prevalence: code -> probability of its own draw, instead of the built-in one.

    Returns:
        Code -> bool [N], for every code in :data:`SUPPORTED_LABELS`.

    Raises:
        ValueError: see :func:`check_labels` and :func:`probabilities`.
    """
    check_labels(labels)
    chance = probabilities(labels, prevalence)
    found = {code: np.zeros(num_records, dtype=bool) for code in SUPPORTED_LABELS}
    draw = rng.random(num_records)
    start = 0.0
    for code in _RHYTHMS:
        found[code] = (draw >= start) & (draw < start + chance[code])
        start += chance[code]
    found["SR"] = ~np.logical_or.reduce([found[code] for code in _RHYTHMS])
    for code in _FINDINGS:
        factor = np.ones(num_records)
        for other, ratio in _ODDS.get(code, {}).items():
            factor = np.where(found[other], factor * ratio, factor)
        p = chance[code]
        raised = factor * p / (factor * p + 1 - p) if p < 1 else np.where(factor > 0, 1.0, 0.0)
        found[code] = rng.random(num_records) < raised
    found["NORM"] = found["SR"] & ~np.logical_or.reduce([found[code] for code in _FINDINGS])
    return found


def check_labels(labels: Sequence[str]) -> None:
    """Refuse label sets that the generator cannot make.

    Raises:
        ValueError: none, one twice, or one that the generator does not know.
    """
    if not labels:
        raise ValueError("labels: found none, needed at least one label")
    for code in labels:
        if code not in SUPPORTED_LABELS:
            raise ValueError(f"labels: found {code!r}, needed codes of {list(SUPPORTED_LABELS)}")
    if len(set(labels)) != len(labels):
        raise ValueError(f"labels: found {list(labels)}, needed each label once")


def probabilities(labels: Sequence[str], prevalence: Mapping[str, float] | None) -> dict[str, float]:
    """The probability of each rhythm but SR and of each finding's own draw; 0 for codes that are not in ``labels``.

    Rhythms that ``prevalence`` does not name give way to those that it names.

    Raises:
        ValueError: an unknown code, SR or NORM (they are what is left), a probability outside [0, 1], or rhythms
            that sum to more than 1.
    """
    given = dict(prevalence or {})
    for code, p in given.items():
        if code not in labels or code in ("SR", "NORM"):
            settable = [name for name in labels if name not in ("SR", "NORM")]
            raise ValueError(f"prevalence: found {code!r}, needed codes of {settable}; SR and NORM are what is left")
        if not 0 <= p <= 1:
            raise ValueError(f"prevalence: found {p!r} for {code!r}, needed a probability between 0 and 1")
    chance = {code: p if code in labels else 0.0 for code, p in (_RHYTHMS | _FINDINGS).items()} | given
    named = sum(given.get(code, 0.0) for code in _RHYTHMS)
    if named > 1:
        raise ValueError(f"prevalence: found rhythms that sum to {named}, needed at most 1")
    for code in _RHYTHMS:
        if code not in given:
            chance[code] *= 1 - named
    return chance
