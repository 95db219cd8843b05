"""``proto-vision explain``: a report of some images, drawn from a checkpoint and the data folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from proto_core.cli.training import data_from_checkpoint
from proto_core.files import atomic_write, writable_folder
from proto_core.training import load_system
from proto_vision.data.module import ImageDataModule
from proto_vision.explanation import ExplainsImages, ExplainsParts
from proto_vision.report import ImageSample, image_report

__all__ = ["explain_images", "run"]


def run(arguments: Any) -> int:
    """Run the command."""
    out = Path(arguments.out)
    writable_folder(out.parent, "--out")
    network = load_system(arguments.ckpt_path, "proto-vision")
    if not isinstance(network, ExplainsParts | ExplainsImages):
        raise ValueError(f"checkpoint {arguments.ckpt_path!r}: system {network.system!r} has no prototypes to show")
    data = data_from_checkpoint(arguments.ckpt_path, {"root": arguments.root})
    options: dict[str, Any] = {"labels": arguments.labels, "top": arguments.top}
    options["source"] = Path(arguments.ckpt_path).name
    if isinstance(network, ExplainsParts):
        html = explain_images(network, data, arguments.images, **options)
    else:
        html = network.explain_images(data, arguments.images, **options)
    with atomic_write(out) as file:
        file.write(html)
    sys.stdout.write(f"report: {out}\n")
    return 0


def explain_images(
    network: Any,
    data: ImageDataModule,
    images: Sequence[str],
    *,
    labels: Sequence[str] | None = None,
    top: int = 3,
    source: str = "",
) -> str:
    """The report of some images as HTML.

    Args:
        network: with projected prototypes.
        data: the data set of the cases.
        images: files, or ids of the data set.
        labels: classes to explain; by default the predicted one.
        top: prototypes shown for and against.
        source: name of the checkpoint, for the report's head.
    """
    places = [data.find_image(name) for name in images]
    inputs = torch.stack([data.model_input(place) for place in places])
    explained = network.explain(inputs, list(images), labels)
    samples = []
    for n, (name, place, explanations) in enumerate(zip(images, places, explained, strict=True)):
        shown = {item.prototype for e in explanations for item in (*e.strongest_for(top), *e.strongest_against(top))}
        maps = network.similarity_maps(inputs[n : n + 1])[0]
        row = data.find_row(place) if isinstance(place, str) else None
        samples.append(
            ImageSample(
                sample_id=name,
                image=data.view(place),
                heat={prototype: maps[prototype].cpu() for prototype in shown},
                explanations=explanations,
                targets=None if row is None else tuple(data.describe(row)[1]),
                requested=labels is not None,
            )
        )
    info = {
        "model": f"{network.paper.title} ({network.system})",
        "classes": str(network.num_classes),
        "prototypes": str(sum(layer.num_prototypes for layer in network.prototype_layers().values())),
        "checkpoint": source,
    }
    return image_report(samples, title="Why the model says so", model_info=info, read_case=data.view, top=top)
