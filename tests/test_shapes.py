"""plaintrain.data.datasets.shapes: a synthetic dataset whose difficulty results depend on."""

import numpy as np
import pytest
from hostile_helpers import rejected

from plaintrain.data.datasets.shapes import load_shapes, render


@pytest.fixture(scope="module")
def records():
    return load_shapes("train", 300)[0]


@pytest.fixture(scope="module")
def shapes(records):
    """Every annotation of the set."""
    return [annotation for record in records for annotation in record["annotations"]]


def _polygon(annotation):
    return np.array(annotation["segmentation"][0]).reshape(-1, 2)


def test_dataset_is_the_one_that_results_were_measured_on(records, shapes):
    # Frozen numbers: a change of these images changes every result that names the dataset.
    boxes = np.array([a["bbox"] for a in shapes])
    np.testing.assert_allclose(boxes[0], [1.87, 91.98, 16.77, 106.88], atol=0.006)
    np.testing.assert_allclose(boxes.mean(axis=0), [46.559, 47.379, 82.258, 82.014], atol=0.001)
    corners = np.concatenate([_polygon(a) for a in shapes])
    np.testing.assert_allclose(corners.mean(axis=0), [63.4737, 65.0644], atol=1e-4)
    keypoints = np.array([a["keypoints"] for a in shapes]).mean(axis=0)
    np.testing.assert_allclose(keypoints[:6], [64.4325, 48.5630, 1.9401, 79.9680, 66.1268, 1.9492], atol=1e-4)
    np.testing.assert_allclose(keypoints[6:], [64.4325, 81.142, 1.9537, 48.8648, 66.1268, 1.9559], atol=1e-4)
    assert np.mean([a["area"] for a in shapes]) == pytest.approx(1032.6052, abs=1e-3)
    metadata = load_shapes("val", 1)[1]
    assert metadata["keypoint_names"] == ["top", "right", "bottom", "left"]
    assert [sorted(pair) for pair in metadata["keypoint_flip_map"]] == [["left", "right"]]
    assert np.bincount([a["category_id"] for a in shapes]).tolist() == [308, 288, 289]
    assert np.bincount([len(r["annotations"]) for r in records]).tolist() == [0, 61, 63, 59, 64, 53]
    images = np.array([render(record["file_name"]) for record in records[:20]]).astype(float)
    assert images.mean(axis=(0, 1, 2)) == pytest.approx([145.62, 128.48, 148.57], abs=0.05)
    assert np.mean([image.std() for image in images]) == pytest.approx(50.99, abs=0.05)
    assert np.abs(np.diff(images, axis=2)).mean() == pytest.approx(15.9, abs=0.05)


def test_dataset_of_more_images_begins_with_that_of_fewer_and_shares_none_with_others(records):
    assert load_shapes("train", 5)[0] == records[:5]
    assert [record["image_id"] for record in records] == list(range(1, 301))
    datasets = [records[:100], *(load_shapes(split, 100)[0] for split in ("val", "test"))]
    datasets.append(load_shapes("train", 100, seed=1)[0])
    boxes = {tuple(r["annotations"][0]["bbox"]) for part in datasets for r in part}
    assert len(boxes) == 400
    assert len({r["file_name"] for part in datasets for r in part}) == 400
    assert len({render(part[0]["file_name"]).tobytes() for part in datasets}) == 4


@pytest.mark.parametrize(("height", "width"), [(96, 160), (16, 16), (17, 301)])
def test_images_of_any_size_hold_shapes_with_tight_boxes(height, width):
    records, _ = load_shapes("val", 20, height, width)
    assert len({tuple(r["annotations"][0]["bbox"]) for r in records}) == 20
    for record in records:
        assert (record["height"], record["width"]) == (height, width)
        assert render(record["file_name"]).shape == (height, width, 3)
        for annotation in record["annotations"]:
            polygon = _polygon(annotation)
            assert annotation["bbox"] == [*polygon.min(axis=0), *polygon.max(axis=0)]
            x0, y0, x1, y1 = annotation["bbox"]
            assert 0 <= x0 < x1 <= width + 1e-9
            assert 0 <= y0 < y1 <= height + 1e-9
            assert 0.1 - 1e-9 <= max(x1 - x0, y1 - y0) / min(height, width) <= 0.5 + 1e-9


def test_arguments_out_of_range_and_names_of_no_image_are_rejected():
    for wrong, words in (
        ({"split": "vla"}, ["train, val, test", "'vla'"]),
        ({"height": 15}, ["HEIGHT", "15"]),
        ({"width": 0}, ["WIDTH", "0"]),
        ({"num": 0}, ["NUM", "0"]),
        ({"seed": -1}, ["SEED", "-1"]),
    ):
        rejected(*words, by=lambda wrong=wrong: load_shapes(**{"num": 1, **wrong}))
    size = "seed=0&height=32&width=32"
    names = "train/0", "train/0?seed=0&height=0&width=32"
    for name in (*names, *(f"{image}?{size}" for image in ("vla/0", "train/one", "train/-1"))):
        rejected("is not an image of the shapes dataset", by=lambda name=name: render(f"shapes://{name}"))
