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


def _clean_labels(parser: Any) -> None:
    parser.add_argument("folder", nargs="?", default=None, help="images, a folder per class: trains, then judges")
    parser.add_argument("--ckpt_path", default=None, help="of cpc or fopro, instead of a folder: only judges")
    parser.add_argument("--trusted", default=None, help="folder of images with right labels, for FoPro instead of CPC")
    parser.add_argument("--config", default=None, help="what is trained; default cpc/clean.yaml or fopro/clean.yaml")
    parser.add_argument("--run", default="runs/clean-labels", help="folder of the checkpoints of a training")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--data.root", dest="root", default=None, help="where a checkpoint's data is now, if it moved")
    parser.add_argument("--out", default="suspicions.csv", help="the table, the most suspicious image first")
    parser.add_argument("--sheet", default="suspicions.html", help="the page of pictures, one self-contained HTML file")
    parser.add_argument("--shown", type=int, default=120, help="pictures on the page")


def _explain(parser: Any) -> None:
    parser.add_argument("images", nargs="+", help="image files, or ids of the data set")
    parser.add_argument("--ckpt_path", required=True, help="checkpoint written by fit or demo")
    parser.add_argument("--out", default="report.html", help="the report, one self-contained HTML file")
    parser.add_argument("--data.root", dest="root", default=None, help="where the training data is now, if it moved")
    parser.add_argument(
        "--labels", nargs="*", default=None, help="classes to explain instead of the predicted; give the images first"
    )
    parser.add_argument("--top", type=int, default=3, help="prototypes shown for and against each class")


def _explain_prototypes(parser: Any) -> None:
    parser.add_argument("images", nargs="*", default=[], help="image files, or ids of the data set, to show in detail")
    parser.add_argument("--ckpt_path", default=None, help="checkpoint of any network of part prototypes")
    parser.add_argument("--config", default=None, help="such as explaining_prototypes/paper.yaml; --ckpt_path rules")
    parser.add_argument(
        "--characteristics",
        nargs="+",
        default=None,
        help="some of contrast, saturation, hue, shape, texture, brightness; by default all that can be had here",
    )
    parser.add_argument("--out", default="prototype-properties", help="folder of the report and the tables")
    parser.add_argument("--data.root", dest="root", default=None, help="where the training data is now, if it moved")
    parser.add_argument("--test", type=bool, default=True, help="also score test images, to see whether they agree")
    parser.add_argument("--limit", type=int, default=None, help="look at so many images of a fold at most")
    parser.add_argument("--batch_size", type=int, default=None, help="images at once, each in all its versions")
    parser.add_argument("--top", type=int, default=3, help="prototypes shown for each image")
    parser.add_argument("--shown", type=int, default=60, help="prototypes that get a picture in the report")


def _evaluate_prototypes(parser: Any) -> None:
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of any network of part prototypes")
    parser.add_argument("--out", default="prototype-quality", help="folder of the report and the tables")
    parser.add_argument("--data.root", dest="root", default=None, help="where the data is now, if it moved")
    parser.add_argument("--fold", default="test", choices=["train", "val", "test"], help="images that are looked at")
    parser.add_argument("--limit", type=int, default=None, help="look at so many images at most")
    parser.add_argument("--batch_size", type=int, default=None)
    parser.add_argument("--threshold", type=float, default=0.8, help="share of images that makes a part consistent")
    parser.add_argument(
        "--half_size", type=int, default=None, help="half the box around a best place in pixels; default 36 per 224"
    )
    parser.add_argument("--std", type=float, default=0.2, help="of the noise on normalised images")
    parser.add_argument("--eps", type=float, default=0.25, help="bound of the noise")
    parser.add_argument("--steps", type=int, default=28, help="of deletion, most of the work; 0 leaves it out")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--shown", type=int, default=24, help="prototypes that get a picture in the report")


def _discover(parser: Any) -> None:
    parser.add_argument("folder", help="folders of labelled images by class; images without labels beside them")
    parser.add_argument("--unlabelled", default=None, help="folder of images without labels; default FOLDER/unlabelled")
    parser.add_argument("--labels", default=None, help="instead of folders: CSV with image and label, empty if unknown")
    parser.add_argument("--classes", type=int, default=None, help="how many there are, known and new, if one knows")
    parser.add_argument(
        "--candidates", type=int, nargs="+", default=None, help="numbers to try; default: five, up to thrice the known"
    )
    parser.add_argument("--config", default="protogcd/discover.yaml", help="what the options below change")
    parser.add_argument("--backbone", default=None, help="conv3, or for photographs vit_base_patch16_224.dino")
    parser.add_argument("--pretrained", type=bool, default=None, help="the backbone's weights (a download)")
    parser.add_argument("--trained", default=None, choices=["all", "last", "none"], help="part of the backbone")
    parser.add_argument("--image_size", type=int, default=None, help="in pixels")
    parser.add_argument("--in_channels", type=int, default=None, help="3 (colour) or 1 (grey)")
    parser.add_argument("--resize", default=None, choices=["stretch", "crop"])
    parser.add_argument("--augment", default=None, help="of both views: tilt (characters), window (photographs), ...")
    parser.add_argument("--epochs", type=int, default=None, help="of each training")
    parser.add_argument("--batch_size", type=int, default=None, help="default 128, less for fewer than 1024 images")
    parser.add_argument("--num_workers", type=int, default=None, help="processes that read images")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--shown", type=int, default=24, help="images of each class on the contact sheet")
    parser.add_argument("--out", default="discovered", help="folder of the table, the contact sheet, the checkpoints")


def _export(parser: Any) -> None:
    parser.add_argument("--ckpt_path", required=True, help="checkpoint written by fit or demo")
    parser.add_argument("--format", default="safetensors", choices=["safetensors", "onnx"])
    parser.add_argument("--out", default=None, help="folder (safetensors) or file (onnx); default: by the checkpoint")


def _ood(parser: Any) -> None:
    parser.add_argument("images", nargs="+", help="folders, image files, or ids of the data set")
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of a classifier, or of a system with features")
    parser.add_argument(
        "--known",
        default=None,
        help="a folder of known images, or 'test': the test images of the trained classes; gives AUROC and FPR95",
    )
    parser.add_argument(
        "--score",
        default="mahalanobis",
        choices=["mahalanobis", "knn", "probability", "energy"],
        help="of features against those of the training images (mahalanobis, knn), or of logits",
    )
    parser.add_argument("--neighbours", type=int, default=50, help="which neighbour knn measures the distance to")
    parser.add_argument("--out", default="ood.csv", help="the table, the least known image first")
    parser.add_argument("--histogram", default=None, help="picture of the scores, .png")
    parser.add_argument("--data.root", dest="root", default=None, help="where the training data is now, if it moved")
    parser.add_argument("--batch_size", type=int, default=None, help="images at once, by default as in training")
    parser.add_argument("--num_workers", type=int, default=None, help="processes that read images")


def _verify(parser: Any) -> None:
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of a system that embeds images, such as unpg")
    parser.add_argument(
        "--pairs",
        default=None,
        help="lines 'path1 path2 label' (1: one identity, 0: two), or packed pairs such as lfw.bin; without, all pairs "
        "of --faces, or of the test fold of the checkpoint's data",
    )
    parser.add_argument("--faces", default=None, help="one folder per identity; with --pairs, where its paths start")
    parser.add_argument(
        "--templates", default=None, help="lines 'image template media' (IJB); --pairs then names templates"
    )
    parser.add_argument("--data.root", dest="root", default=None, help="where the checkpoint's data is now")
    parser.add_argument("--far", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2], help="false accept rates")
    parser.add_argument(
        "--mode", default="upper", choices=["upper", "nearest"], help="never above the rate, or nearest to it (paper)"
    )
    parser.add_argument("--out", default="verification.csv", help="the figures")
    parser.add_argument("--plot", default=None, help="ROC and DET curves, .png or .svg")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--num_workers", type=int, default=0)


def _linear_eval(parser: Any) -> None:
    parser.add_argument("--features", default=None, help=".npz or .csv of features and labels, see the README")
    parser.add_argument("--ckpt_path", default=None, help="or: a checkpoint, whose features are frozen")
    parser.add_argument("--backbone", default=None, help="or: a backbone by name; 'pixels' for the image itself")
    parser.add_argument("--pretrained", type=bool, default=False, help="the backbone's weights (a download)")
    parser.add_argument(
        "--data",
        type=dict[str, Any],
        default=None,
        help="images: --data.class_path (default proto_vision.ImageFolder, or what the checkpoint was trained on), "
        "--data.root and any other argument of that class, such as --data.image_size; one that has arguments itself as "
        "YAML: --data.protocol '{class_path: ..., init_args: {...}}'",
    )
    parser.add_argument("--test_fraction", type=float, default=0.3, help="share that tests, for files without folds")
    parser.add_argument("--config", default=None, help="such as disc_vs_gen/paper.yaml; the options below go first")
    parser.add_argument("--samples_per_class", type=int, nargs="+", default=None, help="default: 1 2 5 10 20 ... all")
    parser.add_argument("--repeats", type=int, default=None, help="random subsets of each size (5)")
    parser.add_argument("--seed", type=int, default=None, help="of the subsets, of a split, of random weights (0)")
    parser.add_argument("--eps", type=float, default=None, help="added to naive Bayes' variances (1e-9)")
    parser.add_argument("--C", type=float, default=None, help="inverse penalty of logistic regression (1)")
    parser.add_argument("--max_iter", type=int, default=None, help="of logistic regression's solver (1000)")
    parser.add_argument("--scaling", default=None, choices=["none", "minmax"], help="of features, by subset (none)")
    parser.add_argument(
        "--episodes", type=int, default=None, help="instead of curves: few-shot accuracy on so many (600) of the test"
    )
    parser.add_argument("--ways", type=int, default=None, help="classes of an episode (5)")
    parser.add_argument("--shots", type=int, nargs="+", default=None, help="samples of a class to learn from (1)")
    parser.add_argument("--queries", type=int, default=None, help="samples of a class to be told (15)")
    parser.add_argument(
        "--classifier", default=None, choices=["logistic", "nearest_mean"], help="of an episode (logistic)"
    )
    parser.add_argument("--out", default="linear_eval.csv", help="accuracy of each head, size and repeat, or by shots")
    parser.add_argument("--plot", default=None, help="the learning curves, .png or .svg")
    parser.add_argument("--save_features", default=None, help=".npz that --features reads again")


APP = App(
    name="proto-vision",
    package="proto-vision",
    summary="Train image classifiers that explain themselves by parts of real images, test, explain and export them.",
    configs=Path(__file__).parent / "configs",
    commands={
        "clean-labels": Command(
            "which images have a wrong label: a table and pictures", "proto_vision_app.clean_labels:run", _clean_labels
        ),
        "demo": Command("train, test and explain a small network on digits", "proto_vision_app.demo:run", _demo),
        "discover": Command(
            "sort images of which few have labels into known and new classes",
            "proto_vision_app.discover:run",
            _discover,
        ),
        "explain": Command("report of some images: this looks like that", "proto_vision_app.explain:run", _explain),
        "explain-prototypes": Command(
            "which visible property matters to each prototype",
            "proto_vision_app.explain_prototypes:run",
            _explain_prototypes,
        ),
        "evaluate-prototypes": Command(
            "are prototypes consistent, stable, on the object; what does deletion cost",
            "proto_vision_app.evaluate_prototypes:run",
            _evaluate_prototypes,
        ),
        "export": Command("weights as safetensors + config.json, or ONNX", "proto_vision_app.export:run", _export),
        "ood": Command("which images look unlike those that were trained", "proto_vision_app.ood:run", _ood),
        "linear-eval": Command(
            "what frozen features are worth: learning curves of two classifiers, or few-shot episodes",
            "proto_vision_app.linear_eval:run",
            _linear_eval,
        ),
        "verify": Command("do two images show one identity: TAR@FAR, EER", "proto_vision_app.verify:run", _verify),
    },
)


def main() -> None:
    """Entry point of the console command."""
    sys.exit(run_app(APP))


if __name__ == "__main__":
    main()
