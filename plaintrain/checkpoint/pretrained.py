"""Locate, download and read pretrained weights, and load them into a model. Loading runs no code."""

import hashlib
import logging
import os
import pickle
import re
import tempfile
from typing import Any, BinaryIO, NamedTuple
from urllib.request import Request, urlopen

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FrozenBatchNorm2d

from plaintrain.checkpoint.detectron2 import convert_from_detectron2, is_detectron2
from plaintrain.checkpoint.files import are_finite, check_plain, read_archive
from plaintrain.checkpoint.torchvision import match_names, select_class_rows
from plaintrain.utils.class_lists import check_trained_classes
from plaintrain.utils.errors import UserError, get_first_line, suggest_similar
from plaintrain.utils.files import check_file
from plaintrain.utils.logger import build_progress_bar

logger = logging.getLogger(__name__)

# Seconds without a byte until a download fails.
_TIMEOUT = 60.0
_URL = re.compile(r"https?://([^/?#]*)([^?#]*)", re.IGNORECASE)
# Tensors that have a dimension of channels.
_LAYER = re.compile(r"(weight|bias|running_\w+|_[wb]|pixel_\w+)$")
_DETECTRON2_URL = "https://dl.fbaipublicfiles.com/detectron2/"
# torchvision sets the eps of FrozenBatchNorm2d to 0 for these files.
_WITHOUT_EPS = re.compile(r"((faster|mask|keypoint)rcnn|retinanet)_resnet50_fpn_coco-\w+\.pth")


def _get_torchvision_url(name: str) -> str:
    """Return the URL of `torchvision://model/WEIGHTS`."""
    model, _, entry = name.removeprefix("torchvision://").partition("/")
    try:
        weights = torchvision.models.get_model_weights(model)
    except ValueError as e:
        hint = f"did you mean {suggest_similar(model, torchvision.models.list_models())}?"
        raise UserError(f"MODEL.WEIGHTS {name}: torchvision has no model {model!r}; {hint}") from e
    if entry not in weights.__members__:
        known = ", ".join(weights.__members__)
        raise UserError(f"MODEL.WEIGHTS {name}: weights of {model} must be one of {known}, got {entry!r}")
    return weights[entry].url


def locate_weights(name: str) -> str:
    """Return the local path or the URL of MODEL.WEIGHTS, without downloading.

    `name` is a path, http(s)://..., torchvision://model/WEIGHTS, or detectron2://path; for the last, the
    folder `$PLAINTRAIN_WEIGHTS` is searched first.
    """
    if _URL.match(name):
        return name
    if name.startswith("torchvision://"):
        return _get_torchvision_url(name)
    if name.startswith("detectron2://"):
        path = name.removeprefix("detectron2://")
        local = os.path.join(os.environ.get("PLAINTRAIN_WEIGHTS", ""), path)
        return local if os.path.isfile(local) else _DETECTRON2_URL + path
    path = os.path.expanduser(name)
    if not os.path.isfile(path):
        raise UserError(f"MODEL.WEIGHTS is {name!r}, but there is no such file")
    return path


def download_weights(name: str) -> str:
    """Return the local path of MODEL.WEIGHTS; download URLs to torch.hub's cache."""
    url = locate_weights(name)
    match = _URL.match(url)
    if not match:
        return url
    basename = os.path.basename(match[2])
    # Names at PyTorch end with the first digits of the SHA-256; names on other hosts are not unique.
    digest = re.search(r"-([a-f0-9]{8,})\.", basename)
    if match[1] != "download.pytorch.org":
        basename = f"{hashlib.sha256(url.encode(errors='replace')).hexdigest()[:12]}-{basename}"
        digest = None
    path = os.path.join(torch.hub.get_dir(), "checkpoints", basename)
    try:
        if not _is_cached(path):
            _download(url, path, digest[1] if digest else "")
    except Exception as e:  # Servers and invalid URLs cause exceptions of many modules.
        local = name.replace("detectron2:/", "$PLAINTRAIN_WEIGHTS") if name.startswith("detectron2") else path
        raise UserError(
            f"cannot download the weights {url[:400]}: {type(e).__name__}: {get_first_line(e)}; download the "
            f"file by hand, and set MODEL.WEIGHTS to its path or save it as {local}"
        ) from e
    return path


def _is_cached(path):
    """Return whether the file exists; delete an unreadable one, which older versions kept."""
    try:
        if os.path.exists(path):
            read_state_dict(path)
    except UserError as e:
        logger.warning(f"{e}; deleting it and downloading it again")
        os.unlink(path)
    return os.path.exists(path)


def _download(url, path, sha256_prefix):
    """Download weights to `path`, where they appear once they are complete and readable."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # Some hosts reject Python's own User-Agent.
    request = Request(url, headers={"User-Agent": "torch.hub"})
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path), prefix="download-") as folder:
        file = os.path.join(folder, os.path.basename(path))
        with urlopen(request, timeout=_TIMEOUT) as response, open(file, "w+b") as f:
            size = response.length
            content_type = response.headers.get("Content-Type", "unknown type")
            content = f"{content_type}, {'unknown' if size is None else size} bytes"
            logger.info(f"downloading {url} to {path} ({content})")
            chunks = iter(lambda: response.read(2**20), b"")
            f.writelines(build_progress_bar(chunks, desc="MiB", total=size and size // 2**20 + 1))
            if size not in (None, f.tell()):
                raise OSError(f"the connection ended after {f.tell()} of {size} bytes")
            f.seek(0)
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        if not digest.startswith(sha256_prefix):
            raise OSError(f"the SHA-256 must begin with {sha256_prefix}, got {digest}")
        try:
            read_state_dict(file)
        except UserError as e:
            raise OSError(f"the file ({content}) holds no weights: {get_first_line(e.__cause__ or e)}") from e
        os.replace(file, path)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler of dicts, lists, numbers, strings and NumPy arrays that rejects all other types."""

    _ALLOWED = {
        ("collections", "OrderedDict"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy._core.numeric", "_frombuffer"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        # NumPy 2 renamed these modules.
        module = module.replace("numpy.core.", "numpy._core.")
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        raise UserError(f"it imports {module}.{name}, which could run code")


def _read_content(file: str | BinaryIO, name: str) -> Any:
    """Return the content of a path or file object; `name` is used in errors."""
    try:
        if not name.partition("?")[0].endswith(".pkl"):
            return read_archive(file)
        if isinstance(file, str):
            check_file(file)
        with open(file, "rb") if isinstance(file, str) else file as f:
            return _ArrayUnpickler(f, encoding="latin1").load()
    except Exception as e:  # Unpickling a damaged file can raise anything.
        raise UserError(f"cannot read the weights {name}: {get_first_line(e)}") from e


def read_state_dict(path: str) -> dict[str, Tensor]:
    """Return the tensors of a file of `torch.save`, or of NumPy arrays in a `.pkl` file, as in Detectron2."""
    return _extract_tensors(_read_content(path, path), path)


def _extract_tensors(content: Any, name: str) -> dict[str, Tensor]:
    for key in ("model", "state_dict", "blobs"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"{name} must hold a dict of weights, got {type(content).__name__}")
    tensors = {}
    try:
        for key, value in content.items():
            if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
                value = torch.from_numpy(value)
            if isinstance(key, str) and isinstance(value, torch.Tensor):
                check_plain(value, key)
                if _LAYER.search(key) and not (value.ndim and value.numel()):
                    raise ValueError(f"{key} must not be empty or a number")
                # Remove the prefixes of DDP and torch.compile.
                tensors[re.sub(r"^((module|model|_orig_mod)\.)+", "", key)] = value
    except (ValueError, TypeError) as e:
        raise UserError(f"cannot read the weights {name}: {e}") from e
    return tensors


def get_averaged_state(ema: dict[str, Any]) -> dict[str, Tensor]:
    """Return the state dict of the averaged model in the `ema` of a checkpoint."""
    return {name[len("module.") :]: v for name, v in ema.items() if str(name).startswith("module.")}


class Weights(NamedTuple):
    """Content of a weights file, and its tensors under the file's names and the model's (`matched`)."""

    content: dict[str, Any]
    tensors: dict[str, Tensor]
    matched: dict[str, Tensor]
    from_detectron2: bool


def read_for_model(model: nn.Module, name: str, file: str | BinaryIO, averaged: bool = False) -> Weights:
    """Read MODEL.WEIGHTS and rename the tensors as in a model, which may be on the device "meta"."""
    generators = [module for module in model.modules() if isinstance(module, AnchorGenerator)]
    num_ratios = len(generators[0].aspect_ratios[0]) if generators else 3
    content = _read_content(file, file if isinstance(file, str) else name)
    ema = content.get("ema") if averaged and isinstance(content, dict) else None
    if isinstance(ema, dict) and ema:
        content["model"] = get_averaged_state(ema)
        logger.info(f"using the averaged weights of {name}")
    tensors = _extract_tensors(content, name)
    from_detectron2 = is_detectron2(tensors)
    converted = convert_from_detectron2(tensors, num_ratios) if from_detectron2 else tensors
    state = model.state_dict()
    matched = match_names(converted, state)
    for key in state.keys() & matched.keys():
        if not are_finite(matched[key]):
            raise UserError(f"{name} must hold finite weights, got NaN or infinity in {key}")
    return Weights(content, tensors, matched, from_detectron2)


def load_weights(
    model: nn.Module,
    name: str,
    class_names: list[str] | None = None,
    *,
    averaged: bool = False,
    file: str | BinaryIO | None = None,
) -> None:
    """Load the tensors of MODEL.WEIGHTS whose names and shapes match the model's, and log the others.

    Args:
        name: MODEL.WEIGHTS; `file` is its path or content, if known.
        class_names: in the order of the labels. Published heads for COCO are reduced to these classes.
        averaged: load the averaged weights (MODEL.EMA) of a checkpoint that has both.
    """
    state = model.state_dict()
    file = file or download_weights(name)
    content, _, weights, from_detectron2 = read_for_model(model, name, file, averaged)
    difference = check_trained_classes(name, content.get("class_names"), class_names, strict=False)
    if difference:
        logger.warning(f"{difference}; each class starts from the weights of the class with its index")
    if class_names:
        weights = select_class_rows(weights, class_names, from_detectron2)
    fitting = {k: v for k, v in weights.items() if k in state and v.shape == state[k].shape}
    if not any(k in fitting for k, _ in model.named_parameters()):
        raise UserError(
            f"none of the {len(weights)} tensors in {name} fits the model; is it of another "
            f"architecture? It starts with {', '.join(list(weights)[:3])}"
        )
    model.load_state_dict(fitting, strict=False)
    _log_differences(name, state, weights, fitting)
    eps = max((m.eps for m in model.modules() if isinstance(m, FrozenBatchNorm2d)), default=0)
    if eps and isinstance(file, str) and _WITHOUT_EPS.fullmatch(os.path.basename(file)):
        logger.warning(f"MODEL.RESNETS.NORM_EPS must be 0 for {name}, as in torchvision, got {eps}")


def _log_differences(name, state, weights, fitting):
    """Log which tensors of the file and of the model have no counterpart, or one of another shape."""
    skipped = [k for k in weights if k in state and k not in fitting]
    missing = [k for k in state if k not in weights and not k.endswith("num_batches_tracked")]
    unused = [k for k in weights if k not in state and not k.endswith("num_batches_tracked")]
    lines = [f"loaded {len(fitting)} of the model's {len(state)} tensors from {name}"]
    for k in skipped:
        lines.append(f"  other shape {k}: {list(weights[k].shape)}, the model has {list(state[k].shape)}")
    lines += [f"  missing     {k}" for k in _shorten(missing)]
    lines += [f"  unused      {k}" for k in _shorten(unused)]
    logger.log(logging.WARNING if skipped or missing else logging.INFO, "\n".join(lines))


def _shorten(names: list[str], limit: int = 20) -> list[str]:
    return names if len(names) <= limit else [*names[:limit], f"... and {len(names) - limit} more"]
