"""ECGs on standard paper, as vector graphics: 1 mm and 5 mm grid, 25 mm/s, 10 mm/mV, 3x4 leads and a rhythm strip.

One user unit of the picture is one millimetre of paper, so a printout at full size can be measured with a ruler.
Format: the usual twelve-lead printout (Kligfield et al. 2007, "Recommendations for the standardization and
interpretation of the electrocardiogram, part I"): columns of leads that follow each other in time, the rhythm strip
below, a calibration pulse of 1 mV and 200 ms before each row. Marked windows are drawn between the grid and the trace.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from proto_core.explain.report import plain_text
from proto_ecg.data.leads import STANDARD_LEADS

__all__ = ["draw_ecg", "draw_strip", "strongest_leads"]

Window = tuple[int, int]  # start and length in samples

HEADER = 5.0  # mm above the traces, for the title
FOOTER = 5.0  # mm below them, for speed and gain
PITCH = 25.0  # mm from one row's baseline to the next
ABOVE, BELOW = 15.0, 15.0  # mm kept free over the first baseline and under the last one
OVERFLOW = 60.0  # mm: the picture grows by at most this much for traces that leave it
STRIP_LEADS = 3

MARK = "#0b5fd0"


@dataclass(frozen=True, slots=True)
class _Panel:
    """A stretch of one lead in one row."""

    lead: int
    start: int
    stop: int
    row: int


@dataclass(frozen=True, slots=True)
class _Sheet:
    """A signal laid out on paper; all lengths in mm."""

    signal: np.ndarray
    panels: tuple[_Panel, ...]
    baselines: tuple[float, ...]
    bands: tuple[tuple[float, float], ...]  # of each row: upper edge, height
    origin: float  # where time 0 lies
    mm_per_sample: float
    gain: float
    width: float
    height: float
    leads: tuple[str, ...]  # names of the signal's rows
    names_at: tuple[float, ...]  # where each panel's lead name starts
    name: str  # for screen readers
    title: str | None
    legend: str

    def x(self, sample: float) -> float:
        return self.origin + sample * self.mm_per_sample


def draw_ecg(
    signal: Float[np.ndarray, "leads L"],
    *,
    sampling_rate: float,
    title: str | None = None,
    windows: Sequence[Window] = (),
    lead_names: Sequence[str] = STANDARD_LEADS,
    rhythm_lead: str = "II",
    speed: float = 25.0,
    gain: float = 10.0,
    layout: str = "3x4+1",
    calibration: bool = True,
    id_prefix: str = "ecg",
    traces_of: str | None = None,
) -> Markup:
    """Draw a record as on paper.

    The leads fill the columns from top to bottom; each column shows its own part of the time, so that all columns
    together last as long as the record. Traces may run into the neighbouring row; the picture grows where they would
    leave it. A NaN interrupts the trace.

    Args:
        signal: ``[leads, L]`` in mV.
        sampling_rate: in Hz.
        title: printed above the traces, and the picture's name for screen readers.
        windows: ``(start, length)`` in samples; marked in each row and column that shows a part of them.
        lead_names: of the rows of ``signal``.
        rhythm_lead: the lead of the strip at the bottom.
        speed: of the paper, mm/s.
        gain: mm/mV.
        layout: ``"ROWSxCOLUMNS"``, with ``"+1"`` for the rhythm strip.
        calibration: draw the pulse of 1 mV and 200 ms before each row.
        id_prefix: begins every id in the picture; must differ between the drawings of a page.
        traces_of: the ``id_prefix`` of an earlier drawing on the same page, of the same signal and settings: its traces
            are shown again instead of being written again.

    Returns:
        An ``<svg>`` element.

    Raises:
        ValueError: a signal of another shape than the lead names say, a layout that does not hold the leads, an
            unknown rhythm lead, or a rate, speed or gain that is not above zero.

    Example:
        >>> import numpy as np
        >>> from proto_ecg.drawing import draw_ecg
        >>> picture = draw_ecg(np.zeros((12, 1000), np.float32), sampling_rate=100, windows=[(200, 90)])
        >>> picture.count("<path data-lead="), picture.count('class="window"')
        (13, 7)
    """
    _check(signal, sampling_rate, speed, gain, lead_names, id_prefix, traces_of)
    rows, columns, strip = _parse_layout(layout, len(lead_names))
    if strip and rhythm_lead not in lead_names:
        raise ValueError(f"rhythm_lead: found {rhythm_lead!r}, needed one of {', '.join(lead_names)}")
    length = signal.shape[1]
    bounds = [column * length // columns for column in range(columns + 1)]
    panels = [_Panel(i, bounds[i // rows], bounds[i // rows + 1], i % rows) for i in range(len(lead_names))]
    if strip:
        panels.append(_Panel(list(lead_names).index(rhythm_lead), 0, length, rows))
    count = rows + strip
    up, down = _reach(signal, panels, count, gain)
    high = max(mm - row * PITCH for row, mm in enumerate(up))  # over the first baseline
    low = max(mm - (count - 1 - row) * PITCH for row, mm in enumerate(down))  # under the last one
    above, below = max(ABOVE, _whole_squares(high)), max(BELOW, _whole_squares(low))
    baselines = tuple(HEADER + above + row * PITCH for row in range(count))
    pulse = 0.2 * speed
    origin = _whole_squares(pulse + 4) if calibration else 5.0
    sheet = _Sheet(
        signal=signal,
        panels=tuple(panels),
        baselines=baselines,
        bands=tuple((y - PITCH / 2 + 0.5, PITCH - 1) for y in baselines),
        origin=origin,
        mm_per_sample=speed / sampling_rate,
        gain=gain,
        width=math.ceil(origin + length / sampling_rate * speed),
        height=baselines[-1] + below + FOOTER,
        leads=tuple(lead_names),
        names_at=tuple(origin + panel.start / sampling_rate * speed + 1 for panel in panels),
        name=f"{len(lead_names)}-lead ECG" + (f", {title}" if title else ""),
        title=title,
        legend=_legend(speed, gain, max(high, low)),
    )
    pulses = Markup("")
    if calibration:
        x = sheet.origin - pulse - 4
        pulses = Markup("").join(
            Markup('<path class="calibration" d="M{} {}h1v-{}h{}v{}h1"/>').format(
                _mm(x + 1), _mm(y), _mm(gain), _mm(pulse), _mm(gain)
            )
            for y in baselines
        )
    ticks = "".join(
        f"M{_mm(sheet.x(panel.start))} {_mm(baselines[panel.row] - 3)}v1.5m0 3v1.5"
        for panel in panels
        if panel.start > 0
    )
    pulses += Markup('<path class="columns" d="{}"/>').format(ticks) if ticks else Markup("")
    return _svg(sheet, windows, pulses, id_prefix, traces_of)


def draw_strip(
    signal: Float[np.ndarray, "leads L"],
    window: Window,
    *,
    sampling_rate: float,
    leads: Sequence[str] | None = None,
    span: float = 4.0,
    title: str | None = None,
    beside: tuple[Float[np.ndarray, "leads M"], Window, float] | None = None,
    lead_names: Sequence[str] = STANDARD_LEADS,
    speed: float = 25.0,
    gain: float = 10.0,
    id_prefix: str = "strip",
) -> Markup:
    """Draw a window of a record in a few leads, in the middle of the time around it.

    The window lies in the middle also at the ends of the record (the paper is empty there), so that two strips can be
    compared side by side.

    Args:
        signal: ``[leads, L]`` in mV.
        window: ``(start, length)`` in samples.
        sampling_rate: in Hz.
        leads: names of the leads to draw; by default the three of largest energy in the window.
        span: seconds shown; a long window gets at least half a second on either side.
        title: printed above the traces.
        beside: signal, window and sampling rate of the strip that is shown next to this one: both get the same rows.
        lead_names: of the rows of ``signal``.
        speed: of the paper, mm/s.
        gain: mm/mV.
        id_prefix: begins every id in the picture; must differ between the drawings of a page.

    Returns:
        An ``<svg>`` element.

    Raises:
        ValueError: as :func:`draw_ecg`; an unknown lead; a window outside the record.

    Example:
        >>> import numpy as np
        >>> from proto_ecg.drawing import draw_strip
        >>> signal = np.zeros((12, 1000), np.float32)
        >>> signal[6:9, 500:520] = 1.0
        >>> picture = draw_strip(signal, (480, 90), sampling_rate=100)
        >>> [name for name in ("I", "V1", "V2", "V3") if f'data-lead="{name}"' in picture]
        ['V1', 'V2', 'V3']
    """
    _check(signal, sampling_rate, speed, gain, lead_names, id_prefix, None)
    start, stop = _clip_window(window, signal.shape[1])
    if leads is None:
        leads = strongest_leads([(signal, window)], lead_names=lead_names)
    unknown = [lead for lead in leads if lead not in lead_names]
    if unknown or not leads:
        raise ValueError(f"leads: found {list(leads)}, needed at least one of {', '.join(lead_names)}")
    rows = [list(lead_names).index(lead) for lead in leads]
    strips = [(signal, (start, stop), sampling_rate)]
    if beside is not None:
        strips.append((beside[0], _clip_window(beside[1], beside[0].shape[1]), beside[2]))
    span = max([span, *((last - first) / rate + 1.0 for _, (first, last), rate in strips)])
    stretches = [_stretch(x, bounds, rate, span, rows) for x, bounds, rate in strips]
    reaches = [_reach(x, panels, len(rows), gain) for (x, _, _), (_, panels) in zip(strips, stretches, strict=True)]
    up, down = np.max(reaches, axis=0).tolist()
    begin, panels = stretches[0]
    baselines, bands, edge = [], [], HEADER
    for above, below in zip(up, down, strict=True):
        above, below = max(10.0, _whole_squares(above)), max(5.0, _whole_squares(below))
        baselines.append(edge + above)
        bands.append((edge + 0.5, above + below - 1))
        edge += above + below
    sheet = _Sheet(
        signal=signal,
        panels=panels,
        baselines=tuple(baselines),
        bands=tuple(bands),
        origin=-begin / sampling_rate * speed,
        mm_per_sample=speed / sampling_rate,
        gain=gain,
        width=math.ceil(span * speed),
        height=edge + FOOTER,
        leads=tuple(lead_names),
        names_at=(1.5,) * len(panels),
        name=f"ECG strip of {', '.join(leads)}" + (f", {title}" if title else ""),
        title=title,
        legend=_legend(speed, gain, max(*up, *down)),
    )
    return _svg(sheet, [window], Markup(""), id_prefix, None)


def strongest_leads(
    windows: Sequence[tuple[Float[np.ndarray, "leads _"], Window]],
    *,
    k: int = STRIP_LEADS,
    lead_names: Sequence[str] = STANDARD_LEADS,
) -> tuple[str, ...]:
    """The leads with the largest energy in one window, or on average over windows of several records.

    Energy is the sum of squared deviations from the lead's median in the window, as a share of all leads' energy, so
    that no record outweighs another.

    Args:
        windows: pairs of a signal ``[leads, L]`` in mV and a window ``(start, length)`` in samples.
        k: how many leads.
        lead_names: of the rows of the signals.

    Returns:
        Names in the order of ``lead_names``.

    Raises:
        ValueError: a window outside its record.

    Example:
        >>> import numpy as np
        >>> from proto_ecg.drawing import strongest_leads
        >>> signal = np.outer(np.arange(12), np.sin(np.arange(1000)))
        >>> strongest_leads([(signal, (0, 100))], k=2)
        ('V5', 'V6')
    """
    total = np.zeros(len(lead_names))
    for signal, window in windows:
        start, stop = _clip_window(window, signal.shape[1])
        part = np.nan_to_num(signal[:, start:stop].astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        energy = np.square(part - np.median(part, axis=1, keepdims=True)).sum(axis=1)
        total += energy / max(energy.sum(), np.finfo(np.float64).tiny)
    best = np.argsort(-total, kind="stable")[:k]
    return tuple(lead_names[i] for i in sorted(best.tolist()))


def _check(
    signal: np.ndarray,
    sampling_rate: float,
    speed: float,
    gain: float,
    lead_names: Sequence[str],
    id_prefix: str,
    traces_of: str | None,
) -> None:
    if signal.ndim != 2 or signal.shape[0] != len(lead_names) or signal.shape[1] < 2:
        raise ValueError(f"signal: found shape {signal.shape}, needed [{len(lead_names)} leads, 2 samples or more]")
    for argument, value in (("sampling_rate", sampling_rate), ("speed", speed), ("gain", gain)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{argument}: found {value}, needed a number above 0")
    for argument, text in (("id_prefix", id_prefix), ("traces_of", traces_of)):
        if text is not None and not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", text):
            raise ValueError(f"{argument}: found {text!r}, needed a letter, then letters, digits, '-' or '_'")


def _parse_layout(layout: str, leads: int) -> tuple[int, int, bool]:
    match = re.fullmatch(r"(\d+)x(\d+)(\+1)?", layout)
    if match is None or int(match[1]) * int(match[2]) != leads:
        raise ValueError(f"layout: found {layout!r}, needed 'ROWSxCOLUMNS' or 'ROWSxCOLUMNS+1' for {leads} leads")
    return int(match[1]), int(match[2]), match[3] is not None


def _clip_window(window: Window, length: int) -> tuple[int, int]:
    """First sample and the one after the last, inside the record."""
    start, stop = max(0, window[0]), min(length, window[0] + window[1])
    if start >= stop:
        raise ValueError(f"window: found start {window[0]}, length {window[1]}, needed a part of {length} samples")
    return start, stop


def _stretch(
    signal: np.ndarray, bounds: tuple[int, int], rate: float, span: float, leads: Sequence[int]
) -> tuple[float, tuple[_Panel, ...]]:
    """Where ``span`` seconds around the window begin, in samples, and one panel for each lead."""
    first = sum(bounds) / 2 - span * rate / 2
    begin, end = max(0, math.ceil(first)), min(signal.shape[1], math.floor(first + span * rate) + 1)
    return first, tuple(_Panel(lead, begin, end, row) for row, lead in enumerate(leads))


def _reach(
    signal: np.ndarray, panels: Sequence[_Panel], rows: int, gain: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """How far each row's traces go above and below their baseline, in mm."""
    up, down = [0.0] * rows, [0.0] * rows
    for panel in panels:
        part = signal[panel.lead, panel.start : panel.stop]
        part = part[np.isfinite(part)]
        if len(part):
            up[panel.row] = max(up[panel.row], float(part.max()) * gain)
            down[panel.row] = max(down[panel.row], -float(part.min()) * gain)
    return tuple(up), tuple(down)


def _whole_squares(mm: float) -> float:
    """The length in whole 5 mm squares, with a millimetre to spare, up to the largest picture."""
    return min(5.0 * math.ceil((mm + 1) / 5), OVERFLOW)


def _legend(speed: float, gain: float, reach: float) -> str:
    text = f"{speed:g} mm/s {gain:g} mm/mV"
    return text + " (the trace leaves the picture)" if reach > OVERFLOW else text


def _svg(sheet: _Sheet, windows: Sequence[Window], furniture: Markup, prefix: str, traces_of: str | None) -> Markup:
    width, height = _mm(sheet.width), _mm(sheet.height)
    if traces_of is None:
        paths = Markup("").join(
            Markup('<path data-lead="{}" d="{}"/>').format(plain_text(sheet.leads[panel.lead]), _trace(sheet, panel))
            for panel in sheet.panels
        )
        traces = Markup('<g id="{}-traces">{}</g>').format(prefix, paths)
    else:
        traces = Markup('<use href="#{}-traces"/>').format(traces_of)
    texts = [
        (x, sheet.bands[panel.row][0] + 3, "bold", sheet.leads[panel.lead])
        for x, panel in zip(sheet.names_at, sheet.panels, strict=True)
    ]
    texts += [(1.5, sheet.height - 1.6, "normal", sheet.legend), (1.5, 3.9, "normal", sheet.title or "")]
    words = Markup("").join(
        Markup('<text x="{}" y="{}" font-weight="{}">{}</text>').format(_mm(x), _mm(y), weight, plain_text(text))
        for x, y, weight, text in texts
        if text
    )
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" class="ecg" role="img" aria-labelledby="{p}-name" '
        'width="{w}mm" height="{h}mm" viewBox="0 0 {w} {h}"><title id="{p}-name">{name}</title><defs>'
        '<pattern id="{p}-1mm" width="1" height="1" patternUnits="userSpaceOnUse">'
        '<path d="M0 0H1V1H0Z" fill="none" stroke="#f7cfcf" stroke-width=".12"/></pattern>'
        '<pattern id="{p}-5mm" width="5" height="5" patternUnits="userSpaceOnUse">'
        '<rect width="5" height="5" fill="url(#{p}-1mm)"/>'
        '<path d="M0 0H5V5H0Z" fill="none" stroke="#eda0a0" stroke-width=".24"/></pattern></defs>'
        '<rect width="{w}" height="{h}" fill="#fffafa"/><rect width="{w}" height="{h}" fill="url(#{p}-5mm)"/>'
        '{marks}<g font-family="Helvetica,Arial,sans-serif" font-size="3" fill="#000" '
        'stroke="#fffafa" stroke-width=".7" paint-order="stroke">{words}</g>'
        '<g fill="none" stroke="#000" stroke-width=".3" stroke-linejoin="round" stroke-linecap="round">'
        "{furniture}{traces}</g></svg>"
    ).format(
        p=prefix,
        w=width,
        h=height,
        name=plain_text(sheet.name),
        marks=_marks(sheet, windows),
        furniture=furniture,
        traces=traces,
        words=words,
    )


def _marks(sheet: _Sheet, windows: Sequence[Window]) -> Markup:
    """One rectangle for each window in each panel that shows a part of it."""
    rectangles = []
    for start, length in windows:
        for panel in sheet.panels:
            left, right = max(start, panel.start), min(start + length, panel.stop)
            if left < right:
                top, height = sheet.bands[panel.row]
                rectangles.append(
                    Markup('<rect class="window" x="{}" y="{}" width="{}" height="{}"/>').format(
                        _mm(sheet.x(left)), _mm(top), _mm((right - left) * sheet.mm_per_sample), _mm(height)
                    )
                )
    group = Markup('<g fill="{0}" fill-opacity=".17" stroke="{0}" stroke-width=".25" stroke-opacity=".75">{1}</g>')
    return group.format(MARK, Markup("").join(rectangles)) if rectangles else Markup("")


def _trace(sheet: _Sheet, panel: _Panel) -> str:
    """The panel's path in hundredths of a millimetre: positions are rounded, not steps, so that no error adds up."""
    values = sheet.signal[panel.lead, panel.start : panel.stop].astype(np.float64)
    valid = np.flatnonzero(np.isfinite(values))
    x = np.rint(100 * (sheet.origin + (panel.start + valid) * sheet.mm_per_sample)).astype(np.int64)
    y = np.rint(100 * (sheet.baselines[panel.row] - values[valid] * sheet.gain)).astype(np.int64)
    pieces = []
    for run in np.split(np.arange(len(valid)), np.flatnonzero(np.diff(valid) > 1) + 1):
        if len(run):
            steps = np.stack([np.diff(x[run]), np.diff(y[run])], axis=1).ravel()
            known, where = np.unique(steps, return_inverse=True)
            texts = [_mm(step / 100) for step in known.tolist()]
            line = " ".join([texts[i] for i in where.tolist()])
            pieces.append(f"M{_mm(x[run[0]] / 100)} {_mm(y[run[0]] / 100)}" + (f"l{line}" if line else "h0"))
    return "".join(pieces)


def _mm(value: float) -> str:
    """A length with at most two decimals and no needless character."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    if text in ("-0", "0", ""):
        return "0"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text
