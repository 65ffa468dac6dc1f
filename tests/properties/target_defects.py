"""Mistakes in reading a record, to patch into plaintrain.structures and plaintrain.data."""

import torch
from torchvision import tv_tensors

from plaintrain import structures
from plaintrain.data import keypoints, mapper
from plaintrain.structures import BoxMode


def convert_from(change):
    """A defect in converting boxes: `change(original, box, from mode, to mode)`."""

    def defect(patch):
        original = BoxMode.convert
        patch.setattr(BoxMode, "convert", staticmethod(lambda *arguments: change(original, *arguments)))

    return defect


def last_pixel(convert, box, a, b):
    x, y, third, fourth = convert(box, a, b)
    return [x, y, third - 1, fourth - 1] if b != a == BoxMode.XYWH_ABS else [x, y, third, fourth]


def flip_from(change):
    """A defect in the order of keypoints after a flip: `change(order)`."""

    def defect(patch):
        original = keypoints.keypoint_flip_indices
        patch.setattr(
            keypoints, "keypoint_flip_indices", lambda *names: tuple(change(list(original(*names))))
        )

    return defect


def first_pair(order):
    moved = [i for i, k in enumerate(order) if i < k][:1]
    return [k if i in moved or k in moved else i for i, k in enumerate(order)]


def only_small_letters(patch):
    patch.setattr(keypoints, "_OTHER", {"left": "right", "right": "left"})


def counts_by_rows(patch):
    original = structures.coco_mask.frPyObjects

    def read(rle, height, width):
        turned = original({**rle, "size": [width, height]}, width, height)
        pixels = structures.coco_mask.decode(turned).T
        return structures.coco_mask.encode(structures.np.asfortranarray(pixels))

    patch.setattr(structures.coco_mask, "frPyObjects", read)


def mapper_from(name, change):
    """A defect in what the mapper reads of annotations: `change(what it should be)`."""

    def defect(patch):
        original = getattr(mapper, name)

        def read(*arguments):
            value = original(*arguments)
            new = change(value.as_subclass(torch.Tensor))
            return tv_tensors.wrap(new, like=value) if isinstance(value, tv_tensors.TVTensor) else new

        patch.setattr(mapper, name, read)

    return defect


def half_a_pixel(points):
    points[..., :2] += 0.5
    return points
