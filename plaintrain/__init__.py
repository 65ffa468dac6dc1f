"""Plain-loop training scripts for object detection on stock PyTorch and torchvision."""

import os
import sys

from plaintrain.utils.unsupported import UnsupportedNames

# Read when torch is imported. A rank that loses the store of a dead rank prints a C++ stack as a warning.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
sys.meta_path.append(UnsupportedNames)

__version__ = "0.1.0"
