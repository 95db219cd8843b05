"""How much CO2 a training run emits, by codecarbon where it is installed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Emissions", "track_emissions"]


@dataclass
class Emissions:
    """What :func:`track_emissions` hands out; ``kg_co2`` is set when the block ends, ``None`` without a tracker."""

    kg_co2: float | None = None


@contextmanager
def track_emissions(
    project_name: str = "proto",
    output_dir: str | Path = ".",
    output_file: str = "emissions.csv",
    *,
    save_to_file: bool = True,
    country_iso_code: str | None = None,
) -> Iterator[Emissions]:
    """Measure the emissions of a block in kg of CO2 equivalents.

    Where codecarbon is missing or cannot start nothing is measured and the block runs all the same. The tracker is
    stopped also when the block fails.

    Args:
        project_name: name in the file.
        output_dir: folder of the file.
        output_file: its name.
        save_to_file: whether to write it.
        country_iso_code: three letters; with them nothing is looked up online.

    Yields:
        An :class:`Emissions`.

    Example:
        >>> from proto_core.emissions import track_emissions
        >>> with track_emissions(save_to_file=False, country_iso_code="DEU") as emissions:
        ...     total = sum(range(1000))
        >>> emissions.kg_co2 is None or emissions.kg_co2 >= 0
        True
    """
    emissions = Emissions()
    tracker = _started(project_name, output_dir, output_file, save_to_file, country_iso_code)
    try:
        yield emissions
    finally:
        if tracker is not None:
            found = tracker.stop()
            emissions.kg_co2 = None if found is None else float(found)


def _started(name: str, folder: str | Path, file: str, save: bool, country: str | None) -> Any:
    """A running tracker, or ``None`` with a warning that says why not."""
    try:
        import codecarbon
    except ImportError:
        return None
    settings: dict[str, Any] = {
        "project_name": name,
        "output_dir": str(folder),
        "output_file": file,
        "save_to_file": save,
        "log_level": "error",
    }
    try:
        online = country is None
        kind: Any = codecarbon.EmissionsTracker if online else codecarbon.OfflineEmissionsTracker
        tracker = kind(**settings) if online else kind(country_iso_code=country, **settings)
        tracker.start()
    except Exception as error:  # whatever the machine lacks: the run is worth more than its measurement
        warnings.warn(f"emissions are not measured: {error}", stacklevel=4)
        return None
    return tracker
