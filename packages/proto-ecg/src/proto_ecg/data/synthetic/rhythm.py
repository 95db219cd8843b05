"""When the heart beats: a sinus clock with the two spectral peaks of heart rate variability, fibrillation, ectopy.

McSharry et al. 2003, section III: the intervals vary at the rate of the blood pressure waves (0.1 Hz, LF) and of
breathing (HF), LF/HF ratio 0.5. Here each peak is three spectral lines with random phases. In atrial fibrillation the
intervals are independent draws. A ventricular beat comes early and leaves the sinus clock alone, so that the pause
after it is compensatory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

__all__ = ["Beats", "draw_beats"]

_SHORTEST_RR = 0.3  # s
_LEAD_IN = 1.0  # s before the record in which beats are made, so that their T waves reach into it
_LEAD_OUT = 0.6  # s after it: their P waves


class Beats(NamedTuple):
    """The beats of N records, K places each.

    Args:
        time: [N, K] seconds from the start of the record.
        rr: [N, K] the interval in seconds that sets the beat's QT time.
        ventricular: [N, K] bool, premature ventricular beats.
        present: [N, K] bool, beats that reach into the record.
        respiration: [N, K] phase of breathing at the beat, -1 to 1.
    """

    time: np.ndarray
    rr: np.ndarray
    ventricular: np.ndarray
    present: np.ndarray
    respiration: np.ndarray


def draw_beats(
    rng: np.random.Generator,
    found: Mapping[str, np.ndarray],
    breathing: tuple[np.ndarray, np.ndarray],
    duration: float,
) -> Beats:
    """Draw the beat times of N records.

    Args:
        rng: source of chance.
        found: code -> bool [N].
        breathing: rate in Hz and phase in radians, [N] each.
        duration: length of the records in seconds.

    Returns:
        The beats, see :class:`Beats`.
    """
    num_records = len(found["SR"])
    places = math.ceil((duration + _LEAD_IN + _LEAD_OUT + 2) / _SHORTEST_RR)
    rate = np.clip(rng.normal(74, 9, num_records), 63, 95)
    rate = np.where(found["SBRAD"], rng.uniform(41, 56, num_records), rate)
    rate = np.where(found["STACH"], rng.uniform(106, 145, num_records), rate)
    rate = np.where(found["AFIB"], np.clip(92 * np.exp(rng.normal(0, 0.22, num_records)), 58, 150), rate)
    mean = (60 / rate)[:, None]

    spread = np.clip(0.028 * np.exp(rng.normal(0, 0.5, num_records)), 0.008, 0.06)[:, None]
    spread = np.where(found["STACH"][:, None], 0.4 * spread, spread)
    tone = mean * np.arange(places)
    sinus = mean * (1 + spread * _variability(rng, tone, breathing[0]))
    chaos = rng.uniform(0.18, 0.30, num_records)[:, None] * rng.standard_normal((num_records, places))
    fibrillating = np.clip(mean * np.exp(chaos), 0.34, 2.0)
    rr = np.maximum(np.where(found["AFIB"][:, None], fibrillating, sinus), _SHORTEST_RR)
    time = np.cumsum(rr, axis=1) - rr[:, :1] * (1 + rng.random((num_records, 1))) - _LEAD_IN

    time, ventricular = _make_premature(rng, time, rr, found["PVC"], duration)
    present = (time > -_LEAD_IN) & (time < duration + _LEAD_OUT)
    respiration = np.sin(2 * np.pi * breathing[0][:, None] * time + breathing[1][:, None])
    return Beats(time, 0.5 * (rr + mean), ventricular, present, respiration)


def _variability(rng: np.random.Generator, tone: np.ndarray, breathing_rate: np.ndarray) -> np.ndarray:
    """Unit-variance variability at nominal times ``tone`` [N, K]; LF carries a third of it, HF two thirds."""
    shape = (len(tone), 3)
    low = 0.1 + 0.01 * rng.standard_normal(shape)
    high = breathing_rate[:, None] + 0.01 * rng.standard_normal(shape)
    frequency = np.concatenate([low, high], axis=1)[:, :, None]
    phase = rng.uniform(0, 2 * np.pi, (len(tone), 6, 1))
    amplitude = np.sqrt(2 * np.repeat([1 / 3, 2 / 3], 3) / 3)[:, None]
    return np.sum(amplitude * np.sin(2 * np.pi * frequency * tone[:, None] + phase), axis=1)


def _make_premature(
    rng: np.random.Generator, time: np.ndarray, rr: np.ndarray, wanted: np.ndarray, duration: float
) -> tuple[np.ndarray, np.ndarray]:
    """Move one beat of each wanted record, and now and then another, ahead of its turn."""
    coupling = rng.uniform(0.58, 0.72, (len(time), 1))
    previous = np.concatenate([time[:, :1] - rr[:, :1], time[:, :-1]], axis=1)
    early = np.maximum(previous + 0.36, time - (1 - coupling) * rr)
    score = rng.random(time.shape)
    inside = (early > 0.25) & (early < duration - 0.45)
    room = early < time - 0.05
    first = np.where(inside, score + room, -1.0).argmax(axis=1)[:, None]
    place = np.arange(time.shape[1])
    apart = (place % 2 == first % 2) & (place != first)  # never two premature beats in a row
    more = inside & room & apart & (score < rng.uniform(0.02, 0.25, (len(time), 1)))
    ventricular = wanted[:, None] & ((place == first) | more)
    return np.where(ventricular, np.minimum(early, time), time), ventricular
