#!/usr/bin/env python
"""Export a trained detector to ONNX or torch.export, and compare it with the model on real images.

python scripts/export_model.py output/quickstart
python scripts/export_model.py output/quickstart --format torch --output model.pt2
python scripts/export_model.py --config-file configs/quickstart.yaml --images photos \\
    MODEL.WEIGHTS output/quickstart/model_final.pth
python examples/predict_exported.py output/quickstart/model.onnx photo.jpg

RUN_FOLDER is the OUTPUT_DIR of a run, whose last checkpoint is exported (model_final.pth of a finished run)
unless MODEL.WEIGHTS names another one; it may also be a checkpoint. --format onnx needs pip install
"plaintrain[export]"; --format torch writes a torch.export program (.pt2), which needs only torch and
torchvision.

Input: `images`, uint8 [batch, 3, height, width], RGB, resized as the metadata of the file describe (min_size
and max_size, or fixed_size). Normalization is part of the model. Output: num_detections [batch]; boxes
[batch, D, 4] as x0, y0, x1, y1 in pixels of the input; scores and labels [batch, D], of which the first
num_detections are valid; masks [batch, D, M, M], probabilities inside each box; keypoint_maps [batch, D,
keypoints, M, M], the heatmaps of each box. Batch and image size are dynamic, but SSD and SSDlite have a fixed
size (INPUT.FIXED_SIZE). The sides of a .pt2's images must exceed the coarsest stride of the model (64, or 128
for RetinaNet and FCOS on ResNet).

Compares the outputs on the first --check images of DATASETS.TEST, or of --images. If they differ by more than
--tolerance (boxes in pixels; scores, masks and heatmaps in their own units), the file is kept as FILE.failed
and the exit code is 1.
"""

import os

from plaintrain.utils.arguments import build_run_parser, parse_run_arguments

if __name__ == "__main__":
    parser = build_run_parser(__doc__)
    parser.add_argument("--format", choices=["onnx", "torch"], help="default: that of --output, else onnx")
    parser.add_argument("--output", metavar="FILE", help="default: model.onnx or model.pt2 in RUN_FOLDER")
    parser.add_argument("--check", type=int, default=10, metavar="N", help="images to compare (default: 10)")
    parser.add_argument("--images", default="", metavar="FOLDER", help="compare on these, not DATASETS.TEST")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest difference (default: 1e-3)")
    args = parse_run_arguments(parser)
    if args.check < 0:
        parser.error(f"--check must be at least 0, got {args.check}")
    if not args.tolerance > 0:
        parser.error(f"--tolerance must be above 0, got {args.tolerance}")

from argparse import Namespace
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from plaintrain.config import CfgNode, get_value
from plaintrain.data import DatasetMapper
from plaintrain.data.datasets.builtin import declare_datasets
from plaintrain.data.image_files import build_image_record, list_images
from plaintrain.data.records import get_detection_dataset_dicts
from plaintrain.engine import launch, load_cfg
from plaintrain.evaluation.evaluator import format_table
from plaintrain.export.export import (
    FORMATS,
    check_exported,
    describe,
    is_fixed,
    open_exported,
    trace,
    write_onnx,
    write_torch,
)
from plaintrain.export.graph import Detector
from plaintrain.predict import Predictor
from plaintrain.utils.errors import UserError, require
from plaintrain.utils.files import writing
from plaintrain.utils.logger import setup_logger

# The image for tracing needs more than one location on each feature level.
_TRACED_SIZE = (384, 512)


def choose_output(args: Namespace) -> tuple[str, str]:
    """Return (format, path) of the file to write."""
    extension = os.path.splitext(args.output or "")[1]
    format_of = {known: name for name, known in FORMATS.items()}
    form = args.format or format_of.get(extension, "onnx")
    if not (args.output or args.run):
        raise UserError("give --output FILE or RUN_FOLDER")
    folder = args.run if os.path.isdir(args.run) else os.path.dirname(args.run)
    path = args.output or os.path.join(folder, "model" + FORMATS[form])
    if not path.endswith(FORMATS[form]):
        raise UserError(f"--output must end in {FORMATS[form]} for --format {form}, got {path!r}")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise UserError(f"--output {path}: there is no folder {os.path.dirname(path)}")
    return form, path


def load_check_images(cfg: CfgNode, num_images: int, folder: str = "") -> list[tuple[str, Tensor]]:
    """Return names and pixels of the first images of a folder or DATASETS.TEST, resized as for evaluation."""
    if folder:
        records: list[Any] = [build_image_record(path, path) for path in list_images(folder)[:num_images]]
    elif cfg.DATASETS.TEST:
        dataset = get_detection_dataset_dicts(cfg.DATASETS.TEST[0], filter_empty=False)
        records = [dataset[i] for i in range(min(num_images, len(dataset)))]
    else:
        raise UserError("DATASETS.TEST is empty; give --images FOLDER, or --check 0 to skip the check")
    mapper = DatasetMapper(cfg, is_train=False)
    return [(os.path.basename(record["file_name"]), mapper(record)["image"]) for record in records]


def print_differences(differences: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Print the differences of each image as a table, and return the largest, {output: difference}."""
    names = [key for key in differences[0] if key not in ("image", "detections")]
    cells = [[d["image"], d["detections"], *(f"{d[name]:.1e}" for name in names)] for d in differences]
    largest = {name: max(d[name] for d in differences) for name in names}
    num_detections = sum(d["detections"] for d in differences)
    cells.append(["largest", num_detections, *(f"{largest[name]:.1e}" for name in names)])
    print(format_table(cells, ["image", "detections", *names]))
    return largest


def write_exported(predictor: Predictor, form: str, path: str) -> dict[str, Any]:
    """Write the file and return its metadata."""
    cfg = predictor.cfg
    metadata = describe(cfg, predictor.class_names, predictor.weights)
    fixed = is_fixed(cfg)
    size = tuple(cfg.INPUT.FIXED_SIZE) if fixed else _TRACED_SIZE
    program = trace(cast(Detector, predictor.model), size, fixed)
    with writing(path):
        (write_onnx if form == "onnx" else write_torch)(program, path, metadata)
    return metadata


def load_predictor(args: Namespace) -> Predictor:
    """Build the predictor on the CPU; reject settings that cannot be exported."""
    opts = [*args.opts, "MODEL.DEVICE", "cpu", "MODEL.CHANNELS_LAST", "False"]
    predictor = Predictor(args.run or load_cfg(args), opts=opts)
    for key in ("TEST.AMP", "TEST.AUG.ENABLED"):
        if get_value(predictor.cfg, key):
            raise UserError(f"{key} must be False for an export, which is one float32 forward, got True")
    return predictor


def main(args: Namespace) -> None:
    """Export and check one model."""
    setup_logger()
    form, path = choose_output(args)
    if form == "onnx":
        modules = ["onnx", "onnxscript", "onnxruntime"] if args.check else ["onnx", "onnxscript"]
        for module in modules:
            require(module, "ONNX", "export")
    predictor = load_predictor(args)
    declare_datasets(predictor.cfg)
    images = load_check_images(predictor.cfg, args.check, args.images) if args.check else []
    stem, ending = os.path.splitext(path)
    unchecked = f"{stem}.unchecked{ending}"
    metadata = write_exported(predictor, form, unchecked)
    if images:
        differences = check_exported(open_exported(unchecked), cast(Detector, predictor.model), images)
        largest = print_differences(differences)
        exceeded = [
            f"{name} by {value:.2g}" for name, value in largest.items() if not value <= args.tolerance
        ]
        if exceeded:
            os.replace(unchecked, path + ".failed")
            raise UserError(
                f"the file differs from the model in {' and '.join(exceeded)}, more than --tolerance "
                f"{args.tolerance:g}; it is kept as {path}.failed"
            )
    os.replace(unchecked, path)
    size = os.path.getsize(path) / 2**20
    print(
        f"wrote {path}: {metadata['architecture']}, {size:.1f} MB, dynamic {', '.join(metadata['dynamic'])}"
    )


if __name__ == "__main__":
    launch(main, args=(args,))
