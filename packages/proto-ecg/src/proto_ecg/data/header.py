"""The text of a WFDB header, checked before anything is decoded.

``wfdb`` decodes the samples; this file reads what ``wfdb`` would guess or drop without a word: a missing sampling rate
(it assumes 250 Hz), ``µV`` (it drops the letter), comments with umlauts, a signal file shorter than the header says.
Format: header(5) of the WFDB Applications Guide.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Header", "SignalSpec", "read_header"]

# Bits of one sample and bytes per sample of every uncompressed WFDB format; the compressed ones have no fixed size.
FORMAT_BITS = {8: 8, 16: 16, 24: 24, 32: 32, 61: 16, 80: 8, 160: 16, 212: 12, 310: 10, 311: 10}
COMPRESSED_BITS = {508: 8, 516: 16, 524: 24}
_BYTES = {8: 1.0, 16: 2.0, 24: 3.0, 32: 4.0, 61: 2.0, 80: 1.0, 160: 2.0, 212: 1.5, 310: 4 / 3, 311: 4 / 3}
_MILLIVOLTS = {"mv": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3}
_FORMAT_FIELD = re.compile(r"(\d+)(?:x(\d+))?(?::\d+)?(?:\+(\d+))?")


@dataclass(frozen=True, slots=True)
class SignalSpec:
    """One signal line of a header.

    Attributes:
        file_name: the signal file, beside the header.
        format: WFDB format number, such as 16 or 212.
        samples_per_frame: samples of this signal in one frame.
        byte_offset: bytes before the first sample.
        unit: as the header writes it; mV where it says nothing (the WFDB default).
        resolution: bits of the analogue-digital converter; 0 where the header does not say.
        zero: the converter's value for the middle of its range.
        lead: the signal's name.
    """

    file_name: str
    format: int
    samples_per_frame: int
    byte_offset: int
    unit: str
    resolution: int
    zero: int
    lead: str

    @property
    def limits(self) -> tuple[int, int] | None:
        """Lowest and highest value that the converter can give, or ``None`` where nobody knows."""
        bits = self.resolution or (FORMAT_BITS | COMPRESSED_BITS).get(self.format, 0)
        return (self.zero - 2 ** (bits - 1), self.zero + 2 ** (bits - 1) - 1) if bits and self.format != 8 else None


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says about its record.

    Attributes:
        path: the record, without extension.
        sampling_rate: frames per second, in Hz.
        num_samples: frames in the signal files; worked out from the file's size where the header does not say.
        says_length: whether the header itself says how many.
        signals: the signal lines.
        comments: the comment lines without ``#``.
    """

    path: Path
    sampling_rate: float
    num_samples: int
    says_length: bool
    signals: tuple[SignalSpec, ...]
    comments: tuple[str, ...]

    def channels(self, leads: tuple[str, ...]) -> list[int]:
        """Where the wanted leads stand, found by name, upper or lower case.

        Raises:
            ValueError: a lead is missing or there twice; names the record and the leads.
        """
        found = [signal.lead for signal in self.signals]
        place: dict[str, list[int]] = {}
        for channel, lead in enumerate(found):
            place.setdefault(lead.casefold(), []).append(channel)
        missing = [lead for lead in leads if lead.casefold() not in place]
        if missing:
            raise ValueError(f"{self.path}.hea: found the leads {found}, needed also {missing}")
        twice = [lead for lead in leads if len(place[lead.casefold()]) > 1]
        if twice:
            raise ValueError(f"{self.path}.hea: found lead {twice[0]!r} more than once, needed each lead once")
        return [place[lead.casefold()][0] for lead in leads]

    def millivolts(self, channels: list[int]) -> list[float]:
        """What each channel's unit is worth in millivolts.

        Raises:
            ValueError: a unit other than mV and µV; names the record, the lead and the unit.
        """
        for channel in channels:
            signal = self.signals[channel]
            if signal.unit.casefold() not in _MILLIVOLTS:
                raise ValueError(
                    f"{self.path}.hea: found unit {signal.unit!r} for lead {signal.lead!r}, needed 'mV' or 'uV'"
                )
        return [_MILLIVOLTS[self.signals[channel].unit.casefold()] for channel in channels]


def read_header(path: Path) -> Header:
    """Read and check ``path.hea`` and the sizes of the signal files that it names.

    Args:
        path: the record without extension.

    Raises:
        ValueError: the header or a signal file is missing, the text is not a WFDB header, the sampling rate is missing
            or not above 0, or a signal file is shorter than the header says. The message names the file.
    """
    hea = Path(f"{path}.hea")
    try:
        content = hea.read_bytes()
    except OSError as error:
        raise ValueError(f"{hea}: cannot read the header ({error.strerror}), needed a WFDB record") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    comments = tuple(line.lstrip("#").strip() for line in lines if line.startswith("#"))
    lines = [line for line in lines if not line.startswith("#")]
    if not lines:
        raise ValueError(f"{hea}: found no record line, needed a WFDB header")
    num_signals, sampling_rate, num_samples = _record_line(hea, lines[0])
    if len(lines) - 1 < num_signals or num_signals == 0:
        raise ValueError(f"{hea}: found {len(lines) - 1} signal lines, needed the {num_signals} of the record line")
    signals = tuple(_signal_line(hea, line) for line in lines[1 : num_signals + 1])
    stored = _stored_samples(hea, signals, num_samples)
    return Header(Path(path), sampling_rate, stored, num_samples > 0, signals, comments)


def _record_line(hea: Path, line: str) -> tuple[int, float, int]:
    """Number of signals, sampling rate and number of samples (0 where it is not said)."""
    fields = line.split()
    if "/" in fields[0]:
        raise ValueError(f"{hea}: found a record of several segments, needed one segment")
    if len(fields) < 2 or not fields[1].isdecimal():
        raise ValueError(f"{hea}: found the record line {line[:80]!r}, needed 'name signals sampling-rate samples'")
    if len(fields) < 3:
        raise ValueError(f"{hea}: found no sampling rate in {line[:80]!r}, needed one in Hz")
    try:
        sampling_rate = float(re.split(r"[/(]", fields[2])[0])
    except ValueError:
        sampling_rate = math.nan
    if not (sampling_rate > 0 and math.isfinite(sampling_rate)):
        raise ValueError(f"{hea}: found sampling rate {fields[2][:40]!r}, needed a number of Hz above 0")
    if len(fields) > 3 and not fields[3].isdecimal():
        raise ValueError(f"{hea}: found {fields[3][:40]!r} samples, needed a whole number")
    return int(fields[1]), sampling_rate, int(fields[3]) if len(fields) > 3 else 0


def _signal_line(hea: Path, line: str) -> SignalSpec:
    fields = line.split(maxsplit=8)
    layout = _FORMAT_FIELD.fullmatch(fields[1]) if len(fields) > 1 else None
    try:
        if layout is None or Path(fields[0]).name != fields[0]:
            raise ValueError
        return SignalSpec(
            file_name=fields[0],
            format=int(layout[1]),
            samples_per_frame=int(layout[2] or 1),
            byte_offset=int(layout[3] or 0),
            unit=fields[2].partition("/")[2] or "mV" if len(fields) > 2 else "mV",
            resolution=int(fields[3]) if len(fields) > 3 else 0,
            zero=int(fields[4]) if len(fields) > 4 else 0,
            lead=fields[8].strip() if len(fields) > 8 else "",
        )
    except ValueError as error:
        raise ValueError(
            f"{hea}: found the signal line {line[:80]!r}, needed 'file format gain …', the file beside the header"
        ) from error


def _stored_samples(hea: Path, signals: tuple[SignalSpec, ...], promised: int) -> int:
    """Frames in the signal files; every file must be as long as the header says."""
    shortest = promised
    for name in dict.fromkeys(signal.file_name for signal in signals):
        inside = [signal for signal in signals if signal.file_name == name]
        file = hea.parent / name
        try:
            size = file.stat().st_size
        except OSError as error:
            raise ValueError(f"{file}: cannot read the signal file ({error.strerror}) that {hea.name} names") from error
        if inside[0].format not in _BYTES:
            continue
        frame = _BYTES[inside[0].format] * sum(signal.samples_per_frame for signal in inside)
        stored = int((size - inside[0].byte_offset) / frame + 1e-9)
        if stored < promised or stored <= 0:
            raise ValueError(
                f"{file}: found {size} bytes ({max(stored, 0)} samples a lead), needed "
                f"{inside[0].byte_offset + math.ceil(frame * promised)} bytes ({promised} samples): it is truncated"
            )
        shortest = promised or (min(shortest, stored) if shortest else stored)
    if not shortest:
        raise ValueError(f"{hea}: found no number of samples, needed one for compressed signals")
    return shortest
