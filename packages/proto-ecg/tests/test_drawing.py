"""The drawing of an ECG says what the signal says: every point, window and pulse is read back from the picture."""

from __future__ import annotations

import re
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from proto_ecg.data.leads import STANDARD_LEADS
from proto_ecg.drawing import draw_ecg, draw_strip, strongest_leads

SVG = "{http://www.w3.org/2000/svg}"
NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)")


def parse_path(d: str) -> list[np.ndarray]:
    """Absolute points of each sub-path of an ``M x y l dx dy dx dy ...`` (or ``h0``) path."""
    runs = []
    for piece in d.split("M")[1:]:
        head, _, steps = piece.partition("l")
        first = [float(number) for number in NUMBER.findall(head.removesuffix("h0"))]
        moves = [float(number) for number in NUMBER.findall(steps)]
        points = np.array(first + moves).reshape(-1, 2)
        runs.append(points.cumsum(axis=0))
    return runs


def traces(picture: str) -> list[tuple[str, np.ndarray]]:
    """Lead and points ``[n, 2]`` of each panel in order."""
    root = ET.fromstring(picture)
    paths = [path for path in root.iter(f"{SVG}path") if "data-lead" in path.attrib]
    return [(path.attrib["data-lead"], np.concatenate(parse_path(path.attrib["d"]))) for path in paths]


def rectangles(picture: str) -> np.ndarray:
    """``x, y, width, height`` of each marked window."""
    root = ET.fromstring(picture)
    found = [r for r in root.iter(f"{SVG}rect") if r.attrib.get("class") == "window"]
    return np.array([[float(r.attrib[key]) for key in ("x", "y", "width", "height")] for r in found])


def baselines(picture: str) -> list[float]:
    """Where each row's calibration pulse starts."""
    root = ET.fromstring(picture)
    pulses = [path.attrib["d"] for path in root.iter(f"{SVG}path") if path.attrib.get("class") == "calibration"]
    return [float(NUMBER.findall(d)[1]) for d in pulses]


def ecg(length: int = 1000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=0.5, size=(12, length)).astype(np.float32)


@pytest.mark.parametrize(("rate", "length"), [(100, 1000), (500, 5000), (360, 1801), (257, 500)])
def test_every_point_is_the_signal_in_millimetres(rate: int, length: int) -> None:
    signal = ecg(length)
    picture = draw_ecg(signal, sampling_rate=rate)
    rows = baselines(picture)
    assert len(rows) == 4
    bounds = [c * length // 4 for c in range(5)]
    panels = traces(picture)
    assert [name for name, _ in panels] == [*STANDARD_LEADS, "II"]
    for i, (name, points) in enumerate(panels):
        start, stop = (bounds[i // 3], bounds[i // 3 + 1]) if i < 12 else (0, length)
        row = i % 3 if i < 12 else 3
        samples = np.arange(start, stop)
        expected = np.stack(
            [10 + samples / rate * 25, rows[row] - signal[STANDARD_LEADS.index(name), samples] * 10.0], axis=1
        )
        assert points.shape == expected.shape
        np.testing.assert_allclose(points, expected, atol=0.01, rtol=0)


def test_real_record_reads_back_from_its_picture(ptbxl_500: Path) -> None:
    path = min(ptbxl_500.rglob("*_lr.hea"))
    record = wfdb.rdrecord(str(path.with_suffix("")))
    signal = record.p_signal.T.astype(np.float32)
    picture = draw_ecg(signal, sampling_rate=record.fs)
    rows = baselines(picture)
    name, points = traces(picture)[-1]
    np.testing.assert_allclose((rows[3] - points[:, 1]) / 10, signal[STANDARD_LEADS.index(name)], atol=0.001)
    np.testing.assert_allclose((points[:, 0] - 10) / 25, np.arange(signal.shape[1]) / 100, atol=0.0004)


def test_speed_and_gain_scale_the_picture_and_are_printed() -> None:
    signal = ecg()
    picture = draw_ecg(signal, sampling_rate=100, speed=50, gain=5)
    assert "50 mm/s 5 mm/mV" in picture
    points = traces(picture)[-1][1]
    np.testing.assert_allclose(points[:, 0] - points[0, 0], np.arange(1000) / 100 * 50, atol=0.01)
    np.testing.assert_allclose(baselines(picture)[3] - points[:, 1], signal[1] * 5, atol=0.01)


def test_user_units_are_millimetres_of_paper() -> None:
    picture = draw_ecg(np.zeros((12, 1000), np.float32), sampling_rate=100)
    root = ET.fromstring(picture)
    x, y, width, height = (float(number) for number in root.attrib["viewBox"].split())
    assert (x, y, width) == (0, 0, 260)
    assert root.attrib["width"] == "260mm"
    assert root.attrib["height"] == f"{height:g}mm"
    patterns = {p.attrib["id"]: p.attrib for p in root.iter(f"{SVG}pattern")}
    assert {(p["width"], p["height"], p["patternUnits"]) for p in patterns.values()} == {
        ("1", "1", "userSpaceOnUse"),
        ("5", "5", "userSpaceOnUse"),
    }


def test_calibration_pulse_is_one_millivolt_for_200_milliseconds() -> None:
    picture = draw_ecg(np.zeros((12, 1000), np.float32), sampling_rate=100)
    pulse = re.findall(r'class="calibration" d="([^"]+)"', picture)
    assert len(pulse) == 4
    assert all(re.fullmatch(r"M2 [\d.]+h1v-10h5v10h1", d) for d in pulse)
    assert "calibration" not in draw_ecg(np.zeros((12, 1000), np.float32), sampling_rate=100, calibration=False)


def test_window_is_marked_in_each_column_that_shows_a_part_of_it() -> None:
    # 2.2 s to 2.9 s: the end of the first column (to 2.5 s), the start of the second, the rhythm strip
    rects = rectangles(draw_ecg(ecg(), sampling_rate=100, windows=[(220, 70)]))
    assert len(rects) == 3 + 3 + 1
    spans = {(float(x), float(width)) for x, _, width, _ in rects}
    assert spans == {(10 + 55.0, 7.5), (10 + 62.5, 10.0), (10 + 55.0, 17.5)}


def test_windows_are_cut_at_the_record_and_dropped_outside_it() -> None:
    rects = rectangles(draw_ecg(ecg(), sampling_rate=100, windows=[(950, 200), (1000, 50), (-60, 50), (10, 0)]))
    assert len(rects) == 4
    np.testing.assert_allclose(rects[:, 0], 10 + 237.5)
    np.testing.assert_allclose(rects[:, 2], 12.5)


def test_window_lies_over_its_own_row() -> None:
    picture = draw_ecg(ecg(), sampling_rate=100, windows=[(10, 50)])
    for (_, y, _, height), baseline in zip(rectangles(picture), baselines(picture), strict=True):
        assert y < baseline < y + height


def test_gap_breaks_the_path_and_a_lone_sample_stays_visible() -> None:
    signal = np.zeros((12, 1000), np.float32)
    signal[1, 100:200] = np.nan
    signal[1, 150] = 0.5
    signal[1, 990:] = np.inf
    path = next(p for p in re.findall(r'data-lead="II" d="([^"]+)"', draw_ecg(signal, sampling_rate=100)))
    runs = parse_path(path)
    assert [len(run) for run in runs] == [100, 1, 50]
    assert path.count("h0") == 1
    np.testing.assert_allclose(runs[1][0, 0], 10 + 1.5 * 25)
    all_nan = draw_ecg(np.full((12, 100), np.nan, np.float32), sampling_rate=100)
    assert set(re.findall(r'data-lead="[^"]+" d="([^"]*)"', all_nan)) == {""}


def test_picture_grows_for_tall_waves_up_to_a_limit_that_it_tells() -> None:
    signal = np.zeros((12, 1000), np.float32)
    signal[0, 50], signal[1, 60] = 4.0, -4.0
    picture = draw_ecg(signal, sampling_rate=100)
    height = float(ET.fromstring(picture).attrib["viewBox"].split()[3])
    points = np.concatenate([points for _, points in traces(picture)])
    assert points[:, 1].min() > 5
    assert points[:, 1].max() < height - 5
    assert "leaves the picture" not in picture
    signal[0, 50] = 50.0
    huge = draw_ecg(signal, sampling_rate=100)
    assert float(ET.fromstring(huge).attrib["viewBox"].split()[3]) < 300
    assert "leaves the picture" in huge


def test_other_layouts_and_other_lead_sets() -> None:
    signal = ecg()
    twelve = draw_ecg(signal, sampling_rate=100, layout="12x1")
    assert [len(points) for _, points in traces(twelve)] == [1000] * 12
    names = ("A", "B", "C", "D")
    four = draw_ecg(signal[:4], sampling_rate=100, layout="2x2+1", lead_names=names, rhythm_lead="C")
    assert [(name, len(points)) for name, points in traces(four)] == [(n, 500) for n in names] + [("C", 1000)]


def test_names_and_titles_are_escaped_and_cleaned() -> None:
    names = ("<script>alert(1)</script>", 'x" onload="alert(1)', "a\x00b\u202e", *STANDARD_LEADS[3:])
    picture = draw_ecg(ecg(), sampling_rate=100, lead_names=names, rhythm_lead=names[0], title="<b>&\udc80</b>")
    root = ET.fromstring(picture)  # a control character or a raw '<' would be an error
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts[:3] == [names[0], names[1], "a\ufffdb\ufffd"]
    assert "<b>&\ufffd</b>" in texts
    assert not any("onload" in element.attrib for element in root.iter())
    assert "<script" not in picture


def test_ids_are_apart_and_traces_can_be_shown_again() -> None:
    signal = ecg()
    first = draw_ecg(signal, sampling_rate=100, id_prefix="a")
    again = draw_ecg(signal, sampling_rate=100, id_prefix="b", windows=[(0, 50)], traces_of="a")
    ids = re.findall(r'\bid="([^"]+)"', first + again)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", again)) <= set(re.findall(r'\bid="([^"]+)"', again))
    assert '<use href="#a-traces"/>' in again
    assert "a-traces" in ids
    assert len(again) < len(first) / 5
    assert ET.fromstring(first).attrib["viewBox"] == ET.fromstring(again).attrib["viewBox"]


def test_strip_puts_the_window_in_its_middle_and_reads_back() -> None:
    signal = ecg()
    picture = draw_strip(signal, (300, 90), sampling_rate=100, leads=("V1", "V6"))
    rects = rectangles(picture)
    np.testing.assert_allclose(rects[:, 0] + rects[:, 2] / 2, 50.0)
    np.testing.assert_allclose(rects[:, 2], 22.5)
    for name, points in traces(picture):
        samples = np.arange(145, 546)
        np.testing.assert_allclose(points[:, 0], (samples - 145) / 100 * 25, atol=0.01)
        heights = signal[STANDARD_LEADS.index(name), samples] * 10
        np.testing.assert_allclose(points[:, 1] - points[0, 1], heights[0] - heights, atol=0.02)


def test_strip_leaves_empty_paper_beyond_the_record() -> None:
    picture = draw_strip(ecg(), (0, 100), sampling_rate=100, leads=("I",))
    ((_, points),) = traces(picture)
    assert points[0, 0] == pytest.approx(37.5)  # 0.5 s - 2 s of context: 1.5 s of empty paper
    assert len(points) == 251
    assert rectangles(picture)[0, 0] == pytest.approx(37.5)


def lead_names_at(picture: str) -> list[tuple[str | None, float]]:
    texts = ET.fromstring(picture).iter(f"{SVG}text")
    return [(text.text, float(text.attrib["x"])) for text in texts if text.attrib["font-weight"] == "bold"]


def test_lead_names_stand_at_the_start_of_their_panel() -> None:
    names = lead_names_at(draw_ecg(ecg(), sampling_rate=100))
    assert names[0::3] == [("I", 11.0), ("aVR", 73.5), ("V1", 136.0), ("V4", 198.5), ("II", 11.0)]
    assert lead_names_at(draw_strip(ecg(), (0, 90), sampling_rate=100, leads=("V1",))) == [("V1", 1.5)]


def test_strips_beside_each_other_have_the_same_rows() -> None:
    small, tall = ecg(seed=1), 4 * ecg(2500, seed=2)
    left = draw_strip(small, (500, 90), sampling_rate=100, leads=("II",), beside=(tall, (600, 1250), 250))
    right = draw_strip(tall, (600, 1250), sampling_rate=250, leads=("II",), beside=(small, (500, 90), 100))
    assert ET.fromstring(left).attrib["viewBox"] == ET.fromstring(right).attrib["viewBox"]
    np.testing.assert_allclose(rectangles(left)[:, 1], rectangles(right)[:, 1])
    assert ET.fromstring(left).attrib["width"] == "150mm"  # 5 s of window and half a second on either side


def test_strongest_leads_ignore_offsets_gaps_and_what_is_outside_the_window() -> None:
    signal = np.zeros((12, 1000))
    signal[0] = 10.0  # offset only
    signal[3, :100] = 5.0 * np.sin(np.arange(100))  # outside
    signal[5, 500:520], signal[7, 500:520], signal[11, 500:520] = 1.0, -2.0, 0.5
    signal[7, 530] = np.nan
    assert strongest_leads([(signal, (480, 90))]) == ("aVF", "V2", "V6")
    assert strongest_leads([(signal, (480, 90))], k=1) == ("V2",)


def test_strongest_leads_weigh_records_alike() -> None:
    loud, quiet = np.zeros((12, 100)), np.zeros((12, 100))
    loud[0, 50:60], loud[1, 50:60] = 10.0, 9.0
    quiet[2, 50:60] = 0.1
    assert strongest_leads([(loud, (0, 100)), (quiet, (0, 100))], k=1) == ("III",)


@settings(max_examples=30, deadline=None)
@given(
    signal=hnp.arrays(np.float32, (12, 40), elements=st.floats(-5, 5, width=32) | st.just(float("nan"))),
    window=st.tuples(st.integers(-50, 60), st.integers(0, 60)),
)
def test_any_signal_and_window_give_a_well_formed_picture(signal: np.ndarray, window: tuple[int, int]) -> None:
    picture = draw_ecg(signal, sampling_rate=100, windows=[window])
    points = np.concatenate([np.concatenate([np.empty((0, 2)), *parse_path(d)]) for d in trace_data(picture)])
    shown = sum(np.isfinite(signal[i, 10 * (i // 3) : 10 * (i // 3) + 10]).sum() for i in range(12))
    assert len(points) == shown + np.isfinite(signal[1]).sum()
    covered = max(0, min(40, sum(window)) - max(0, window[0]))
    rhythm = [width for _, y, width, _ in rectangles(picture) if y > baselines(picture)[2]]
    assert sum(rhythm) == pytest.approx(covered / 100 * 25, abs=0.01)


def trace_data(picture: str) -> list[str]:
    return re.findall(r'data-lead="[^"]+" d="([^"]*)"', picture)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"signal": np.zeros((11, 100))}, "found shape \\(11, 100\\), needed \\[12 leads"),
        ({"signal": np.zeros((12, 1))}, "2 samples or more"),
        ({"signal": np.zeros(100)}, "signal: found shape"),
        ({"sampling_rate": 0}, "sampling_rate: found 0"),
        ({"speed": float("nan")}, "speed: found nan"),
        ({"gain": -1.0}, "gain: found -1.0"),
        ({"layout": "4x4"}, "layout: found '4x4'"),
        ({"layout": "<b>"}, "layout: found '<b>'"),
        ({"rhythm_lead": "X"}, "rhythm_lead: found 'X', needed one of I, II"),
        ({"id_prefix": 'a"b'}, "id_prefix"),
        ({"traces_of": "1"}, "traces_of"),
    ],
)
def test_bad_input_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_ecg(**{"signal": np.zeros((12, 100)), "sampling_rate": 100, **arguments})


@pytest.mark.parametrize(
    ("window", "leads", "message"),
    [((100, 10), None, "window: found start 100, length 10"), ((0, 10), ("X",), "leads"), ((0, 10), (), "leads")],
)
def test_bad_strip_is_named(window: tuple[int, int], leads: tuple[str, ...] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_strip(np.zeros((12, 100)), window, sampling_rate=100, leads=leads)


@pytest.mark.unchecked
def test_twelve_ecgs_are_drawn_within_half_a_second() -> None:
    signal = ecg(5000)
    draw_ecg(signal, sampling_rate=500)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(12):
            draw_ecg(signal, sampling_rate=500)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5
