"""Losses, one family per file; all are ``nn.Module`` and return a scalar to minimise."""

from proto_core.losses.adaptive_scaling import ThresholdAdaptiveLossScaling
from proto_core.losses.adaptive_temperature import (
    AdaptiveMultiHeadContrastiveLoss,
    AdaptiveTemperature,
    BarlowTwinsLoss,
    temperature_regularizer,
)
from proto_core.losses.comp_sum import CompSumLoss, SmoothAdversarialCompSumLoss
from proto_core.losses.components import GLVQLoss, ProbabilityMarginLoss, RobustnessMarginLoss, TemplateMarginLoss
from proto_core.losses.dice import (
    DiceLoss,
    HeatmapFocalLoss,
    MaskedBCELoss,
    MaskedSmoothL1Loss,
    gather_map,
    gradient_variance,
    regression_gradient,
)
from proto_core.losses.equity import GeneralizedFocalLoss, dequity_weight
from proto_core.losses.harmonic import HarmonicLoss, harmonic_log_probs
from proto_core.losses.hybrid import HybridSegmentationLoss
from proto_core.losses.infonce import HardContrastiveLoss, InfoNCELoss, SimpleContrastiveLoss
from proto_core.losses.margin import UNPGLoss, box_whisker_filter
from proto_core.losses.multi_similarity import (
    MultiSimilarityLoss,
    gpw_surrogate,
    multi_similarity_mining,
    pair_weights,
)
from proto_core.losses.orthogonal import (
    OPLDistillationLoss,
    OrthogonalProjectionLoss,
    PerpetualOrthogonalProjectionLoss,
)
from proto_core.losses.palm import PALMLoss
from proto_core.losses.parts import (
    ClosenessLoss,
    DiscriminationLoss,
    IncorrectConnectionL1Loss,
    SubspaceOrthogonalityLoss,
)
from proto_core.losses.prototype import ClusterLoss, MultiLabelClusterLoss, MultiLabelSeparationLoss, SeparationLoss
from proto_core.losses.prototype_gram import (
    DiversityLoss,
    PrototypeContrastiveLoss,
    contrastive_of_gram,
    diversity_of_gram,
    prototype_gram,
)
from proto_core.losses.prototype_relation import PrototypePullLoss, PrototypeRelationDistillationLoss
from proto_core.losses.restoration import CharbonnierLoss, PixelFocusLoss
from proto_core.losses.segmentation import CBDiceLoss, CEDiceLoss, CESkeletonRecallLoss, CLDiceLoss, RegionWiseLoss
from proto_core.losses.sinkhorn import (
    SinkhornLoss,
    UncertaintyPrototypeAlignmentLoss,
    confidence_score,
    uncertainty_prototypes,
)
from proto_core.losses.soft_infonce import SoftInfoNCELoss, soft_infonce_weights
from proto_core.losses.supcon import SupConLoss
from proto_core.losses.topology import TopoLoss, TopoWinLoss, WarpingLoss
from proto_core.losses.triplet import ICNNLoss, ProtoTripletLoss

__all__ = [
    "AdaptiveMultiHeadContrastiveLoss",
    "AdaptiveTemperature",
    "BarlowTwinsLoss",
    "CBDiceLoss",
    "CEDiceLoss",
    "CESkeletonRecallLoss",
    "CLDiceLoss",
    "CharbonnierLoss",
    "ClosenessLoss",
    "ClusterLoss",
    "CompSumLoss",
    "DiceLoss",
    "DiscriminationLoss",
    "DiversityLoss",
    "GLVQLoss",
    "GeneralizedFocalLoss",
    "HardContrastiveLoss",
    "HarmonicLoss",
    "HeatmapFocalLoss",
    "HybridSegmentationLoss",
    "ICNNLoss",
    "IncorrectConnectionL1Loss",
    "InfoNCELoss",
    "MaskedBCELoss",
    "MaskedSmoothL1Loss",
    "MultiLabelClusterLoss",
    "MultiLabelSeparationLoss",
    "MultiSimilarityLoss",
    "OPLDistillationLoss",
    "OrthogonalProjectionLoss",
    "PALMLoss",
    "PerpetualOrthogonalProjectionLoss",
    "PixelFocusLoss",
    "ProbabilityMarginLoss",
    "ProtoTripletLoss",
    "PrototypeContrastiveLoss",
    "PrototypePullLoss",
    "PrototypeRelationDistillationLoss",
    "RegionWiseLoss",
    "RobustnessMarginLoss",
    "SeparationLoss",
    "SimpleContrastiveLoss",
    "SinkhornLoss",
    "SmoothAdversarialCompSumLoss",
    "SoftInfoNCELoss",
    "SubspaceOrthogonalityLoss",
    "SupConLoss",
    "TemplateMarginLoss",
    "ThresholdAdaptiveLossScaling",
    "TopoLoss",
    "TopoWinLoss",
    "UNPGLoss",
    "UncertaintyPrototypeAlignmentLoss",
    "WarpingLoss",
    "box_whisker_filter",
    "confidence_score",
    "contrastive_of_gram",
    "dequity_weight",
    "diversity_of_gram",
    "gather_map",
    "gpw_surrogate",
    "gradient_variance",
    "harmonic_log_probs",
    "multi_similarity_mining",
    "pair_weights",
    "prototype_gram",
    "regression_gradient",
    "soft_infonce_weights",
    "temperature_regularizer",
    "uncertainty_prototypes",
]
