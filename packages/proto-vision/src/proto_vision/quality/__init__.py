"""What part prototypes are worth: consistency, stability, heat on the object, deletion; for any network of parts.

Sources: EvalProtoPNet (ICCV 2023, arXiv 2212.05946) and ST-ProtoPNet (ICCV 2023, arXiv 2301.04011).
"""

from proto_vision.quality.measure import PrototypeQuality, class_heat, deletion_scores, measure_prototypes
from proto_vision.quality.samples import AnnotatedImages

__all__ = ["AnnotatedImages", "PrototypeQuality", "class_heat", "deletion_scores", "measure_prototypes"]
