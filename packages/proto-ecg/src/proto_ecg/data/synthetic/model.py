"""The generator: beat times, a heart, its dipole over time, twelve leads.

McSharry et al. 2003, equation (1): a point runs round a limit cycle once per beat, and dz/dt = -sum_i a_i dtheta_i
exp(-dtheta_i^2 / 2 b_i^2) - (z - z0). Without the relaxation (z - z0), which only keeps a step-by-step solution from
drifting, this integrates in closed form: z = sum_i A_i exp(-dtheta_i^2 / 2 b_i^2), and as the phase grows evenly within
a beat, a Gaussian in phase is a Gaussian in time. That sum is evaluated here, once per axis of a dipole (Sameni et al.
2007), for all beats at once. Times of ST, T and U grow with the square root of the RR interval (Bazett).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from proto_ecg.data.synthetic.electrodes import electrode_noise, project
from proto_ecg.data.synthetic.findings import (
    DEFAULT_LABELS,
    SUPPORTED_LABELS,
    check_labels,
    draw_findings,
    probabilities,
)
from proto_ecg.data.synthetic.heart import Heart, draw_hearts
from proto_ecg.data.synthetic.rhythm import Beats, draw_beats

__all__ = ["SyntheticECG", "generate_ecgs"]

_BLOCK = 64  # records; a block is always made whole, so that record i does not depend on how many follow
_BEFORE, _AFTER = 0.50, 0.95  # s around R outside of which a beat has no events
_J_POINT = 0.045  # s after R
_SAME_PATIENT = 0.15  # share of record pairs that are of one patient


@dataclass(frozen=True)
class SyntheticECG:
    """N generated ECGs.

    Args:
        signals: float32 [N, 12, L] in mV, leads in the order of :data:`proto_ecg.data.leads.STANDARD_LEADS`.
        targets: int8 [N, C], 1 where the record has the label.
        label_names: the C labels.
        r_peaks: for each record the samples of its beats' R waves, ventricular ones too.
        patient_id: int64 [N]; neighbouring records may be of one patient.
        age: int64 [N] years.
        sex: int64 [N], 0 male, 1 female, as in PTB-XL.
        sampling_rate: in Hz.
    """

    signals: np.ndarray
    targets: np.ndarray
    label_names: tuple[str, ...]
    r_peaks: list[np.ndarray]
    patient_id: np.ndarray
    age: np.ndarray
    sex: np.ndarray
    sampling_rate: int


def generate_ecgs(
    num_records: int,
    *,
    sampling_rate: int = 100,
    duration: float = 10.0,
    seed: int = 0,
    labels: Sequence[str] | None = DEFAULT_LABELS,
    noise: float = 0.010,
    baseline_wander: float = 0.05,
    powerline: float = 0.0,
    prevalence: Mapping[str, float] | None = None,
    severity: float = 1.0,
) -> SyntheticECG:
    """Make 12-lead ECGs with known findings.

    The same settings give the same bits; a record depends on its number and on the settings but not on how many records
    are made, and its heart and rhythm depend neither on noise nor on the sampling rate.

    Args:
        num_records: N.
        sampling_rate: in Hz, at least 50.
        duration: length of the records in seconds, 3 to 60; L is ``round(duration * sampling_rate)``.
        seed: the same seed gives the same records.
        labels: the findings that may occur, of :data:`SUPPORTED_LABELS`; ``None`` for all of them. What is not listed
            does not occur, except sinus rhythm.
        noise: root mean square in mV of amplifier and muscle noise at the median electrode.
        baseline_wander: root mean square in mV of the drift at the median electrode.
        powerline: root mean square in mV of 50 Hz hum at the median electrode; needs more than 100 Hz.
        prevalence: label -> probability of its own draw. Labels that occur together raise each other's, some exclude
            each other. SR and NORM are what is left and cannot be set.
        severity: how marked the findings are, above 0 to 1.5: 1 is plain to see, at 0.5 a T wave is flat rather than
            inverted. Rhythms and voltages are not graded.

    Returns:
        The records, see :class:`SyntheticECG`.

    Raises:
        ValueError: an argument outside its range, an unknown label.

    Example:
        >>> from proto_ecg.data.synthetic import generate_ecgs
        >>> ecgs = generate_ecgs(3, labels=("SR", "AFIB"), prevalence={"AFIB": 1.0})
        >>> ecgs.signals.shape, ecgs.targets.tolist()
        ((3, 12, 1000), [[0, 1], [0, 1], [0, 1]])
    """
    names = tuple(SUPPORTED_LABELS if labels is None else labels)
    check_labels(names)
    probabilities(names, prevalence)
    _check_numbers(num_records, sampling_rate, duration, seed, noise, baseline_wander, powerline, severity)
    num_samples = round(duration * sampling_rate)
    signals = np.empty((num_records, 12, num_samples), dtype=np.float32)
    targets = np.empty((num_records, len(names)), dtype=np.int8)
    patients, ages, sexes = (np.empty(num_records, dtype=np.int64) for _ in range(3))
    r_peaks: list[np.ndarray] = []
    for start in range(0, num_records, _BLOCK):
        stop = min(start + _BLOCK, num_records)
        rows = slice(0, stop - start)
        streams = [np.random.Generator(np.random.Philox(s)) for s in _seeds(seed, start // _BLOCK)]
        found = draw_findings(streams[0], _BLOCK, names, prevalence)
        age, sex, same = _draw_patients(streams[1], found)
        breathing = (streams[1].uniform(0.17, 0.32, _BLOCK), streams[1].uniform(0, 2 * np.pi, _BLOCK))
        heart = draw_hearts(streams[2], found, same, severity)
        beats = draw_beats(streams[3], found, breathing, duration)
        dipole = _dipole(streams[4], heart, beats, num_samples, sampling_rate)
        dipole += _fibrillation(streams[5], found["AFIB"], num_samples, sampling_rate)
        added = electrode_noise(
            streams[6], _BLOCK, num_samples, sampling_rate, breathing, noise, baseline_wander, powerline
        )
        signals[start:stop] = project(dipole, heart.field, added)[rows]
        targets[start:stop] = np.stack([found[code] for code in names], axis=1)[rows]
        ages[start:stop], sexes[start:stop] = age[rows], sex[rows]
        number = np.arange(start, start + _BLOCK) + 1
        number[1::2] -= same
        patients[start:stop] = number[rows]
        r_peaks += [_samples(time, sampling_rate, num_samples) for time in beats.time[rows]]
    return SyntheticECG(signals, targets, names, r_peaks, patients, ages, sexes, sampling_rate)


def _check_numbers(
    num_records: int,
    sampling_rate: int,
    duration: float,
    seed: int,
    noise: float,
    wander: float,
    powerline: float,
    severity: float,
) -> None:
    if num_records < 1:
        raise ValueError(f"num_records: found {num_records}, needed 1 or more")
    if sampling_rate != int(sampling_rate) or sampling_rate < 50:
        raise ValueError(f"sampling_rate: found {sampling_rate}, needed a whole number of at least 50 Hz")
    if not 3 <= duration <= 60:
        raise ValueError(f"duration: found {duration}, needed 3 to 60 s")
    if seed < 0:
        raise ValueError(f"seed: found {seed}, needed 0 or more")
    for name, value in (("noise", noise), ("baseline_wander", wander), ("powerline", powerline)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name}: found {value}, needed 0 mV or more")
    if not 0 < severity <= 1.5:
        raise ValueError(f"severity: found {severity}, needed more than 0, at most 1.5")
    if powerline > 0 and sampling_rate <= 100:
        raise ValueError(f"powerline: found {powerline} at {sampling_rate} Hz, needed more than 100 Hz to hold 50 Hz")


def _seeds(seed: int, block: int) -> list[np.random.SeedSequence]:
    """One stream for each kind of draw, so that a change in one kind leaves the others alone."""
    return np.random.SeedSequence([seed, block]).spawn(7)


def _draw_patients(
    rng: np.random.Generator, found: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Age, sex, and which pairs of records are of one patient."""
    older = 9.0 * found["AFIB"] + 6.0 * (found["CLBBB"] | found["QWAVE"] | found["LVH"]) - 8.0 * found["NORM"]
    age = np.clip(np.rint(rng.normal(60 + older, 14)), 18, 89).astype(np.int64)
    sex = (rng.random(_BLOCK) < 0.48).astype(np.int64)
    same = rng.random(_BLOCK // 2) < _SAME_PATIENT
    age[1::2] = np.where(same, age[::2], age[1::2])
    sex[1::2] = np.where(same, sex[::2], sex[1::2])
    return age, sex, same


def _samples(time: np.ndarray, sampling_rate: int, num_samples: int) -> np.ndarray:
    sample = np.rint(time * sampling_rate).astype(np.int64)
    return sample[(sample >= 0) & (sample < num_samples)]


def _dipole(rng: np.random.Generator, heart: Heart, beats: Beats, num_samples: int, sampling_rate: int) -> np.ndarray:
    """The heart's dipole [N, 3, L] in mV: each beat is evaluated on its own stretch of samples, then all are summed."""
    row, place = np.nonzero(beats.present)
    kind = beats.ventricular[row, place].astype(int)
    centre, width = _event_times(heart, beats.rr[row, place], row, kind)
    vector = heart.vector[row, kind] * (1 + 0.035 * rng.standard_normal((*beats.time.shape, 10, 1))[row, place])
    vector = _breathe(vector, beats.respiration[row, place])

    before, after = math.ceil(_BEFORE * sampling_rate), math.ceil(_AFTER * sampling_rate)
    r_sample = beats.time[row, place] * sampling_rate
    first = np.floor(r_sample).astype(np.int64) - before
    step = np.arange(before + after)
    time = ((step - (r_sample - first)[:, None]) / sampling_rate).astype(np.float32)
    wave = np.exp(-np.square((time[:, None] - centre[:, :, None]) / (width[:, :, None] * np.float32(math.sqrt(2)))))
    moment = vector.transpose(0, 2, 1).astype(np.float32) @ wave

    margin = math.ceil(2 * sampling_rate)
    length = num_samples + 2 * margin
    index = (row * length + margin + first)[:, None] + step
    flat = [np.bincount(index.ravel(), moment[:, axis].ravel(), len(beats.time) * length) for axis in range(3)]
    return np.stack(flat).reshape(3, -1, length)[:, :, margin:-margin].transpose(1, 0, 2)


def _event_times(heart: Heart, rr: np.ndarray, row: np.ndarray, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """When after R each event of each beat has its peak, and its width; float32 [M, 10] each, in seconds."""
    root = np.sqrt(rr)
    pr = heart.pr[row] * np.clip(root, 0.7, 1.05)
    t_width = 0.046 * root * heart.t_width[row, kind]
    t_peak = np.maximum(heart.qtc[row, kind] * root - 0.035 - 2.1 * t_width, 0.1)
    segment = t_peak - _J_POINT
    st = _J_POINT + heart.st_place[row, kind] * segment
    centre = np.empty((len(row), 10), dtype=np.float32)
    width = np.empty((len(row), 10), dtype=np.float32)
    centre[:, 0], centre[:, 1] = -pr - 0.008, -pr + 0.022
    centre[:, 2:6] = heart.qrs_time[row, kind]
    width[:, :6] = heart.width[row, kind]
    centre[:, 6], width[:, 6] = st, heart.st_width[row, kind] * segment
    centre[:, 7], width[:, 7] = t_peak - 1.1 * t_width, 1.35 * t_width
    centre[:, 8], width[:, 8] = t_peak, 0.9 * t_width
    centre[:, 9], width[:, 9] = t_peak + 2.6 * t_width + 0.055, 0.75 * t_width
    return centre, width


def _breathe(vector: np.ndarray, respiration: np.ndarray) -> np.ndarray:
    """The lungs fill: the dipole [M, 10, 3] looks smaller and turns by a few degrees in the frontal plane."""
    turn = (math.radians(4) * respiration)[:, None]
    x, y, z = np.moveaxis(vector * (1 - 0.05 * respiration)[:, None, None], 2, 0)
    return np.stack([x - turn * y, y + turn * x, z], axis=2)


def _fibrillation(rng: np.random.Generator, who: np.ndarray, num_samples: int, sampling_rate: int) -> np.ndarray:
    """Fibrillatory waves of 5 to 8 Hz, largest in V1: a sawtooth whose rate and size wander, [N, 3, L] in mV."""
    n = len(who)
    time = np.arange(num_samples) / sampling_rate
    rate, turn = rng.uniform(5, 8, (n, 1)), rng.uniform(0, 2 * np.pi, (n, 5, 1))
    size = rng.uniform(0.03, 0.085, (n, 1)) * who[:, None]
    drift = rng.uniform(0.2, 0.6, (n, 2, 1))
    out = np.zeros((n, 3, num_samples))
    row = np.flatnonzero(who)
    if len(row) == 0:
        return out
    phase = 2 * np.pi * rate[row] * time + 1.6 * np.sin(2 * np.pi * drift[row, 0] * time + turn[row, 0])
    phase += 0.5 * np.sin(2 * np.pi * 2.3 * drift[row, 1] * time + turn[row, 1])
    swell = size[row] * (1 + 0.45 * np.sin(2 * np.pi * 1.7 * drift[row, 1] * time + turn[row, 2]))
    for harmonic in (1, 2, 3):
        angle = harmonic * phase[:, None] + turn[row, 2:5] * [[0.3], [0.6], [0.1]]
        out[row] += (swell[:, None] / harmonic) * np.sin(angle) * [[-0.25], [0.6], [-0.75]]
    return out
