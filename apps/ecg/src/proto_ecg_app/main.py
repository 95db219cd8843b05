"""The command ``proto-ecg``: which commands there are and what arguments they take. Nothing here imports torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from proto_core.cli import App, Command
from proto_core.cli import main as run_app

__all__ = ["APP", "main"]


def _demo(parser: Any) -> None:
    parser.add_argument("--out", default="runs/demo", help="folder of the report, the checkpoints and the figures")
    parser.add_argument("--keep-data", default=None, help="keep the generated records here, in PTB-XL's own layout")
    parser.add_argument("--records", type=int, default=1600, help="how many records to generate")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--explain", type=int, default=4, help="how many test records the report explains")


def _explain(parser: Any) -> None:
    parser.add_argument("records", nargs="+", help="WFDB records (path without extension) or ids of the data set")
    parser.add_argument("--ckpt_path", required=True, help="checkpoint written by fit or demo")
    parser.add_argument("--out", default="report.html", help="the report, one self-contained HTML file")
    parser.add_argument("--data.root", dest="root", default=None, help="where the training data is now, if it moved")
    parser.add_argument(
        "--labels", nargs="*", default=None, help="labels to explain instead of the predicted; give the records first"
    )
    parser.add_argument("--top", type=int, default=3, help="prototypes shown for and against each label")


def _phenotypes(parser: Any) -> None:
    parser.add_argument("--config", default="ecg_phenotypes/paper.yaml", help="how associations are fitted")
    parser.add_argument("--ckpt_path", required=True, help="checkpoint written by fit or demo")
    parser.add_argument("--diagnoses", required=True, help="CSV of diagnoses by record or patient_id")
    parser.add_argument("--out", required=True, help="folder of the tables and the figure")
    parser.add_argument("--data.root", dest="root", default=None, help="records to study; default: those trained on")
    parser.add_argument("--phecode_map", default=None, help="CSV that maps ICD codes to phecodes")
    parser.add_argument("--rollup_map", default=None, help="CSV that lists each phecode with its ancestors")
    parser.add_argument("--correction", default=None, choices=["bonferroni", "fdr_bh"], help="instead of the config's")
    parser.add_argument("--alpha", type=float, default=None, help="instead of the config's")
    parser.add_argument("--min_cases", type=int, default=None, help="least number of cases and of controls")
    parser.add_argument("--covariates", nargs="*", default=[], help="numeric columns of the diagnoses CSV, as age sex")
    parser.add_argument("--concepts", nargs="*", default=[], help="0/1 columns of the diagnoses CSV, to compare with")
    parser.add_argument("--all_records", action="store_true", help="every record of a patient, not the first alone")
    parser.add_argument("--predict", type=int, default=10, help="for how many outcomes predictors are tested")
    parser.add_argument("--batch_size", type=int, default=64)


def _export(parser: Any) -> None:
    parser.add_argument("--ckpt_path", required=True, help="checkpoint written by fit or demo")
    parser.add_argument("--format", default="safetensors", choices=["safetensors", "onnx"])
    parser.add_argument("--out", default=None, help="folder (safetensors) or file (onnx); default: by the checkpoint")


APP = App(
    name="proto-ecg",
    package="proto-ecg",
    summary="Train ECG classifiers that explain themselves by real cases, test, explain, study and export them.",
    configs=Path(__file__).parent / "configs",
    commands={
        "demo": Command("train, test and explain a small network on generated ECGs", "proto_ecg_app.demo:run", _demo),
        "explain": Command("case-based report of some records", "proto_ecg_app.explain:run", _explain),
        "phenotypes": Command(
            "prototype activations against diagnosis codes: tables and a figure",
            "proto_ecg_app.phenotypes:run",
            _phenotypes,
        ),
        "export": Command("weights as safetensors + config.json, or ONNX", "proto_ecg_app.export:run", _export),
    },
)


def main() -> None:
    """Entry point of the console command."""
    sys.exit(run_app(APP))


if __name__ == "__main__":
    main()
