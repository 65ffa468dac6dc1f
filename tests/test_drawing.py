"""plaintrain.visualization.drawing and images: what is drawn, where, in which colour."""

import numpy as np
import pytest
import torch
from PIL import Image

from plaintrain.data.datasets.shapes import load_shapes
from plaintrain.structures import BoxMode
from plaintrain.utils.errors import UserError
from plaintrain.utils.visualizer import Visualizer
from plaintrain.visualization import drawing
from plaintrain.visualization.colors import PALETTE, get_class_colors
from plaintrain.visualization.drawing import draw_sheet, filter_instances, scale_longer_side, shorten
from plaintrain.visualization.images import save_image

NAMES = ["circle", "square"]
GREY = torch.full((3, 120, 160), 128, dtype=torch.uint8)


def instances(boxes, labels=None, **more):
    labels = torch.tensor(labels or [0] * len(boxes)).long()
    return {"boxes": torch.tensor(boxes).float().reshape(-1, 4), "labels": labels, **more}


def is_color(image, color):
    """bool `[H, W]`: the pixels of a colour."""
    return (image == torch.tensor(color)[:, None, None]).all(dim=0)


def extent(pixels):
    """x0, y0, x1, y1 of the pixels that are true, the last ones excluded."""
    y, x = pixels.nonzero().unbind(1)
    return [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]


def test_draw_instances_covers_the_pixels_of_boxes_in_the_colours_of_their_classes():
    boxes = [[20, 30, 60.4, 70], [80.2, 40, 160, 120]]
    image = drawing.draw_instances(GREY, instances(boxes, [0, 1]), NAMES, captions=["", ""])
    assert extent(is_color(image, PALETTE[0])) == [20, 30, 60, 70]
    # Its last pixels are those at the image's edge.
    assert extent(is_color(image, PALETTE[1])) == [80, 40, 160, 120]
    assert (GREY == 128).all() and image.dtype == torch.uint8
    # Colors and captions can be given for each instance.
    found = instances([[20, 30, 60, 70], [20, 30, 50, 60], [90, 30, 120, 60]])
    wanted = [(1, 2, 3), (4, 5, 6), (1, 2, 3)]
    plain = drawing.draw_instances(GREY, found, NAMES, captions=["", "", ""], colors=wanted)
    assert extent(is_color(plain, (4, 5, 6))) == [20, 30, 50, 60]
    named = drawing.draw_instances(GREY, found, NAMES, captions=["", "", "x"], colors=wanted)
    changed = extent((named != plain).any(dim=0))
    assert changed[0] >= 80 and changed[3] <= 31
    # Labels do not lie upon each other.
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    found = instances([[60, 50, 100, 90]] * 3)
    image = drawing.draw_instances(GREY, found, NAMES, captions=["one"] * 3, colors=colors)
    assert min(int(is_color(image, color).sum()) for color in colors) > 100
    image = drawing.draw_instances(GREY, instances([]), NAMES)
    assert torch.equal(image, GREY) and image.data_ptr() != GREY.data_ptr()
    assert get_class_colors(3) == list(PALETTE[:3]) and len(set(get_class_colors(100))) == 100


@pytest.mark.parametrize("box", [[150, 110, 160, 120], [-50, -40, 300, 200], [np.nan, 5, np.inf, 7]])
def test_a_label_stays_inside_the_image_and_is_readable(box):
    found = instances([box], scores=torch.tensor([0.996]), crowds=torch.tensor([True]))
    assert drawing.format_captions(found, NAMES) == ["circle 1.00 (crowd)"]
    image = drawing.draw_instances(GREY, found, NAMES, colors=[(10, 20, 30)])
    assert image.shape == GREY.shape
    # White letters on the dark ground.
    assert (image > 170).all(dim=0).sum() > 30


def test_masks_are_blended_small_ones_upon_large_ones_and_keypoints_joined():
    masks = torch.zeros(2, 120, 160, dtype=torch.uint8)
    masks[0, 10:50, :50], masks[1, 5:110, 5:150] = 1, 1
    found = instances([[0, 10, 50, 50], [3, 3, 152, 112]], [0, 1], masks=masks)
    image = drawing.draw_instances(GREY, found, NAMES, captions=["", ""])
    blended = [pytest.approx(0.6 * 128 + 0.4 * np.array(color), abs=2) for color in PALETTE[:2]]
    assert image[:, 30, 30].numpy() == blended[0] and image[:, 30, 5].numpy() == blended[0]
    assert image[:, 80, 100].numpy() == blended[1]
    assert torch.equal(image[:, 115, 100], GREY[:, 0, 0])

    # Keypoints are drawn where their third number is above 0.
    points = torch.tensor([[[20.0, 20, 2], [100, 20, 1], [60, 100, 0]]])
    found = instances([[0, 0, 1, 1]], keypoints=points)
    image = drawing.draw_instances(GREY, found, NAMES, skeleton=[(0, 1), (1, 2)], captions=[""])
    drawn = is_color(image, PALETTE[0])
    assert drawn[18:23, 18:23].any() and drawn[22, 100]
    assert (image[:, 20, 60] == 255).all()
    assert (image[:, 95:105, 55:65] == 128).all() and (image[:, 60, 70:90] == 128).all()


def test_a_record_becomes_instances_and_metadata_a_skeleton():
    record = load_shapes("val", 3, 64, 64)[0][0]
    found = drawing.get_record_instances(record)
    count = len(record["annotations"])
    assert found["boxes"].tolist() == pytest.approx(np.array([a["bbox"] for a in record["annotations"]]))
    assert found["masks"].shape == (count, 64, 64) and found["keypoints"].shape == (count, 4, 3)
    assert not found["crowds"].any() and "scores" not in found
    box = {"bbox": [1, 2, 3, 4], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, "iscrowd": 1, "score": 0.5}
    record = {"file_name": "a.jpg", "height": 10, "width": 20, "annotations": [box]}
    found = drawing.get_record_instances(record)
    assert found["boxes"].tolist() == [[1, 2, 4, 6]] and found["crowds"].all() and found["scores"].all()
    assert set(found) == {"boxes", "labels", "crowds", "scores"}
    polygon, points = [[0, 0, 5, 0, 5, 5]], [1.5, 2.5, 2]
    record["annotations"].append({**box, "segmentation": polygon, "keypoints": points})
    found = drawing.get_record_instances(record)
    assert found["masks"].any(dim=(1, 2)).tolist() == [False, True]
    assert found["keypoints"].tolist() == [[[0, 0, 0]], [[1.5, 2.5, 2]]]
    assert drawing.get_record_instances({**record, "annotations": []})["boxes"].shape == (0, 4)
    record["annotations"][1]["segmentation"] = [[0, 0, 5]]
    with pytest.raises(UserError, match="annotation of a.jpg: .*polygon"):
        drawing.get_record_instances(record)
    names = ["head", "neck", "foot"]
    rules = [("head", "neck", (1, 2, 3)), ("neck", "tail", (0, 0, 0))]
    assert drawing.get_skeleton({"keypoint_names": names, "keypoint_connection_rules": rules}) == ((0, 1),)
    assert drawing.get_skeleton({"keypoint_names": names, "skeleton": [[1, 3], [3, 4], [0, 1]]}) == ((0, 2),)
    assert drawing.get_skeleton({}) == ()
    assert drawing.get_skeleton(load_shapes("val", 1)[1]) == ((0, 1), (1, 2), (2, 3), (3, 0))


def test_images_are_scaled_with_their_instances_and_laid_out_on_a_sheet():
    masks = torch.zeros(1, 120, 160, dtype=torch.bool)
    masks[0, 60:, :80] = True
    points = torch.tensor([[[80.0, 60, 2]]])
    found = instances([[0, 60, 80, 120]], masks=masks, keypoints=points)
    image, scaled = scale_longer_side(GREY, found, 320)
    assert image.shape == (3, 240, 320) and scaled["masks"].shape == (1, 240, 320)
    assert scaled["boxes"].tolist() == [[0, 120, 160, 240]] == [extent(scaled["masks"][0])]
    assert scaled["keypoints"].tolist() == [[[160, 120, 2]]]
    assert filter_instances(scaled, scaled["labels"] > 0)["masks"].shape == (0, 240, 320)
    none = filter_instances(found, found["labels"] > 0)
    assert scale_longer_side(GREY, none, 320)[1]["masks"].shape == (0, 240, 320)
    # The shorter side is rounded.
    thin, scaled = scale_longer_side(GREY[:, :7], instances([[0, 0, 160, 7]]), 100)
    assert thin.shape == (3, 4, 100) and scaled["boxes"].tolist() == [[0, 0, 100, 4]]
    sizes = {(200, 0, 0): (40, 80), (0, 200, 0): (90, 30), (0, 0, 200): (10, 10)}
    images = [torch.tensor(c, dtype=torch.uint8)[:, None, None].expand(3, *sizes[c]) for c in sizes]
    sheet = draw_sheet(images, ["a", "b", "c"], columns=2, width=400)
    assert sheet.shape[2] == 400 and sheet.dtype == torch.uint8
    places = [extent(is_color(sheet, color)) for color in sizes]
    for (x0, y0, x1, y1), (height, width) in zip(places, sizes.values(), strict=True):
        assert max(x1 - x0, y1 - y0) == 188
        assert (x1 - x0) / (y1 - y0) == pytest.approx(width / height, rel=0.02)
    assert places[0][2] <= 200 <= places[1][0] and places[2][1] > places[0][3] == places[1][3]
    legend = {f"class {i}": color for i, color in enumerate(get_class_colors(12))}
    more = draw_sheet(images, ["a", "b", "c"], columns=2, width=400, legend=legend)
    assert more.shape[1] > sheet.shape[1]
    assert all(is_color(more, color).sum() >= 100 for color in legend.values())


def test_images_are_written_by_their_ending_and_texts_cut_to_their_room(tmp_path):
    save_image(str(tmp_path / "new" / "a.PNG"), GREY)
    assert np.array(Image.open(tmp_path / "new" / "a.PNG")).shape == (120, 160, 3)
    assert shorten("a rather long name", 12, 1000)[0] == "a rather long name"
    text, _, length = shorten("a rather long name", 12, 60)
    assert text.startswith("a r") and text.endswith("...") and length <= 60


def test_detectron2s_visualizer_draws_at_its_scale(tmp_path):
    metadata = {"thing_classes": NAMES}
    predictions = instances([[20, 30, 60, 70]], [1], scores=torch.tensor([0.9]))
    record = {"height": 120, "width": 160, "file_name": "a.png"}
    box = {"bbox": [20, 30, 40, 40], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}

    def make():
        return Visualizer(GREY.permute(1, 2, 0).numpy(), metadata, scale=2)

    drawn = [
        make().draw_instance_predictions(predictions).get_image(),
        make().draw_dataset_dict({**record, "annotations": [box]}).get_output().get_image(),
        make().overlay_instances(boxes=np.array([[20, 30, 60, 70]]), masks=None).get_image(),
    ]
    for image, color in zip(drawn, [PALETTE[1], PALETTE[1], PALETTE[0]], strict=True):
        assert image.shape == (240, 320, 3)
        pixels = is_color(torch.from_numpy(image).permute(2, 0, 1), color)
        assert extent(pixels)[2:] == [120, 140] and pixels[100, 40]
    make().draw_instance_predictions(predictions).save(str(tmp_path / "a.png"))
    assert Image.open(tmp_path / "a.png").size == (320, 240)
