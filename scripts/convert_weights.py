#!/usr/bin/env python
"""Convert a detector's weights from torchvision's names to Detectron2's, or back.

python scripts/convert_weights.py model_final.pkl faster_rcnn.pth --to torchvision
python scripts/convert_weights.py output/run/model_final.pth model_final.pkl --to detectron2

SOURCE is any value of MODEL.WEIGHTS: a file of either format, torchvision://MODEL/WEIGHTS, detectron2://PATH
or a URL. R-CNN (boxes, masks, keypoints) and RetinaNet on ResNet-FPN exist in both. Only names and the order
of classes and anchors change: the config must still match the training of the weights (INPUT.FORMAT,
MODEL.PIXEL_MEAN and PIXEL_STD, MODEL.RESNETS.STRIDE_IN_1X1, MODEL.ANCHOR_GENERATOR, POOLER_TYPE), which is
not checked for a converted file. torchvision's box and mask weights of the background, which it never uses,
are dropped for Detectron2 and zero on the way back.
"""

import pickle
from argparse import Namespace

import torch
from torch import Tensor

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


def convert(source: str, to: str, num_ratios: int) -> dict[str, Tensor]:
    """Return {name: tensor} of SOURCE under the names of `to`."""
    tensors = read_state_dict(download_weights(source))
    if not tensors:
        raise UserError(f"{source} holds no weights")
    if is_detectron2(tensors):
        tensors = convert_from_detectron2(tensors, num_ratios)
    for layer, num_anchors in count_anchors(tensors).items():
        if num_anchors % num_ratios:
            raise UserError(
                f"{layer} in {source} has {num_anchors} anchors, which is no multiple of {num_ratios} aspect "
                "ratios; give their number with --num-ratios"
            )
    return convert_to_detectron2(tensors, num_ratios) if to == "detectron2" else tensors


def write_weights(tensors: dict[str, Tensor], path: str) -> None:
    """Write `{"model": tensors}`, as NumPy arrays in a .pkl, as tensors in a .pth."""
    with atomic_write(path, "wb") as f:
        if path.endswith(".pkl"):
            arrays = {name: value.numpy() for name, value in tensors.items()}
            # With __author__, Detectron2 does not match names heuristically.
            pickle.dump({"model": arrays, "__author__": "plaintrain", "matching_heuristics": False}, f)
        else:
            torch.save({"model": tensors, "__author__": "plaintrain"}, f)


def main(args: Namespace) -> None:
    """Convert one file."""
    endings = (".pth", ".pkl") if args.to == "detectron2" else (".pth",)
    if not args.output.endswith(endings):
        raise UserError(f"OUTPUT must end in {' or '.join(endings)}, got {args.output!r}")
    tensors = convert(args.source, args.to, args.num_ratios)
    write_weights(tensors, args.output)
    print(f"wrote {len(tensors)} tensors with the names of {args.to} to {args.output}")


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
