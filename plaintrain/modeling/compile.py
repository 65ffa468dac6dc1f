"""torch.compile for the parts of a detector that are all arithmetic: backbone, FPN and heads.

What selects (anchors, proposals, samples) stays as it is.
"""

import logging

logger = logging.getLogger(__name__)

# By the names that torchvision's detectors give them.
_PARTS = (
    "backbone", "head", "rpn.head", "roi_heads.box_head", "roi_heads.box_predictor", "roi_heads.mask_head",
    "roi_heads.mask_predictor", "roi_heads.keypoint_head", "roi_heads.keypoint_predictor",
)  # fmt: skip
# Of a part: training, validation losses and evaluation, with autocast and without.
_MOST_GRAPHS = 8


def compile_parts(model, backend="inductor"):
    """Compile a detector's parts in place, each when it is first called; names in state dicts stay.

    Sizes of images and numbers of boxes are dynamic: others do not compile again. A copy of the model is not
    compiled. What cannot be compiled runs as it is, with a warning.

    Args:
        model: the detector.
        backend: name or function, as torch.compile takes it.
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
