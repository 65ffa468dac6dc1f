"""plaintrain.analysis.dataset: counts and histograms of a dataset."""

import numpy as np
import pytest
from detection_helpers import make_annotation, make_record
from hostile_helpers import rejected

from plaintrain.analysis.dataset import compute_dataset_statistics
from plaintrain.data import DatasetCatalog
from plaintrain.data.catalog import load_class_names
from plaintrain.data.datasets.builtin import declare_dataset
from plaintrain.data.serialized import SerializedRecords
from plaintrain.structures import BoxMode

RECORDS = [
    make_record(
        1,
        make_annotation([60, 0, 70, 40], segmentation=[[60, 0, 70, 0, 70, 40]]),
        make_annotation([50, 50, 40, 20], 2, bbox_mode=BoxMode.XYWH_ABS, keypoints=[60, 60, 2, 0, 0, 0]),
        make_annotation([0, 0, 100, 100], 2, iscrowd=1, segmentation=[[0, 0, 10, 0, 10, 40]]),
    ),
    make_record(2, make_annotation([100, 40, 200, 140], 2)) | {"width": 200, "height": 160},
    make_record(3, make_annotation([0, 0, 50, 50], 2, iscrowd=1)),
    make_record(4),
]


def shown(histogram):
    """Return the bins that are not empty."""
    return {name: count for name, count in zip(histogram["names"], histogram["counts"], strict=True) if count}


def test_dataset_statistics_as_counted_by_hand():
    found = compute_dataset_statistics(RECORDS, ["a", "b", "c"])
    numbers = {key: found[key] for key in ("images", "empty_images", "objects", "crowds", "mean_objects")}
    assert numbers == {"images": 4, "empty_images": 2, "objects": 3, "crowds": 2, "mean_objects": 0.75}
    assert found["classes"] == {
        "a": {"objects": 1, "images": 1},
        "b": {"objects": 0, "images": 0},
        "c": {"objects": 2, "images": 2},
    }
    assert shown(found["objects_per_image"]) == {"0": 2, "1": 1, "2": 1}
    # Areas 400, 800 and 10000.
    assert shown(found["box_size"]) == {"16-32": 2, "96-128": 1}
    assert found["areas"] == pytest.approx([2 / 3, 0, 1 / 3])
    assert shown(found["aspect"]) == {"0.25-0.33": 1, "0.75-1.33": 1, "2-3": 1}
    assert found["ranges"] == {"width": (100, 200), "height": (100, 160)}
    names = found["objects_per_image"]["names"]
    assert names[:7] == ["0", "1", "2", "3", "4", "5", "6-7"] and names[-2:] == ["50-99", ">= 100"]


@pytest.mark.parametrize("records", [[], [make_record(1)], [make_record(1, make_annotation([0, 0, 0, 0]))]])
def test_statistics_of_nothing_are_none(records):
    found = compute_dataset_statistics(records, ["a"])
    assert found["empty_images"] == len(records) - found["objects"]
    assert found["ranges"].get("width") == ((100, 100) if records else None)
    assert sum(found["areas"]) == found["areas"][0] == found["objects"]


def test_columns_and_lists_have_the_same_statistics(tiny_coco):
    # Polygons, an RLE of a crowd and of an object, and keypoints.
    tiny_coco.content["annotations"][0]["segmentation"] = {"size": [30, 40], "counts": [0, 600, 600]}
    tiny_coco.save()
    root = str(tiny_coco.images)
    declare_dataset("pets", {"FORMAT": "coco", "JSON": str(tiny_coco.json), "IMAGE_ROOT": root})
    records, classes = DatasetCatalog.get("pets"), load_class_names("pets")
    in_columns = SerializedRecords.from_arrays(SerializedRecords(list(records)).to_arrays())
    expected = compute_dataset_statistics(list(records), classes)
    assert expected["crowds"] == 1
    for given in (records, in_columns, SerializedRecords.join([in_columns]), in_columns.take(np.arange(3))):
        assert compute_dataset_statistics(given, classes) == expected
    # Broken annotations are referred to check_dataset.
    for wrong in ({"bbox": [0, 0, "x", 4]}, {"category_id": 3}):
        record = make_record(1, make_annotation([0, 0, 1, 1]) | wrong)
        rejected(
            "check_dataset", by=lambda record=record: compute_dataset_statistics([record], ["a", "b", "c"])
        )
