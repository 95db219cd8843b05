"""ECG data: PTB-XL as it is on disk, a user's own WFDB archive, and a built-in generator.

Names are loaded on first use: a process that only decodes records does not pay for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "BRANCHES": "labels",
    "PTBXL_ALL": "labels",
    "PTBXL_DIFFUSE": "labels",
    "PTBXL_MORPHOLOGY": "labels",
    "PTBXL_RHYTHM": "labels",
    "branch_labels": "labels",
    "read_branches": "labels",
    "STANDARD_LEADS": "leads",
    "ECGWarning": "records",
    "Record": "records",
    "preprocess_record": "records",
    "read_record": "records",
    "remove_baseline_wander": "records",
    "resolve_record": "records",
    "cached_signals": "cache",
    "default_cache_dir": "cache",
    "ECGBatch": "module",
    "ECGDataModule": "module",
    "ECGDataset": "module",
    "PTBXL": "ptbxl",
    "ECGArchive": "archive",
    "GeneratedECG": "generated",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
