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


def _inductor(graph, inputs):
    # Imported where it is used: that takes seconds.
    from torch._dynamo import lookup_backend
    from torch._functorch import config

    # The backward pass is compiled now, not when it is first run: there nobody could catch a failure.
    eager = {"force_non_lazy_backward_lowering": True}
    with config.patch({key: value for key, value in eager.items() if hasattr(config, key)}):
        return lookup_backend("inductor")(graph, inputs)


def careful(backend):
    """A backend of torch.compile: once `backend` fails, graphs stay as they are; one warning is logged."""
    failed = []

    def compile_graph(graph, inputs):
        """See `careful`."""
        if not failed:
            try:
                return backend(graph, inputs)
            except Exception as e:
                from torch._dynamo.exc import RestartAnalysis

                # No failure: the tracer's own way to begin anew.
                if isinstance(e, RestartAnalysis):
                    raise
                # No C compiler, no Triton, a mistake of its own: what is raised then is not settled.
                reason = (str(e).strip() or type(e).__name__).splitlines()[0]
                logger.warning(f"MODEL.COMPILE does nothing, training goes on without it: {reason}")
                failed.append(True)
        return graph.forward

    return compile_graph


def compile_parts(model, backend=_inductor):
    """Compile a detector's parts in place, each when it is first called; names in state dicts stay.

    Sizes of images and numbers of boxes are dynamic: others do not compile again. A copy of the model
    is not compiled. Where compiling is impossible, one warning is logged and the model works as before.

    Args:
        model: the detector.
        backend: function (graph, example inputs) -> callable, as torch.compile takes it.
    """
    parts, backend = dict(model.named_modules()), careful(backend)
    try:
        from torch._dynamo import config

        # torch counts the graphs of all parts together, and by default stops at 8.
        config.recompile_limit = max(config.recompile_limit, _MOST_GRAPHS * len(_PARTS))
        for name in _PARTS:
            if parts.get(name) is not None:
                parts[name].compile(backend=backend, dynamic=True)
    except (ImportError, RuntimeError) as e:
        # A Python or a platform that this torch cannot compile on.
        logger.warning(f"MODEL.COMPILE does nothing, training goes on without it: {e}")
