#!/usr/bin/env python
"""Rewrite a detector's weights from torchvision's names to Detectron2's, or back.

python scripts/convert_weights.py model_final.pkl faster_rcnn.pth --to torchvision
python scripts/convert_weights.py output/run/model_final.pth model_final.pkl --to detectron2

SOURCE is what MODEL.WEIGHTS may be: a file of either kind, torchvision://MODEL/WEIGHTS,
detectron2://PATH or an address. R-CNN (boxes, masks, keypoints) and RetinaNet on ResNet-FPN have a
counterpart in both. Only names and the order of classes and anchors change: the config must still say
what the weights were trained with (INPUT.FORMAT, MODEL.PIXEL_MEAN and PIXEL_STD,
MODEL.RESNETS.STRIDE_IN_1X1, MODEL.ANCHOR_GENERATOR, POOLER_TYPE), which is not checked for a converted file.
torchvision's boxes and masks of the background, which it never uses, are lost on the way to Detectron2 and
zero on the way back.
"""

import pickle

import torch

from plaintrain.checkpoint.detectron2 import (
    convert_from_detectron2,
    convert_to_detectron2,
    count_anchors,
    is_detectron2,
)
from plaintrain.checkpoint.pretrained import download_weights, read_state_dict
from plaintrain.engine.launch import launch
from plaintrain.utils.arguments import build_parser
from plaintrain.utils.errors import UserError
from plaintrain.utils.files import atomic_write


def convert(source, to, num_ratios):
    """Return {name: tensor} of SOURCE under the names of `to`.

    Raises:
        UserError: it cannot be read, or has no counterpart there.
    """
    tensors = read_state_dict(download_weights(source))
    if not tensors:
        raise UserError(f"{source} holds no weights")
    if is_detectron2(tensors):
        tensors = convert_from_detectron2(tensors, num_ratios)
    for layer, number in count_anchors(tensors).items():
        if number % num_ratios:
            raise UserError(
                f"{layer} in {source} is for {number} anchors, which {num_ratios} aspect ratios do not "
                "divide; give the number of ratios with --num-ratios"
            )
    return convert_to_detectron2(tensors, num_ratios) if to == "detectron2" else tensors


def write(tensors, path):
    """Write `{"model": tensors}`: arrays for Detectron2 if it is a .pkl, tensors if it is a .pth."""
    with atomic_write(path, "wb") as f:
        if path.endswith(".pkl"):
            arrays = {name: value.numpy() for name, value in tensors.items()}
            # Detectron2 takes names as they are from a file with an author.
            pickle.dump({"model": arrays, "__author__": "plaintrain", "matching_heuristics": False}, f)
        else:
            torch.save({"model": tensors, "__author__": "plaintrain"}, f)


def main(args):
    """Convert one file."""
    endings = (".pth", ".pkl") if args.to == "detectron2" else (".pth",)
    if not args.output.endswith(endings):
        raise UserError(f"OUTPUT is {args.output!r}, but must end in {' or '.join(endings)}")
    tensors = convert(args.source, args.to, args.num_ratios)
    write(tensors, args.output)
    print(f"{args.output}: {len(tensors)} tensors under the names of {args.to}")


if __name__ == "__main__":
    parser = build_parser(__doc__)
    parser.add_argument("source", metavar="SOURCE", help="weights to read")
    parser.add_argument("output", metavar="OUTPUT", help="file to write: .pth, or .pkl for detectron2")
    parser.add_argument("--to", required=True, choices=["torchvision", "detectron2"])
    parser.add_argument(
        "--num-ratios", type=int, default=3, help="aspect ratios per anchor size (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.num_ratios < 1:
        parser.error("--num-ratios must be at least 1")
    launch(main, args=(args,))
