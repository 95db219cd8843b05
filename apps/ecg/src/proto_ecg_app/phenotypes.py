"""``proto-ecg phenotypes``: what the prototypes of a trained network say about the diagnoses of a population."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from proto_core.cli import instantiate
from proto_core.cli.training import data_from_checkpoint, data_settings, find_config
from proto_core.files import atomic_write, writable_folder
from proto_ecg import ProtoECGNet
from proto_ecg.data.cache import cached_signals
from proto_ecg.data.module import ECGDataModule, ECGDataset
from proto_ecg.phenotypes import PrototypeSet, StudyResult, diagnosis_matrix, load_diagnoses, phenotype_study

__all__ = ["run"]


class _Population(NamedTuple):
    """The rows of a study: records of people that the diagnoses name."""

    root: Path
    records: list[str]
    persons: list[str]
    by: str
    patients: list[str]
    preprocessing: dict[str, Any]


def run(arguments: Any) -> int:
    """Run the command."""
    from proto_ecg_app.main import APP

    folder = writable_folder(arguments.out, "--out")
    settings = {name: getattr(arguments, name) for name in ("correction", "alpha", "min_cases")}
    overrides = [f"--model.{name}={value}" for name, value in settings.items() if value is not None]
    model, _ = instantiate(find_config(APP, arguments.config), overrides)
    diagnoses = load_diagnoses(arguments.diagnoses)
    covariates = [_numbers(diagnoses, name, "--covariates", arguments.diagnoses) for name in arguments.covariates]
    concepts = [_numbers(diagnoses, name, "--concepts", arguments.diagnoses) for name in arguments.concepts]
    network = ProtoECGNet.from_checkpoint(arguments.ckpt_path)
    people = _population(arguments, diagnoses)
    names, outcomes = diagnosis_matrix(
        diagnoses, people.persons, by=people.by, phecode_map=arguments.phecode_map, rollup_map=arguments.rollup_map
    )
    activations, probabilities = _run_network(network, people, arguments.batch_size)
    rivals = {"class probability": probabilities}
    if concepts:
        rivals["concept"] = _columns(diagnoses, people, arguments.concepts, concepts)
    result = phenotype_study(
        activations,
        network.prototype_names(),
        _prototype_sets(network),
        outcomes,
        names,
        folder,
        model=model,
        rivals=rivals,
        covariates=_columns(diagnoses, people, arguments.covariates, covariates) if covariates else None,
        patient_ids=people.patients,
        predicted=arguments.predict,
    )
    _write_cases(network, folder / "prototypes.csv")
    _print(result, people, folder)
    return 0


def _population(arguments: Any, diagnoses: pd.DataFrame) -> _Population:
    """Records that the diagnoses name, by record or by patient; of each patient the first, unless all are wanted.

    With a column ``record`` the root is any folder of WFDB records; records are patients of their own unless there is
    also a column ``patient_id``. With ``patient_id`` alone the data set's table says whose the records are.
    """
    checkpoint = arguments.ckpt_path
    settings: dict[str, Any] = data_settings(checkpoint)["init_args"]
    if "record" in diagnoses:
        by = "record"
        table = diagnoses.drop_duplicates("record")
        records = persons = table["record"].tolist()
        patients = table["patient_id"].tolist() if "patient_id" in table else records
        root = Path(arguments.root) if arguments.root else data_from_checkpoint(checkpoint).root
    else:
        by = "patient_id"
        data: ECGDataModule = data_from_checkpoint(checkpoint, {"root": arguments.root})
        root = data.root
        if data.patient_ids is None:
            raise ValueError(f"{root}: its table names no patients, needed a column 'record' in the diagnoses")
        wanted = set(diagnoses["patient_id"])
        rows = [i for i, patient in enumerate(data.patient_ids) if patient in wanted]
        if not rows:
            raise ValueError(
                f"diagnoses: found no patient_id of {root} (there, for example, {data.patient_ids[0]!r}; in the "
                f"diagnoses {diagnoses['patient_id'].iloc[0]!r})"
            )
        records = [data.record_ids[i] for i in rows]
        persons = patients = [data.patient_ids[i] for i in rows]
    if not arguments.all_records:
        first: dict[str, int] = {}
        for i, patient in enumerate(patients):
            first.setdefault(patient, i)
        records, persons, patients = ([values[i] for i in first.values()] for values in (records, persons, patients))
    kept: dict[str, Any] = {name: settings[name] for name in ("remove_baseline", "cache_dir") if name in settings}
    return _Population(root, records, persons, by, patients, kept)


def _run_network(network: ProtoECGNet, people: _Population, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Similarities ``[N, P]`` and probabilities ``[N, C]``."""
    count = len(people.records)
    signals = cached_signals(
        people.root,
        people.records,
        sampling_rate=network.sampling_rate,
        num_samples=network.num_samples,
        **people.preprocessing,
    ).signals
    dataset = ECGDataset(signals, torch.zeros(count, network.num_classes), np.arange(count))
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=batch_size, collate_fn=ECGDataset.collate)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_model_summary=False, devices=1)
    parts: Any = trainer.predict(network, loader)
    similarities, probabilities = (
        torch.cat([part[key].float().cpu() for part in parts]).double().numpy()
        for key in ("similarities", "probabilities")
    )
    return similarities, probabilities


def _prototype_sets(network: ProtoECGNet) -> dict[str, PrototypeSet]:
    return {
        name: PrototypeSet(
            network.branch(name).prototypes.detach().float().cpu().numpy(),
            network.branch(name).class_identity.cpu().numpy(),
            network.branch_labels[name],
        )
        for name in network.branch_names
    }


def _numbers(diagnoses: pd.DataFrame, column: str, option: str, file: str) -> pd.Series:
    """A column as numbers."""
    if column not in diagnoses:
        raise ValueError(f"{option}: no column {column!r} in {file!r}, found {list(diagnoses.columns)}")
    try:
        return pd.to_numeric(diagnoses[column]).astype(float)
    except ValueError as error:
        raise ValueError(f"{option}: column {column!r} of {file!r} is not numeric ({error})") from error


def _columns(
    diagnoses: pd.DataFrame, people: _Population, names: Sequence[str], columns: Sequence[pd.Series]
) -> np.ndarray:
    """``[N, Q]`` values of each row's person, who has one value in every row of the diagnoses."""
    table = pd.concat([diagnoses[people.by].rename("_person"), *columns], axis=1)
    grouped = table.groupby("_person")[list(names)]
    several = grouped.nunique().gt(1).any()
    if several.any():
        raise ValueError(f"diagnoses: a {people.by} has several values of {list(several[several].index)}, needed one")
    values = grouped.first().loc[people.persons]
    if values.isna().any(axis=None):
        person = values.index[values.isna().any(axis=1)][0]
        raise ValueError(f"diagnoses: {people.by} {person!r} lacks a value of {list(names)}, needed one for each")
    return values.to_numpy()


def _write_cases(network: ProtoECGNet, path: Path) -> None:
    """Which training ECG each prototype is."""
    names = iter(network.prototype_names())
    with atomic_write(path) as file:
        writer = csv.writer(file)
        writer.writerow(["prototype", "branch", "class", "case", "case_labels", "window_start"])
        for branch in network.branch_names:
            layer = network.branch(branch).layer
            for row, classes in enumerate(network.branch(branch).class_identity.tolist()):
                labels = [label for label, flag in zip(network.branch_labels[branch], classes) if flag]
                place = network.case_window(branch, row)
                start = "" if place is None else f"{place[0] / network.sampling_rate:.3f}"
                case_labels = ";".join(layer.case_labels[row])
                writer.writerow([next(names), branch, ";".join(labels), layer.case_ids[row], case_labels, start])


def _print(result: StudyResult, people: _Population, folder: Path) -> None:
    """The strongest associations, the comparison, and where everything is."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    found = result.associations
    fitted = int(np.isfinite(found.beta).sum())
    table = Table(title=f"{len(people.records)} records: strongest of {fitted} associations", title_justify="left")
    for column in ("prototype", "diagnosis", "odds ratio per SD", "95 % interval", "adjusted p", "AUC", "cases"):
        table.add_column(column, justify="left" if column in ("prototype", "diagnosis") else "right")
    for row in result.table.head(10).itertuples():
        interval = f"{row.ci_low:.2f} to {row.ci_high:.2f}"
        table.add_row(
            str(row.prototype),
            str(row.phecode),
            f"{row.odds_ratio:.2f}",
            interval,
            f"{row.p_adjusted:.2g}",
            f"{row.auc:.3f}",
            str(row.n_cases),
        )
    console.print(table)
    means = result.comparison.groupby("score", sort=False)[["significant", "largest_abs_beta", "best_auc"]].mean()
    compared = Table(title="Means over diagnoses", title_justify="left")
    for column in ("score", "significant", "largest |beta|", "best AUC"):
        compared.add_column(column, justify="left" if column == "score" else "right")
    for kind, significant, beta, area in means.itertuples():
        compared.add_row(str(kind), f"{significant:.1f}", f"{beta:.3f}", f"{area:.3f}")
    console.print(compared)
    test = result.cell_test
    console.print(
        f"Intra-class distance: mixed {test.mean_mixed:.3f} ({test.n_mixed} cells), uniform {test.mean_uniform:.3f} "
        f"({test.n_uniform}), one-sided p {test.p_value:.2g}; classes once: p {result.class_test.p_value:.2g}",
        soft_wrap=True,
    )
    for row in result.prediction.itertuples():
        console.print(f"all prototypes predict {row.phecode}: held-out AUC {row.auc_held_out:.3f}", soft_wrap=True)
    console.print(f"tables and figure: {folder}", soft_wrap=True)
