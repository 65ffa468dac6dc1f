#!/usr/bin/env python
"""Write a trained detector as a file that needs no plaintrain, and check it on real images.

python scripts/export_model.py output/quickstart
python scripts/export_model.py output/quickstart --format torch --output model.pt2
python scripts/export_model.py --config-file configs/quickstart.yaml --images photos \\
    MODEL.WEIGHTS output/quickstart/model_final.pth
python examples/predict_exported.py output/quickstart/model.onnx photo.jpg

RUN_FOLDER is that of a run (OUTPUT_DIR), whose last checkpoint is taken (model_final.pth when it has ended)
unless MODEL.WEIGHTS names another, or it is a checkpoint itself. --format onnx needs pip install
"plaintrain[export]"; --format torch writes a program of torch.export (.pt2), for torch and torchvision alone.

What goes in: `images`, uint8 [batch, 3, height, width] in RGB, all of one size and resized already; the file
says to which (min_size and max_size, or fixed_size). Normalising is inside. What comes out: num_detections
[batch]; boxes [batch, D, 4] as x0, y0, x1, y1 in pixels of the image given, scores and labels [batch, D], of
which an image's first num_detections count; masks [batch, D, M, M], probabilities inside each box;
keypoint_maps [batch, D, keypoints, M, M], the heatmaps of each box. The number of images may vary, and their
size too, but for SSD and SSDlite, which take INPUT.FIXED_SIZE. A .pt2 takes images with sides longer than
the model's coarsest stride (64, or 128 of RetinaNet and FCOS on ResNet).

The first --check images of DATASETS.TEST, or of --images, go through the file and the model. A file that is
further off than --tolerance (boxes in pixels, scores, masks and heatmaps in their own units) is kept as
FILE.failed, and the exit code is 1.
"""

import os

from plaintrain.utils.arguments import build_run_parser, parse_run_arguments

if __name__ == "__main__":
    parser = build_run_parser(__doc__)
    parser.add_argument("--format", choices=["onnx", "torch"], help="default: as --output ends, else onnx")
    parser.add_argument("--output", metavar="FILE", help="default: model.onnx or model.pt2 in RUN_FOLDER")
    parser.add_argument("--check", type=int, default=10, metavar="N", help="images, default 10; 0: none")
    parser.add_argument("--images", default="", metavar="FOLDER", help="check with these, not DATASETS.TEST")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest difference, default 1e-3")
    args = parse_run_arguments(parser)
    if args.check < 0 or not args.tolerance > 0:
        parser.error("--check must be at least 0, and --tolerance above 0")

from plaintrain.config import get_value
from plaintrain.data.datasets.builtin import declare_datasets
from plaintrain.engine import launch, load_cfg
from plaintrain.evaluation.evaluator import format_table
from plaintrain.export.export import (
    FORMATS,
    check_exported,
    describe,
    is_fixed,
    load_images,
    open_exported,
    trace,
    write_onnx,
    write_torch,
)
from plaintrain.predict import Predictor
from plaintrain.utils.errors import UserError, require
from plaintrain.utils.files import writing
from plaintrain.utils.logger import setup_logger

# What an image to trace with needs: more than one location on each level.
_TRACED_SIZE = (384, 512)


def output_path(args):
    """(format, path) of the file to write.

    Raises:
        UserError: the format, the ending and RUN_FOLDER do not say which.
    """
    ending = os.path.splitext(args.output or "")[1]
    fitting = [name for name, known in FORMATS.items() if known == ending]
    form = args.format or (fitting[0] if fitting else "onnx")
    if not (args.output or args.run):
        raise UserError("give --output FILE, or the folder of a run")
    folder = args.run if os.path.isdir(args.run) else os.path.dirname(args.run)
    path = args.output or os.path.join(folder, "model" + FORMATS[form])
    if not path.endswith(FORMATS[form]):
        raise UserError(f"--output is {path!r}, but a file of --format {form} must end in {FORMATS[form]}")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise UserError(f"--output {path}: there is no folder {os.path.dirname(path)}")
    return form, path


def report(rows):
    """Print a table of the differences, and return the largest, {value: difference}."""
    values = [key for key in rows[0] if key not in ("image", "detections")]
    cells = [[row["image"], row["detections"], *(f"{row[v]:.1e}" for v in values)] for row in rows]
    worst = {value: max(row[value] for row in rows) for value in values}
    cells.append(["largest", sum(row["detections"] for row in rows), *(f"{worst[v]:.1e}" for v in values)])
    print(format_table(cells, ["image", "detections", *values]))
    return worst


def write(predictor, form, path):
    """Write the file; returns what it says about itself."""
    cfg = predictor.cfg
    about, fixed = describe(cfg, predictor.class_names, predictor.weights), is_fixed(cfg)
    program = trace(predictor.model, tuple(cfg.INPUT.FIXED_SIZE) if fixed else _TRACED_SIZE, fixed)
    with writing(path):
        (write_onnx if form == "onnx" else write_torch)(program, path, about)
    return about


def load(args):
    """The `Predictor` of what the command line names, on the CPU.

    Raises:
        UserError: nothing to load, or a setting that a file cannot hold.
    """
    opts = [*args.opts, "MODEL.DEVICE", "cpu", "MODEL.CHANNELS_LAST", "False"]
    predictor = Predictor(args.run or load_cfg(args), opts=opts)
    for key in ("TEST.AMP", "TEST.AUG.ENABLED"):
        if get_value(predictor.cfg, key):
            raise UserError(f"{key} is True, but a file is one pass in float32: give {key} False")
    return predictor


def main(args):
    """Export one model."""
    setup_logger()
    form, path = output_path(args)
    if form == "onnx":
        for module in ("onnx", "onnxscript", *(["onnxruntime"] if args.check else [])):
            require(module, "ONNX", "export")
    predictor = load(args)
    cfg, model = predictor.cfg, predictor.model
    declare_datasets(cfg)
    images = load_images(cfg, args.check, args.images) if args.check else []
    stem, ending = os.path.splitext(path)
    unchecked = f"{stem}.unchecked{ending}"
    about = write(predictor, form, unchecked)
    if images:
        worst = report(check_exported(open_exported(unchecked), model, images))
        off = {name: value for name, value in worst.items() if not value <= args.tolerance}
        if off:
            os.replace(unchecked, path + ".failed")
            found = " and ".join(f"{name} by {value:.2g}" for name, value in off.items())
            raise UserError(
                f"the file differs from the model in {found}, more than --tolerance {args.tolerance:g}; it "
                f"is kept as {path}.failed"
            )
    os.replace(unchecked, path)
    size = os.path.getsize(path) / 2**20
    print(f"{path}: {about['architecture']}, {size:.1f} MB, any {', '.join(about['dynamic'])}")


if __name__ == "__main__":
    launch(main, args=(args,))
