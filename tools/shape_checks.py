"""Run-time check of annotations in tests: shapes by jaxtyping, types by beartype (an int is a float).

``PROTO_SHAPE_CHECKS=1 uv run pytest`` switches it on, as continuous integration does.
"""

from __future__ import annotations

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

__all__ = ["CHECKED", "check", "switch_on"]

CHECKED = ["proto_core", "proto_ecg", "proto_vision"]
"""Import names of the packages whose annotations are checked."""

check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def switch_on() -> None:
    """Check every package that is imported from now on."""
    install_import_hook(CHECKED, f"{__name__}.check")
