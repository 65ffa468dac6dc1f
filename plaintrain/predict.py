"""Inference with a trained detector, without a dataset or data loader."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from plaintrain.analysis.run_folder import read_config
from plaintrain.checkpoint.files import DamagedCheckpointError, read_checkpoint, read_last_checkpoint
from plaintrain.checkpoint.pretrained import download_weights, load_weights
from plaintrain.checkpoint.torchvision import COCO_NAMES
from plaintrain.checkpoint.weight_checks import check_weights
from plaintrain.config import CfgNode, get_cfg, get_value, set_value
from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog, load_class_names
from plaintrain.data.datasets.builtin import declare_datasets
from plaintrain.data.images import convert_to_rgb, get_pixel_range, read_image
from plaintrain.data.keypoints import COCO_SKELETON
from plaintrain.data.transforms.build import build_augmentation
from plaintrain.data.transforms.tensors import unwrap_image
from plaintrain.data.tta import build_tta_mapper
from plaintrain.evaluation.evaluator import inference_context
from plaintrain.modeling.build import build_model, get_num_classes_key
from plaintrain.modeling.tta import build_tta
from plaintrain.solver.amp import build_test_autocast
from plaintrain.utils.errors import UserError
from plaintrain.visualization.drawing import Edges, get_skeleton


class Predictor:
    """Callable that maps an image to the detections of a trained model.

    It needs neither the dataset nor a complete output folder: `config.yaml` and one checkpoint suffice.
    INPUT.* for evaluation, TEST.AUG, TEST.AMP and MODEL.EMA.EVALUATE apply; the model is not compiled.

    Attributes:
        cfg: the config, with its number of classes.
        pixel_range: INPUT.PIXEL_RANGE, for `read_image`.
        class_names: in the order of the labels.
        skeleton: pairs of keypoints to connect by a line, for `draw_instances`.
    """

    def __init__(self, run: str | os.PathLike | CfgNode, weights: str = "", opts: Sequence[Any] = ()):
        """
        Args:
            run: an output folder, a checkpoint with its config, or a config.
            weights: as MODEL.WEIGHTS, or a file in the output folder such as model_best.pth; "" loads the
                last checkpoint (model_final.pth of a finished run), or MODEL.WEIGHTS of a config.
            opts: [KEY, VALUE, ...] to merge into the config, such as ["MODEL.DEVICE", "cpu"].
        """
        weights = weights or dict(zip(opts[::2], opts[1::2], strict=False)).get("MODEL.WEIGHTS", "")
        cfg, weights = _read_run(run, weights)
        cfg.merge_from_list(list(opts))
        self.cfg = cfg
        self.weights = weights or cfg.MODEL.WEIGHTS
        if not self.weights:
            raise UserError("MODEL.WEIGHTS is empty; set it to a file of weights")
        set_value(cfg, "MODEL.WEIGHTS", self.weights)
        set_value(cfg, "MODEL.COMPILE", False)
        cfg.freeze()
        self.pixel_range = get_pixel_range(cfg)
        self.class_names = _infer_classes(cfg, download_weights(self.weights))
        self.skeleton = _infer_keypoints(cfg) if cfg.MODEL.KEYPOINT_ON else ()
        model = build_model(cfg)
        averaged = cfg.MODEL.EMA.ENABLED and cfg.MODEL.EMA.EVALUATE == "averaged"
        check_weights(cfg, model, self.weights, self.class_names, strict=True)
        load_weights(model, self.weights, self.class_names, averaged=averaged)
        self.model = build_tta(cfg, model).eval()
        self._autocast = build_test_autocast(cfg, model)
        self._augmentation = build_augmentation(cfg, is_train=False)
        self._tta_mapper = None
        if cfg.TEST.AUG.ENABLED:
            dataset_name = _find_dataset(cfg)
            if dataset_name is None and cfg.MODEL.KEYPOINT_ON and cfg.TEST.AUG.FLIP:
                raise UserError(
                    "TEST.AUG.FLIP needs the left and right keypoints of a dataset, but none of DATASETS.* "
                    "can be loaded; set TEST.AUG.FLIP False"
                )
            self._tta_mapper = build_tta_mapper(cfg, dataset_name)

    def __call__(self, image: str | os.PathLike | Image.Image | np.ndarray | Tensor) -> dict[str, Tensor]:
        """Return the detections in an image, on the CPU, by descending score.

        Args:
            image: a path or a Pillow image (with EXIF orientation and INPUT.PIXEL_RANGE), or a uint8 array
                `[H, W, 3]` or `[H, W]` or tensor `[3, H, W]` in RGB.

        Returns:
            `boxes` (`[N, 4]`, XYXY, in pixels of the image), `scores` (`[N]`, in [0, 1]), `labels` (`[N]`,
            index of `class_names`), with a mask head `masks` (bool `[N, H, W]`), with a keypoint head
            `keypoints` (`[N, Kp, 3]`, x, y, score).
        """
        return self.batch([image])[0]

    def batch(self, images: Sequence[Any]) -> list[dict[str, Tensor]]:
        """Return the detections in several images, which are padded to the largest."""
        tensors = [to_tensor(image, self.pixel_range) for image in images]
        samples = [self._build_sample(tensor, index) for index, tensor in enumerate(tensors)]
        with inference_context(self.model), torch.no_grad(), self._autocast:
            outputs = self.model(samples) if samples else []
        return [{name: value.cpu() for name, value in output.items()} for output in outputs]

    def _build_sample(self, image: Tensor, index: int) -> dict[str, Any]:
        height, width = image.shape[-2:]
        sample = {"image_id": index, "file_name": "", "height": height, "width": width}
        if self._tta_mapper is not None:
            return {**sample, "views": self._tta_mapper.create_views(image)}
        tensors = {"image": tv_tensors.Image(image)}
        for transform in self._augmentation:
            tensors = transform(tensors, np.random.default_rng(0))
        return {**sample, "image": unwrap_image(tensors)}


def to_tensor(image: Any, pixel_range: Sequence[float] = ()) -> Tensor:
    """Convert an image, as `Predictor` accepts it, to a uint8 RGB tensor `[3, H, W]`; see `read_image`."""
    if isinstance(image, str | os.PathLike):
        return read_image(os.fspath(image), pixel_range)
    if isinstance(image, Image.Image):
        return convert_to_rgb(image, pixel_range)
    if isinstance(image, np.ndarray):
        # Copy because tensors do not support the negative strides of flipped arrays.
        image = torch.from_numpy(image.copy())
        image = image.permute(2, 0, 1) if image.ndim == 3 else image[None]
    shape = list(getattr(image, "shape", ()))
    if len(shape) != 3 or shape[0] not in (1, 3) or image.dtype != torch.uint8:
        raise UserError(
            "an image must be a path, a Pillow image, a uint8 array [H, W, 3] or a uint8 tensor [3, H, W], "
            f"got {type(image).__name__} {getattr(image, 'dtype', '')} {shape}"
        )
    return image.cpu().expand(3, -1, -1)


def _read_run(run: str | os.PathLike | CfgNode, weights: str) -> tuple[CfgNode, str]:
    """Return the config and the weights ("" if there are none) of a folder, a checkpoint or a config."""
    if isinstance(run, CfgNode):
        cfg = run.clone()
        cfg.defrost()
        return cfg, weights
    run = os.path.expanduser(os.fspath(run))
    if os.path.isfile(run):
        text = read_checkpoint(run, mmap=True).get("config")
        if not isinstance(text, str):
            raise UserError(f"{run} holds no config; use its output folder, or a config and MODEL.WEIGHTS")
        cfg = get_cfg()
        cfg.merge_from_other_cfg(CfgNode.load_cfg(text))
        return cfg, weights or run
    cfg = read_config(run)
    if weights and os.path.isfile(os.path.join(run, weights)):
        return cfg, os.path.join(run, weights)
    if not weights:
        best = os.path.join(run, "model_best.pth")
        others = [best] if os.path.isfile(best) else []
        weights, _ = read_last_checkpoint(run, *others)
        if not weights:
            raise UserError(f"{run} holds no checkpoint; its training has not saved one yet, or it was moved")
    return cfg, weights


def _find_dataset(cfg: CfgNode) -> str | None:
    """Return the name of the first dataset of the config that can be loaded, or None."""
    with contextlib.suppress(UserError):
        declare_datasets(cfg)
        for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
            with contextlib.suppress(UserError):
                DatasetCatalog.get(name)
                return name
    return None


def _infer_classes(cfg: CfgNode, path: str) -> list[str]:
    """Return the class names of the checkpoint, the datasets or COCO; set their number in the config."""
    key = get_num_classes_key(cfg)
    configured = get_value(cfg, key)
    if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
        set_value(cfg, key, configured or 1)
        return ["object"]
    try:
        names = list(read_checkpoint(path, mmap=True).get("class_names") or ())
    except DamagedCheckpointError:
        # Published weights are no checkpoint of plaintrain.
        names = []
    dataset_name = None if names else _find_dataset(cfg)
    if dataset_name:
        names = load_class_names(dataset_name)
    # Published weights without names were trained on COCO, which has keypoints of persons only.
    coco_names = COCO_NAMES[:1] if cfg.MODEL.KEYPOINT_ON else COCO_NAMES
    if not names and configured in (0, len(coco_names)):
        names = coco_names
    names = [str(name) for name in names] or [f"class {label}" for label in range(configured)]
    if configured not in (0, len(names)):
        raise UserError(f"{key} must be {len(names)} for {path} ({', '.join(names)}), got {configured}")
    set_value(cfg, key, len(names))
    return names


def _infer_keypoints(cfg: CfgNode) -> Edges:
    """Return the skeleton of the dataset or COCO; set the number of keypoints in the config."""
    name = _find_dataset(cfg)
    metadata: Any = MetadataCatalog.get(name) if name else {}
    if not metadata.get("keypoint_names"):
        metadata = {"keypoint_names": range(17), "skeleton": COCO_SKELETON}
    num_names = len(metadata.get("keypoint_names"))
    num_keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS or num_names
    set_value(cfg, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", num_keypoints)
    return get_skeleton(metadata) if num_keypoints == num_names else ()
