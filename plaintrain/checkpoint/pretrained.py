"""Pretrained weights: from a name to a state dict to a model, running no code on the way."""

import collections
import hashlib
import logging
import os
import pickle
import re
from urllib.parse import urlsplit

import numpy as np
import torch
import torchvision
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FrozenBatchNorm2d

from plaintrain.checkpoint.classes import select_classes
from plaintrain.checkpoint.torchvision import match_names, strip_wrappers, translate
from plaintrain.utils.class_lists import check_trained_classes
from plaintrain.utils.errors import UserError, first_line, nearest
from plaintrain.utils.files import check_file, check_stored

logger = logging.getLogger(__name__)

_DETECTRON2_URL = "https://dl.fbaipublicfiles.com/detectron2/"


def mirror_folder():
    """The folder `$PLAINTRAIN_WEIGHTS`, where detectron2:// names are looked for first, or None."""
    return os.environ.get("PLAINTRAIN_WEIGHTS")


def _torchvision_url(name):
    """The address of `torchvision://model/WEIGHTS`."""
    model, _, entry = name.removeprefix("torchvision://").partition("/")
    try:
        weights = torchvision.models.get_model_weights(model)
    except ValueError as e:
        near = nearest(model, torchvision.models.list_models())
        raise UserError(
            f"MODEL.WEIGHTS {name}: torchvision has no model {model!r}; the nearest is {near}"
        ) from e
    if entry not in weights.__members__:
        known = ", ".join(weights.__members__)
        raise UserError(f"MODEL.WEIGHTS {name}: {model} has the weights {known}, not {entry!r}")
    return weights[entry].url


def locate_weights(name):
    """(local path or None, address or None) of MODEL.WEIGHTS; downloads nothing.

    Args:
        name: a path, http(s)://..., torchvision://model/WEIGHTS, or detectron2://path, which is
            looked for in `mirror_folder()` first.

    Raises:
        UserError: a file that does not exist, or a name that torchvision does not know.
    """
    scheme = urlsplit(name).scheme
    if scheme in ("http", "https"):
        return None, name
    if scheme == "torchvision":
        return None, _torchvision_url(name)
    if scheme == "detectron2":
        path = name.removeprefix("detectron2://")
        local = os.path.join(mirror_folder(), path) if mirror_folder() else None
        if local and os.path.isfile(local):
            return local, None
        return None, _DETECTRON2_URL + path
    path = os.path.expanduser(name)
    if not os.path.isfile(path):
        raise UserError(f"MODEL.WEIGHTS is {name!r}, but there is no such file")
    return path, None


def fetch_weights(name):
    """The local path of MODEL.WEIGHTS, downloaded to torch.hub's cache if it is not there.

    Raises:
        UserError: see `locate_weights`; or the download fails.
    """
    path, url = locate_weights(name)
    return path or _download(url)


def _download(url):
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    parts = urlsplit(url)
    name, digest = os.path.basename(parts.path), None
    if parts.hostname == "download.pytorch.org":
        # The names end in the start of the file's SHA-256.
        digest = re.search(r"-([a-f0-9]{8,})\.", name)
    else:
        # torchvision's names are unique; elsewhere only the whole address tells files apart.
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        os.makedirs(folder, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path, hash_prefix=digest and digest.group(1))
        except (OSError, RuntimeError) as e:
            raise UserError(f"cannot download the weights {url}: {e}") from e
    return path


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers, strings and NumPy arrays; refuses everything else."""

    _ALLOWED = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
        **{
            (f"numpy.{core}.multiarray", name): getattr(np._core.multiarray, name)
            for core in ("core", "_core")
            for name in ("_reconstruct", "scalar")
        },
        ("numpy.core.numeric", "_frombuffer"): np._core.numeric._frombuffer,
        ("numpy._core.numeric", "_frombuffer"): np._core.numeric._frombuffer,
    }

    def find_class(self, module, name):
        if (module, name) in self._ALLOWED:
            return self._ALLOWED[module, name]
        raise UserError(f"it asks for {module}.{name}, which could run code, and is refused")


def _read_content(path):
    try:
        check_file(path)
        check_stored(path)
        if path.endswith(".pkl"):
            with open(path, "rb") as f:
                return _ArrayUnpickler(f, encoding="latin1").load()
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # A damaged file can raise anything while it is unpickled.
        raise UserError(f"cannot read the weights {path}: {first_line(e)}") from e


def read_state_dict(path):
    """The name -> tensor dict of a weights file.

    `.pkl` files are pickles of NumPy arrays, as Detectron2's; anything else is what `torch.save`
    wrote: a state dict, or a dict that holds one under model or state_dict.

    Raises:
        UserError: the file is damaged, holds no state dict, or asks to run code.
    """
    return _tensors(_read_content(path), path)


def _tensors(content, path):
    for key in ("model", "state_dict", "blobs"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    tensors = {}
    for name, value in content.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            value = torch.from_numpy(value)
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            tensors[name] = value
    return tensors


def read_weights(path, num_ratios=3):
    """`read_state_dict` under torchvision's names, whichever project wrote the file.

    Args:
        path: the file.
        num_ratios: see `plaintrain.checkpoint.detectron2.from_detectron2`.
    """
    return translate(read_state_dict(path), num_ratios)[0]


# torchvision runs the models of these files without the epsilon of their frozen norms.
_WITHOUT_EPS = {
    os.path.basename(weights.COCO_V1.url)
    for weights in (
        detection.FasterRCNN_ResNet50_FPN_Weights,
        detection.MaskRCNN_ResNet50_FPN_Weights,
        detection.KeypointRCNN_ResNet50_FPN_Weights,
        detection.RetinaNet_ResNet50_FPN_Weights,
    )
}


def _check_eps(model, path):
    eps = max((m.eps for m in model.modules() if isinstance(m, FrozenBatchNorm2d)), default=0)
    if os.path.basename(path) in _WITHOUT_EPS and eps:
        logger.warning(
            f"{os.path.basename(path)} was made for MODEL.RESNETS.NORM_EPS 0, as torchvision sets it, "
            f"but it is {eps}"
        )


def averaged_state(ema):
    """The state dict of the averaged model in the `ema` of a checkpoint."""
    prefix = "module."
    return {name.removeprefix(prefix): v for name, v in ema.items() if str(name).startswith(prefix)}


def read_for_model(model, name, averaged=False):
    """Read MODEL.WEIGHTS under the names of a model.

    Args:
        model: the module; may be on the device "meta".
        name, averaged: see `load_weights`.

    Returns:
        (what the file holds, its {name: tensor}, the same under the model's names, whether Detectron2 wrote
        them).
    """
    path = fetch_weights(name)
    generators = [module for module in model.modules() if isinstance(module, AnchorGenerator)]
    num_ratios = len(generators[0].aspect_ratios[0]) if generators else 3
    content = _read_content(path)
    ema = content.get("ema") if averaged and isinstance(content, dict) else None
    if isinstance(ema, dict) and ema:
        content["model"] = averaged_state(ema)
        logger.info(f"the averaged weights of {name} are taken")
    tensors = strip_wrappers(_tensors(content, path))
    translated, of_detectron2 = translate(tensors, num_ratios)
    return content, tensors, match_names(translated, model.state_dict()), of_detectron2


def load_weights(model, name, class_names=None, *, averaged=False):
    """Load MODEL.WEIGHTS into a model as far as names and shapes agree, and log what did not.

    Args:
        model: the module; its own parameter names are torchvision's.
        name: see `locate_weights`.
        class_names: the dataset's, in the order of their labels. Heads for COCO's classes that
            torchvision or Detectron2 published are reduced to these if they have all of them.
        averaged: take the averaged weights (MODEL.EMA) of a checkpoint that has both.

    Returns:
        The names of the model's parameters that were not in the file, or in another shape.

    Raises:
        UserError: unreadable weights, not a single tensor that fits, or a file that was trained for the same
            classes in another order.
    """
    wanted = model.state_dict()
    content, _, found, of_detectron2 = read_for_model(model, name, averaged)
    difference = check_trained_classes(name, content.get("class_names"), class_names, strict=False)
    if difference:
        logger.warning(f"{difference}: each class is initialized from the one of the same index")
    if class_names:
        found = select_classes(found, class_names, of_detectron2)
    fitting = {k: v for k, v in found.items() if k in wanted and v.shape == wanted[k].shape}
    parameters = dict(model.named_parameters())
    if not any(k in parameters for k in fitting):
        raise UserError(
            f"none of the {len(found)} tensors in {name} fits the model; is it of another "
            f"architecture? It starts with {', '.join(list(found)[:3])}"
        )
    model.load_state_dict(fitting, strict=False)
    _report(name, wanted, found, fitting)
    _check_eps(model, fetch_weights(name))
    return [k for k in parameters if k not in fitting]


def _report(name, wanted, found, fitting):
    rows = [f"loaded {len(fitting)} of the model's {len(wanted)} tensors from {name}"]
    skipped = [k for k in found if k in wanted and k not in fitting]
    rows += [
        f"  other shape   {k}: {list(found[k].shape)} there, {list(wanted[k].shape)} here" for k in skipped
    ]
    counters = ("num_batches_tracked",)
    missing = [k for k in wanted if k not in found and not k.endswith(counters)]
    unused = [k for k in found if k not in wanted and not k.endswith(counters)]
    rows += [f"  missing there {k}" for k in _shorten(missing)]
    rows += [f"  not used      {k}" for k in _shorten(unused)]
    logger.log(logging.WARNING if skipped or missing else logging.INFO, "\n".join(rows))


def _shorten(names, limit=20):
    return names if len(names) <= limit else [*names[:limit], f"... and {len(names) - limit} more"]
