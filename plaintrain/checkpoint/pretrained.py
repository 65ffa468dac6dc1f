"""Pretrained weights: from a name to a state dict to a model, running no code on the way."""

import hashlib
import logging
import os
import pickle
import re
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import torch
import torchvision
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FrozenBatchNorm2d

from plaintrain.checkpoint.detectron2 import convert_from_detectron2, is_detectron2
from plaintrain.checkpoint.torchvision import match_names, select_class_rows
from plaintrain.utils.class_lists import check_trained_classes
from plaintrain.utils.errors import UserError, get_first_line, suggest_similar
from plaintrain.utils.files import check_file, check_stored

logger = logging.getLogger(__name__)

_DETECTRON2_URL = "https://dl.fbaipublicfiles.com/detectron2/"
# torchvision runs the models of these files without the epsilon of their frozen norms.
_WITHOUT_EPS = re.compile(r"((faster|mask|keypoint)rcnn|retinanet)_resnet50_fpn_coco-\w+\.pth")


def _torchvision_url(name):
    """Return the address of `torchvision://model/WEIGHTS`."""
    model, _, entry = name.removeprefix("torchvision://").partition("/")
    try:
        weights = torchvision.models.get_model_weights(model)
    except ValueError as e:
        near = suggest_similar(model, torchvision.models.list_models())
        raise UserError(
            f"MODEL.WEIGHTS {name}: torchvision has no model {model!r}; did you mean {near}?"
        ) from e
    if entry not in weights.__members__:
        known = ", ".join(weights.__members__)
        raise UserError(f"MODEL.WEIGHTS {name}: {model} has the weights {known}, got {entry!r}")
    return weights[entry].url


def locate_weights(name):
    """Return the local path or the address of MODEL.WEIGHTS; download nothing.

    It is a path, http(s)://..., torchvision://model/WEIGHTS, or detectron2://path, which is searched for in
    the folder `$PLAINTRAIN_WEIGHTS` first.
    """
    scheme = urlsplit(name).scheme
    if scheme in ("http", "https"):
        return name
    if scheme == "torchvision":
        return _torchvision_url(name)
    if scheme == "detectron2":
        path = name.removeprefix("detectron2://")
        local = os.path.join(os.environ.get("PLAINTRAIN_WEIGHTS", ""), path)
        return local if os.path.isfile(local) else _DETECTRON2_URL + path
    path = os.path.expanduser(name)
    if not os.path.isfile(path):
        raise UserError(f"MODEL.WEIGHTS is {name!r}, but there is no such file")
    return path


def download_weights(name):
    """Return the local path of MODEL.WEIGHTS, downloaded to torch.hub's cache if it is not there."""
    url = locate_weights(name)
    if not url.startswith(("http://", "https://")):
        return url
    parts = urlsplit(url)
    name, digest = os.path.basename(parts.path), None
    if parts.hostname == "download.pytorch.org":
        # The names end in the start of the file's SHA-256.
        digest = re.search(r"-([a-f0-9]{8,})\.", name)
    else:
        # torchvision's names are unique; elsewhere only the whole address tells files apart.
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"
    path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    if not os.path.isfile(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path, hash_prefix=digest and digest.group(1))
        except (OSError, RuntimeError) as e:
            raise UserError(f"cannot download the weights {url}: {e}") from e
    return path


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers, strings and NumPy arrays; rejects everything else."""

    _ALLOWED = {
        ("collections", "OrderedDict"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy._core.numeric", "_frombuffer"),
        ("_codecs", "encode"),
    }

    def find_class(self, module, name):
        # The modules' names before NumPy 2.
        module = module.replace("numpy.core.", "numpy._core.")
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        raise UserError(f"it asks for {module}.{name}, which could run code, and is refused")


def _read_content(file, name):
    """Return what a file holds, given as a path or a file object; `name` is that in an error."""
    try:
        if isinstance(file, str):
            check_file(file)
            check_stored(file)
        if name.partition("?")[0].endswith(".pkl"):
            with open(file, "rb") if isinstance(file, str) else file as f:
                return _ArrayUnpickler(f, encoding="latin1").load()
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # A damaged file can raise anything while it is unpickled.
        raise UserError(f"cannot read the weights {name}: {get_first_line(e)}") from e


def read_state_dict(path):
    """Return the {name: tensor} of a weights file.

    `.pkl` files are pickles of NumPy arrays, as Detectron2's; anything else is what `torch.save`
    wrote: a state dict, or a dict that holds one under model or state_dict.
    """
    return _tensors(_read_content(path, path), path)


def _tensors(content, name):
    for key in ("model", "state_dict", "blobs"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"{name} holds a {type(content).__name__}, not a dict of weights")
    tensors = {}
    for key, value in content.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            value = torch.from_numpy(value)
        if isinstance(key, str) and isinstance(value, torch.Tensor):
            # Without the prefixes of wrapped and compiled modules.
            tensors[re.sub(r"^((module|model|_orig_mod)\.)+", "", key)] = value
    return tensors


def get_averaged_state(ema):
    """Return the state dict of the averaged model in the `ema` of a checkpoint."""
    prefix = "module."
    return {name.removeprefix(prefix): v for name, v in ema.items() if str(name).startswith(prefix)}


class Weights(NamedTuple):
    """What a file of weights holds."""

    content: dict[str, Any]
    # Under the file's names and under the model's.
    tensors: dict[str, torch.Tensor]
    matched: dict[str, torch.Tensor]
    # Detectron2 wrote them: the order of classes is its.
    of_detectron2: bool


def read_for_model(model, name, file, averaged=False):
    """Read MODEL.WEIGHTS under the names of a model, which may be on "meta"; see `load_weights`."""
    generators = [module for module in model.modules() if isinstance(module, AnchorGenerator)]
    num_ratios = len(generators[0].aspect_ratios[0]) if generators else 3
    content = _read_content(file, file if isinstance(file, str) else name)
    ema = content.get("ema") if averaged and isinstance(content, dict) else None
    if isinstance(ema, dict) and ema:
        content["model"] = get_averaged_state(ema)
        logger.info(f"the averaged weights of {name} are taken")
    tensors = _tensors(content, name)
    of_detectron2 = is_detectron2(tensors)
    translated = convert_from_detectron2(tensors, num_ratios) if of_detectron2 else tensors
    return Weights(content, tensors, match_names(translated, model.state_dict()), of_detectron2)


def load_weights(model, name, class_names=None, *, averaged=False, file=None):
    """Load MODEL.WEIGHTS into a model as far as names and shapes agree, and log what did not.

    Args:
        model: the module; its own parameter names are torchvision's.
        name, file: MODEL.WEIGHTS, and the path or file object that it stands for, where that is known.
        class_names: the dataset's, in the order of their labels. Heads for COCO's classes that
            torchvision or Detectron2 published are reduced to these if they have all of them.
        averaged: take the averaged weights (MODEL.EMA) of a checkpoint that has both.

    Raises:
        UserError: unreadable weights, not a single tensor that fits, or a file that was trained for the same
            classes in another order.
    """
    state, file = model.state_dict(), file or download_weights(name)
    content, _, weights, of_detectron2 = read_for_model(model, name, file, averaged)
    difference = check_trained_classes(name, content.get("class_names"), class_names, strict=False)
    if difference:
        logger.warning(f"{difference}: each class is initialized from the one of the same index")
    if class_names:
        weights = select_class_rows(weights, class_names, of_detectron2)
    fitting = {k: v for k, v in weights.items() if k in state and v.shape == state[k].shape}
    if not any(k in fitting for k, _ in model.named_parameters()):
        raise UserError(
            f"none of the {len(weights)} tensors in {name} fits the model; is it of another "
            f"architecture? It starts with {', '.join(list(weights)[:3])}"
        )
    model.load_state_dict(fitting, strict=False)
    _log_report(name, state, weights, fitting)
    eps = max((m.eps for m in model.modules() if isinstance(m, FrozenBatchNorm2d)), default=0)
    if eps and isinstance(file, str) and _WITHOUT_EPS.fullmatch(os.path.basename(file)):
        logger.warning(
            f"{name} was made for MODEL.RESNETS.NORM_EPS 0, as torchvision sets it, but it is {eps}"
        )


def _log_report(name, state, weights, fitting):
    """Log which tensors of the file and of the model have no counterpart, or one of another shape."""
    skipped = [k for k in weights if k in state and k not in fitting]
    counters = ("num_batches_tracked",)
    missing = [k for k in state if k not in weights and not k.endswith(counters)]
    unused = [k for k in weights if k not in state and not k.endswith(counters)]
    lines = [f"loaded {len(fitting)} of the model's {len(state)} tensors from {name}"]
    lines += [
        f"  other shape   {k}: {list(weights[k].shape)} there, {list(state[k].shape)} here" for k in skipped
    ]
    lines += [f"  missing there {k}" for k in _shorten(missing)]
    lines += [f"  not used      {k}" for k in _shorten(unused)]
    logger.log(logging.WARNING if skipped or missing else logging.INFO, "\n".join(lines))


def _shorten(names, limit=20):
    return names if len(names) <= limit else [*names[:limit], f"... and {len(names) - limit} more"]
