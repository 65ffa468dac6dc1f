"""A trained detector without a dataset, a loader or an evaluator: an image in, its detections out."""

import contextlib
import os

import numpy as np
import torch
from PIL import Image
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
from plaintrain.visualization.drawing import get_skeleton

_NUM_KEYPOINTS = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"


class Predictor:
    """A callable from an image to the detections of a trained model.

    A run's folder may have been copied from another machine: `config.yaml` and one checkpoint suffice, the
    dataset need not be there. INPUT.* for evaluation, TEST.AUG, TEST.AMP and MODEL.EMA.EVALUATE are those
    of the config; the model is not compiled.

    Attributes:
        cfg: the config, with its number of classes.
        pixel_range: INPUT.PIXEL_RANGE, for `read_image`.
        weights: the name of what was loaded.
        class_names: by label.
        skeleton: pairs of keypoints that a line joins, for `draw_instances`.
        model: the detector, in evaluation mode.
    """

    def __init__(self, run, weights="", opts=()):
        """
        Args:
            run: a run's folder, a checkpoint with its config in it, or a config.
            weights: as MODEL.WEIGHTS, or a file in the run's folder such as model_best.pth; "" takes the
                run's last checkpoint (model_final.pth when it has ended), or MODEL.WEIGHTS of a config.
            opts: [KEY, VALUE, ...] to merge over the config, for example ["MODEL.DEVICE", "cpu"].
        """
        weights = weights or dict(zip(opts[::2], opts[1::2], strict=False)).get("MODEL.WEIGHTS", "")
        cfg, weights = _read_run(run, weights)
        cfg.merge_from_list(list(opts))
        self.cfg, self.weights = cfg, weights or cfg.MODEL.WEIGHTS
        if not self.weights:
            raise UserError(
                "there is nothing to predict with: MODEL.WEIGHTS is empty; name a file of weights"
            )
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
            dataset_name = _first_dataset(cfg)
            if dataset_name is None and cfg.MODEL.KEYPOINT_ON and cfg.TEST.AUG.FLIP:
                raise UserError(
                    "TEST.AUG.FLIP mirrors images, but which keypoints then change places only the datasets "
                    "of DATASETS know, and none can be read here: set TEST.AUG.FLIP False"
                )
            self._tta_mapper = build_tta_mapper(cfg, dataset_name)

    def __call__(self, image):
        """Return the detections in an image.

        Args:
            image: a path or a Pillow image (the EXIF orientation and INPUT.PIXEL_RANGE are applied), a uint8
                array `[H, W, 3]` or `[H, W]`, or a uint8 tensor `[3, H, W]`; colours are RGB, 0 to 255.

        Returns:
            dict of tensors on the CPU, scores descending: `boxes` (`[N, 4]`, XYXY, in the image's pixels),
            `scores` (`[N]`, 0 to 1), `labels` (`[N]`, of `class_names`), with a mask head `masks` (bool
            `[N, H, W]`), with a keypoint head `keypoints` (`[N, Kp, 3]`, x, y, score).
        """
        return self.batch([image])[0]

    def batch(self, images):
        """Return the detections in several images at once; those of other sizes are padded to the largest."""
        samples = [self._sample(to_tensor(image, self.pixel_range), i) for i, image in enumerate(images)]
        with inference_context(self.model), torch.no_grad(), self._autocast:
            outputs = self.model(samples) if samples else []
        return [{name: value.cpu() for name, value in output.items()} for output in outputs]

    def _sample(self, image, index):
        height, width = image.shape[-2:]
        sample = {"image_id": index, "file_name": "", "height": height, "width": width}
        if self._tta_mapper is not None:
            return {**sample, "views": self._tta_mapper.create_views(image)}
        tensors = {"image": tv_tensors.Image(image)}
        for transform in self._augmentation:
            tensors = transform(tensors, np.random.default_rng(0))
        return {**sample, "image": unwrap_image(tensors)}


def to_tensor(image, pixel_range=()):
    """Return an image, as `Predictor` takes it, as a uint8 tensor `[3, H, W]`, RGB; see also `read_image`."""
    if isinstance(image, str | os.PathLike):
        return read_image(os.fspath(image), pixel_range)
    if isinstance(image, Image.Image):
        return convert_to_rgb(image, pixel_range)
    if isinstance(image, np.ndarray):
        # A copy: a view of an array may have negative strides, which tensors do not.
        image = torch.from_numpy(image.copy())
        image = image.permute(2, 0, 1) if image.ndim == 3 else image[None]
    shape = list(getattr(image, "shape", ()))
    if len(shape) != 3 or shape[0] not in (1, 3) or image.dtype != torch.uint8:
        raise UserError(
            "an image must be a path, a Pillow image, a uint8 array [H, W, 3] or a uint8 tensor [3, H, W], "
            f"got {type(image).__name__} {getattr(image, 'dtype', '')} {shape}"
        )
    return image.cpu().expand(3, -1, -1)


def _read_run(run, weights):
    """Return (config, name of the weights or "") of a run's folder, a checkpoint or a config."""
    if isinstance(run, CfgNode):
        cfg = run.clone()
        cfg.defrost()
        return cfg, weights
    run = os.path.expanduser(os.fspath(run))
    if os.path.isfile(run):
        text = read_checkpoint(run, mmap=True).get("config")
        if not isinstance(text, str):
            raise UserError(
                f"{run} holds no config: give the folder of its run, or a config and MODEL.WEIGHTS"
            )
        cfg = get_cfg()
        cfg.merge_from_other_cfg(CfgNode.load_cfg(text))
        return cfg, weights or run
    cfg = read_config(run)
    if weights and os.path.isfile(os.path.join(run, weights)):
        return cfg, os.path.join(run, weights)
    if not weights:
        best = os.path.join(run, "model_best.pth")
        weights, _ = read_last_checkpoint(run, *[best] * os.path.isfile(best), mmap=True)
        if not weights:
            raise UserError(
                f"{run} holds no checkpoint: its training has not saved one yet, or it was left behind"
            )
    return cfg, weights


def _first_dataset(cfg):
    """Return the name of the first of the config's datasets that can be read here, or None."""
    try:
        declare_datasets(cfg)
    except UserError:
        return None
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        with contextlib.suppress(UserError):
            DatasetCatalog.get(name)
            return name
    return None


def _infer_classes(cfg, path):
    """Take the class names from the checkpoint, the datasets, or COCO, and their number into the config."""
    key = get_num_classes_key(cfg)
    configured = get_value(cfg, key)
    if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
        set_value(cfg, key, configured or 1)
        return ["object"]
    try:
        names = list(read_checkpoint(path, mmap=True).get("class_names") or ())
    except DamagedCheckpointError:
        # Published weights have another form.
        names = []
    if not names and _first_dataset(cfg):
        names = load_class_names(_first_dataset(cfg))
    # What is published without names is of COCO, whose keypoints are those of persons.
    coco_names = COCO_NAMES[:1] if cfg.MODEL.KEYPOINT_ON else COCO_NAMES
    if not names and configured in (0, len(coco_names)):
        names = coco_names
    names = [str(name) for name in names] or [f"class {label}" for label in range(configured)]
    if configured not in (0, len(names)):
        raise UserError(f"{key} is {configured}, but {path} was trained for {len(names)}: {', '.join(names)}")
    set_value(cfg, key, len(names))
    return names


def _infer_keypoints(cfg):
    """Take the number of keypoints into the config, and return the skeleton."""
    name = _first_dataset(cfg)
    metadata = MetadataCatalog.get(name) if name else {}
    names = metadata.get("keypoint_names")
    if not names:
        # COCO's, of persons.
        names = range(17)
        metadata = {"keypoint_names": names, "skeleton": COCO_SKELETON}
    number = get_value(cfg, _NUM_KEYPOINTS) or len(names)
    set_value(cfg, _NUM_KEYPOINTS, number)
    return get_skeleton(metadata) if number == len(names) else ()
