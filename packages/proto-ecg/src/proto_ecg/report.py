"""The report of explained ECGs: each record beside the training ECGs that decided about it, on ECG paper.

The page itself is written by ``proto_core.explain.report``; here the records are read and drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from proto_core.explain import Comparison, Evidence, Explanation, Picture, ReportSection, render_report
from proto_ecg.data.leads import STANDARD_LEADS
from proto_ecg.drawing import Window, draw_ecg, draw_strip, strongest_leads

__all__ = ["ReportSample", "ecg_report"]

Location = tuple[tuple[int, int], ...] | None
FOOTER = (
    "The large drawings are to scale (25 mm/s, 10 mm/mV) when printed at 100 % in landscape format. The shaded window "
    "is where the prototype matched; a prototype of the whole record has none. For research, not for diagnosis."
)


@dataclass(frozen=True, slots=True, eq=False)
class ReportSample(ReportSection):
    """An explained record.

    Attributes:
        signal: ``[12, L]`` in mV, standard leads; the windows of the explanations count its samples.
        sampling_rate: in Hz.
    """

    signal: Float[np.ndarray, "12 L"] = field(kw_only=True)
    sampling_rate: float = field(kw_only=True)


def ecg_report(
    samples: Sequence[ReportSample],
    *,
    title: str,
    model_info: Mapping[str, str],
    read_case: Callable[[str], tuple[Float[np.ndarray, "12 L"], float]],
    top: int = 3,
) -> str:
    """Write the report of some records.

    Args:
        samples: the explained records.
        title: of the page.
        model_info: shown in the head of the page, such as the model's name.
        read_case: gives signal ``[12, L]`` in mV and sampling rate of a training record; called once per record. A
            record that it cannot read (``OSError``, ``ValueError``, ``LookupError``) is shown as a note.
        top: how many prototypes are shown for each label, for and against.

    Returns:
        HTML: one file, no script, vector graphics.

    Raises:
        ValueError: no sample, a sample without explanation, or a signal that is not ``[12, L]``.

    Example:
        >>> import numpy as np
        >>> from proto_core.explain import Case, Evidence, Explanation
        >>> from proto_ecg.report import ReportSample, ecg_report
        >>> signal = np.zeros((12, 1000), np.float32)
        >>> case = Case("records100/00000/00001_lr", index=0, location=((300, 93),), labels=("NORM",))
        >>> evidence = (Evidence(0, "morphology", ("NORM",), 0.9, 2.0, location=((100, 93),), case=case),)
        >>> found = Explanation("mine", "NORM", logit=1.8, probability=0.86, threshold=0.5, bias=0.0, evidence=evidence)
        >>> sample = ReportSample("mine", (found,), {"age": "56"}, signal=signal, sampling_rate=100)
        >>> html = ecg_report([sample], title="Report", model_info={}, read_case=lambda name: (signal, 100))
        >>> html.count('<svg xmlns="http://www.w3.org/2000/svg" class="ecg"')
        5
    """
    painter = _Painter(read_case)
    return render_report(
        samples,
        title=title,
        metadata=model_info,
        draw_query=painter.query,
        draw_evidence=painter.evidence,
        footer=FOOTER,
        noun="ECG",
        top=top,
    )


class _Painter:
    """Draws the page's pictures in order; each record is read once, and its traces are written once."""

    def __init__(self, read_case: Callable[[str], tuple[np.ndarray, float]]) -> None:
        self.read_case = read_case
        self.cases: dict[str, tuple[np.ndarray, float] | str] = {}
        self.traces: dict[ReportSample | str, str] = {}
        self.drawings = 0

    def query(self, sample: ReportSample) -> Picture:
        image = self._sheet(sample, sample.signal, sample.sampling_rate, sample.sample_id, None)
        seconds = sample.signal.shape[1] / sample.sampling_rate
        return Picture(image, f"ECG {sample.sample_id}, {seconds:.1f} s at {sample.sampling_rate:g} Hz.", wide=True)

    def evidence(self, sample: ReportSample, explanation: Explanation, item: Evidence) -> list[Comparison]:
        del explanation  # the picture of a match is the same for every label
        rate = sample.sampling_rate
        image = self._sheet(sample, sample.signal, rate, sample.sample_id, item.location)
        query = Picture(image, f"This ECG, {_place(item.location, rate)}.", wide=True)
        if item.case is None:
            return [Comparison(query, Picture(None, "No training ECG.", "This prototype was never projected."))]
        name = item.case.sample_id
        found = self._read(name)
        if isinstance(found, str):
            caption = f"Training ECG {name}."
            return [Comparison(query, Picture(None, caption, f"The record could not be read: {found}"))]
        signal, case_rate = found
        image = self._sheet(name, signal, case_rate, name, item.case.location)
        case = Picture(image, f"Training ECG {name}, {_place(item.case.location, case_rate)}.", wide=True)
        ours, theirs = _window(item.location, sample.signal), _window(item.case.location, signal)
        if ours is None or theirs is None:
            return [Comparison(query, case)]
        leads = strongest_leads([(sample.signal, ours), (signal, theirs)])
        first, second = (sample.signal, ours, rate), (signal, theirs, case_rate)
        left, right = (
            draw_strip(x, window, sampling_rate=hz, leads=leads, beside=other, id_prefix=self._next())
            for (x, window, hz), other in ((first, second), (second, first))
        )
        shown = f"the window in {', '.join(leads)}, the leads with the largest waves in it"
        strips = Comparison(Picture(left, f"This ECG: {shown}."), Picture(right, f"Training ECG {name}: {shown}."))
        return [strips, Comparison(query, case)]

    def _sheet(
        self, record: ReportSample | str, signal: np.ndarray, rate: float, title: str, location: Location
    ) -> Markup:
        prefix = self._next()
        windows = () if location is None else location[:1]
        known = self.traces.get(record)
        image = draw_ecg(signal, sampling_rate=rate, title=title, windows=windows, id_prefix=prefix, traces_of=known)
        self.traces.setdefault(record, prefix)
        return image

    def _next(self) -> str:
        self.drawings += 1
        return f"d{self.drawings}"

    def _read(self, name: str) -> tuple[np.ndarray, float] | str:
        """The training record, or why it cannot be had."""
        if name not in self.cases:
            try:
                signal, rate = self.read_case(name)
                if signal.ndim != 2 or len(signal) != len(STANDARD_LEADS) or signal.shape[1] < 2:
                    raise ValueError(f"found shape {signal.shape}, needed [{len(STANDARD_LEADS)} leads, samples]")
                self.cases[name] = (signal, rate)
            except (OSError, ValueError, LookupError) as error:
                self.cases[name] = str(error) or type(error).__name__
        return self.cases[name]


def _window(location: Location, signal: np.ndarray) -> Window | None:
    """The location as a window that shows some of the signal."""
    if location is None or location[0][0] >= signal.shape[1] or sum(location[0]) <= 0:
        return None
    return location[0]


def _place(location: Location, rate: float) -> str:
    if location is None:
        return "whole record"
    start, length = location[0]
    return f"{start / rate:.2f} s to {(start + length) / rate:.2f} s marked"
