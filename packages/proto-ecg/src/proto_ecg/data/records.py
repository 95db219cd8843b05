"""One ECG record from disk: decoded by ``wfdb``, put into standard form, and checked.

Standard form: float32 millivolts, leads in the order the caller names (found by NAME, whatever the file's order), one
sampling rate, one length. What cannot be put right is refused with the file's name; what can be used but should be
known (a flat lead) is kept and warned about. Preprocessing of ProtoECGNet (arXiv 2504.08713, section on data): per lead
a first-order Butterworth high-pass at 0.5 Hz, forwards and backwards.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import numpy as np
import wfdb
from jaxtyping import Float
from scipy.signal import butter, filtfilt, resample_poly

from proto_ecg.data.header import Header, read_header
from proto_ecg.data.leads import STANDARD_LEADS

__all__ = ["ECGWarning", "Record", "preprocess_record", "read_record", "remove_baseline_wander", "resolve_record"]

SATURATED_SHARE = 0.01  # of the samples at the converter's limits: short spikes are fine, a clipped lead is not


class ECGWarning(UserWarning):
    """Something about an ECG that is kept but should be known.

    Attributes:
        record: the record, as a path without extension; empty for a warning about a whole data set.
        kind: ``"flat"``, ``"missing"``, ``"saturated"``, ``"gaps"``, or empty.
        leads: the leads concerned.
    """

    def __init__(self, message: str, *, record: str = "", kind: str = "", leads: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.record, self.kind, self.leads = record, kind, leads


@dataclass(frozen=True, slots=True)
class Record:
    """One ECG in standard form.

    Attributes:
        signal: ``[leads, L]`` float32, in mV.
        sampling_rate: in Hz, of ``signal``.
        record_name: the file's name without extension.
        comments: the header's comment lines, as they are (not escaped).
    """

    signal: Float[np.ndarray, "leads L"]
    sampling_rate: int
    record_name: str
    comments: list[str]


def read_record(
    path: str | Path,
    *,
    leads: tuple[str, ...] = STANDARD_LEADS,
    sampling_rate: int = 100,
    num_samples: int | None = None,
    on_long: Literal["crop", "error"] = "crop",
) -> Record:
    """Read one WFDB record and put it into standard form.

    Missing samples (NaN) become 0. Another sampling rate is resampled by a polyphase filter that removes what the new
    rate cannot hold (no aliasing).

    Args:
        path: the record without extension (``.hea`` or ``.dat`` at the end is taken off).
        leads: names of the wanted leads in the wanted order; found in the file by name, upper or lower case.
        sampling_rate: wanted, in Hz.
        num_samples: wanted length at that rate; ``None`` keeps the whole record.
        on_long: what a longer record gets: cut after ``num_samples`` from its start, or an error.

    Warns:
        ECGWarning: a lead is flat, has no sample at all, has gaps, or touches the converter's limits for 1 % of its
            samples or more. The lead is kept.

    Raises:
        ValueError: a missing or truncated file, text that is no WFDB header, missing leads, a unit other than mV and
            µV, no sampling rate, a record that is too short, or one without a single sample in any lead. The message
            names the file, what was found and what is needed.

    Example:
        >>> import tempfile, numpy as np, wfdb
        >>> from proto_ecg.data.leads import STANDARD_LEADS
        >>> from proto_ecg.data.records import read_record
        >>> folder = tempfile.mkdtemp()
        >>> volts = np.sin(np.arange(5000) / 50)[:, None] * np.arange(1, 13)
        >>> names = list(reversed(STANDARD_LEADS))
        >>> wfdb.wrsamp("ecg", 500, ["mV"] * 12, names, volts, fmt=["16"] * 12, write_dir=folder)
        >>> record = read_record(f"{folder}/ecg", sampling_rate=100, num_samples=1000)
        >>> record.signal.shape, round(float(np.ptp(record.signal[0])))
        ((12, 1000), 24)
    """
    path = strip_extension(path)
    if sampling_rate <= 0:
        raise ValueError(f"sampling_rate: found {sampling_rate}, needed a number of Hz above 0")
    if on_long not in ("crop", "error"):
        raise ValueError(f"on_long: found {on_long!r}, needed 'crop' or 'error'")
    header = read_header(path)
    channels = header.channels(leads)
    scale = np.array(header.millivolts(channels))
    ratio = Fraction(sampling_rate) / Fraction(header.sampling_rate).limit_denominator(1000)
    reach = _samples_to_read(header, ratio, sampling_rate, num_samples, on_long)
    digital, physical = _decode(header, channels, reach)
    signal = (physical * scale).T
    _check_leads(header, channels, digital, signal, leads)
    signal = np.nan_to_num(signal, nan=0.0, posinf=0.0, neginf=0.0)
    if ratio != 1:
        signal = resample_poly(signal, ratio.numerator, ratio.denominator, axis=1, padtype="line")
    signal = np.ascontiguousarray(signal[:, :num_samples], dtype=np.float32)
    return Record(signal, sampling_rate, path.name, list(header.comments))


def strip_extension(path: str | Path) -> Path:
    """The record's path without ``.hea`` or ``.dat``."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".hea", ".dat") else path


def _samples_to_read(header: Header, ratio: Fraction, sampling_rate: int, num_samples: int | None, on_long: str) -> int:
    """How many of the file's samples the wanted length needs, with what the resampling filter sees behind the end."""
    if num_samples is None:
        return header.num_samples
    found, needed = header.num_samples / header.sampling_rate, num_samples / sampling_rate
    resampled = math.ceil(header.num_samples * ratio)
    if resampled < num_samples:
        raise ValueError(f"{header.path}: found {found:.2f} s of signal, needed {needed:.2f} s")
    if resampled > num_samples and on_long == "error":
        raise ValueError(f"{header.path}: found {found:.2f} s of signal, needed exactly {needed:.2f} s")
    margin = 0 if ratio == 1 else math.ceil(10 * max(1 / ratio, Fraction(1))) + 1
    return min(header.num_samples, math.ceil(num_samples / ratio) + margin)


def _decode(header: Header, channels: list[int], samples: int) -> tuple[np.ndarray, np.ndarray]:
    """The channels' first samples ``[L, leads]`` as the converter wrote them, and in the header's units."""
    name = str(header.path.absolute())
    last = samples if header.says_length else None  # wfdb takes no end for a record of unstated length
    try:
        record: Any = wfdb.rdrecord(name, sampto=last, channels=channels, physical=False)
        digital = record.d_signal.copy()
        record.dac(inplace=True)
        physical = record.p_signal
    except Exception as error:  # a damaged file makes wfdb raise whatever its parser stumbles over
        raise ValueError(f"{header.path}: cannot decode the record ({type(error).__name__}: {error})") from error
    if len(physical) < samples:
        raise ValueError(f"{header.path}: found {len(physical)} samples a lead, needed {samples}")
    return digital[:samples], physical[:samples]


def _check_leads(
    header: Header, channels: list[int], digital: np.ndarray, signal: np.ndarray, leads: tuple[str, ...]
) -> None:
    """Refuse a record without samples; warn about leads that are empty, flat, clipped or have gaps."""
    invalid = ~np.isfinite(signal)
    missing = invalid.all(axis=1)
    if missing.all():
        raise ValueError(f"{header.path}: found no valid sample in any lead, needed a signal")
    gaps = invalid.any(axis=1) & ~missing
    flat = np.where(invalid, -np.inf, signal).max(axis=1) == np.where(invalid, np.inf, signal).min(axis=1)
    bounds = np.array([header.signals[channel].limits or (-np.inf, np.inf) for channel in channels])
    # the lowest value of a format means "no sample", so a clipped lead stops one above it
    touching = (digital <= bounds[:, 0] + 1) | (digital >= bounds[:, 1])
    saturated = ((touching & ~invalid.T).mean(axis=0) >= SATURATED_SHARE) & ~flat
    for kind, mask in (("missing", missing), ("flat", flat), ("saturated", saturated), ("gaps", gaps)):
        if mask.any():
            named = tuple(lead for lead, hit in zip(leads, mask, strict=True) if hit)
            text = f"{header.path}: {PROBLEMS[kind]}: {', '.join(named)}"
            warnings.warn(ECGWarning(text, record=str(header.path), kind=kind, leads=named), stacklevel=3)


PROBLEMS: dict[str, str] = {
    "missing": "a lead without a single sample, kept as zeros",
    "flat": "a flat lead, kept",
    "saturated": "a lead at the converter's limits, kept",
    "gaps": "a lead with missing samples, set to 0",
}


def remove_baseline_wander(
    x: Float[np.ndarray, "*shape L"], sampling_rate: int = 100, cutoff: float = 0.5, order: int = 1
) -> Float[np.ndarray, "*shape L"]:
    """Take slow drift out of a signal: Butterworth high-pass, forwards and backwards, so that no wave is shifted.

    Args:
        x: ``[..., L]``; computed in float64, given back in its own floating type.
        sampling_rate: in Hz.
        cutoff: in Hz.
        order: of the filter, before it is run twice.

    Raises:
        ValueError: the cutoff is not between 0 and half the sampling rate, or the signal is shorter than the filter's
            padding (``3 * (order + 1)`` samples).

    Example:
        >>> import numpy as np
        >>> from proto_ecg.data.records import remove_baseline_wander
        >>> t = np.arange(1000) / 100
        >>> drift = remove_baseline_wander(2 + np.sin(2 * np.pi * 0.05 * t))
        >>> bool(np.abs(drift[200:800]).max() < 0.05)
        True
    """
    if not 0 < cutoff < sampling_rate / 2:
        raise ValueError(f"cutoff: found {cutoff} Hz, needed more than 0 and less than {sampling_rate / 2} Hz")
    if x.shape[-1] <= 3 * (order + 1):
        raise ValueError(f"x: found {x.shape[-1]} samples, needed more than {3 * (order + 1)}")
    numerator, denominator = butter(order, cutoff / (sampling_rate / 2), "highpass")
    filtered = filtfilt(numerator, denominator, x.astype(np.float64), axis=-1)
    return filtered.astype(x.dtype if np.issubdtype(x.dtype, np.floating) else np.float64)


def preprocess_record(
    path: str | Path, *, sampling_rate: int, num_samples: int, remove_baseline: bool = True
) -> Float[np.ndarray, "12 L"]:
    """A record as the model sees it: standard form, and without baseline wander where that was asked for.

    The cache and the explanation of a single record both go through here.

    Args:
        path: the record without extension.
        sampling_rate: the model's, in Hz.
        num_samples: the model's input length.
        remove_baseline: take slow drift out, as :func:`remove_baseline_wander` does by default.

    Returns:
        ``[12, num_samples]`` float32, in mV.

    Raises:
        ValueError: as :func:`read_record`.
    """
    signal = read_record(path, sampling_rate=sampling_rate, num_samples=num_samples).signal
    return remove_baseline_wander(signal, sampling_rate) if remove_baseline else signal


def resolve_record(root: str | Path, record_id: str) -> Path:
    """The path of a record of a data set, which must lie inside the data set's folder.

    A checkpoint names the training records behind its prototypes. A checkpoint comes from elsewhere: its names must not
    reach other files of the machine.

    Args:
        root: the data set's folder.
        record_id: the record's path relative to ``root``, without extension, with ``/``.

    Raises:
        ValueError: the id is empty, absolute, contains ``..``, or leads out of ``root`` through a symbolic link.

    Example:
        >>> import tempfile
        >>> from proto_ecg.data.records import resolve_record
        >>> resolve_record(tempfile.gettempdir(), "records100/00000/00001_lr").name
        '00001_lr'
    """
    root = Path(root).resolve()
    path = join_record(root, record_id)
    files = (path, Path(f"{path}.hea"), Path(f"{path}.dat"))
    if not all(file.resolve().is_relative_to(root) for file in files):
        raise ValueError(f"record id: found {record_id!r}, which leaves the data folder {root}")
    return path


def join_record(root: Path, record_id: str) -> Path:
    """The path that an id spells, without looking at the disk.

    Raises:
        ValueError: the id is empty, absolute, or contains ``..``.
    """
    parts = PurePosixPath(record_id.replace("\\", "/")).parts
    if not parts or "\0" in record_id:
        raise ValueError(f"record id: found {record_id!r}, needed a path relative to {root}")
    if PureWindowsPath(record_id).drive or record_id[0] in "/\\" or ".." in parts:
        raise ValueError(f"record id: found {record_id!r}, which leaves the data folder {root}")
    return root.joinpath(*parts)
