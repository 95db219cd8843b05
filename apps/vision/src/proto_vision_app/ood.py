"""``proto-vision ood``: which images do not look like those that a network was trained on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from proto_core.cli.training import data_from_checkpoint
from proto_core.files import writable_folder
from proto_core.metrics import auroc, fpr_at_tpr
from proto_core.training import load_system
from proto_vision.ood import (
    ImageScores,
    KnownScore,
    draw_histogram,
    images_at,
    on_accelerator,
    score_images,
    write_scores,
)

__all__ = ["run"]

TPR = 0.95


def run(arguments: Any) -> int:
    """Run the command."""
    out, histogram = Path(arguments.out), arguments.histogram and Path(arguments.histogram)
    for path, argument in ((out, "--out"), (histogram, "--histogram")):
        if path:
            writable_folder(path.parent, argument)
    network = on_accelerator(load_system(arguments.ckpt_path, "proto-vision"))
    replaced = {name: getattr(arguments, name) for name in ("root", "batch_size", "num_workers")}
    data = data_from_checkpoint(arguments.ckpt_path, replaced)
    asked = images_at(arguments.images, data, "images")
    known_places = _known(arguments.known, data)
    score = KnownScore(network, arguments.score, data, arguments.neighbours)
    known = score_images(score, data, known_places, "known images") if known_places else None
    found = score_images(score, data, asked, "images")
    threshold = None if known is None else float(np.percentile(known.readable, round(100 * (1 - TPR), 9)))
    write_scores(out, known, found, threshold)
    if histogram:
        draw_histogram(histogram, None if known is None else known.readable, found.readable, threshold)
    _say(known, found, threshold, out, histogram)
    return 0


def _known(name: str | None, data: Any) -> list[str | Path]:
    """The known images: files of a folder, or the test images of the classes that were trained."""
    if name is None:
        return []
    if name != "test":
        return images_at([name], data, "--known")
    rows = data.rows("test")
    rows = rows[data.table.targets[rows] < data.num_classes]
    if not rows.size:
        raise ValueError("--known test: the checkpoint's data has no test image of a class that was trained")
    return [data.record_ids[row] for row in rows]


def _say(
    known: ImageScores | None, found: ImageScores, threshold: float | None, out: Path, histogram: Path | None
) -> None:
    lines = []
    for what, part in (("known images", known), ("images", found)):
        bad = [problem for problem in part.problems if problem] if part is not None else []
        if bad:
            sys.stderr.write(f"{len(bad)} {what} cannot be read and are left out; the first: {bad[0]}\n")
    if known is None or threshold is None:
        lines.append(f"{len(found.readable)} images scored; --known FOLDER or --known test says how many are unknown")
    else:
        inside, outside = known.readable, found.readable
        lines.append(f"AUROC: {auroc(inside, outside):.4f} ({len(inside)} known images, {len(outside)} in question)")
        lines.append(f"FPR95: {fpr_at_tpr(inside, outside, TPR):.4f}")
        lines.append(f"unknown at a threshold that keeps 95 % of the known: {int((outside < threshold).sum())} images")
    lines += [f"scores: {out}", *([f"histogram: {histogram}"] if histogram else [])]
    sys.stdout.write("\n".join(lines) + "\n")
