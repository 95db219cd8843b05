"""Diagnosis codes and files of the phenotype analysis: ICD codes, maps, rollup, the matrix of cases, admissions."""

import numpy as np
import pandas as pd
import pytest

from proto_ecg.phenotypes import (
    diagnosis_matrix,
    link_admissions,
    load_diagnoses,
    load_phecode_map,
    load_rollup_map,
    map_to_phecodes,
    normalize_icd,
    phecode_matrix,
)


@pytest.mark.parametrize(
    ("code", "version", "normal"),
    [
        ("I4891", 10, "I48.91"),
        (" i48.0 ", 10, "I48.0"),
        ("I10", 10, "I10"),
        ("42731", 9, "427.31"),
        ("V4501", 9, "V45.01"),
        ("E8790", 9, "E879.0"),
        ("E879", 9, "E879"),
        ("E119", 10, "E11.9"),
        ("0389", 9, "038.9"),
    ],
)
def test_icd_codes_get_their_dot(code, version, normal):
    assert normalize_icd(code, version) == normal


def test_other_icd_versions_are_refused():
    with pytest.raises(ValueError, match="version: found 11, needed 9 or 10"):
        normalize_icd("I48", 11)


MAP = """vocabulary_id,code,phecode
ICD10CM,I48.91,427.21
ICD10CM,I48.0,427.21
ICD9CM,427.31,427.21
ICD10CM,I50.9,428.1
ICD10CM,A41.9,038
ICD10CM,A41.9,994.2
ICD10CM,Z00.0,
ICD10CM,N17.9,585.1
ICD10CM,I21.4,411.2
ICD10CM,E11.9,250.2
ICD10CM,E10.2,250.41
"""
ROLLUP = """code,phecode_unrolled
427.21,427.21
427.21,427.2
427.21,427
428.1,428.1
428.1,428
038,038
994.2,994.2
250.41,250.41
250.41,250.4
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "map.csv").write_text(MAP)
    (tmp_path / "rollup.csv").write_text(ROLLUP)
    return tmp_path


def test_map_of_three_columns(files):
    found = load_phecode_map(files / "map.csv")
    assert found["ICD10CM", "I48.91"] == found["ICD9CM", "427.31"] == {"427.21"}
    assert found["ICD10CM", "A41.9"] == {"038", "994.2"}
    assert not found.get(("ICD10CM", "Z00.0"))


def test_map_of_eight_columns_in_cp1252(tmp_path):
    header = "icd10cm,icd10cm_str,phecode,phecode_str,exclude_range,exclude_name,leaf,rollup"
    rows = ["I48.91,Flutter – unspecified,427.21,Atrial fibrillation,426-427.99,x,1,1", "M35.2,Behçet,008,b,1-9,x,1,1"]
    (tmp_path / "icd10.csv").write_bytes("\n".join([header, *rows]).encode("cp1252"))
    found = load_phecode_map(tmp_path / "icd10.csv")
    assert found == {("ICD10CM", "I48.91"): {"427.21"}, ("ICD10CM", "M35.2"): {"008"}}


def test_files_with_other_columns_are_named(tmp_path):
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    for load in (load_phecode_map, load_rollup_map):
        with pytest.raises(ValueError, match=r"bad\.csv.*found columns \['a', 'b'\]"):
            load(tmp_path / "bad.csv")
        with pytest.raises(ValueError, match="no such file"):
            load(tmp_path / "none.csv")


def test_rollup_follows_the_file_and_not_the_decimals(files):
    mapped, rollup = load_phecode_map(files / "map.csv"), load_rollup_map(files / "rollup.csv")
    codes, vocabularies = ["I48.91", "E10.2", "X99"], ["ICD10CM"] * 3
    assert map_to_phecodes(codes, vocabularies, mapped, rollup) == [
        {"427.21", "427.2", "427"},
        {"250.41", "250.4"},
        set(),
    ]
    assert map_to_phecodes(codes, vocabularies, mapped) == [{"427.21"}, {"250.41"}, set()]


def test_matrix_counts_dates_and_keeps_unmapped_persons(files):
    mapped = load_phecode_map(files / "map.csv")
    persons, codes = ["b", "b", "a", "a"], ["I48.91", "I48.0", "I50.9", "I50.9"]
    arguments = (persons, codes, ["ICD10CM"] * 4, mapped)
    people, names, matrix = phecode_matrix(*arguments, all_persons=["c", "a", "b"])
    assert (people, names) == (["a", "b", "c"], ["427.21", "428.1"])
    assert matrix.tolist() == [[0, 1], [1, 0], [0, 0]]
    assert matrix.dtype == np.int8
    *_, twice = phecode_matrix(*arguments, min_count=2)
    assert twice.tolist() == [[0, 1], [1, 0]]
    *_, dated = phecode_matrix(*arguments, dates=["d1", "d2", "d1", "d1"], min_count=2)
    assert dated.tolist() == [[0, 0], [1, 0]]


def test_examples_from_padded_codes_without_dots(files):
    mapped = load_phecode_map(files / "map.csv")
    expected = {
        "i4891 ": "427.21",
        "I480": "427.21",
        "I509": "428.1",
        "N179": "585.1",
        "I214": "411.2",
        "E119": "250.2",
    }
    codes = [normalize_icd(code, 10) for code in expected]
    assert map_to_phecodes(codes, ["ICD10CM"] * 6, mapped) == [{phecode} for phecode in expected.values()]
    assert map_to_phecodes([normalize_icd("42731", 9)] * 2, ["ICD9CM", "ICD10CM"], mapped) == [{"427.21"}, set()]


def test_phecodes_are_strings_and_one_code_counts_once_per_ancestor():
    mapped = {("ICD10CM", "A"): {"008", "8"}, ("ICD10CM", "B"): {"8.1", "8.2"}}
    rollup = {"8.1": {"8.1", "8"}, "8.2": {"8.2", "8"}}
    arguments = (["p", "p"], ["A", "B"], ["ICD10CM"] * 2, mapped, rollup)
    _, names, matrix = phecode_matrix(*arguments)
    assert (names, matrix.tolist()) == (["008", "8", "8.1", "8.2"], [[1, 1, 1, 1]])
    assert phecode_matrix(*arguments, min_count=2)[2].tolist() == [[0, 1, 0, 0]]
    assert phecode_matrix(*arguments, min_count=3)[2].tolist() == [[0, 0, 0, 0]]
    assert mapped["ICD10CM", "B"] == {"8.1", "8.2"}


@pytest.mark.bad_input
def test_matrix_takes_arrays_and_series_of_any_index():
    """Series are not of the annotated type, yet what people pass."""
    codes, mapped = pd.Series(["A", "A"], index=[7, 9]), {("ICD9CM", "A"): {"1"}}
    people, _, matrix = phecode_matrix(
        pd.Series(["p", "p"], index=[7, 9]),
        codes,
        ["ICD9CM"] * 2,
        mapped,
        dates=pd.Series(["2020", "2021"], index=[7, 9]),
        min_count=2,
        all_persons=np.array(["q", "p"]),
    )
    assert (list(people), matrix.tolist()) == (["p", "q"], [[1], [0]])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: map_to_phecodes(["A", "B"], ["ICD9CM"], {}), "vocabularies: found 1, needed 2"),
        (lambda: phecode_matrix(["p"], ["A", "B"], ["ICD9CM"] * 2, {}), "found 1, 2 and none, needed as many"),
        (lambda: phecode_matrix(["p"], ["A"], ["ICD9CM"], {}, dates=[]), "found 1, 1 and 0, needed as many"),
        (lambda: phecode_matrix(["p"], ["A"], ["ICD9CM"], {}, min_count=0), "min_count: found 0, needed at least 1"),
        (lambda: normalize_icd("  ", 10), "code: found nothing, needed an ICD code"),
        (lambda: normalize_icd("I48", "10"), "version: found '10', needed 9 or 10"),
    ],
)
def test_bad_codes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_odd_files_are_read_or_named(tmp_path):
    path = tmp_path / "map.csv"
    path.write_bytes('\ufeffICD10CM,"Phecode",icd10cm_str\r\n a00 ,008,"a, b"\r\nB00,8\r\n\r\nC00\r\n'.encode())
    assert load_phecode_map(path) == {("ICD10CM", "A00"): {"008"}, ("ICD10CM", "B00"): {"8"}}
    path.write_text("icd10cm,icd10cm_str,phecode\nA00,one\x0bcell\u2028of text,008\n", encoding="utf-8")
    assert load_phecode_map(path) == {("ICD10CM", "A00"): {"008"}}
    for load, columns in (
        (load_phecode_map, "vocabulary_id,code,phecode"),
        (load_rollup_map, "code,phecode_unrolled"),
    ):
        path.write_text(f'{columns}\n"{"x" * 200_000}')
        with pytest.raises(ValueError, match=r"map\.csv': found a line that is not CSV .*needed comma"):
            load(path)
        path.write_text("")
        with pytest.raises(ValueError, match=r"map\.csv': the file is empty"):
            load(path)


def test_admissions_include_their_ends_and_share_no_patients():
    records = pd.DataFrame(
        {
            "subject_id": [1, 1, 1, 2, 2, 3],
            "study_id": [13, 12, 11, 21, 22, 31],
            "ecg_time": [
                "2020-01-01",
                "2020-01-01",
                "2020-01-05 00:00:00",
                "2020-01-01",
                "2020-01-05 00:00:01",
                "2020-01-06",
            ],
            "path": list("abcdef"),
        }
    )
    admissions = pd.DataFrame(
        {
            "subject_id": [1, 1, 2, 3],
            "hadm_id": [100, 101, 200, 300],
            "admittime": ["2020-01-01", "2020-01-05", "2020-01-02", "2020-01-03"],
            "dischtime": ["2020-01-04", "2020-01-09", "2020-01-05", "2020-01-06"],
        }
    )
    diagnoses = pd.DataFrame({"hadm_id": [100, 101, 200, 300], "icd_code": list("ABCD"), "icd_version": [9] * 4})
    found = link_admissions(records, admissions, diagnoses)
    # study 12 before 13 by number, both at the hour of admission; 31 at that of discharge; patient 2 has none inside
    assert found[["hadm_id", "study_id", "icd_code", "path"]].values.tolist() == [
        [100, 12, "A", "b"],
        [101, 11, "B", "c"],
        [300, 31, "D", "f"],
    ]
    assert list(found.columns) == [*records.columns, "hadm_id", "icd_code", "icd_version"]


def test_ecgs_belong_to_the_admission_they_lie_in():
    records = pd.DataFrame(
        {
            "subject_id": [1, 1, 1, 2],
            "study_id": [10, 11, 12, 20],
            "ecg_time": ["2020-01-02 10:00", "2020-01-02 09:00", "2020-03-01", "2020-01-02"],
        }
    )
    admissions = pd.DataFrame(
        {"subject_id": [1, 2], "hadm_id": [100, 200], "admittime": ["2020-01-01"] * 2, "dischtime": ["2020-01-05"] * 2}
    )
    diagnoses = pd.DataFrame({"hadm_id": [100, 100, 300], "icd_code": ["I4891", "I10", "X"], "icd_version": [10] * 3})
    found = link_admissions(records, admissions, diagnoses)
    assert found["study_id"].tolist() == [11, 11]  # the first of admission 100; 200 has no diagnosis, 12 no admission
    assert found["icd_code"].tolist() == ["I4891", "I10"]
    with pytest.raises(ValueError, match=r"admissions: found columns .* needed also"):
        link_admissions(records, admissions.drop(columns="dischtime"), diagnoses)


def test_diagnoses_of_any_form(tmp_path, files):
    path = tmp_path / "d.csv"
    path.write_text("record,icd_code,icd_version\nr1,I4891,10\nr2,,10\nr3,42731,9\n")
    names, matrix = diagnosis_matrix(
        load_diagnoses(path), ["r3", "r2", "r1"], by="record", phecode_map=files / "map.csv"
    )
    assert (names, matrix.tolist()) == (["427.21"], [[1], [0], [1]])
    with pytest.warns(UserWarning, match="no phecode map"):
        names, matrix = diagnosis_matrix(load_diagnoses(path), ["r1", "r3"], by="record")
    assert (names, matrix.tolist()) == (["ICD10CM I48", "ICD9CM 427"], [[1, 0], [0, 1]])
    path.write_text("patient_id,diagnosis\n7,amyloidosis\n8,\n")
    names, matrix = diagnosis_matrix(load_diagnoses(path), ["7", "8"], by="patient_id")
    assert (names, matrix.tolist()) == (["amyloidosis"], [[1], [0]])


def test_columns_of_diagnoses_that_are_complete_win(tmp_path):
    table = pd.DataFrame({"record": ["r1"], "icd_code": ["I10"], "diagnosis": ["hypertension"]})
    assert diagnosis_matrix(table, ["r1"], by="record")[0] == ["hypertension"]


@pytest.mark.filterwarnings("ignore:no phecode map")
@pytest.mark.parametrize(
    ("change", "by", "message"),
    [
        ({}, "patient_id", "found columns .*'record'.*needed 'patient_id'"),
        ({"icd_version": ["10", "11"]}, "record", "found icd_version '11', needed 9 or 10"),
        ({"icd_version": None}, "record", "found columns .*needed 'record' and one of"),
        ({"record": ["x", "y"]}, "record", "no outcome for any of the 2 persons; does the column 'record' match"),
    ],
)
def test_diagnoses_that_do_not_fit_are_named(change, by, message):
    table = pd.DataFrame({"record": ["r1", "r2"], "icd_code": ["I10", "I48"], "icd_version": ["10", "10"]} | change)
    table = table.dropna(axis=1)
    with pytest.raises(ValueError, match=message):
        diagnosis_matrix(table, ["r1", "r2"], by=by)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("record,phecode\nr1,427,\n", "cannot be read as CSV"),
        ("record,phecode\nr1,427\nr2,427,1\n", "cannot be read as CSV"),
        ("a,diagnosis\n1,2\n", "needed 'record' or 'patient_id'"),
        ("record,code\n1,2\n", "needed 'phecode', or 'icd_code' and 'icd_version', or 'diagnosis'"),
        ("record,diagnosis\n", "has no row"),
    ],
)
def test_bad_diagnoses_are_named(tmp_path, text, message):
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_diagnoses(tmp_path / "d.csv")
    assert "d.csv" in str(error.value)
