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

from plaintrain.utils.errors import UserError, first_line

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
        raise UserError(f"MODEL.WEIGHTS {name}: torchvision has no model {model!r}") from e
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


def _download(url):
    """The local copy of an address in torch.hub's cache, downloaded if it is not there."""
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    parts = urlsplit(url)
    name = os.path.basename(parts.path)
    if parts.hostname != "download.pytorch.org":
        # torchvision's names are unique; elsewhere only the whole address tells files apart.
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        os.makedirs(folder, exist_ok=True)
        digest = re.search(r"-([a-f0-9]{8,})\.", name)
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


def read_state_dict(path):
    """The name -> tensor dict of a weights file.

    `.pkl` files are Detectron2's (arrays only, names translated); anything else is what
    `torch.save` wrote: a state dict, or a dict that holds one under model or state_dict.

    Raises:
        UserError: the file is damaged, holds no state dict, or asks to run code.
    """
    try:
        if path.endswith(".pkl"):
            with open(path, "rb") as f:
                content = _ArrayUnpickler(f, encoding="latin1").load()
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # A damaged file can raise anything while it is unpickled.
        raise UserError(f"cannot read the weights {path}: {first_line(e)}") from e
    for key in ("model", "state_dict", "blobs"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    for name, value in content.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            tensors[name] = torch.from_numpy(value)
    if path.endswith(".pkl"):
        tensors = {_from_detectron2(_from_caffe2(name)): value for name, value in tensors.items()}
    return tensors


_CAFFE2_ENDINGS = {
    "_(bn|gn)_s": ".norm.weight",
    "_(bn|gn)_b": ".norm.bias",
    "_bn_rm": ".norm.running_mean",
    "_bn_riv": ".norm.running_var",
    "_w": ".weight",
}


def _from_caffe2(name):
    """A blob's name in Caffe2's ResNets -> Detectron2's."""
    name = re.sub(r"^(res_)?conv1_", "stem.conv1_", name)
    name = re.sub(r"^res(\d)_(\d+)_branch1_", r"res\1.\2.shortcut_", name)
    for letter, number in (("a", 1), ("b", 2), ("c", 3)):
        name = re.sub(rf"^res(\d)_(\d+)_branch2{letter}_", rf"res\1.\2.conv{number}_", name)
    for ending, full in _CAFFE2_ENDINGS.items():
        name = re.sub(ending + "$", full, name)
    return name


def _from_detectron2(name):
    """A parameter's name in Detectron2's ResNet-FPN -> torchvision's."""
    name = re.sub(r"^(backbone\.bottom_up\.)?(stem\.|res\d\.)", r"backbone.body.\2", name)
    name = re.sub(r"body\.stem\.conv1\.norm\.", "body.bn1.", name)
    name = re.sub(r"body\.stem\.", "body.", name)
    name = re.sub(r"body\.res(\d)\.", lambda m: f"body.layer{int(m[1]) - 1}.", name)
    name = re.sub(r"\.shortcut\.norm\.", ".downsample.1.", name)
    name = re.sub(r"\.shortcut\.", ".downsample.0.", name)
    name = re.sub(r"\.conv(\d)\.norm\.", r".bn\1.", name)
    blocks = {"lateral": "inner_blocks", "output": "layer_blocks"}
    return re.sub(
        r"^backbone\.fpn_(lateral|output)(\d)\.",
        lambda m: f"backbone.fpn.{blocks[m[1]]}.{int(m[2]) - 2}.0.",
        name,
    )


# Ways in which a file's names can differ from the model's; the one that fits most is taken.
_RENAMES = (
    lambda name: name,
    lambda name: name.removeprefix("module."),
    lambda name: "backbone.body." + name,
    lambda name: "backbone.body." + name.removeprefix("features."),
)


def _match_names(tensors, wanted):
    """The tensors under the model's names as far as a rule brings them there."""
    best = max(_RENAMES, key=lambda rename: sum(rename(name) in wanted for name in tensors))
    matched = {}
    for name, value in tensors.items():
        name = best(name)
        if name not in wanted:
            # Before torchvision 0.13 a head's convolutions were not wrapped with their norm.
            name = re.sub(r"^(rpn\.head\.conv)\.(weight|bias)$", r"\1.0.0.\2", name)
            name = re.sub(
                r"^(head\.\w+\.conv)\.(\d)\.(weight|bias)$",
                lambda m: f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}",
                name,
            )
        matched[name] = value
    return matched


def load_weights(model, name):
    """Load MODEL.WEIGHTS into a model as far as names and shapes agree, and log what did not.

    Args:
        model: the module; its own parameter names are torchvision's.
        name: see `locate_weights`.

    Raises:
        UserError: unreadable weights, or not a single tensor that fits.
    """
    path, url = locate_weights(name)
    wanted = model.state_dict()
    found = _match_names(read_state_dict(path or _download(url)), wanted)
    fitting = {k: v for k, v in found.items() if k in wanted and v.shape == wanted[k].shape}
    if not any(k in dict(model.named_parameters()) for k in fitting):
        raise UserError(
            f"none of the {len(found)} tensors in {name} fits the model; is it of another "
            f"architecture? It starts with {', '.join(list(found)[:3])}"
        )
    model.load_state_dict(fitting, strict=False)
    _report(name, wanted, found, fitting)


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
