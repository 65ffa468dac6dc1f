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


def _inductor(graph, inputs):
    # Imported where it is used: that takes seconds.
    from torch._dynamo import lookup_backend

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
    for name in _PARTS:
        if parts.get(name) is None:
            continue
        try:
            parts[name].compile(backend=backend, dynamic=True)
        except RuntimeError as e:
            # A Python or a platform that this torch cannot compile on.
            logger.warning(f"MODEL.COMPILE does nothing, training goes on without it: {e}")
            return
