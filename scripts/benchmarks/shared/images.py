"""Synthetic image files for benchmarks."""

import os
from typing import Any

import numpy as np
from PIL import Image

from plaintrain.structures import BoxMode


def write_images(folder: str, num_images: int) -> list[dict[str, Any]]:
    """Write 640x480 JPEG files, about as large as COCO's, with seven boxes each, and return their records."""
    records = []
    rng = np.random.default_rng(0)
    for i in range(num_images):
        coarse = Image.fromarray(rng.integers(0, 256, size=(30, 40, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = pixels + rng.normal(0, 9, size=(480, 640, 1))
        path = os.path.join(folder, f"{i}.jpg")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=92)
        corners = np.sort(rng.uniform(0, 1, size=(7, 2, 2)), axis=1) * (640, 480)
        boxes = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 0}
            for box in corners.reshape(7, 4).tolist()
        ]
        records.append({"file_name": path, "image_id": i, "height": 480, "width": 640, "annotations": boxes})
    return records
