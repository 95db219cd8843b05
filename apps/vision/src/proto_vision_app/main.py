"""The command ``proto-vision``: which commands there are and what arguments they take. Nothing here imports torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from proto_core.cli import App, Command
from proto_core.cli import main as run_app

__all__ = ["APP", "main"]


def _demo(parser: Any) -> None:
    parser.add_argument("--out", default="runs/vision-demo", help="folder of the report, checkpoints and figures")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--explain", type=int, default=4, help="how many test images the report explains")


def _explain(parser: Any) -> None:
    parser.add_argument("images", nargs="+", help="image files, or ids of the data set")
    parser.add_argument("--ckpt_path", required=True, help="checkpoint written by fit or demo")
    parser.add_argument("--out", default="report.html", help="the report, one self-contained HTML file")
    parser.add_argument("--data.root", dest="root", default=None, help="where the training data is now, if it moved")
    parser.add_argument(
        "--labels", nargs="*", default=None, help="classes to explain instead of the predicted; give the images first"
    )
    parser.add_argument("--top", type=int, default=3, help="prototypes shown for and against each class")


def _export(parser: Any) -> None:
    parser.add_argument("--ckpt_path", required=True, help="checkpoint written by fit or demo")
    parser.add_argument("--format", default="safetensors", choices=["safetensors", "onnx"])
    parser.add_argument("--out", default=None, help="folder (safetensors) or file (onnx); default: by the checkpoint")


APP = App(
    name="proto-vision",
    package="proto-vision",
    summary="Train image classifiers that explain themselves by parts of real images, test, explain and export them.",
    configs=Path(__file__).parent / "configs",
    commands={
        "demo": Command("train, test and explain a small network on digits", "proto_vision_app.demo:run", _demo),
        "explain": Command("report of some images: this looks like that", "proto_vision_app.explain:run", _explain),
        "export": Command("weights as safetensors + config.json, or ONNX", "proto_vision_app.export:run", _export),
    },
)


def main() -> None:
    """Entry point of the console command."""
    sys.exit(run_app(APP))


if __name__ == "__main__":
    main()
