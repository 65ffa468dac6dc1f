"""Simple Copy-Paste."""

from dataclasses import dataclass

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.ops import masks_to_boxes
from torchvision.tv_tensors import wrap

from plaintrain.data.transforms.arguments import CheckedArguments, argument
from plaintrain.data.transforms.tensors import (
    INSTANCE_KEYS,
    Tensors,
    get_image_size,
    has_extent,
    resize,
    select_instances,
    tighten_boxes,
)


@dataclass(frozen=True)
class SimpleCopyPaste(CheckedArguments):
    """Paste each instance of another image with probability `p` (arXiv 2012.07177).

    The other image is first resized to this one's size. Masks lose the covered pixels and their boxes are
    recomputed; covered keypoints become hidden; fully covered instances are removed. `blending` blurs the
    edges of pasted instances (Gaussian, 5x5 pixels, sigma 2).
    """

    p: float = argument(0, 1, default=0.5)
    blending: bool = True

    def __call__(self, tensors: Tensors, rng: np.random.Generator, partner: Tensors) -> Tensors:
        """Paste instances of the image `partner`; both images must have masks."""
        selected = torch.from_numpy(rng.random(len(partner["labels"])) < self.p)
        pasted = resize(select_instances(partner, selected), get_image_size(tensors))
        pasted = select_instances(pasted, has_extent(pasted))
        if len(pasted["labels"]) == 0:
            return tensors
        cover = pasted["masks"].as_subclass(Tensor).any(dim=0).bool()
        result = _cover_instances(tensors, cover)
        for name in set(INSTANCE_KEYS) & set(tensors):
            joined = torch.cat([t[name].as_subclass(Tensor) for t in (result, pasted)])
            result[name] = joined if name in ("labels", "visibility") else wrap(joined, like=tensors[name])
        result["image"] = _paste(tensors["image"], pasted["image"], cover, self.blending)
        return result


def _cover_instances(tensors, cover):
    """Remove the pixels of `cover`, bool `[H, W]`, from the instances."""
    masks = tensors["masks"].as_subclass(Tensor)
    visible = masks * ~cover
    touched = (visible != masks).flatten(1).any(dim=1)
    result = {**tensors, "masks": wrap(visible, like=tensors["masks"])}
    if "keypoints" in tensors:
        limit = torch.tensor(cover.shape[::-1]) - 1
        x, y = tensors["keypoints"].as_subclass(Tensor).long().clamp(min=0).minimum(limit).unbind(-1)
        hidden = tensors["visibility"].clamp(max=1)
        result["visibility"] = torch.where(cover[y, x], hidden, tensors["visibility"])
    keep = visible.flatten(1).any(dim=1).bool()
    return tighten_boxes(select_instances(result, keep), touched[keep])


def _paste(image, other, cover, blending):
    # The blur reflects two pixels at the border, which requires three.
    if not blending or min(cover.shape) < 3:
        return wrap(torch.where(cover, other, image), like=image)
    # The blur reaches two pixels; two more keep the reflection at the crop's border out.
    left, top, right, bottom = masks_to_boxes(cover[None])[0].int().tolist()
    region = (..., slice(max(0, top - 4), bottom + 5), slice(max(0, left - 4), right + 5))
    weight = F.gaussian_blur(cover[None].float()[region], kernel_size=[5, 5], sigma=[2.0, 2.0])
    result = image.as_subclass(Tensor).clone()
    blended = torch.lerp(result[region].float(), other.as_subclass(Tensor)[region].float(), weight)
    result[region] = blended.round().to(torch.uint8)
    return wrap(result, like=image)
