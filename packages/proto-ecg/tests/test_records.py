"""One record from disk: standard form, exact numbers, and what every kind of damage gets."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_ecg.data.header import read_header
from proto_ecg.data.labels import (
    PTBXL_ALL,
    PTBXL_DIFFUSE,
    PTBXL_MORPHOLOGY,
    PTBXL_RHYTHM,
    branch_labels,
    read_branches,
)
from proto_ecg.data.leads import STANDARD_LEADS
from proto_ecg.data.records import (
    ECGWarning,
    preprocess_record,
    read_record,
    remove_baseline_wander,
    resolve_record,
)


def write(
    folder: Path,
    name: str = "ecg",
    *,
    fs: float = 100,
    seconds: float = 10,
    leads: tuple[str, ...] = STANDARD_LEADS,
    signal: np.ndarray | None = None,
    unit: str = "mV",
    gain: float = 1000,
    fmt: str = "16",
    comments: list[str] | None = None,
) -> Path:
    """A WFDB record whose lead ``k`` is a sine of ``k + 1`` Hz, by its place in ``leads``."""
    if signal is None:
        t = np.arange(round(seconds * fs)) / fs
        signal = np.sin(2 * np.pi * t[:, None] * (1 + np.arange(len(leads))))
    count = len(leads)
    wfdb.wrsamp(
        name,
        fs,
        [unit] * count,
        list(leads),
        signal,
        fmt=[fmt] * count,
        adc_gain=[gain] * count,
        baseline=[0] * count,
        comments=comments or [],
        write_dir=str(folder),
    )
    return folder / name


def edit_header(path: Path, old: str, new: str, encoding: str = "utf-8") -> None:
    hea = Path(f"{path}.hea")
    text = hea.read_text()
    assert old in text
    hea.write_bytes(text.replace(old, new).encode(encoding))


def test_numbers_are_those_of_wfdb(ptbxl_500: Path) -> None:
    path = ptbxl_500 / "records100/00000/00017_lr"
    expected, fields = wfdb.rdsamp(str(path))
    record = read_record(path, num_samples=1000)
    assert [name.upper() for name in STANDARD_LEADS] == [name.upper() for name in fields["sig_name"]]
    assert np.array_equal(record.signal, expected.T.astype(np.float32))
    assert (record.sampling_rate, record.record_name) == (100, "00017_lr")
    unfiltered = preprocess_record(path, sampling_rate=100, num_samples=1000, remove_baseline=False)
    assert np.array_equal(unfiltered, record.signal)
    filtered = preprocess_record(path, sampling_rate=100, num_samples=1000)
    assert np.array_equal(filtered, remove_baseline_wander(record.signal, 100))
    assert not np.array_equal(filtered, record.signal)


def test_leads_are_found_by_name(tmp_path: Path) -> None:
    shuffled = ("V6", "avr", "II", "AVL", "V1", "I", "aVF", "iii", "V2", "v3", "V5", "V4")
    path = write(tmp_path, leads=shuffled)
    signal = read_record(path).signal
    t = np.arange(1000) / 100
    for row, lead in enumerate(STANDARD_LEADS):
        place = [name.casefold() for name in shuffled].index(lead.casefold())
        assert np.abs(signal[row] - np.sin(2 * np.pi * t * (place + 1))).max() < 1e-3, lead


def test_more_than_twelve_leads_are_fine(tmp_path: Path) -> None:
    path = write(tmp_path, leads=("vx", "vy", "vz", *STANDARD_LEADS))
    t = np.arange(1000) / 100
    assert np.abs(read_record(path).signal[0] - np.sin(2 * np.pi * t * 4)).max() < 1e-3


@pytest.mark.parametrize(("text", "encoding"), [("uV", "utf-8"), ("µV", "utf-8"), ("µV", "latin-1"), ("μV", "utf-8")])
def test_microvolts_become_millivolts(tmp_path: Path, text: str, encoding: str) -> None:
    t = np.arange(1000) / 100
    volts = np.repeat(1500 * np.sin(2 * np.pi * t)[:, None], 12, axis=1)
    path = write(tmp_path, signal=volts, unit="uV", gain=10)
    edit_header(path, "/uV", f"/{text}", encoding)
    assert np.abs(read_record(path).signal - 1.5 * np.sin(2 * np.pi * t)).max() < 1e-3


@pytest.mark.parametrize("fs", [250, 257, 360.0, 500, 1000])
def test_resampling_keeps_the_signal_and_its_time(tmp_path: Path, fs: float) -> None:
    signal = read_record(write(tmp_path, fs=fs), num_samples=1000).signal
    assert signal.shape == (12, 1000)
    t = np.arange(1000) / 100
    expected = np.sin(2 * np.pi * t * (1 + np.arange(12))[:, None])
    assert np.abs(signal - expected)[:, 50:-50].max() < 0.02


def test_resampling_lets_nothing_alias(tmp_path: Path) -> None:
    t = np.arange(5000) / 500
    tone = np.repeat(np.sin(2 * np.pi * 120 * t)[:, None], 12, axis=1)
    signal = read_record(write(tmp_path, fs=500, signal=tone)).signal
    assert np.abs(signal[:, 50:-50]).max() < 0.02  # plain subsampling would leave a 20 Hz sine of height 1


@settings(max_examples=15, deadline=None)
@given(scale=st.floats(0.05, 4), offset=st.floats(-3, 3))
def test_resampling_is_linear_with_an_offset(
    tmp_path_factory: pytest.TempPathFactory, scale: float, offset: float
) -> None:
    t = np.arange(2500) / 250
    wave = np.repeat(np.sin(2 * np.pi * 3 * t)[:, None], 12, axis=1)
    path = write(tmp_path_factory.mktemp("wfdb"), fs=250, signal=scale * wave + offset)
    signal = read_record(path).signal
    assert np.abs(signal - (scale * np.sin(2 * np.pi * 3 * np.arange(1000) / 100) + offset)).max() < 0.05 * scale + 2e-3


def test_long_records_are_cut_after_their_start(tmp_path: Path) -> None:
    path = write(tmp_path, fs=100, seconds=30)
    assert np.array_equal(read_record(path, num_samples=1000).signal, read_record(path).signal[:, :1000])
    resampled = write(tmp_path, "fast", fs=500, seconds=30)
    start, whole = read_record(resampled, num_samples=1000).signal, read_record(resampled).signal
    assert whole.shape == (12, 3000)
    assert np.abs(start - whole[:, :1000]).max() < 1e-3
    with pytest.raises(ValueError, match=r"found 30\.00 s of signal, needed exactly 10\.00 s"):
        read_record(path, num_samples=1000, on_long="error")


def test_short_records_say_what_is_needed(tmp_path: Path) -> None:
    path = write(tmp_path, fs=500, seconds=7.5)
    with pytest.raises(ValueError, match=r"ecg: found 7\.50 s of signal, needed 10\.00 s"):
        read_record(path, num_samples=1000)


def test_formats_and_extensions(tmp_path: Path) -> None:
    wide = read_record(write(tmp_path, "wide", fmt="32", gain=100000))
    narrow = read_record(Path(f"{write(tmp_path, 'narrow', fmt='212')}.hea"))
    assert np.abs(wide.signal - narrow.signal).max() < 2e-3
    assert narrow.record_name == "narrow"


def test_comments_keep_their_letters(tmp_path: Path) -> None:
    path = write(tmp_path, comments=["Dx: x"])
    edit_header(path, "Dx: x", "Überleitung <b>1</b>")
    assert read_record(path).comments == ["Überleitung <b>1</b>"]


def test_length_from_the_file_where_the_header_is_silent(tmp_path: Path) -> None:
    path = write(tmp_path)
    edit_header(path, "ecg 12 100 1000", "ecg 12 100")
    assert read_header(path).num_samples == 1000
    assert read_record(path).signal.shape == (12, 1000)


def test_missing_files(tmp_path: Path) -> None:
    path = write(tmp_path)
    os.unlink(f"{path}.dat")
    with pytest.raises(ValueError, match=r"ecg\.dat: cannot read the signal file"):
        read_record(path)
    with pytest.raises(ValueError, match=r"nothing\.hea: cannot read the header"):
        read_record(tmp_path / "nothing")


@pytest.mark.parametrize("fmt", ["16", "212"])
def test_truncated_signal_file(tmp_path: Path, fmt: str) -> None:
    path = write(tmp_path, fmt=fmt)
    dat = Path(f"{path}.dat")
    whole = dat.read_bytes()
    dat.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"ecg\.dat: found {len(whole) - 100} bytes .* needed {len(whole)} bytes"):
        read_record(path)


def test_damaged_compressed_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path)
    edit_header(path, "ecg.dat 16", "ecg.dat 516")
    with pytest.raises(ValueError, match=r"ecg: cannot decode the record"):
        read_record(path)


def test_other_leads(tmp_path: Path) -> None:
    eight = write(tmp_path, leads=("I", "II", "V1", "V2", "V3", "V4", "V5", "V6"))
    with pytest.raises(ValueError, match=r"ecg\.hea: found the leads .* needed also \['III', 'aVR', 'aVL', 'aVF'\]"):
        read_record(eight)
    renamed = write(tmp_path, "mlii", leads=("I", "MLII", *STANDARD_LEADS[2:]))
    with pytest.raises(ValueError, match=r"needed also \['II'\]"):
        read_record(renamed)
    twice = write(tmp_path, "twice", leads=("I", "i", *STANDARD_LEADS[1:]))
    with pytest.raises(ValueError, match="lead 'I' more than once"):
        read_record(twice)


def test_other_unit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ecg\.hea: found unit 'mmHg' for lead 'I'"):
        read_record(write(tmp_path, unit="mmHg"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ecg 12", "found no sampling rate"),
        ("ecg 12 0 1000", "found sampling rate '0'"),
        ("ecg 12 -100 1000", "found sampling rate '-100'"),
        ("ecg 12 nan 1000", "found sampling rate 'nan'"),
        ("ecg twelve 100 1000", "found the record line"),
        ("ecg", "found the record line"),
        ("ecg 12 100 many", "found 'many' samples"),
        ("ecg 13 100 1000", "found 12 signal lines"),
        ("ecg/3 12 100 1000", "several segments"),
    ],
)
def test_damaged_record_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path)
    edit_header(path, "ecg 12 100 1000", line)
    with pytest.raises(ValueError, match=message) as error:
        read_record(path)
    assert "ecg.hea" in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"\x00\xff\xfe garbage\n\x01", b"# only a comment\n", b"ecg 1 100 1000\nnonsense\n"]
)
def test_header_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ecg.hea").write_bytes(content)
    with pytest.raises(ValueError, match=r"ecg\.hea: found"):
        read_record(tmp_path / "ecg")


def test_signal_file_elsewhere_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    edit_header(path, "ecg.dat", "../ecg.dat")
    with pytest.raises(ValueError, match="the file beside the header"):
        read_record(path)


def test_all_nan_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, "empty", signal=np.full((1000, 12), np.nan))
    with pytest.raises(ValueError, match="empty: found no valid sample in any lead"):
        read_record(path)


def caught(path: Path) -> tuple[np.ndarray, list[ECGWarning]]:
    with warnings.catch_warnings(record=True) as entries:
        warnings.simplefilter("always")
        signal = read_record(path).signal
    return signal, [entry.message for entry in entries if isinstance(entry.message, ECGWarning)]


def test_odd_leads_are_kept_and_warned_about(tmp_path: Path) -> None:
    t = np.arange(1000) / 100
    signal = np.repeat(np.sin(2 * np.pi * t)[:, None], 12, axis=1)
    signal[:, 1] = np.nan
    signal[:, 2] = 0.25
    signal[:, 6] = np.clip(60 * signal[:, 6], -32.767, 32.767)
    signal[100:110, 11] = np.nan
    values, found = caught(write(tmp_path, "odd", signal=signal))
    assert {(entry.kind, entry.leads) for entry in found} == {
        ("missing", ("II",)),
        ("flat", ("III",)),
        ("saturated", ("V1",)),
        ("gaps", ("V6",)),
    }
    assert all(entry.record == str(tmp_path / "odd") and "odd" in str(entry) for entry in found)
    assert (values[1] == 0).all()
    assert np.allclose(values[2], 0.25)
    assert (values[11, 100:110] == 0).all()
    assert np.isfinite(values).all()


def test_a_clean_record_warns_of_nothing(tmp_path: Path) -> None:
    assert caught(write(tmp_path))[1] == []


@pytest.mark.bad_input
def test_arguments_out_of_range(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(ValueError, match="sampling_rate: found 0"):
        read_record(path, sampling_rate=0)
    with pytest.raises(ValueError, match="on_long: found 'tail'"):
        read_record(path, on_long="tail")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cutoff: found 50"):
        remove_baseline_wander(np.zeros((12, 100)), 100, cutoff=50)
    with pytest.raises(ValueError, match="x: found 6 samples, needed more than 6"):
        remove_baseline_wander(np.zeros((12, 6)), 100)


def test_baseline_filter_golden(golden_dir: Path) -> None:
    with np.load(golden_dir / "protoecgnet.npz") as golden:
        np.testing.assert_allclose(
            remove_baseline_wander(golden["bw_input"]), golden["bw_output"], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    "record_id", ["../x", "a/../../x", "/etc/passwd", "\\etc", "C:\\x", "a\\..\\..\\x", "", "a\0b"]
)
def test_ids_do_not_leave_the_root(tmp_path: Path, record_id: str) -> None:
    with pytest.raises(ValueError, match="record id: found"):
        resolve_record(tmp_path, record_id)


def test_links_do_not_leave_the_root(tmp_path: Path) -> None:
    outside = write(tmp_path)
    root = tmp_path / "root"
    (root / "inside").mkdir(parents=True)
    write(root / "inside")
    (root / "folder").symlink_to(tmp_path, target_is_directory=True)
    for extension in ("hea", "dat"):
        (root / f"link.{extension}").symlink_to(f"{outside}.{extension}")
    (root / "half.dat").symlink_to(f"{outside}.dat")
    for record_id in ("folder/ecg", "link", "half"):
        with pytest.raises(ValueError, match="leaves the data folder"):
            resolve_record(root, record_id)
    (tmp_path / "alias").symlink_to(root, target_is_directory=True)
    assert resolve_record(tmp_path / "alias", "inside/ecg") == root.resolve() / "inside" / "ecg"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["..", ".", "a", "b", "/", "\\", "C:"]), min_size=1, max_size=6))
def test_whatever_is_resolved_lies_inside(parts: list[str]) -> None:
    try:
        path = resolve_record("/nowhere/root", "/".join(parts))
    except ValueError:
        return
    assert Path(os.path.normpath(path)).is_relative_to("/nowhere/root")


def test_label_groups(ptbxl_500: Path) -> None:
    codes = pd.read_csv(ptbxl_500 / "scp_statements.csv", index_col=0).index
    assert tuple(codes) == PTBXL_ALL
    assert [len(group) for group in (PTBXL_RHYTHM, PTBXL_MORPHOLOGY, PTBXL_DIFFUSE)] == [16, 52, 3]
    assert set(PTBXL_RHYTHM) | set(PTBXL_MORPHOLOGY) | set(PTBXL_DIFFUSE) == set(PTBXL_ALL)
    assert PTBXL_MORPHOLOGY[:3] == ("NDT", "NST_", "LNGQT")
    assert PTBXL_MORPHOLOGY[-2:] == ("STE_", "PRC(S)")
    assert branch_labels(PTBXL_ALL) == {
        "rhythm": list(PTBXL_RHYTHM),
        "morphology": list(PTBXL_MORPHOLOGY),
        "diffuse": list(PTBXL_DIFFUSE),
    }


def test_branches_of_other_labels(tmp_path: Path) -> None:
    assert branch_labels(["X", "AFIB"]) == {"rhythm": ["X", "AFIB"], "morphology": ["X"], "diffuse": ["X"]}
    assert branch_labels(["AFIB"], {"AFIB": "diffuse"}) == {"diffuse": ["AFIB"]}
    path = tmp_path / "branches.csv"
    path.write_text("code,branch\nX,morphology\n")
    assert branch_labels(["X", "AFIB"], read_branches(path)) == {"rhythm": ["AFIB"], "morphology": ["X"]}


def test_bad_branches(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown SCP code 'Y'"):
        branch_labels(["X"], {"Y": "rhythm"})
    with pytest.raises(ValueError, match="found branch 'shape' for 'X'"):
        branch_labels(["X"], {"X": "shape"})
    with pytest.raises(ValueError, match=r"found \['X'\] more than once"):
        branch_labels(["X", "X"])
    with pytest.raises(ValueError, match="found none"):
        branch_labels([])
    path = tmp_path / "branches.csv"
    path.write_text("code,group\nX,rhythm\n")
    with pytest.raises(ValueError, match=r"branches\.csv: found columns \['code', 'group'\]"):
        read_branches(path)
    path.write_text("code,branch\nX,rhythm\nX,diffuse\n")
    with pytest.raises(ValueError, match="2 rows for 1 codes"):
        read_branches(path)
    with pytest.raises(ValueError, match="cannot read the grouping file"):
        read_branches(tmp_path / "none.csv")
