"""`build_model`: the detector that a config describes."""

import logging

import torch

from plaintrain.config import check_cfg, get_value
from plaintrain.modeling.fcos import build_fcos
from plaintrain.modeling.rcnn import build_proposal_network, build_rcnn
from plaintrain.modeling.retinanet import build_retinanet
from plaintrain.modeling.ssd import build_ssd
from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)

# MODEL.META_ARCHITECTURE -> (builder, the key that holds its number of classes).
META_ARCHITECTURES = {
    "GeneralizedRCNN": (build_rcnn, "MODEL.ROI_HEADS.NUM_CLASSES"),
    "ProposalNetwork": (build_proposal_network, "MODEL.ROI_HEADS.NUM_CLASSES"),
    "RetinaNet": (build_retinanet, "MODEL.RETINANET.NUM_CLASSES"),
    "FCOS": (build_fcos, "MODEL.FCOS.NUM_CLASSES"),
    "SSD": (build_ssd, "MODEL.SSD.NUM_CLASSES"),
}

# By the names that torchvision's detectors give them.
_PARTS = (
    "backbone", "head", "rpn.head", "roi_heads.box_head", "roi_heads.box_predictor", "roi_heads.mask_head",
    "roi_heads.mask_predictor", "roi_heads.keypoint_head", "roi_heads.keypoint_predictor",
)  # fmt: skip
# Of a part: training, validation losses and evaluation, with autocast and without.
_MOST_GRAPHS = 8


def get_num_classes_key(cfg):
    """The config key that holds the number of classes of MODEL.META_ARCHITECTURE."""
    if cfg.MODEL.META_ARCHITECTURE not in META_ARCHITECTURES:
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}, but must be one of "
            + ", ".join(META_ARCHITECTURES)
        )
    return META_ARCHITECTURES[cfg.MODEL.META_ARCHITECTURE][1]


def get_device(name):
    """Return the `torch.device` that MODEL.DEVICE names; auto takes CUDA, then MPS, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"MODEL.DEVICE is {name!r}, which cannot be used here: {reason}") from e
    return device


def build_model(cfg):
    """Build the detector of MODEL.META_ARCHITECTURE with random weights, on MODEL.DEVICE.

    Returns:
        A module that takes samples: `image` uint8 `[3, H, W]`, in training with `target`. In training it
        returns a dict of losses, 0-d tensors. In evaluation it returns a list of {boxes `[N, 4]`, scores
        `[N]`, labels `[N]`}, boxes XYXY in the original image's pixels, scores descending in 0..1, labels
        0 to K-1; with their heads masks bool `[N, height, width]` and keypoints `[N, Kp, 3]` (x, y, score).
    """
    check_cfg(cfg)
    key = get_num_classes_key(cfg)
    if get_value(cfg, key) < 1:
        raise UserError(
            f"{key} is {get_value(cfg, key)}: call default_setup(cfg, args), which asks the "
            "training dataset, or set the number of classes"
        )
    builder, _ = META_ARCHITECTURES[cfg.MODEL.META_ARCHITECTURE]
    device = get_device(cfg.MODEL.DEVICE)
    model = builder(cfg).to(device)
    if cfg.MODEL.CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)
    if cfg.MODEL.COMPILE and device.type != "meta":
        compile_parts(model)
    return model


def compile_parts(model, backend="inductor"):
    """Compile the parts of a detector that are all arithmetic, backbone, FPN and heads, in place.

    What selects (anchors, proposals, samples) stays as it is. Each is compiled when it is first called.
    Sizes of images and numbers of boxes are dynamic: others do not compile again. A copy of the model is not
    compiled. What cannot be compiled runs as it is, with a warning. `backend` is torch.compile's.
    """
    # Imported where it is used: that takes seconds.
    from torch._dynamo import config
    from torch._functorch import config as functorch_config

    config.suppress_errors = True
    # The backward pass is compiled now, not when it is first run: there nobody could catch a failure.
    if hasattr(functorch_config, "force_non_lazy_backward_lowering"):
        functorch_config.force_non_lazy_backward_lowering = True
    # torch counts the graphs of all parts together, and by default stops at 8.
    config.recompile_limit = max(config.recompile_limit, _MOST_GRAPHS * len(_PARTS))
    parts = dict(model.named_modules())
    for name in _PARTS:
        if parts.get(name) is not None:
            try:
                parts[name].compile(backend=backend, dynamic=True)
            except RuntimeError as e:
                # A Python or a platform that this torch cannot compile on.
                logger.warning(f"MODEL.COMPILE does nothing, training runs without it: {e}")
                return
