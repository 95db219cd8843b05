"""CPC: class prototypes that tell right labels from wrong ones, beside DivideMix (arXiv 2212.10766, 2002.07394).

The cleaner is a RECONSTRUCTION from the paper's abstract; DivideMix is as its authors' code has it.
"""

from proto_vision.cpc.cleaner import ClassPrototypeCleaner
from proto_vision.cpc.dividemix import (
    SemiLoss,
    gmm_clean_probability,
    guess_labels,
    mix_up,
    negative_entropy,
    refine_labels,
    uniform_prior_penalty,
)
from proto_vision.cpc.network import CPCNetwork
from proto_vision.cpc.schedule import CPCSchedule
from proto_vision.cpc.system import CPCModule, CPCOutput

__all__ = [
    "CPCModule",
    "CPCNetwork",
    "CPCOutput",
    "CPCSchedule",
    "ClassPrototypeCleaner",
    "SemiLoss",
    "gmm_clean_probability",
    "guess_labels",
    "mix_up",
    "negative_entropy",
    "refine_labels",
    "uniform_prior_penalty",
]
