"""Build the detector of a config."""

import logging
from collections.abc import Callable

import torch
from torch import nn

from plaintrain.config import CfgNode, check_cfg, get_value
from plaintrain.modeling.fcos import build_fcos
from plaintrain.modeling.rcnn import build_proposal_network, build_rcnn
from plaintrain.modeling.retinanet import build_retinanet
from plaintrain.modeling.ssd import build_ssd
from plaintrain.utils.errors import UserError
from plaintrain.utils.user_code import describe_import

logger = logging.getLogger(__name__)

# MODEL.META_ARCHITECTURE -> (builder, key of its number of classes).
META_ARCHITECTURES: dict[str, tuple[Callable[[CfgNode], nn.Module], str]] = {
    "GeneralizedRCNN": (build_rcnn, "MODEL.ROI_HEADS.NUM_CLASSES"),
    "ProposalNetwork": (build_proposal_network, "MODEL.ROI_HEADS.NUM_CLASSES"),
    "RetinaNet": (build_retinanet, "MODEL.RETINANET.NUM_CLASSES"),
    "FCOS": (build_fcos, "MODEL.FCOS.NUM_CLASSES"),
    "SSD": (build_ssd, "MODEL.SSD.NUM_CLASSES"),
}

_COMPILED_MODULES = (
    "backbone", "head", "rpn.head", "roi_heads.box_head", "roi_heads.box_predictor", "roi_heads.mask_head",
    "roi_heads.mask_predictor", "roi_heads.keypoint_head", "roi_heads.keypoint_predictor",
)  # fmt: skip
# A module has graphs for training, validation losses and evaluation, with and without autocast.
_GRAPHS_PER_MODULE = 8


def get_num_classes_key(cfg: CfgNode) -> str:
    """Return the config key of the number of classes of MODEL.META_ARCHITECTURE."""
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in META_ARCHITECTURES:
        raise UserError(
            f"MODEL.META_ARCHITECTURE must be one of {', '.join(META_ARCHITECTURES)}, got {name!r} "
            f"({describe_import()})"
        )
    return META_ARCHITECTURES[name][1]


def get_device(name: str) -> torch.device:
    """Return the device of MODEL.DEVICE; "auto" prefers CUDA, then MPS."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"MODEL.DEVICE must be a device of this machine, got {name!r}; {reason}") from e
    return device


def build_model(cfg: CfgNode) -> nn.Module:
    """Build the detector of MODEL.META_ARCHITECTURE with random weights, on MODEL.DEVICE.

    It takes a list of samples: `image` uint8 `[3, H, W]`, in training with `target`. In training it returns a
    dict of losses. In evaluation it returns for each image {boxes `[N, 4]`, scores `[N]`, labels `[N]`}:
    boxes XYXY in the original image's pixels, scores descending in 0..1, labels 0 to K-1; with their heads
    masks bool `[N, height, width]` and keypoints `[N, Kp, 3]` (x, y, score).
    """
    check_cfg(cfg)
    key = get_num_classes_key(cfg)
    if get_value(cfg, key) < 1:
        raise UserError(
            f"{key} must be at least 1, got {get_value(cfg, key)}; default_setup(cfg, args) takes it from "
            "the training dataset"
        )
    builder, _ = META_ARCHITECTURES[cfg.MODEL.META_ARCHITECTURE]
    device = get_device(cfg.MODEL.DEVICE)
    model = builder(cfg).to(device)
    if cfg.MODEL.CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)
    if cfg.MODEL.COMPILE and device.type != "meta":
        compile_submodules(model)
    return model


def compile_submodules(model: nn.Module, backend: str | Callable = "inductor") -> None:
    """Compile backbone, FPN and heads in place, each when it is first called.

    Image sizes and numbers of boxes are dynamic. The rest of the model stays eager, and so do copies of it.
    Modules that fail to compile run eagerly, with a warning.
    """
    # These imports take seconds.
    from torch._dynamo import config
    from torch._functorch import config as functorch_config

    config.suppress_errors = True
    # Compile the backward pass with the forward pass, where a failure is caught.
    if hasattr(functorch_config, "force_non_lazy_backward_lowering"):
        functorch_config.force_non_lazy_backward_lowering = True
    # torch counts the graphs of all modules together, and by default stops at 8.
    config.recompile_limit = max(config.recompile_limit, _GRAPHS_PER_MODULE * len(_COMPILED_MODULES))
    for name, module in model.named_modules():
        if name in _COMPILED_MODULES:
            try:
                module.compile(backend=backend, dynamic=True)
            except RuntimeError as e:
                # This torch does not support compilation on this Python or platform.
                logger.warning(f"MODEL.COMPILE is ignored; training runs eagerly: {e}")
                return
