"""From the heart's dipole and the electrodes' noise to twelve leads that keep the laws of Einthoven and Goldberger.

Noise arises at the nine electrodes (right arm, left arm, left leg, V1..V6), never in a lead: a bad left arm shows in
I, III, aVL and, a third of it, in every chest lead. So I + III = II and the rest hold to the rounding of float32.
"""

from __future__ import annotations

import numpy as np
from scipy.signal import butter, sosfilt

__all__ = ["electrode_noise", "project", "standard_leads"]

_RA, _LA, _LL = range(3)
_NUM_ELECTRODES = 9
_WANDER_LINES = 6


def standard_leads(independent: np.ndarray) -> np.ndarray:
    """Twelve leads [N, 12, L] from the eight independent ones [N, 8, L] (I, II, V1..V6)."""
    first, second = independent[:, 0], independent[:, 1]
    out = np.empty((len(independent), 12, independent.shape[2]), dtype=independent.dtype)
    out[:, 0], out[:, 1] = first, second
    out[:, 2] = second - first
    out[:, 3] = -0.5 * (first + second)
    out[:, 4] = first - 0.5 * second
    out[:, 5] = second - 0.5 * first
    out[:, 6:] = independent[:, 2:]
    return out


def project(dipole: np.ndarray, field: np.ndarray, electrodes: np.ndarray | None = None) -> np.ndarray:
    """The twelve leads of a dipole seen through a lead field, with what the electrodes add.

    Args:
        dipole: [N, 3, L] mV.
        field: [N, 8, 3], rows I, II, V1..V6.
        electrodes: [N, 9, L] mV at right arm, left arm, left leg, V1..V6.

    Returns:
        float32 [N, 12, L] mV.
    """
    independent = field.astype(np.float32) @ dipole.astype(np.float32)
    if electrodes is not None:
        independent[:, 0] += electrodes[:, _LA] - electrodes[:, _RA]
        independent[:, 1] += electrodes[:, _LL] - electrodes[:, _RA]
        terminal = (electrodes[:, _RA] + electrodes[:, _LA] + electrodes[:, _LL]) / np.float32(3)
        independent[:, 2:] += electrodes[:, 3:] - terminal[:, None]
    return standard_leads(independent)


def electrode_noise(
    rng: np.random.Generator,
    num_records: int,
    num_samples: int,
    sampling_rate: int,
    breathing: tuple[np.ndarray, np.ndarray],
    noise: float,
    baseline_wander: float,
    powerline: float,
) -> np.ndarray:
    """What the electrodes add: amplifier noise, muscle, drift that follows breathing, mains hum.

    Records differ in how noisy they are; ``noise``, ``baseline_wander`` and ``powerline`` are root mean squares in mV
    of the median electrode.

    Returns:
        float32 [N, 9, L] mV.
    """
    shape = (num_records, _NUM_ELECTRODES, num_samples)
    time = (np.arange(num_samples) / sampling_rate).astype(np.float32)
    level = np.exp(0.45 * rng.standard_normal((3, num_records, _NUM_ELECTRODES, 1))).astype(np.float32)
    level *= np.array([noise, baseline_wander, powerline], dtype=np.float32)[:, None, None, None]

    out = _drift(rng, time, num_records, breathing)
    out *= level[1]
    if noise > 0:
        white = rng.standard_normal(shape, dtype=np.float32)
        out += level[0] * np.float32(np.sqrt(0.3)) * white
        band = butter(1, [15, min(150.0, 0.45 * sampling_rate)], "bandpass", fs=sampling_rate, output="sos")
        impulse = sosfilt(band, np.eye(1, 4 * sampling_rate)[0])
        muscle = sosfilt(band, rng.standard_normal(shape, dtype=np.float32), axis=-1).astype(np.float32)
        tension = rng.uniform(0, 2 * np.pi, (num_records, _NUM_ELECTRODES, 1)).astype(np.float32)
        tension = 1 + np.float32(0.5) * np.sin(np.float32(2 * np.pi * 0.15) * time + tension)
        out += level[0] * np.float32(np.sqrt(0.7) / np.sqrt(np.sum(impulse**2))) * tension * muscle
    if powerline > 0:
        phase = rng.uniform(0, 2 * np.pi, (num_records, 1, 1)).astype(np.float32)
        out += level[2] * np.float32(np.sqrt(2)) * np.sin(np.float32(2 * np.pi * 50) * time + phase)
    return out


def _drift(
    rng: np.random.Generator, time: np.ndarray, num_records: int, breathing: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Slow lines of random phase and one at the rate of breathing, unit root mean square, [N, 9, L]."""
    frequency = rng.uniform(0.03, 0.40, (num_records, _WANDER_LINES))
    frequency[:, 0] = breathing[0]
    angle = 2 * np.pi * frequency[:, :, None] * time
    lines = np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)
    size = 0.12 / np.maximum(frequency, 0.06)  # drift is slow: amplitude falls with frequency
    size[:, 0] *= 1.5
    size /= np.sqrt(np.sum(size**2, axis=1, keepdims=True))
    weight = rng.standard_normal((num_records, _NUM_ELECTRODES, 2 * _WANDER_LINES))
    return (weight * np.tile(size, 2)[:, None]).astype(np.float32) @ lines
