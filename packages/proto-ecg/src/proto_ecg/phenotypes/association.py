"""Every prototype against every phecode: odds ratios with intervals, AUC, and correction for all tests at once.

"Prototype Learning to Create Refined Interpretable Digital Phenotypes from ECGs" (2025, arXiv 2508.01521). No code of
the authors exists; covariates, correction and intervals are our reading of the abstract.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float, Real

from proto_core.systems import Paper

from .arrays import Array, check_binary, float_array, float_matrix, label_matrix
from .correction import adjust_p_values, check_correction
from .logistic import BLOCK, newton, shared_columns, standardised, wald
from .ranking import phecode_auc

__all__ = ["AssociationTable", "PrototypePhenotyper"]

_MAX_ITER, _TOLERANCE = 50, 1e-10


@dataclass(frozen=True, slots=True)
class AssociationTable:
    """Associations of P prototypes with K phecodes; ``[P, K]`` float64 unless said, NaN where a cell was not fitted.

    Attributes:
        beta: log odds ratio, per standard deviation of the activation if it was standardised.
        se: standard error.
        z: ``beta / se``.
        p_value: two-sided Wald.
        odds_ratio: ``exp(beta)``.
        ci_low: lower end of the 95 % interval of the odds ratio.
        ci_high: its upper end.
        auc: probability that a random case has the larger activation; also where no model was fitted.
        p_adjusted: p corrected over all fitted cells.
        significant: bool, adjusted p below alpha.
        n_cases: ``[K]`` int64.
        n_controls: ``[K]`` int64.
    """

    beta: np.ndarray
    se: np.ndarray
    z: np.ndarray
    p_value: np.ndarray
    odds_ratio: np.ndarray
    ci_low: np.ndarray
    ci_high: np.ndarray
    auc: np.ndarray
    p_adjusted: np.ndarray
    significant: np.ndarray
    n_cases: np.ndarray
    n_controls: np.ndarray

    def to_frame(self, prototype_names: Sequence[str], phecode_names: Sequence[str]) -> pd.DataFrame:
        """One row per prototype and phecode.

        Args:
            prototype_names: P names.
            phecode_names: K names.

        Raises:
            ValueError: another number of names.
        """
        prototypes, phecodes = self.beta.shape
        for argument, names, count in (
            ("prototype_names", prototype_names, prototypes),
            ("phecode_names", phecode_names, phecodes),
        ):
            if len(names) != count:
                raise ValueError(f"{argument}: found {len(names)} names, needed {count}")
        columns: dict[str, object] = {
            "prototype": np.repeat(np.asarray(prototype_names, dtype=object), phecodes),
            "phecode": np.tile(np.asarray(phecode_names, dtype=object), prototypes),
        }
        for name in ("beta", "se", "z", "p_value", "odds_ratio", "ci_low", "ci_high", "auc", "p_adjusted"):
            columns[name] = getattr(self, name).ravel()
        columns["significant"] = self.significant.ravel()
        columns["n_cases"] = np.tile(self.n_cases, prototypes)
        columns["n_controls"] = np.tile(self.n_controls, prototypes)
        return pd.DataFrame(columns)


class PrototypePhenotyper:
    """Tests prototypes as digital phenotypes: one logistic regression for each pair of prototype and phecode.

    ``logit P(y_k = 1) = b0 + b1 z_p + gamma^T covariates``, unpenalised; ``z_p`` is the activation standardised over
    all rows given (ddof 0). Cells with fewer than ``min_cases`` cases or controls, a constant activation, perfect
    separation or no convergence are NaN and not significant; their AUC is still computed.

    Args:
        correction: "bonferroni" or "fdr_bh", over all fitted cells jointly.
        alpha: significance level of the adjusted p, in (0, 1).
        min_cases: least number of cases and of controls.
        standardize: odds ratios per standard deviation (True) or per unit of activation.

    Raises:
        ValueError: unknown correction, alpha outside (0, 1), negative ``min_cases``.

    Source:
        arXiv 2508.01521 as its card reads it, steps 4 and 5.

    Example:
        >>> import numpy as np
        >>> from proto_ecg.phenotypes import PrototypePhenotyper
        >>> rng = np.random.default_rng(0)
        >>> activations = rng.normal(size=(300, 2))
        >>> sick = (activations[:, :1] + rng.normal(size=(300, 1)) > 0.5).astype(int)
        >>> PrototypePhenotyper().fit(activations, sick).significant.tolist()
        [[True], [False]]
    """

    paper: ClassVar[Paper] = Paper(
        title="Prototype Learning to Create Refined Interpretable Digital Phenotypes from ECGs",
        year=2025,
        arxiv="2508.01521",
        code=None,
        evidence="formulas",
        summary="Prototype activations against diagnosis codes: odds ratios, corrected p-values, AUC, comparisons.",
        claim="Single prototypes follow sub-patterns of a class better than the class does, and classes whose "
        "prototypes disagree about a phecode have prototypes further apart.",
    )

    def __init__(
        self, correction: str = "bonferroni", alpha: float = 0.05, min_cases: int = 20, standardize: bool = True
    ) -> None:
        check_correction(correction)
        if not 0 < alpha < 1:
            raise ValueError(f"alpha: found {alpha}, needed a number between 0 and 1")
        if not min_cases >= 0:
            raise ValueError(f"min_cases: found {min_cases}, needed 0 or more")
        self.correction, self.alpha = correction, alpha
        self.min_cases, self.standardize = min_cases, standardize

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(correction={self.correction!r}, alpha={self.alpha}, min_cases={self.min_cases}, "
            f"standardize={self.standardize})"
        )

    def fit(
        self,
        activations: Real[Array, "N P"],
        phecodes: Real[Array, "N K"],
        covariates: Real[Array, "N Q"] | None = None,
    ) -> AssociationTable:
        """Fit all cells.

        Args:
            activations: finite; one row per patient (several recordings of one patient make p-values too small).
            phecodes: in {0, 1, NaN}; NaN (neither case nor control) drops the row for that phecode.
            covariates: finite, used as they are.

        Returns:
            The table of all cells.

        Raises:
            ValueError: numbers of rows that differ, an empty axis, NaN in activations or covariates, other outcomes.
        """
        scores = float_matrix(activations, "activations", "N P")
        labels = label_matrix(phecodes, len(scores))
        if covariates is not None:
            covariates = float_matrix(covariates, "covariates", "N Q")
            if len(covariates) != len(scores):
                raise ValueError(f"covariates: found {len(covariates)} rows, needed {len(scores)}")
        columns, deviation = standardised(np.ascontiguousarray(scores.T))
        beta = np.full((scores.shape[1], labels.shape[1]), np.nan)
        se = np.full_like(beta, np.nan)
        n_cases, n_controls = (labels == 1).sum(axis=0), (labels == 0).sum(axis=0)
        enough = (np.minimum(n_cases, n_controls) >= max(self.min_cases, 1)).nonzero()[0]
        for k in enough:
            self._fit_phecode(columns, labels[:, k], covariates, beta[:, k], se[:, k])
        if not self.standardize:
            scale = np.where(deviation > 0, deviation, np.nan)[:, None]
            beta, se = beta / scale, se / scale
        statistics = wald(beta, se)
        adjusted = adjust_p_values(statistics["p_value"], self.correction)
        return AssociationTable(
            beta=beta,
            se=se,
            **statistics,
            auc=phecode_auc(scores, labels),
            p_adjusted=adjusted,
            significant=np.nan_to_num(adjusted, nan=1.0) < self.alpha,
            n_cases=n_cases.astype(np.int64),
            n_controls=n_controls.astype(np.int64),
        )

    @staticmethod
    def _fit_phecode(
        columns: np.ndarray, outcome: np.ndarray, covariates: np.ndarray | None, beta: np.ndarray, se: np.ndarray
    ) -> None:
        """Write one phecode's coefficients and errors ``[P]``, in blocks of prototypes that stay in the cache."""
        present = outcome == outcome
        every = bool(present.all())
        y = outcome.astype(np.float64) if every else outcome[present].astype(np.float64)
        shared = shared_columns(covariates if covariates is None or every else covariates[present], len(y))
        step = max(1, BLOCK // len(y))
        for start in range(0, len(columns), step):
            block = columns[start : start + step]
            block = block if every else block[:, present]
            found = newton(block, y, shared, _MAX_ITER, _TOLERANCE)
            beta[start : start + step], se[start : start + step] = found.beta, found.se


def fit_phecode_predictor(
    activations: Float[Array, "N P"],
    labels: Real[Array, " N"],
    patient_ids: Sequence[object],
    test_size: float = 0.2,
    seed: int = 0,
) -> tuple[float, object]:
    """Predict a phecode from all prototypes: L2 logistic regression, patients split by id.

    Activations are standardised with the training part's statistics; C = 1, up to 1000 iterations.

    Args:
        activations: finite.
        labels: in {0, 1}.
        patient_ids: N ids; a patient's recordings never lie on both sides.
        test_size: share of the patients held out, in (0, 1).
        seed: of the split.

    Returns:
        AUC on the held-out patients (NaN if they are of one class), and the fitted scikit-learn pipeline.

    Raises:
        ValueError: sizes that differ, one class only in training, fewer than 2 patients.

    Source:
        arXiv 2508.01521 as its card reads it, step 9.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scores = float_matrix(activations, "activations", "N P")
    y = float_array(labels, "labels")
    if y.shape != (len(scores),) or len(patient_ids) != len(scores):
        raise ValueError(
            f"labels, patient_ids: found {list(y.shape)} and {len(patient_ids)}, needed {len(scores)} of each"
        )
    if np.isnan(y).any():
        raise ValueError("labels: found NaN, needed 0 or 1")
    check_binary(y, "labels")
    if not 0 < test_size < 1:
        raise ValueError(f"test_size: found {test_size}, needed a number between 0 and 1")
    patients, owner = np.unique(np.asarray(patient_ids), return_inverse=True)
    if len(patients) < 2:
        raise ValueError(f"patient_ids: found {len(patients)} patient, needed at least 2")
    held = min(max(round(test_size * len(patients)), 1), len(patients) - 1)
    chosen = np.random.default_rng(seed).permutation(len(patients))[:held]
    test = np.isin(owner, chosen)
    if len(np.unique(y[~test])) < 2:
        raise ValueError("labels: the training patients are of one class only, needed cases and controls")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=1000))
    model.fit(scores[~test], y[~test])
    probability = model.predict_proba(scores[test])[:, 1]
    return float(phecode_auc(probability[:, None], y[test][:, None])[0, 0]), model
