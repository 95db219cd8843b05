"""Generated ECGs: what a label says can be measured in the signal, and the files are PTB-XL's."""

from __future__ import annotations

import ast
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_ecg.data.labels import PTBXL_ALL, branch_labels
from proto_ecg.data.leads import STANDARD_LEADS
from proto_ecg.data.synthetic import DEFAULT_LABELS, SUPPORTED_LABELS, SyntheticECG, generate_ecgs, write_ptbxl

LEAD = {name: i for i, name in enumerate(STANDARD_LEADS)}
RHYTHMS = ("SR", "AFIB", "STACH", "SBRAD")
QUIET = {"noise": 0.0, "baseline_wander": 0.0}


def only(code: str, num_records: int = 64, sampling_rate: int = 500, seed: int = 3) -> SyntheticECG:
    """Records without noise that have this finding and no other; the hearts are the same for every finding."""
    given = {} if code in ("SR", "NORM") else {code: 1.0}
    return generate_ecgs(
        num_records, labels=("SR", code) if code != "SR" else ("SR",), prevalence=given, sampling_rate=sampling_rate,
        seed=seed, **QUIET,
    )  # fmt: skip


def mean_beat(ecgs: SyntheticECG, before: float = 0.35, after: float = 0.45) -> np.ndarray:
    """Median beat of each record around R, [N, 12, samples]."""
    rate = ecgs.sampling_rate
    left, right = round(before * rate), round(after * rate)
    beats = []
    for signal, peaks in zip(ecgs.signals, ecgs.r_peaks, strict=True):
        inside = peaks[(peaks >= left) & (peaks < signal.shape[1] - right)]
        beats.append(np.median([signal[:, r - left : r + right] for r in inside], axis=0))
    return np.stack(beats)


def qrs_width(ecgs: SyntheticECG) -> np.ndarray:
    """Seconds over which the leads together move faster than a tenth of their fastest."""
    beat = mean_beat(ecgs, 0.12, 0.16)
    speed = np.linalg.norm(np.diff(beat, axis=2), axis=1)
    fast = speed > 0.1 * speed.max(axis=1, keepdims=True)
    return (fast.shape[1] - fast[:, ::-1].argmax(axis=1) - fast.argmax(axis=1)) / ecgs.sampling_rate


def level(ecgs: SyntheticECG, seconds: float, lead: str) -> np.ndarray:
    """Median beat's level in mV so long after R, against the PR segment."""
    beat = mean_beat(ecgs)[:, LEAD[lead]]
    zero = beat[:, round((0.35 - 0.065) * ecgs.sampling_rate)]
    return beat[:, round((0.35 + seconds) * ecgs.sampling_rate)] - zero


@pytest.fixture(scope="module")
def normal() -> SyntheticECG:
    return only("NORM")


@pytest.fixture(scope="module")
def mixed() -> SyntheticECG:
    return generate_ecgs(1000, labels=None)


def test_a_record_depends_on_settings_and_number_alone() -> None:
    first, again, longer = generate_ecgs(70), generate_ecgs(70), generate_ecgs(130)
    assert np.array_equal(first.signals, again.signals)
    assert np.array_equal(first.signals, longer.signals[:70])
    assert np.array_equal(first.targets, longer.targets[:70])
    assert all(np.array_equal(a, b) for a, b in zip(first.r_peaks, longer.r_peaks[:70], strict=True))
    assert np.array_equal(first.patient_id, longer.patient_id[:70])
    other = generate_ecgs(70, seed=1)
    assert np.abs(other.signals - first.signals).max() > 0.5
    assert not np.array_equal(first.signals[0], first.signals[64])  # blocks differ


def test_noise_and_rate_leave_the_heart_alone() -> None:
    loud, still = generate_ecgs(8, noise=0.02), generate_ecgs(8, **QUIET)
    fine = generate_ecgs(8, sampling_rate=500, **QUIET)
    assert np.array_equal(loud.targets, still.targets)
    assert np.abs(loud.signals - still.signals).mean() > 0.01
    assert all(np.array_equal(a, b) for a, b in zip(loud.r_peaks, still.r_peaks, strict=True))
    assert np.allclose(fine.signals[:, :, ::5], still.signals, atol=2e-5)


def test_noise_has_the_size_asked_for() -> None:
    still = generate_ecgs(128, sampling_rate=500, **QUIET).signals
    for setting in ({"noise": 0.05, "baseline_wander": 0}, {"noise": 0, "baseline_wander": 0.05}):
        added = generate_ecgs(128, sampling_rate=500, **setting).signals - still
        size = np.median(added[:, LEAD["I"]].std(axis=1)) / np.sqrt(2)  # the difference of two electrodes
        assert 0.8 < size / 0.05 < 1.4
    hum = generate_ecgs(64, sampling_rate=500, powerline=0.05, **QUIET).signals[0, LEAD["I"]] - still[0, LEAD["I"]]
    assert np.abs(np.fft.rfft(hum)).argmax() == 500  # 50 Hz in 10 s


@pytest.mark.parametrize("sampling_rate", [100, 500])
def test_einthoven_and_goldberger(sampling_rate: int) -> None:
    x = generate_ecgs(64, sampling_rate=sampling_rate, noise=0.05, baseline_wander=0.3).signals
    i, ii, iii, avr, avl, avf = (x[:, LEAD[name]] for name in STANDARD_LEADS[:6])
    for law in (i + iii - ii, avr + (i + ii) / 2, avl - (i - iii) / 2, avf - (ii + iii) / 2, avr + avl + avf):
        assert np.abs(law).max() < 3e-6


def test_amplitudes_are_those_of_people(normal: SyntheticECG) -> None:
    beat = mean_beat(normal)
    qrs = beat[:, :, round(0.29 * 500) : round(0.41 * 500)]
    r, s = np.median(qrs.max(axis=2), axis=0), np.median(qrs.min(axis=2), axis=0)
    assert 0.4 < r[LEAD["I"]] < 1.0
    assert 0.9 < r[LEAD["V5"]] < 2.0
    assert -1.5 < s[LEAD["V2"]] < -0.7
    assert r[LEAD["V1"]] < 0.45 < r[LEAD["V4"]]  # R grows across the chest
    p = beat[:, LEAD["II"], round(0.14 * 500) : round(0.26 * 500)].max(axis=1) - beat[:, LEAD["II"], round(0.285 * 500)]
    assert 0.08 < np.median(p) < 0.2
    t = beat[:, LEAD["V4"], round(0.5 * 500) :].max(axis=1)
    assert 0.2 < np.median(t) < 0.7
    assert (beat[:, LEAD["aVR"], round(0.35 * 500)] < 0).mean() > 0.95


def test_heart_rates() -> None:
    for code, low, high in (("SR", 60, 100), ("SBRAD", 35, 60), ("STACH", 100, 155)):
        ecgs = only(code, 128, 100)
        rate = np.array([6000 / np.diff(peaks).mean() for peaks in ecgs.r_peaks])
        assert rate.min() >= low, code
        assert rate.max() <= high, code


def test_r_peaks_lie_on_the_peaks(normal: SyntheticECG) -> None:
    energy = np.linalg.norm(np.diff(normal.signals, axis=2), axis=1)
    for row, peaks in enumerate(normal.r_peaks):
        near = np.stack([energy[row, r - 25 : r + 25].max() for r in peaks if 25 <= r < 4975])
        assert near.min() > 0.5 * energy[row].max()
    assert min(len(peaks) for peaks in normal.r_peaks) >= 9


def test_fibrillation_is_irregular_and_has_no_p_wave(normal: SyntheticECG) -> None:
    fibrillating = only("AFIB")
    irregular = [np.std(np.diff(peaks)) / np.mean(np.diff(peaks)) for peaks in fibrillating.r_peaks]
    regular = [np.std(np.diff(peaks)) / np.mean(np.diff(peaks)) for peaks in normal.r_peaks]
    assert np.median(irregular) > 0.15
    assert np.quantile(irregular, 0.02) > max(regular)

    def p_wave(ecgs: SyntheticECG) -> float:
        """Height in lead II 150 ms before R over 60 ms before R, mean of all beats."""
        heights = []
        for signal, peaks in zip(ecgs.signals[:, LEAD["II"]], ecgs.r_peaks, strict=True):
            slow = peaks[1:][np.diff(peaks) > 300]  # where the last T wave is over
            heights += (signal[slow - 75] - signal[slow - 32]).tolist()
        return float(np.mean(heights))

    assert p_wave(normal) > 0.08
    assert abs(p_wave(fibrillating)) < 0.02


def test_ventricular_beats_come_early_and_broad_with_a_full_pause() -> None:
    sinus, ectopic = only("SR"), only("PVC")
    checked = 0
    for row in range(64):
        early = sorted(set(ectopic.r_peaks[row]) - set(sinus.r_peaks[row]))
        assert early, row
        mean = np.diff(sinus.r_peaks[row]).mean()
        for r in early:
            place = list(ectopic.r_peaks[row]).index(r)
            if 0 < place < len(ectopic.r_peaks[row]) - 1:
                before, after = np.diff(ectopic.r_peaks[row][place - 1 : place + 2])
                assert before < 0.88 * mean
                assert after > 1.1 * mean
                assert abs(before + after - 2 * mean) < 0.25 * mean  # the sinus clock went on
                checked += 1
    assert checked > 50


def test_pr_interval_is_long_in_av_block(normal: SyntheticECG) -> None:
    def peak_before_r(ecgs: SyntheticECG) -> np.ndarray:
        beat = mean_beat(ecgs)[:, LEAD["II"], : round(0.29 * 500)]
        bump = np.array([np.polyval(np.polyfit([0, 1], row[[40, -1]], 1), np.linspace(0, 1, 105)) for row in beat])
        return 0.35 - (40 + (beat[:, 40:] - bump).argmax(axis=1)) / 500

    assert np.median(peak_before_r(normal)) < 0.17
    assert np.median(peak_before_r(only("1AVB"))) > 0.21


def test_bundle_branch_blocks_are_broad_and_late(normal: SyntheticECG) -> None:
    assert np.median(qrs_width(normal)) < 0.105
    for code in ("CLBBB", "CRBBB"):
        assert np.quantile(qrs_width(only(code)), 0.05) >= 0.115, code
    right, left = only("CRBBB"), only("CLBBB")
    assert np.median(level(right, 0.066, "V1")) > 0.3  # R'
    assert np.median(level(right, 0.066, "V6")) < -0.2  # broad S
    assert np.median(level(left, 0.04, "V1")) < -0.5
    assert np.median(level(left, 0.04, "V6")) > 0.5
    assert np.median(level(left, 0.24, "V6")) < -0.05 < 0.05 < np.median(level(left, 0.24, "V1"))  # T against QRS


def test_st_level_has_the_sign_of_the_label(normal: SyntheticECG) -> None:
    up, down = only("STE_"), only("STD_")
    anterior, inferior = (level(up, 0.09, lead) - level(normal, 0.09, lead) for lead in ("V3", "aVF"))
    assert (np.maximum(anterior, inferior) > 0.1).all()
    low = level(up, 0.09, "aVL")[inferior > 0.1]
    assert np.median(low) < -0.05  # reciprocal
    assert np.quantile(level(down, 0.09, "V5"), 0.9) < -0.05
    assert (level(down, 0.09, "aVR") > level(normal, 0.09, "aVR")).all()


def test_t_waves_point_away_in_inversion(normal: SyntheticECG) -> None:
    def deepest(ecgs: SyntheticECG) -> np.ndarray:
        beat = mean_beat(ecgs)[:, [LEAD[lead] for lead in ("I", "II", "aVF", "V3", "V4", "V5")]]
        zero = beat[:, :, [round(0.285 * 500)]]
        return (beat - zero)[:, :, round(0.5 * 500) :].min(axis=(1, 2))

    assert np.quantile(deepest(only("INVT")), 0.9) < -0.15
    assert np.median(deepest(normal)) > -0.1


def test_q_waves_come_first_and_deep(normal: SyntheticECG) -> None:
    def initial(ecgs: SyntheticECG) -> np.ndarray:
        return np.min([level(ecgs, -0.034, lead) for lead in ("aVF", "V2", "V3", "aVL")], axis=0)

    assert np.quantile(initial(only("QWAVE")), 0.9) < -0.15
    assert np.median(initial(normal)) > -0.1


def test_voltages() -> None:
    def heights(code: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        beat = mean_beat(only(code), 0.1, 0.1)
        span = np.ptp(beat, axis=2)
        sokolow = -beat[:, LEAD["V1"]].min(axis=1) + beat[:, LEAD["V5"] :].max(axis=(1, 2))
        return span[:, :6].max(axis=1), span[:, 6:].max(axis=1), sokolow

    limb, chest, _ = heights("LVOLT")
    assert limb.max() < 0.55
    assert chest.max() < 1.1
    limb, _, sokolow = heights("NORM")
    assert limb.min() > 0.5
    assert np.quantile(sokolow, 0.98) < 3.5
    assert np.quantile(heights("LVH")[2], 0.02) > 3.5


def test_diffuse_findings(normal: SyntheticECG) -> None:
    dig, electrolytes = only("DIG"), only("EL")
    scoop, straight = (
        np.min([level(ecgs, 0.15, lead) for lead in ("II", "V4", "V5", "V6")], axis=0) for ecgs in (dig, normal)
    )
    assert np.quantile(scoop, 0.9) < -0.05 < straight.min()
    t = mean_beat(electrolytes)[:, LEAD["V4"], round(0.5 * 500) :].max(axis=1)
    usual = mean_beat(normal)[:, LEAD["V4"], round(0.5 * 500) :].max(axis=1)
    tall = t > 1.3 * usual
    flat = t < 0.9 * usual
    assert tall.sum() > 15
    assert flat.sum() > 15


def test_severity_grades_the_finding() -> None:
    settings = {"labels": ("SR", "CLBBB", "STD_"), "sampling_rate": 500, "seed": 3, **QUIET}
    st, width = [], []
    for severity in (0.01, 0.5, 1.0):
        graded = {"severity": severity, **settings}
        st.append(np.median(level(generate_ecgs(64, prevalence={"STD_": 1.0, "CLBBB": 0.0}, **graded), 0.09, "V5")))
        width.append(np.median(qrs_width(generate_ecgs(64, prevalence={"CLBBB": 1.0}, **graded))))
    assert abs((st[0] - st[1]) / (st[0] - st[2]) - 0.5) < 0.15
    assert st[0] > -0.02
    assert width[0] < 0.105 < width[1] < width[2]


def test_labels_fit_together(mixed: SyntheticECG) -> None:
    has = dict(zip(mixed.label_names, mixed.targets.T.astype(bool), strict=True))
    assert mixed.label_names == SUPPORTED_LABELS
    assert (sum(has[code].astype(int) for code in RHYTHMS) == 1).all()
    others = np.logical_or.reduce([has[code] for code in SUPPORTED_LABELS if code not in ("SR", "NORM")])
    assert np.array_equal(has["NORM"], ~others)
    assert has["STD_"][has["LVH"]].mean() > 2 * has["STD_"][~has["LVH"]].mean()
    assert has["PVC"][has["AFIB"]].mean() > has["PVC"][~has["AFIB"]].mean()
    assert not (has["CLBBB"] & has["CRBBB"]).any()
    assert not (has["LVOLT"] & has["LVH"]).any()
    assert min(column.sum() for column in has.values()) >= 30
    assert 0.15 < has["NORM"].mean() < 0.4


def test_default_labels_reach_every_branch() -> None:
    groups = branch_labels(DEFAULT_LABELS)
    assert set(groups) == {"rhythm", "morphology", "diffuse"}
    assert min(len(group) for group in groups.values()) >= 3
    assert list(DEFAULT_LABELS) == sorted(DEFAULT_LABELS, key=PTBXL_ALL.index)
    assert len(DEFAULT_LABELS) == 15


def test_prevalence_is_obeyed() -> None:
    ecgs = generate_ecgs(2000, duration=3, labels=("SR", "AFIB", "PVC"), prevalence={"AFIB": 0.4, "PVC": 0.0})
    assert np.abs(ecgs.targets.mean(axis=0) - [0.6, 0.4, 0.0]).max() < 0.04


def test_one_patients_records_share_the_heart() -> None:
    ecgs = only("NORM", 128)
    pairs = np.flatnonzero(ecgs.patient_id[::2] == ecgs.patient_id[1::2]) * 2
    assert 4 <= len(pairs) <= 24
    assert np.array_equal(ecgs.age[pairs], ecgs.age[pairs + 1])
    beat = mean_beat(ecgs, 0.06, 0.06)
    apart = np.abs(beat[::2] - beat[1::2]).mean(axis=(1, 2))
    same = np.isin(np.arange(64) * 2, pairs)
    assert apart[same].max() < 0.5 * np.median(apart[~same])


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([50, 100, 125, 250, 360, 500]), st.floats(3, 12), st.integers(1, 5))
def test_shapes_of_any_rate_and_duration(sampling_rate: int, duration: float, num_records: int) -> None:
    ecgs = generate_ecgs(num_records, sampling_rate=sampling_rate, duration=duration)
    samples = round(duration * sampling_rate)
    assert ecgs.signals.shape == (num_records, 12, samples)
    assert ecgs.signals.dtype == np.float32
    assert np.isfinite(ecgs.signals).all()
    assert 0.1 < np.abs(ecgs.signals).max() < 8
    assert ecgs.targets.shape == (num_records, len(DEFAULT_LABELS))
    for peaks in ecgs.r_peaks:
        assert 1 <= len(peaks) <= duration / 0.3
        assert (np.diff(peaks) > 0).all()
        assert 0 <= peaks[0] < peaks[-1] < samples or len(peaks) == 1


def test_two_thousand_records_in_seconds() -> None:
    start = time.perf_counter()
    assert generate_ecgs(2000).signals.shape == (2000, 12, 1000)
    assert time.perf_counter() - start < 15


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_records": 0}, "num_records: found 0"),
        ({"sampling_rate": 49}, "sampling_rate: found 49"),
        ({"sampling_rate": 100.5}, "sampling_rate: found 100.5"),
        ({"duration": 2.9}, "duration: found 2.9"),
        ({"duration": float("nan")}, "duration: found nan"),
        ({"seed": -1}, "seed: found -1"),
        ({"noise": -0.1}, "noise: found -0.1"),
        ({"baseline_wander": float("inf")}, "baseline_wander: found inf"),
        ({"severity": 0}, "severity: found 0"),
        ({"powerline": 0.1}, "powerline: found 0.1 at 100 Hz"),
        ({"labels": ()}, "labels: found none"),
        ({"labels": ("SR", "WPW")}, "labels: found 'WPW'"),
        ({"labels": ("SR", "SR")}, "needed each label once"),
        ({"prevalence": {"LVH": 0.1}}, "prevalence: found 'LVH'"),
        ({"prevalence": {"NORM": 0.1}}, "SR and NORM are what is left"),
        ({"prevalence": {"PVC": 1.1}}, "prevalence: found 1.1 for 'PVC'"),
        ({"prevalence": {"AFIB": 0.6, "STACH": 0.6}}, "rhythms that sum to"),
    ],
)
def test_bad_settings(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_ecgs(**{"num_records": 1, **arguments})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SyntheticECG]:
    ecgs = generate_ecgs(1002, duration=3)
    return write_ptbxl(tmp_path_factory.mktemp("data") / "ecgs", ecgs), ecgs


def test_records_come_back_through_wfdb(written: tuple[Path, SyntheticECG]) -> None:
    folder, ecgs = written
    for i, name in ((0, "00000/00001_lr"), (998, "00000/00999_lr"), (999, "01000/01000_lr")):
        record = wfdb.rdrecord(folder / "records100" / name)
        assert record.fs == 100
        assert record.units == ["mV"] * 12
        assert [lead.upper() for lead in STANDARD_LEADS] == record.sig_name
        assert np.abs(record.p_signal.T - ecgs.signals[i]).max() <= 5.1e-4
        digital = wfdb.rdrecord(folder / "records100" / name, physical=False)
        assert digital.calc_checksum() == record.checksum
        assert digital.d_signal[0].tolist() == record.init_value


def test_tables_are_ptbxl(written: tuple[Path, SyntheticECG]) -> None:
    folder, ecgs = written
    table = pd.read_csv(folder / "ptbxl_database.csv", index_col="ecg_id")
    codes = table.scp_codes.map(ast.literal_eval)
    assert table.index.tolist() == list(range(1, 1003))
    assert all(set(found) == {n for n, t in zip(ecgs.label_names, row) if t} for found, row in zip(codes, ecgs.targets))
    assert all((folder / f"{name}.dat").is_file() for name in table.filename_lr)
    assert table.filename_hr[1] == "records500/00000/00001_hr"
    assert (table.groupby("patient_id").strat_fold.nunique() == 1).all()
    assert table.patient_id.duplicated().any()
    sizes = table.strat_fold.value_counts()
    assert sorted(sizes.index) == list(range(1, 11))
    assert sizes.min() > 80
    statements = pd.read_csv(folder / "scp_statements.csv", index_col=0)
    assert statements.index.tolist() == list(DEFAULT_LABELS)
    assert statements.index[statements.rhythm == 1].tolist() == list(RHYTHMS)


def test_tables_have_the_columns_of_the_real_ones(written: tuple[Path, SyntheticECG], ptbxl_500: Path) -> None:
    folder, _ = written
    for name in ("ptbxl_database.csv", "scp_statements.csv"):
        made, real = pd.read_csv(folder / name), pd.read_csv(ptbxl_500 / name)
        assert made.columns.tolist() == real.columns.tolist()
    made, real = (pd.read_csv(root / "scp_statements.csv", index_col=0) for root in (folder, ptbxl_500))
    same = ["description", "diagnostic", "form", "rhythm", "diagnostic_class", "diagnostic_subclass"]
    pd.testing.assert_frame_equal(made[same], real.loc[made.index, same])


def test_both_rates_are_written(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    ecgs = generate_ecgs(2, sampling_rate=500, duration=4)
    folder = write_ptbxl(tmp_path / "new" / "ecgs", ecgs, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 2), (2, 2)]
    fine = wfdb.rdrecord(folder / "records500/00000/00002_hr")
    coarse = wfdb.rdrecord(folder / "records100/00000/00002_lr")
    assert (fine.fs, coarse.fs, fine.p_signal.shape, coarse.p_signal.shape) == (500, 100, (2000, 12), (400, 12))
    assert np.abs(fine.p_signal.T - ecgs.signals[1]).max() <= 5.1e-4
    assert np.corrcoef(fine.p_signal[::5, 1], coarse.p_signal[:, 1])[0, 1] > 0.98


def test_the_folder_is_whole_or_absent(tmp_path: Path, written: tuple[Path, SyntheticECG]) -> None:
    ecgs = generate_ecgs(3, duration=3)

    def killed(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_ptbxl(tmp_path / "ecgs", ecgs, progress=killed)
    assert list(tmp_path.iterdir()) == []
    first, second = (write_ptbxl(tmp_path / name, ecgs) for name in ("a", "b"))
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(names) == 8
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    with pytest.raises(ValueError, match="folder: found other files"):
        write_ptbxl(tmp_path, ecgs)
    with pytest.raises(ValueError, match="folder: found other files"):
        write_ptbxl(first / "scp_statements.csv", ecgs)
