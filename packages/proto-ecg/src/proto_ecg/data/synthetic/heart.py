"""The heart as a dipole: ten Gaussian events per beat, each with a vector, a time and a width; findings change them.

Axes as in Frank's leads: x to the left, y to the feet, z to the back; millivolts. A finding is a change of the events
and nothing else, so that what a lead shows of it follows from the lead field: an inferior ST elevation comes with its
reciprocal depression in aVL, a right bundle branch block's late forces make R' in V1 and a broad S in I and V6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["DOWER", "Heart", "draw_hearts"]

# Dower's transform from Frank's x, y, z to the eight independent leads I, II, V1..V6 (Dower et al. 1980).
DOWER = np.array(
    [
        [0.632, -0.235, 0.059],
        [0.235, 1.066, -0.132],
        [-0.515, 0.157, -0.917],
        [0.044, 0.164, -1.387],
        [0.882, 0.098, -1.277],
        [1.213, 0.127, -0.601],
        [1.125, 0.127, -0.086],
        [0.831, 0.076, 0.230],
    ]
)

EVENTS = ("P right", "P left", "Q", "R", "S", "late", "ST", "T early", "T late", "U")
P1, P2, Q, R, S, LATE, ST, T1, T2, U = range(10)
_QRS = slice(Q, ST)
_T = slice(T1, U)

_SINUS_VECTOR = np.array(
    [
        [0.030, 0.070, -0.050],
        [0.065, 0.065, 0.035],
        [-0.170, -0.100, -0.370],
        [1.300, 0.740, 0.100],
        [-0.200, -0.070, 0.700],
        [0.000, 0.000, 0.000],
        [0.010, 0.005, -0.040],
        [0.110, 0.060, -0.110],
        [0.200, 0.110, -0.160],
        [0.012, 0.006, -0.015],
    ]
)
_QRS_TIME = np.array([-0.022, 0.0, 0.024, 0.055])  # s from R
_WIDTH = np.array([0.019, 0.021, 0.0085, 0.0120, 0.0115, 0.020])  # s: P right .. late; the rest follows from the RR


@dataclass(frozen=True)
class Heart:
    """N hearts. Every array may be changed in place by a finding.

    Args:
        vector: [N, 2, 10, 3] mV; of sinus beats and of ventricular beats.
        qrs_time: [N, 2, 4] s from R of Q, R, S and the late event.
        width: [N, 2, 6] s of P right .. late.
        pr: [N] s from the P wave to R.
        qtc: [N, 2] s, QT time at RR = 1 s (Bazett).
        t_width: [N, 2] factor on the width of T.
        st_place: [N, 2] where the ST event lies between the J point (0) and the peak of T (1).
        st_width: [N, 2] its width in the same unit.
        field: [N, 8, 3] lead field of this chest and these electrodes.
    """

    vector: np.ndarray
    qrs_time: np.ndarray
    width: np.ndarray
    pr: np.ndarray
    qtc: np.ndarray
    t_width: np.ndarray
    st_place: np.ndarray
    st_width: np.ndarray
    field: np.ndarray


def draw_hearts(
    rng: np.random.Generator, found: Mapping[str, np.ndarray], same_patient: np.ndarray, severity: float
) -> Heart:
    """Draw N hearts and give them their findings.

    Args:
        rng: source of chance.
        found: code -> bool [N], see :func:`proto_ecg.data.synthetic.findings.draw_findings`.
        same_patient: [N / 2] bool; where true, records 2i and 2i + 1 are of one patient and share the healthy heart.
        severity: how far each event goes from the healthy heart's (0) to the finding's (1) or beyond; fibrillation and
            voltage are there or not.

    Returns:
        The hearts, see :class:`Heart`.
    """
    heart = _healthy(rng, len(found["SR"]))
    again = 2 * np.flatnonzero(same_patient)
    for part in vars(heart).values():
        part[again + 1] = part[again]
    _make_ventricular(rng, heart)
    healthy = {name: part.copy() for name, part in vars(heart).items()}
    sinus = _Change(rng, heart)
    for code, change in _CHANGES.items():
        getattr(sinus, change)(found[code])
    for name, part in vars(heart).items():
        part += (severity - 1) * (part - healthy[name])
    heart.vector[:, 0, :Q] *= np.where(found["AFIB"], 0.0, 1.0)[:, None, None]  # the model adds the fibrillation
    _set_voltage(rng, heart, found)
    return heart


def _healthy(rng: np.random.Generator, n: int) -> Heart:
    vector = np.tile(_SINUS_VECTOR, (n, 2, 1, 1))
    vector[:, :, :Q] *= _spread(rng, (n, 1, 2, 1), 0.22)
    vector[:, :, Q:ST] *= _spread(rng, (n, 1, 1, 1), 0.25) * _spread(rng, (n, 1, 4, 1), 0.2)
    vector[:, :, T1:] *= _spread(rng, (n, 1, 1, 1), 0.28) * _spread(rng, (n, 1, 3, 1), 0.08)
    vector[:, :, ST] *= _spread(rng, (n, 1, 1), 0.4)
    common = rng.standard_normal((n, 3))
    own = rng.standard_normal((3, n, 3))
    for part, share, degrees in ((slice(P1, Q), 0.3, 8.0), (_QRS, 1.0, 14.0), (slice(ST, 10), 0.5, 9.0)):
        angle = np.radians(degrees) * (share * common + (1 - share) * own[0 if part.stop == Q else 1])
        vector[:, :, part] = np.einsum("nij,nbej->nbei", _rotation(angle * [0.6, 0.9, 1.4]), vector[:, :, part])
    width = np.tile(_WIDTH, (n, 2, 1)) * _spread(rng, (n, 1, 6), 0.07)
    field = DOWER * (1 + 0.06 * rng.standard_normal((n, 8, 1)) + 0.05 * rng.standard_normal((n, 8, 3)))
    return Heart(
        vector=vector,
        qrs_time=np.tile(_QRS_TIME, (n, 2, 1)) * _spread(rng, (n, 1, 1), 0.06),
        width=width,
        pr=np.clip(rng.normal(0.158, 0.016, n), 0.125, 0.195),
        qtc=np.repeat(np.clip(rng.normal(0.405, 0.014, (n, 1)), 0.375, 0.435), 2, axis=1),
        t_width=np.repeat(_spread(rng, (n, 1), 0.08), 2, axis=1),
        st_place=np.full((n, 2), 0.55),
        st_width=np.full((n, 2), 0.26),
        field=field,
    )


def _make_ventricular(rng: np.random.Generator, heart: Heart) -> None:
    """Beats that start in one ventricle: no P, a broad QRS away from it, ST and T against the QRS."""
    n = len(heart.pr)
    right = (rng.random(n) < 0.6)[:, None]  # from the right ventricle: forces to the left and back
    main = np.where(right, [0.85, 0.0, 0.75], [-0.55, 0.0, -0.85]) + rng.normal(0, [0.2, 0.75, 0.2], (n, 3))
    main *= (rng.uniform(1.1, 1.9, n) / np.linalg.norm(main, axis=1))[:, None]
    vector = heart.vector[:, 1]
    vector[:, [P1, P2, U]] = 0
    vector[:, Q] = 0.25 * main + rng.normal(0, 0.12, (n, 3))
    vector[:, R] = main
    vector[:, S] = 0.55 * main + rng.normal(0, 0.15, (n, 3))
    vector[:, LATE] = -0.25 * main + rng.normal(0, 0.12, (n, 3))
    vector[:, ST] = -0.12 * main
    vector[:, T1] = -0.20 * main
    vector[:, T2] = -0.32 * main
    heart.qrs_time[:, 1] = np.array([-0.038, 0.0, 0.040, 0.076])
    heart.width[:, 1, Q:] = np.array([0.017, 0.022, 0.021, 0.020]) * _spread(rng, (n, 1), 0.08)
    heart.qtc[:, 1] += 0.045
    heart.t_width[:, 1] *= 1.15


class _Change:
    """The findings as changes of the sinus beats. Every method draws for all N hearts and changes those in ``who``."""

    def __init__(self, rng: np.random.Generator, heart: Heart) -> None:
        self.rng, self.heart, self.n = rng, heart, len(heart.pr)
        self.vector = heart.vector[:, 0]

    def _uniform(self, low: float, high: float) -> np.ndarray:
        return self.rng.uniform(low, high, self.n)

    def _set(self, who: np.ndarray, event: int, vector: np.ndarray) -> None:
        self.vector[:, event] = np.where(who[:, None], vector, self.vector[:, event])

    def _scale(self, who: np.ndarray, event: int | slice, factor: np.ndarray | float) -> None:
        shape = (-1, 1) if isinstance(event, int) else (-1, 1, 1)
        self.vector[:, event] *= np.where(who, factor, 1.0).reshape(shape)

    def _jitter(self, direction: np.ndarray, size: float = 0.1) -> np.ndarray:
        return direction + size * self.rng.standard_normal((self.n, 3))

    def _territory(self, directions: np.ndarray, size: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
        which = self.rng.integers(0, len(directions), self.n)
        return which, self._jitter(directions[which], size)

    def long_pr(self, who: np.ndarray) -> None:
        self.heart.pr[:] = np.where(who, self._uniform(0.225, 0.31), self.heart.pr)

    def hypertrophy(self, who: np.ndarray) -> None:
        """Left ventricular mass: the force turns left and back, see also the voltage."""
        self.vector[:, R] += np.where(who[:, None], self._jitter(np.array([0.15, -0.15, 0.20]), 0.05), 0.0)
        self._scale(who, S, 1.25)

    def left_bundle(self, who: np.ndarray) -> None:
        """No septal force to the right; two broad, notched forces to the left and back; ST and T against them."""
        size = self._uniform(0.85, 1.25)[:, None]
        main = self._jitter(np.array([0.62, 0.12, 0.70]), 0.07) * size
        self._set(who, Q, 0.22 * self._jitter(np.array([0.6, 0.2, 0.1])))
        self._set(who, R, 0.95 * main)
        self._set(who, S, 0.75 * main + self._jitter(np.zeros(3), 0.06))
        self._set(who, LATE, 0.75 * self._jitter(main, 0.08))
        self._set(who, ST, -0.11 * self._jitter(main))
        self._set(who, T1, -0.12 * self._jitter(main))
        self._set(who, T2, -0.26 * self._jitter(main))
        self._broaden(who, [-0.030, 0.0, 0.030, 0.062], [0.016, 0.019, 0.019, 0.017])

    def right_bundle(self, who: np.ndarray) -> None:
        """The first half of the QRS as ever, then a slow force to the right and front; T against it."""
        late = self._jitter(np.array([-0.48, -0.05, -0.50]), 0.07) * self._uniform(0.8, 1.3)[:, None]
        self._scale(who, S, 0.55)
        self._set(who, LATE, late)
        self.vector[:, T1] -= np.where(who[:, None], 0.12 * late, 0.0)
        self.vector[:, T2] -= np.where(who[:, None], 0.28 * late, 0.0)
        self._broaden(who, [-0.022, 0.0, 0.026, 0.066], [0.0085, 0.0120, 0.0115, 0.021])

    def _broaden(self, who: np.ndarray, time: list[float], width: list[float]) -> None:
        spread = self._uniform(0.95, 1.12)[:, None]
        heart = self.heart
        heart.qrs_time[:, 0] = np.where(who[:, None], np.array(time) * spread, heart.qrs_time[:, 0])
        heart.width[:, 0, Q:] = np.where(who[:, None], np.array(width) * spread, heart.width[:, 0, Q:])
        heart.qtc[:, 0] += np.where(who, 0.035, 0.0)

    def q_wave(self, who: np.ndarray) -> None:
        """Dead tissue: a first force of 40 ms away from it, and less force towards it afterwards."""
        directions = np.array([[0.05, 1.0, 0.1], [0.15, 0.0, -1.0], [0.8, -0.55, -0.3]])  # inferior, anterior, lateral
        which, towards = self._territory(directions, 0.06)
        size = self._uniform(0.50, 0.80) * np.array([0.9, 0.8, 0.9])[which]
        loss = 0.55 * np.maximum(np.sum(self.vector[:, R] * towards, axis=1), 0)
        self._set(who, Q, -size[:, None] * towards)
        self.vector[:, R] -= np.where(who, loss, 0.0)[:, None] * towards
        heart = self.heart
        heart.qrs_time[:, 0, 0] = np.where(who, -0.036, heart.qrs_time[:, 0, 0])
        heart.width[:, 0, Q] = np.where(who, 0.0145, heart.width[:, 0, Q])

    def st_elevation(self, who: np.ndarray) -> None:
        """Injury current towards the anterior or the inferior wall, with the T wave drawn along."""
        _, towards = self._territory(np.array([[0.30, 0.05, -0.95], [0.05, 1.0, 0.10]]), 0.08)
        current = self._uniform(0.20, 0.36)[:, None] * towards
        self._st(who, current, 0.42, 0.36)
        self.vector[:, T1:U] += np.where(who[:, None], 0.45 * current, 0.0)[:, None]

    def st_depression(self, who: np.ndarray) -> None:
        """Subendocardial: the current points away from the apex, so that V4-V6, I and II sink."""
        current = -self._uniform(0.16, 0.28)[:, None] * self._jitter(np.array([0.85, 0.50, -0.10]))
        self._st(who, current, 0.40, 0.34)
        self._scale(who, _T, 0.75)

    def _st(self, who: np.ndarray, current: np.ndarray, place: float, width: float) -> None:
        self._set(who, ST, current)
        self.heart.st_place[:, 0] = np.where(who, place, self.heart.st_place[:, 0])
        self.heart.st_width[:, 0] = np.where(who, width, self.heart.st_width[:, 0])

    def t_inversion(self, who: np.ndarray) -> None:
        """A symmetric T wave that points away from the anterior, the lateral or the inferior wall."""
        directions = np.array([[-0.45, -0.05, 0.75], [-0.90, -0.10, 0.10], [0.15, -0.90, -0.15]])
        _, away = self._territory(directions)
        size = self._uniform(0.24, 0.46)[:, None]
        self._set(who, T1, 0.25 * size * away)
        self._set(who, T2, size * away)

    def digitalis(self, who: np.ndarray) -> None:
        """A scooped ST segment against the QRS in all leads, a low T wave and a short QT time."""
        axis = self.vector[:, R] / np.linalg.norm(self.vector[:, R], axis=1, keepdims=True)
        self._st(who, -self._uniform(0.16, 0.27)[:, None] * self._jitter(axis, 0.06), 0.68, 0.30)
        self._scale(who, T1, 0.1)
        self._scale(who, T2, self._uniform(0.25, 0.5))
        self.heart.qtc[:, 0] -= np.where(who, self._uniform(0.035, 0.055), 0.0)

    def electrolytes(self, who: np.ndarray) -> None:
        """Half of them high potassium (tall, narrow T; low P; wider QRS), half low (flat T, sagging ST, U wave)."""
        heart = self.heart
        high = self.rng.random(self.n) < 0.5
        axis = self._jitter(np.array([0.65, 0.40, -0.60]), 0.08)
        tall, low = who & high, who & ~high
        self._set(tall, T1, self._uniform(0.10, 0.18)[:, None] * axis)
        self._set(tall, T2, self._uniform(0.65, 1.0)[:, None] * axis)
        self._scale(tall, slice(P1, Q), 0.45)
        heart.t_width[:, 0] *= np.where(tall, 0.72, 1.0)
        heart.width[:, 0, Q:] *= np.where(tall, 1.25, 1.0)[:, None]
        heart.qrs_time[:, 0] *= np.where(tall, 1.25, 1.0)[:, None]
        self._scale(low, _T, self._uniform(0.10, 0.30))
        self._st(low, -self._uniform(0.07, 0.13)[:, None] * axis, 0.55, 0.32)
        self._set(low, U, self._uniform(0.18, 0.32)[:, None] * axis)


_CHANGES = {
    "LVH": "hypertrophy",
    "CLBBB": "left_bundle",
    "CRBBB": "right_bundle",
    "QWAVE": "q_wave",
    "EL": "electrolytes",
    "DIG": "digitalis",
    "STE_": "st_elevation",
    "STD_": "st_depression",
    "INVT": "t_inversion",
    "1AVB": "long_pr",
}


def _set_voltage(rng: np.random.Generator, heart: Heart, found: Mapping[str, np.ndarray]) -> None:
    """Scale the QRS so that its height is what the labels say.

    Low voltage: at most 0.5 mV from peak to peak in every limb lead and 1 mV in every chest lead. Hypertrophy: Sokolow
    and Lyon's S in V1 plus R in V5 or V6 at least 3.5 mV. Everyone else: at least 0.6 mV in some limb lead and Sokolow
    below 3.3 mV.
    """
    time = np.arange(-0.12, 0.2, 0.004)[:, None]
    beat = np.exp(-0.5 * ((time - heart.qrs_time[:, :1]) / heart.width[:, :1, Q:]) ** 2)
    lead = np.einsum("nte,nej,nlj->nlt", beat, heart.vector[:, 0, _QRS], heart.field)
    derived = np.stack([lead[:, 1] - lead[:, 0], lead[:, 0] - lead[:, 1] / 2, lead[:, 1] - lead[:, 0] / 2], axis=1)
    limb = np.ptp(np.concatenate([lead[:, :2], derived, (lead[:, :1] + lead[:, 1:2]) / 2], axis=1), axis=2).max(axis=1)
    chest = np.ptp(lead[:, 2:], axis=2).max(axis=1)
    sokolow = np.maximum(-lead[:, 2].min(axis=1), 0) + lead[:, 6:].max(axis=(1, 2))
    normal = np.minimum(np.maximum(1.0, 0.6 / limb), 3.3 / np.maximum(sokolow, 1e-6))
    low = rng.uniform(0.65, 0.92, len(limb)) * np.minimum(0.5 / limb, 1.0 / chest)
    high = np.maximum(1.0, rng.uniform(3.9, 5.2, len(limb)) / np.maximum(sokolow, 1e-6))
    factor = np.where(found["LVOLT"], low, np.where(found["LVH"], high, normal))
    heart.vector[:, 0, _QRS] *= factor[:, None, None]
    heart.vector[:, 0, [P1, P2, T1, T2]] *= np.where(found["LVOLT"], 0.65, 1.0)[:, None, None]


def _spread(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    return np.exp(np.clip(sigma * rng.standard_normal(shape), -2.2 * sigma, 2.2 * sigma))


def _rotation(angle: np.ndarray) -> np.ndarray:
    """Rotation matrices [N, 3, 3] from angles [N, 3] in radians about x, then y, then z."""
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.tile(np.eye(3), (3, len(angle), 1, 1))
    for axis in range(3):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn[axis, :, i, i] = turn[axis, :, j, j] = cos[:, axis]
        turn[axis, :, i, j], turn[axis, :, j, i] = -sin[:, axis], sin[:, axis]
    return turn[2] @ turn[1] @ turn[0]
