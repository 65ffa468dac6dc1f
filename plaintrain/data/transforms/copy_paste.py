"""Simple Copy-Paste: instances of another image, pasted over this one."""

from dataclasses import dataclass

import torch
import torchvision.transforms.v2.functional as F
from torchvision.ops import masks_to_boxes
from torchvision.tv_tensors import wrap

from plaintrain.data.transforms.arguments import CheckedArguments, argument
from plaintrain.data.transforms.tensors import (
    ROWS,
    get_image_size,
    has_extent,
    resize,
    select_instances,
    tighten_boxes,
)


@dataclass(frozen=True)
class SimpleCopyPaste(CheckedArguments):
    """Paste a random subset of another image's instances (arXiv 2012.07177).

    The other image is scaled to this one's size first. What is pasted covers what lies below: masks
    lose those pixels, their boxes are drawn around what is left, keypoints become hidden, and
    instances that are covered whole are removed.

    Attributes:
        p: probability of each instance of the other image.
        blending: soften the edges of what is pasted (Gaussian, 5x5 pixels, sigma 2).
    """

    p: float = argument(0, 1, default=0.5)
    blending: bool = True

    def __call__(self, tensors, rng, partner):
        """Paste from `partner`, the tensors of another image; both need masks."""
        chosen = torch.from_numpy(rng.random(len(partner["labels"])) < self.p)
        pasted = resize(select_instances(partner, chosen), get_image_size(tensors))
        pasted = select_instances(pasted, has_extent(pasted))
        if len(pasted["labels"]) == 0:
            return tensors
        cover = pasted["masks"].as_subclass(torch.Tensor).any(dim=0).bool()
        result = _covered(tensors, cover)
        for name in set(ROWS) & set(tensors):
            joined = torch.cat([t[name].as_subclass(torch.Tensor) for t in (result, pasted)])
            result[name] = joined if name in ("labels", "visibility") else wrap(joined, like=tensors[name])
        result["image"] = _paste(tensors["image"], pasted["image"], cover, self.blending)
        return result


def _covered(tensors, cover):
    """The instances as they are where the pixels of `cover`, bool `[H, W]`, are pasted over."""
    masks = tensors["masks"].as_subclass(torch.Tensor)
    rest = masks * ~cover
    touched = (rest != masks).flatten(1).any(dim=1)
    result = {**tensors, "masks": wrap(rest, like=tensors["masks"])}
    if "keypoints" in tensors:
        limit = torch.tensor(cover.shape[::-1]) - 1
        x, y = tensors["keypoints"].as_subclass(torch.Tensor).long().clamp(min=0).minimum(limit).unbind(-1)
        hidden = tensors["visibility"].clamp(max=1)
        result["visibility"] = torch.where(cover[y, x], hidden, tensors["visibility"])
    keep = rest.flatten(1).any(dim=1).bool()
    return tighten_boxes(select_instances(result, keep), touched[keep])


def _paste(image, other, cover, blending):
    # The blur reflects two pixels at the border, which takes three.
    if not blending or min(cover.shape) < 3:
        return wrap(torch.where(cover, other, image), like=image)
    # What is pasted changes two pixels around it; two more keep the border's reflection out.
    left, top, right, bottom = masks_to_boxes(cover[None])[0].int().tolist()
    region = (..., slice(max(0, top - 4), bottom + 5), slice(max(0, left - 4), right + 5))
    share = F.gaussian_blur(cover[None].float()[region], kernel_size=[5, 5], sigma=[2.0, 2.0])
    result = image.as_subclass(torch.Tensor).clone()
    blended = torch.lerp(result[region].float(), other.as_subclass(torch.Tensor)[region].float(), share)
    result[region] = blended.round().to(torch.uint8)
    return wrap(result, like=image)
