"""One image in, its detections out: a trained detector without a dataset, a loader or an evaluator."""

import os

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

from plaintrain.analysis.run_folder import read_config
from plaintrain.checkpoint.classes import COCO_NAMES
from plaintrain.checkpoint.files import DamagedCheckpointError, read_checkpoint, read_last
from plaintrain.checkpoint.pretrained import fetch_weights, load_weights
from plaintrain.checkpoint.weight_checks import check_weights
from plaintrain.config import CfgNode, get_cfg, get_value, set_value
from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog, class_names
from plaintrain.data.datasets.builtin import declare_datasets
from plaintrain.data.images import get_pixel_range, read_image, to_rgb
from plaintrain.data.keypoints import COCO_SKELETON
from plaintrain.data.transforms.build import build_augmentation
from plaintrain.data.transforms.tensors import plain_image
from plaintrain.data.tta import build_tta_mapper
from plaintrain.evaluation.evaluator import inference_context
from plaintrain.modeling.build import build_model, num_classes_key
from plaintrain.modeling.tta import build_tta
from plaintrain.solver.amp import build_autocast
from plaintrain.utils.errors import UserError
from plaintrain.visualization.drawing import skeleton_of

_NUM_KEYPOINTS = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
# What a run may hold beside the checkpoints that it could be resumed from.
_BEST = "model_best.pth"


class Predictor:
    """A callable from an image to what a trained detector finds in it.

    A run's folder may have been copied from another machine: `config.yaml` and one checkpoint suffice, the
    dataset need not be there. INPUT.* for evaluation, TEST.AUG, TEST.AMP and MODEL.EMA.EVALUATE are those
    of the config; the model is not compiled.

    Attributes:
        cfg: the config, with its number of classes settled.
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

        Raises:
            UserError: there is no such run, nothing to load, or weights of another model.
        """
        self.cfg, self.weights = _find(run, weights, opts)
        self.pixel_range = get_pixel_range(self.cfg)
        path = fetch_weights(self.weights)
        self.class_names = _settle_classes(self.cfg, path)
        self.skeleton = _settle_keypoints(self.cfg)
        model = build_model(self.cfg)
        ema = self.cfg.MODEL.EMA
        averaged = ema.ENABLED and ema.EVALUATE == "averaged"
        check_weights(self.cfg, model, self.weights, self.class_names, strict=True)
        load_weights(model, self.weights, self.class_names, averaged=averaged)
        self.model = build_tta(self.cfg, model).eval()
        device = next(model.parameters()).device.type
        self._autocast = build_autocast(self.cfg.TEST.AMP, self.cfg.SOLVER.AMP.PRECISION, device)
        self._steps, self._views = build_augmentation(self.cfg, is_train=False), None
        if self.cfg.TEST.AUG.ENABLED:
            self._views = _tta_mapper(self.cfg)

    def __call__(self, image):
        """What is found in an image.

        Args:
            image: a path or a Pillow image (the EXIF orientation and INPUT.PIXEL_RANGE are applied), a uint8
                array `[H, W, 3]` or `[H, W]`, or a uint8 tensor `[3, H, W]`; colours are RGB, 0 to 255.

        Returns:
            dict of tensors on the CPU, scores descending: `boxes` (`[N, 4]`, XYXY, in the image's pixels),
            `scores` (`[N]`, 0 to 1), `labels` (`[N]`, of `class_names`), with a mask head `masks` (bool
            `[N, H, W]`), with a keypoint head `keypoints` (`[N, Kp, 3]`, x, y, score).

        Raises:
            UserError: what is no image.
        """
        return self.batch([image])[0]

    def batch(self, images):
        """As for one image, of several at once; those of other sizes are padded to the largest."""
        samples = [self._sample(to_tensor(image, self.pixel_range), i) for i, image in enumerate(images)]
        with inference_context(self.model), torch.no_grad(), self._autocast:
            found = self.model(samples) if samples else []
        return [{name: value.cpu() for name, value in output.items()} for output in found]

    def _sample(self, image, index):
        height, width = image.shape[-2:]
        sample = {"image_id": index, "file_name": "", "height": height, "width": width}
        if self._views is not None:
            return {**sample, "views": self._views.views(image)}
        tensors = {"image": tv_tensors.Image(image)}
        for step in self._steps:
            tensors = step(tensors, np.random.default_rng(0))
        return {**sample, "image": plain_image(tensors)}


def to_tensor(image, pixel_range=()):
    """An image, as `Predictor` takes it, as a uint8 tensor `[3, H, W]`, RGB; `pixel_range`: see `read_image`.

    Raises:
        UserError: a file that cannot be read, or what is no image.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(os.fspath(image), pixel_range)
    if isinstance(image, Image.Image):
        return to_rgb(image, pixel_range)
    found = f"a {type(image).__name__}"
    if isinstance(image, np.ndarray | torch.Tensor):
        found = f"{found} {image.dtype} of the shape {list(image.shape)}"
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
            # A copy: a view of an array may have negative strides, which tensors do not.
            image = torch.from_numpy(np.array(image))
            image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
        right = isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and image.ndim == 3
        if right and image.shape[0] in (1, 3) and min(image.shape) > 0:
            return image.cpu().expand(3, -1, -1)
    raise UserError(
        "an image must be a path, a Pillow image, a uint8 array [H, W, 3] or a uint8 tensor [3, H, W], not "
        + found
    )


def _find(run, weights, opts):
    """(config, weights) of what `Predictor` is given."""
    weights = weights or dict(zip(opts[::2], opts[1::2], strict=False)).get("MODEL.WEIGHTS", "")
    if isinstance(run, CfgNode):
        cfg = run.clone()
    else:
        cfg, weights = _from_folder(os.path.expanduser(os.fspath(run)), weights)
    cfg.defrost()
    cfg.merge_from_list(list(opts))
    weights = weights or cfg.MODEL.WEIGHTS
    if not weights:
        raise UserError("there is nothing to predict with: MODEL.WEIGHTS is empty; name a file of weights")
    set_value(cfg, "MODEL.WEIGHTS", weights)
    set_value(cfg, "MODEL.COMPILE", False)
    cfg.freeze()
    return cfg, weights


def _from_folder(run, weights):
    """(config, weights) of a run's folder or of a checkpoint."""
    if os.path.isfile(run):
        text = read_checkpoint(run, mmap=True).get("config")
        if not isinstance(text, str):
            raise UserError(
                f"{run} holds no config: give the folder of its run, or a config and MODEL.WEIGHTS"
            )
        cfg = get_cfg()
        cfg.merge_from_other_cfg(CfgNode.load_cfg(text))
        return cfg, weights or run
    path = os.path.join(run, "config.yaml")
    if not os.path.isfile(path):
        what = "has no config.yaml" if os.path.isdir(run) else "does not exist"
        raise UserError(f"{run!r} {what}: expected the OUTPUT_DIR of a training, or a checkpoint")
    cfg = read_config(run)
    if weights and os.path.isfile(os.path.join(run, weights)):
        return cfg, os.path.join(run, weights)
    return cfg, weights or _last_weights(run)


def _last_weights(run):
    """The newest checkpoint of a run that can be read."""
    best = os.path.join(run, _BEST)
    path, _ = read_last(run, *[best] * os.path.isfile(best), mmap=True)
    if not path:
        raise UserError(
            f"{run} holds no checkpoint: its training has not saved one yet, or it was left behind"
        )
    return path


def _datasets(cfg):
    """Names of the config's datasets that can be read here, loaded."""
    try:
        declare_datasets(cfg)
    except UserError:
        return
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        try:
            DatasetCatalog.get(name)
        except UserError:
            continue
        yield name


def _settle_classes(cfg, path):
    """The class names, from the checkpoint, the datasets, or COCO; settles their number in the config."""
    key = num_classes_key(cfg)
    number = get_value(cfg, key)
    if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
        set_value(cfg, key, number or 1)
        return ["object"]
    try:
        names = list(read_checkpoint(path, mmap=True).get("class_names") or ())
    except DamagedCheckpointError:
        # Published weights have another form.
        names = []
    names = names or next((class_names(name) for name in _datasets(cfg)), [])
    # What is published without names is of COCO, whose keypoints are those of persons.
    of_coco = COCO_NAMES[:1] if cfg.MODEL.KEYPOINT_ON else COCO_NAMES
    if not names and number in (0, len(of_coco)):
        names = list(of_coco)
    names = [str(name) for name in names] or [f"class {label}" for label in range(number)]
    if number not in (0, len(names)):
        raise UserError(f"{key} is {number}, but {path} was trained for {len(names)}: {', '.join(names)}")
    set_value(cfg, key, len(names))
    return names


def _settle_keypoints(cfg):
    """The skeleton; settles the number of keypoints in the config."""
    if not cfg.MODEL.KEYPOINT_ON:
        return ()
    metadata = next(map(MetadataCatalog.get, _datasets(cfg)), {})
    number = get_value(cfg, _NUM_KEYPOINTS)
    names = list(metadata.get("keypoint_names") or ())
    if number == 0:
        set_value(cfg, _NUM_KEYPOINTS, len(names) or 17)
    if names and number in (0, len(names)):
        return skeleton_of(metadata)
    is_coco = get_value(cfg, _NUM_KEYPOINTS) == 17
    return tuple((a - 1, b - 1) for a, b in COCO_SKELETON) if is_coco else ()


def _tta_mapper(cfg):
    dataset = next(_datasets(cfg), None)
    if dataset is None and cfg.MODEL.KEYPOINT_ON and cfg.TEST.AUG.FLIP:
        raise UserError(
            "TEST.AUG.FLIP mirrors images, but which keypoints then change places only the datasets of "
            "DATASETS know, and none can be read here: set TEST.AUG.FLIP False"
        )
    return build_tta_mapper(cfg, dataset)
