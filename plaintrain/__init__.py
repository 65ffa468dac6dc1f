"""Plain-loop training scripts for object detection on stock PyTorch and torchvision."""

__version__ = "0.1.0"
