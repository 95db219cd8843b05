"""Metrics: plain functions over a whole fold, and torchmetrics classes that gather the fold."""

from proto_core.metrics.classification import FoldAccuracy, classification_figures
from proto_core.metrics.clustering import ClusterAccuracy, cluster_accuracy
from proto_core.metrics.concentration import circularity, pca_concentration
from proto_core.metrics.continual import ContinualMetrics
from proto_core.metrics.image import psnr, ssim
from proto_core.metrics.multilabel import (
    MacroAUROC,
    auroc_matrix,
    auroc_per_label,
    calibration_error,
    f1_micro,
    f1_per_label,
    fmax,
    macro_auroc,
)
from proto_core.metrics.neighbourhood import icnn_score
from proto_core.metrics.ood import OODDetection, OODMetrics, auroc, fpr_at_tpr, ood_metrics
from proto_core.metrics.parts import (
    PartPrototypeScores,
    assign_parts,
    consistency_score,
    parts_near,
    perturb_images,
    rescale_part_locations,
    stability_score,
)
from proto_core.metrics.peaks import map_peaks
from proto_core.metrics.ranking import (
    RecallAtK,
    best_positive_rank,
    knn_predict,
    mean_reciprocal_rank,
    nearest,
    recall_at_k,
    reciprocal_ranks,
)
from proto_core.metrics.representation import (
    penalty_distribution,
    penalty_entropy,
    relative_penalty,
    tolerance,
    uniformity,
)
from proto_core.metrics.saliency import content_heatmap, deletion_auc, heatmap_iou, outside_inside_ratio
from proto_core.metrics.salient_objects import SaliencyMetrics, saliency_metrics
from proto_core.metrics.topology import (
    BettiError,
    betti_error,
    betti_error_local,
    betti_numbers,
    cldice_score,
    dice_score,
    hd95,
)
from proto_core.metrics.uncertainty import aleatoric_uncertainty, epistemic_uncertainty, predictive_entropy
from proto_core.metrics.verification import (
    VerificationMetrics,
    best_threshold_accuracy,
    equal_error_rate,
    rank1_accuracy,
    tar_at_far,
    template_features,
)

__all__ = [
    "BettiError",
    "ClusterAccuracy",
    "ContinualMetrics",
    "FoldAccuracy",
    "MacroAUROC",
    "OODDetection",
    "OODMetrics",
    "PartPrototypeScores",
    "RecallAtK",
    "SaliencyMetrics",
    "VerificationMetrics",
    "aleatoric_uncertainty",
    "assign_parts",
    "auroc",
    "auroc_matrix",
    "auroc_per_label",
    "best_positive_rank",
    "best_threshold_accuracy",
    "betti_error",
    "betti_error_local",
    "betti_numbers",
    "calibration_error",
    "circularity",
    "classification_figures",
    "cldice_score",
    "cluster_accuracy",
    "consistency_score",
    "content_heatmap",
    "deletion_auc",
    "dice_score",
    "epistemic_uncertainty",
    "equal_error_rate",
    "f1_micro",
    "f1_per_label",
    "fmax",
    "fpr_at_tpr",
    "hd95",
    "heatmap_iou",
    "icnn_score",
    "knn_predict",
    "macro_auroc",
    "map_peaks",
    "mean_reciprocal_rank",
    "nearest",
    "ood_metrics",
    "outside_inside_ratio",
    "parts_near",
    "pca_concentration",
    "penalty_distribution",
    "penalty_entropy",
    "perturb_images",
    "predictive_entropy",
    "psnr",
    "rank1_accuracy",
    "recall_at_k",
    "reciprocal_ranks",
    "relative_penalty",
    "rescale_part_locations",
    "saliency_metrics",
    "ssim",
    "stability_score",
    "tar_at_far",
    "template_features",
    "tolerance",
    "uniformity",
]
