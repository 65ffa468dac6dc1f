"""Random seeds and the environment report."""

import contextlib
import os
import platform
import random
import sys
from collections.abc import Iterator

import numpy as np
import torch
import torchvision


def seed_all_rng(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def fork_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's generators of the CPU and `device` within the block, and restore them after it."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type):
        torch.manual_seed(seed)
        yield


def collect_env_info() -> str:
    """Return library versions, devices and settings, one `name: value` per line."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    info = {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "CUDA (torch was built with)": torch.version.cuda or "none",
        "cuDNN": torch.backends.cudnn.version() if gpus else "not in use",
        "GPUs": ", ".join(gpus) or "none",
        "MPS": torch.backends.mps.is_available(),
        "CPU cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "PLAINTRAIN_DATASETS": os.environ.get("PLAINTRAIN_DATASETS", "not set, so datasets/"),
    }
    return "\n".join(f"{name}: {value}" for name, value in info.items())
