"""Prototypes as digital phenotypes (arXiv 2508.01521): activations against diagnosis codes."""

from proto_ecg.phenotypes.association import AssociationTable, PrototypePhenotyper, fit_phecode_predictor
from proto_ecg.phenotypes.correction import adjust_p_values
from proto_ecg.phenotypes.diagnoses import diagnosis_matrix, link_admissions, load_diagnoses
from proto_ecg.phenotypes.distance import (
    DistanceTest,
    class_activation,
    intra_class_distance,
    intra_class_distance_test,
    mixed_significance,
)
from proto_ecg.phenotypes.logistic import LogisticResult, logistic_association
from proto_ecg.phenotypes.phecodes import (
    load_phecode_map,
    load_rollup_map,
    map_to_phecodes,
    normalize_icd,
    phecode_matrix,
)
from proto_ecg.phenotypes.ranking import phecode_auc
from proto_ecg.phenotypes.study import PrototypeSet, StudyResult, phenotype_study

__all__ = [
    "AssociationTable",
    "DistanceTest",
    "LogisticResult",
    "PrototypePhenotyper",
    "PrototypeSet",
    "StudyResult",
    "adjust_p_values",
    "class_activation",
    "diagnosis_matrix",
    "fit_phecode_predictor",
    "intra_class_distance",
    "intra_class_distance_test",
    "link_admissions",
    "load_diagnoses",
    "load_phecode_map",
    "load_rollup_map",
    "logistic_association",
    "map_to_phecodes",
    "mixed_significance",
    "normalize_icd",
    "phecode_auc",
    "phecode_matrix",
    "phenotype_study",
]
