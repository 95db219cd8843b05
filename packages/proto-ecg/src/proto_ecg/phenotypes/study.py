"""The whole phenotype study of a trained network: associations, comparisons, spread of classes; tables and a figure.

"Prototype Learning to Create Refined Interpretable Digital Phenotypes from ECGs" (2025, arXiv 2508.01521).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import track

from proto_core.files import atomic_write, writable_folder

from .arrays import float_matrix, label_matrix
from .association import AssociationTable, PrototypePhenotyper, fit_phecode_predictor
from .distance import (
    DistanceTest,
    class_activation,
    intra_class_distance,
    intra_class_distance_test,
    mixed_significance,
)
from .figure import draw_associations

__all__ = ["PrototypeSet", "StudyResult", "phenotype_study"]


@dataclass(frozen=True, slots=True)
class PrototypeSet:
    """The prototypes of one branch.

    Attributes:
        vectors: ``[P, ...]``.
        class_identity: ``[P, C]`` over the branch's own classes.
        class_names: C names.
    """

    vectors: np.ndarray
    class_identity: np.ndarray
    class_names: Sequence[str]


@dataclass(frozen=True, slots=True)
class StudyResult:
    """What a study found.

    Attributes:
        associations: prototypes against phecodes.
        table: the same as a long table.
        comparison: per phecode and kind of score: significant scores, largest ``|beta|``, best AUC.
        distances: per class of a branch: intra-class distance and number of prototypes.
        mixed: per class and phecode: mixed significance, -1 also for phecodes that were not fitted.
        prediction: per phecode: AUC on held-out patients of all prototypes together; without rows if not asked for.
        cell_test: distance of mixed against uniform (class, phecode) cells.
        class_test: the same, each class once.
    """

    associations: AssociationTable
    table: pd.DataFrame
    comparison: pd.DataFrame
    distances: pd.DataFrame
    mixed: pd.DataFrame
    prediction: pd.DataFrame
    cell_test: DistanceTest
    class_test: DistanceTest


def phenotype_study(
    activations: np.ndarray,
    prototype_names: Sequence[str],
    branches: Mapping[str, PrototypeSet],
    outcomes: np.ndarray,
    outcome_names: Sequence[str],
    out: str | Path,
    *,
    model: PrototypePhenotyper | None = None,
    rivals: Mapping[str, np.ndarray] | None = None,
    covariates: np.ndarray | None = None,
    patient_ids: Sequence[str] | None = None,
    predicted: int = 0,
) -> StudyResult:
    """Run the study and write its tables and figure.

    Args:
        activations: ``[N, P]``, branch after branch in the order of ``branches``.
        prototype_names: P names.
        branches: the prototypes of each branch; branches are never compared with each other.
        outcomes: ``[N, K]`` in {0, 1, NaN}.
        outcome_names: K names.
        out: folder, made if needed; found out to be writable before the work.
        model: how associations are fitted and corrected; the defaults of :class:`PrototypePhenotyper` if ``None``.
        rivals: further scores ``[N, .]`` by name, such as class probabilities or flags from the report text; the
            largest activation of each class is always compared.
        covariates: ``[N, Q]``.
        patient_ids: N names; rows of one patient stay together when predictors are tested.
        predicted: for how many outcomes, by rising smallest p, all prototypes together predict held-out patients.

    Returns:
        All tables. Files: ``associations.csv``, ``comparison.csv``, ``intra_class_distance.csv``,
        ``mixed_significance.csv``, ``prediction.csv`` (if asked for), ``summary.json``, ``figure.svg``, ``figure.png``.

    Raises:
        ValueError: an unwritable folder, sizes that do not fit, no outcome with enough cases and controls.
    """
    folder = writable_folder(out, "--out")
    scores = float_matrix(activations, "activations", "N P")
    counts = [len(part.vectors) for part in branches.values()]
    if sum(counts) != scores.shape[1]:
        raise ValueError(f"activations: found {scores.shape[1]} columns, needed {sum(counts)}, one per prototype")
    if patient_ids is not None and len(patient_ids) != len(scores):
        raise ValueError(f"patient_ids: found {len(patient_ids)}, needed {len(scores)}, one per row of activations")
    starts = np.cumsum([0, *counts])
    others = {"class activation": _class_activations(scores, branches, starts)}
    for name, values in (rivals or {}).items():
        if name in ("prototype", *others):
            raise ValueError(f"rivals: the name {name!r} is taken, needed another")
        others[name] = float_matrix(values, f"rivals[{name!r}]", "N S")
        if len(others[name]) != len(scores):
            raise ValueError(f"rivals[{name!r}]: found {len(others[name])} rows, needed {len(scores)}")
    model = model or PrototypePhenotyper()
    found = model.fit(scores, outcomes, covariates)
    if not np.isfinite(found.beta).any():
        raise ValueError(
            f"no outcome could be fitted: needed {model.min_cases} cases and as many controls, found at most "
            f"{int(np.minimum(found.n_cases, found.n_controls).max())} among {len(scores)} rows"
        )
    table = found.to_frame(prototype_names, outcome_names).sort_values("p_value", kind="stable", na_position="last")

    kinds = {"prototype": found} | {name: model.fit(values, outcomes, covariates) for name, values in others.items()}
    comparison = pd.concat([_best(name, result, outcome_names) for name, result in kinds.items()], ignore_index=True)

    fitted = np.isfinite(found.beta).any(axis=0)
    distance_rows, mixed_rows, all_distances, all_mixed = [], [], [], []
    for (branch, part), start, stop in zip(branches.items(), starts, starts[1:]):
        distance = intra_class_distance(part.vectors, part.class_identity)
        mixed = np.where(fitted, mixed_significance(found.significant[start:stop], part.class_identity), -1)
        members = np.asarray(part.class_identity).sum(axis=0)
        all_distances.append(distance)
        all_mixed.append(mixed)
        for c, name in enumerate(part.class_names):
            distance_rows.append(
                {"branch": branch, "class": name, "prototypes": int(members[c]), "distance": distance[c]}
            )
            mixed_rows.append({"branch": branch, "class": name} | dict(zip(outcome_names, mixed[c].tolist())))
    distances, statuses = np.concatenate(all_distances), np.concatenate(all_mixed)
    anywhere = np.where((statuses >= 0).any(axis=1), (statuses == 1).any(axis=1).astype(np.int64), -1)
    result = StudyResult(
        associations=found,
        table=table,
        comparison=comparison,
        distances=pd.DataFrame(distance_rows),
        mixed=pd.DataFrame(mixed_rows),
        prediction=_predict(scores, outcomes, outcome_names, found, patient_ids, predicted),
        cell_test=intra_class_distance_test(distances, statuses),
        class_test=intra_class_distance_test(distances, anywhere[:, None]),
    )
    _write(result, folder, model, len(scores))
    return result


def _predict(
    scores: np.ndarray,
    outcomes: np.ndarray,
    names: Sequence[str],
    found: AssociationTable,
    patient_ids: Sequence[str] | None,
    most: int,
) -> pd.DataFrame:
    """Held-out AUC of all prototypes together, for the outcomes with the smallest p; NaN where it cannot be tested."""
    patients = np.asarray(patient_ids if patient_ids is not None else np.arange(len(scores)).astype(str))
    labels = label_matrix(outcomes, len(scores), "outcomes")
    smallest = np.where(np.isfinite(found.p_value), found.p_value, np.inf).min(axis=0)
    order = [k for k in np.argsort(smallest, kind="stable") if np.isfinite(smallest[k])]
    rows = []
    for k in track(order[:most], description="Predictors", disable=not most, console=Console(stderr=True)):
        present = labels[:, k] == labels[:, k]
        reason = "the held-out patients are of one class only"
        try:
            area, _ = fit_phecode_predictor(scores[present], labels[present, k], patients[present].tolist())
        except ValueError as error:  # such as all cases in one patient: the other tables shall not be lost for it
            area, reason = float("nan"), str(error)
        if np.isnan(area):
            warnings.warn(f"{names[k]}: its predictor cannot be tested ({reason})", stacklevel=3)
        rows.append(
            {
                "phecode": names[k],
                "auc_held_out": area,
                "n_cases": int(found.n_cases[k]),
                "n_controls": int(found.n_controls[k]),
            }
        )
    return pd.DataFrame(rows)


def _class_activations(scores: np.ndarray, branches: Mapping[str, PrototypeSet], starts: np.ndarray) -> np.ndarray:
    parts = [
        class_activation(scores[:, start:stop], part.class_identity)
        for part, start, stop in zip(branches.values(), starts, starts[1:])
    ]
    joined = np.concatenate(parts, axis=1)
    return joined[:, np.isfinite(joined).all(axis=0)]


def _best(kind: str, result: AssociationTable, names: Sequence[str]) -> pd.DataFrame:
    def largest(values: np.ndarray) -> np.ndarray:
        return np.where(np.isfinite(values).any(axis=0), np.nan_to_num(values, nan=-np.inf).max(axis=0), np.nan)

    return pd.DataFrame(
        {
            "phecode": list(names),
            "score": kind,
            "scores": result.beta.shape[0],
            "significant": result.significant.sum(axis=0),
            "largest_abs_beta": largest(np.abs(result.beta)),
            "best_auc": largest(result.auc),
            "n_cases": result.n_cases,
            "n_controls": result.n_controls,
        }
    )


def _write(result: StudyResult, folder: Path, model: PrototypePhenotyper, rows: int) -> None:
    tables = {
        "associations.csv": result.table,
        "comparison.csv": result.comparison,
        "intra_class_distance.csv": result.distances,
        "mixed_significance.csv": result.mixed,
    }
    if len(result.prediction):
        tables["prediction.csv"] = result.prediction
    for name, table in tables.items():
        with atomic_write(folder / name) as file:
            table.to_csv(file, index=False)
    fitted = int(np.isfinite(result.associations.beta).sum())
    summary: dict[str, Any] = {
        "rows": rows,
        "prototypes": result.associations.beta.shape[0],
        "outcomes": result.associations.beta.shape[1],
        "fitted_cells": fitted,
        "significant_cells": int(result.associations.significant.sum()),
        "correction": model.correction,
        "alpha": model.alpha,
        "min_cases": model.min_cases,
        "distance_test_cells": _plain(result.cell_test),
        "distance_test_classes": _plain(result.class_test),
    }
    with atomic_write(folder / "summary.json") as file:
        json.dump(summary, file, indent=1)
    for ending in ("svg", "png"):
        with atomic_write(folder / f"figure.{ending}", "wb") as file:
            draw_associations(result.table, result.comparison, model.alpha, model.correction, fitted, file, ending)


def _plain(test: DistanceTest) -> dict[str, float | int | None]:
    return {key: None if value != value else value for key, value in asdict(test).items()}
