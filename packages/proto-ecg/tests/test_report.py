"""The report of ECGs: each case beside the query with the right window marked, read once, and nothing unescaped."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections import Counter

import numpy as np
import pytest

from proto_core.explain import Case, Evidence, Explanation
from proto_ecg.report import ReportSample, ecg_report

ATTACK = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
SVG = "{http://www.w3.org/2000/svg}"


def signal(seed: int = 0, length: int = 1000) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=0.3, size=(12, length)).astype(np.float32)


def explain(evidence: list[Evidence], label: str = "IMI", bias: float = -0.5, threshold: float = 0.5) -> Explanation:
    logit = bias + math.fsum(item.contribution for item in evidence)
    ordered = tuple(sorted(evidence, key=lambda item: -item.contribution))
    return Explanation("mine", label, logit, 1 / (1 + math.exp(-logit)), threshold, bias, ordered)


def window(prototype: int, weight: float, name: str, start: int = 300, case_start: int = 600) -> Evidence:
    case = Case(name, prototype, ((case_start, 93),), ("IMI", "SR"))
    return Evidence(prototype, "morphology", ("IMI",), 0.8, weight, ((start, 93),), case)


def whole(prototype: int, weight: float, name: str) -> Evidence:
    return Evidence(prototype, "rhythm", ("SR",), 0.6, weight, None, Case(name, prototype, None, ("SR",)))


class Records:
    """Training records by name, counting how often each is read."""

    def __init__(self, **records: tuple[np.ndarray, float] | Exception) -> None:
        self.records = records
        self.reads: Counter[str] = Counter()

    def __call__(self, name: str) -> tuple[np.ndarray, float]:
        self.reads[name] += 1
        record = self.records[name]
        if isinstance(record, Exception):
            raise record
        return record


def report(evidence: list[Evidence], records: Records, **changes: object) -> str:
    values: dict = {"sample_id": "mine", "explanations": (explain(evidence),), "signal": signal(), "sampling_rate": 100}
    sample = ReportSample(**{**values, **changes})
    return ecg_report([sample], title="Report", model_info={"model": "ProtoECGNet"}, read_case=records)


def pictures(html: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r'<svg xmlns="[^"]+" class="ecg".*?</svg>', html, re.S)]


def windows(picture: ET.Element) -> list[tuple[float, float]]:
    return [
        (float(rect.attrib["x"]), float(rect.attrib["width"]))
        for rect in picture.iter(f"{SVG}rect")
        if rect.attrib.get("class") == "window"
    ]


def test_window_is_marked_in_the_query_and_in_the_case() -> None:
    html = report([window(0, 2.0, "a")], Records(a=(signal(1, 2500), 250)))
    top, left_strip, right_strip, query, case = pictures(html)
    assert windows(top) == []
    assert windows(query)[-1] == (10 + 75.0, 23.25)  # 3.00 s and 0.93 s at 100 Hz
    assert windows(case)[-1] == (10 + 60.0, 9.3)  # 600 and 93 samples at 250 Hz
    # both windows in the middle of 4 s of paper
    assert {round(x + width / 2, 1) for x, width in windows(left_strip)} == {50.0}
    assert {round(x + width / 2, 1) for x, width in windows(right_strip)} == {50.0}
    assert "This ECG, 3.00 s to 3.93 s marked." in html
    assert "Training ECG a, 2.40 s to 2.77 s marked." in html


def test_strips_show_the_same_leads_in_rows_of_the_same_height() -> None:
    loud = signal(1)
    loud[9:12, 600:693] *= 20
    _, left, right, *_ = pictures(report([window(0, 2.0, "a")], Records(a=(loud, 100))))
    leads = [[p.attrib["data-lead"] for p in s.iter(f"{SVG}path") if "data-lead" in p.attrib] for s in (left, right)]
    assert leads[0] == leads[1]
    assert len(leads[0]) == 3
    assert left.attrib["viewBox"] == right.attrib["viewBox"]


def test_prototype_of_the_whole_record_marks_nothing_and_says_so() -> None:
    html = report([whole(0, 2.0, "a")], Records(a=(signal(1), 100)))
    assert [windows(picture) for picture in pictures(html)] == [[], [], []]
    assert "This ECG, whole record." in html
    assert "Training ECG a, whole record." in html


def test_each_case_is_read_once_and_its_traces_written_once() -> None:
    records = Records(a=(signal(1), 100), b=(signal(2), 100))
    evidence = [window(0, 2.0, "a"), window(1, 1.0, "a", case_start=100), whole(2, -1.0, "b"), whole(3, -2.0, "a")]
    html = report(evidence, records, explanations=(explain(evidence), explain(evidence, label="SR")))
    assert records.reads == {"a": 1, "b": 1}
    groups = [g.attrib["id"] for picture in pictures(html) for g in picture.iter(f"{SVG}g") if "id" in g.attrib]
    used = [use.attrib["href"][1:] for picture in pictures(html) for use in picture.iter(f"{SVG}use")]
    assert used
    assert set(used) <= set(groups)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    full = [p for p in pictures(html) if float(p.attrib["viewBox"].split()[2]) == 260]
    written = [p for p in full if any("data-lead" in path.attrib for path in p.iter(f"{SVG}path"))]
    assert len(full) == 1 + 2 * 4 * 2
    assert len(written) == 3  # the query, a, b


@pytest.mark.parametrize("error", [ValueError("a.dat: truncated <here>"), OSError("gone"), KeyError("a")])
def test_case_that_cannot_be_read_is_told_and_the_rest_shown(error: Exception) -> None:
    records = Records(a=error, b=(signal(2), 100))
    html = report([window(0, 2.0, "a"), window(1, 1.0, "a"), window(2, 0.5, "b")], records)
    assert html.count("The record could not be read") == 2
    assert "<here>" not in html
    assert records.reads["a"] == 1
    assert len(pictures(html)) == 1 + 1 + 1 + 4


@pytest.mark.bad_input
def test_case_of_another_shape_is_told() -> None:
    html = report([window(0, 2.0, "a")], Records(a=(np.zeros((3, 1000)), 100)))
    assert "The record could not be read: found shape (3, 1000), needed [12 leads, samples]" in html


def test_prototype_without_a_case_is_told() -> None:
    html = report([Evidence(0, "rhythm", ("SR",), 1.0, 1.0)], Records())
    assert "This prototype was never projected." in html


def test_window_outside_a_shorter_case_is_not_drawn() -> None:
    html = report([window(0, 2.0, "a")], Records(a=(signal(1, 500), 100)))
    assert len(pictures(html)) == 3
    assert windows(pictures(html)[2]) == []


def test_sum_and_shown_prototypes_stand_on_the_page() -> None:
    evidence = [window(p, 1.0 + p, "a") for p in range(6)] + [whole(9, -2.0, "a")]
    html = report(evidence, Records(a=(signal(1), 100)))
    logit = -0.5 + 0.8 * 21 - 1.2
    text = re.sub(r"<[^>]+>", " ", html)
    assert re.search(rf"Sum = logit\s+\+{logit:.3f}", text)
    assert re.search(rf"Other 3 prototypes\s+\+{0.8 * 6:.3f}", text)
    assert [int(p) for p in re.findall(r"<b>Prototype (\d+)</b>", html)] == [5, 4, 3, 9]


def test_what_comes_from_files_is_escaped() -> None:
    case = Case(ATTACK, 0, ((5, 50),), (ATTACK,))
    item = Evidence(0, ATTACK, (ATTACK,), 1.0, 2.0, ((5, 50),), case)
    sample = ReportSample(
        ATTACK,
        (explain([item], label=ATTACK),),
        {"comment": ATTACK, ATTACK: "56"},
        (ATTACK,),
        signal=signal(),
        sampling_rate=100,
    )
    for read in (lambda _: (signal(1), 100), Records()):
        html = ecg_report([sample], title=ATTACK, model_info={"model": ATTACK}, read_case=read)
        assert "<script" not in html
        assert "<img" not in html
        assert "&lt;script&gt;" in html
        pictures(html)  # each is well-formed XML


def test_page_needs_nothing_but_itself_and_is_the_same_each_time() -> None:
    evidence = [window(0, 2.0, "a"), whole(1, -1.0, "a")]
    html = report(evidence, Records(a=(signal(1), 100)))
    bare = html.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert re.search(r"https?://|<script|<link|@import|javascript:", bare) is None
    assert all(target.startswith("#") for target in re.findall(r'(?:href|src)="([^"]*)"', html))
    assert html == report(evidence, Records(a=(signal(1), 100)))


@pytest.mark.bad_input
def test_query_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"signal: found shape \(3, 1000\)"):
        report([whole(0, 1.0, "a")], Records(), signal=np.zeros((3, 1000)))
