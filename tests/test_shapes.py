"""plaintrain.data.shapes: the synthetic set, whose difficulty is part of every measured result."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from plaintrain.data import DatasetCatalog
from plaintrain.data.builtin import declare_dataset
from plaintrain.data.shapes import load_shapes, render
from plaintrain.utils.errors import UserError


@pytest.fixture(scope="module")
def records():
    return load_shapes("train", 300)[0]


@pytest.fixture(scope="module")
def shapes(records):
    """Every annotation of the set."""
    return [annotation for record in records for annotation in record["annotations"]]


def _polygon(annotation):
    return np.array(annotation["segmentation"][0]).reshape(-1, 2)


def _inside(polygon, points):
    """Whether points `[N, 2]` lie in a polygon: an odd number of edges is right of them."""
    odd = np.zeros(len(points), dtype=bool)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if y0 != y1:
            at = x0 + (points[:, 1] - y0) * (x1 - x0) / (y1 - y0)
            odd ^= ((y0 > points[:, 1]) != (y1 > points[:, 1])) & (at > points[:, 0])
    return odd


def _scaled(polygon, share):
    centre = polygon.mean(axis=0)
    return centre + (polygon - centre) * share


def _pixels(record):
    y, x = np.mgrid[: record["height"], : record["width"]] + 0.5
    return np.stack([x.ravel(), y.ravel()], axis=1)


def _visible(record, index, share):
    """Mask `[H * W]` of one shape's pixels, grown or shrunk, that no later shape comes near."""
    polygons, pixels = [_polygon(a) for a in record["annotations"]], _pixels(record)
    mask = _inside(_scaled(polygons[index], share), pixels)
    for later in polygons[index + 1 :]:
        mask &= ~_inside(_scaled(later, 1.2), pixels)
    return mask


def _colours(record):
    return render(record["file_name"]).reshape(-1, 3).astype(float)


# ---- which images


def test_the_set_is_the_same_every_time_and_a_larger_one_begins_with_it(records):
    assert load_shapes("train", 300)[0] == records
    assert load_shapes("train", 5)[0] == records[:5]
    np.testing.assert_array_equal(render(records[3]["file_name"]), render(records[3]["file_name"]))


def test_the_set_is_the_one_that_results_were_measured_on(records):
    # Frozen numbers: a change of these images changes every result that names the set.
    boxes = [
        [1.87, 91.98, 16.77, 106.88],
        [42.32, 72.8, 92.47, 122.95],
        [98.65, 3.9, 111.59, 15.82],
        [38.45, 22.6, 95.44, 75.2],
        [14.14, 77.43, 28.39, 89.97],
    ]
    np.testing.assert_allclose([a["bbox"] for a in records[0]["annotations"]], boxes, atol=0.006)
    assert [a["category_id"] for a in records[0]["annotations"]] == [1, 1, 2, 2, 2]
    assert render(records[0]["file_name"]).mean() == pytest.approx(132.40, abs=0.05)


def test_splits_and_seeds_share_no_image(records):
    sets = [records, *(load_shapes(split, 200)[0] for split in ("val", "test"))]
    sets.append(load_shapes("train", 200, seed=1)[0])
    for one, other in itertools.combinations(sets, 2):
        assert not {r["file_name"] for r in one} & {r["file_name"] for r in other}
        first = [{tuple(r["annotations"][0]["bbox"]) for r in part} for part in (one, other)]
        assert not first[0] & first[1]
    images = {render(part[0]["file_name"]).tobytes() for part in sets}
    assert len(images) == len(sets)


def test_image_ids_count_from_one_and_every_name_is_its_own(records):
    assert [record["image_id"] for record in records] == list(range(1, 301))
    assert len({record["file_name"] for record in records}) == 300


def test_metadata_names_classes_keypoints_and_what_a_flip_swaps():
    metadata = load_shapes("val", 1)[1]
    assert metadata["thing_classes"] == ["circle", "square", "triangle"]
    assert metadata["keypoint_names"] == ["top", "right", "bottom", "left"]
    assert [sorted(pair) for pair in metadata["keypoint_flip_map"]] == [["left", "right"]]


# ---- difficulty


def test_longer_sides_are_10_to_50_percent_of_the_images_shorter_side(shapes):
    sides = np.array([max(x1 - x0, y1 - y0) for x0, y0, x1, y1 in (a["bbox"] for a in shapes)]) / 128
    assert 0.1 <= sides.min() < 0.12
    assert 0.48 < sides.max() <= 0.5 + 1e-9
    assert 0.27 < sides.mean() < 0.33


def test_boxes_overlap_by_an_iou_of_up_to_30_percent(records):
    overlaps = []
    for record in records:
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]], dtype=torch.float64)
        overlaps += box_iou(boxes, boxes)[np.triu_indices(len(boxes), 1)].tolist()
    assert max(overlaps) <= 0.3 + 1e-9
    assert max(overlaps) > 0.25
    assert sum(iou > 0.1 for iou in overlaps) > 0.08 * len(overlaps)


def test_no_shape_hides_more_than_half_of_an_earlier_box(records):
    hidden = []
    for record in records:
        boxes = np.array([a["bbox"] for a in record["annotations"]])
        for one, later in itertools.combinations(boxes, 2):
            sides = np.minimum(one[2:], later[2:]) - np.maximum(one[:2], later[:2])
            hidden.append(sides.clip(0).prod() / (one[2:] - one[:2]).prod())
    assert 0.4 < max(hidden) <= 0.5 + 1e-9


def test_an_image_holds_1_to_5_shapes_about_equally_often(records):
    numbers = Counter(len(record["annotations"]) for record in records)
    assert set(numbers) == {1, 2, 3, 4, 5}
    assert min(numbers.values()) > 40
    assert max(numbers.values()) < 80


def test_the_three_classes_are_about_equally_frequent(shapes):
    labels = Counter(a["category_id"] for a in shapes)
    assert set(labels) == {0, 1, 2}
    assert min(labels.values()) > 0.29 * len(shapes)


def test_squares_and_triangles_are_regular_and_turned_by_up_to_10_degrees(shapes):
    # Lying on an edge, a square has a corner at 45 degrees and a triangle one at the top.
    for label, corners, upright in ((1, 4, 45), (2, 3, -90)):
        polygons = [_polygon(a) for a in shapes if a["category_id"] == label]
        assert {len(polygon) for polygon in polygons} == {corners}
        edges = np.array([np.roll(polygon, -1, axis=0) - polygon for polygon in polygons])
        lengths = np.linalg.norm(edges, axis=2)
        np.testing.assert_allclose(lengths, lengths[:, :1].repeat(corners, 1))
        x, y = np.array([polygon[0] - polygon.mean(axis=0) for polygon in polygons]).T
        turn = (np.degrees(np.arctan2(y, x)) - upright + 180 / corners) % (360 / corners) - 180 / corners
        assert np.abs(turn).max() <= 10 + 1e-6
        assert np.histogram(turn, bins=4, range=(-10, 10))[0].min() > 0.17 * len(turn)


def test_circles_are_round(shapes):
    for polygon in (_polygon(a) for a in shapes if a["category_id"] == 0):
        radius = np.linalg.norm(polygon - polygon.mean(axis=0), axis=1)
        np.testing.assert_allclose(radius, radius[0])
        assert len(polygon) >= 30


def test_shapes_stand_out_from_the_background_but_not_always_far(records):
    contrasts = []
    for record in records[:60]:
        colours = _colours(record)
        background = np.ones(len(colours), dtype=bool)
        for index in range(len(record["annotations"])):
            background &= ~_inside(_scaled(_polygon(record["annotations"][index]), 1.2), _pixels(record))
        for index in range(len(record["annotations"])):
            mask = _visible(record, index, 0.8)
            if mask.sum() > 20:
                difference = colours[mask].mean(axis=0) - colours[background].mean(axis=0)
                contrasts.append(np.linalg.norm(difference))
    assert len(contrasts) > 120
    assert min(contrasts) > 40
    assert sum(contrast < 75 for contrast in contrasts) >= 5


def test_noise_has_its_measured_strength_grey_and_coloured(records):
    grey, coloured = [], []
    for record in records[:20]:
        step = np.diff(render(record["file_name"]).astype(float), axis=1)
        # From neighbouring pixels, by the median: outlines and the soft background do not count.
        grey.append(np.median(np.abs(step)) / 0.6745 / 2**0.5)
        coloured.append(np.median(np.abs(step[..., 0] - step[..., 1])) / 0.6745 / 2**0.5)
    assert np.median(grey) == pytest.approx((12**2 + 6**2) ** 0.5, rel=0.1)
    assert np.median(coloured) == pytest.approx((6**2 + 6**2) ** 0.5, rel=0.1)


def test_the_background_is_no_flat_colour(records):
    spread = []
    for record in [record for record in records if len(record["annotations"]) == 1][:10]:
        shape = _inside(_scaled(_polygon(record["annotations"][0]), 1.2), _pixels(record))
        # Means of cells of 16x16 pixels that the shape does not reach.
        free = ~shape.reshape(8, 16, 8, 16).any(axis=(1, 3))
        cells = render(record["file_name"]).reshape(8, 16, 8, 16, 3).mean(axis=(1, 3))
        spread.append(cells[free].std(axis=0).mean())
    assert np.median(spread) > 8


# ---- boxes, polygons, keypoints and pixels agree


@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 160), (160, 96), (16, 16), (17, 301)])
def test_any_size_holds_its_shapes_with_tight_boxes(height, width):
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


def test_area_is_the_polygons(shapes):
    for annotation in shapes:
        polygon = _polygon(annotation)
        radius, corners = np.linalg.norm(polygon[0] - polygon.mean(axis=0)), len(polygon)
        regular = corners * radius**2 * np.sin(2 * np.pi / corners) / 2
        assert annotation["area"] == pytest.approx(regular)


@pytest.mark.parametrize(("height", "width"), [(128, 128), (90, 200)])
def test_the_picture_shows_what_its_record_says(height, width):
    records, _ = load_shapes("val", 30, height, width)
    shown = 0
    for record in records:
        colours = _colours(record)
        last = len(record["annotations"]) - 1
        inside, grown = _visible(record, last, 0.85), _visible(record, last, 1.5)
        ring = grown & ~_visible(record, last, 1.15)
        for earlier in record["annotations"][:last]:
            ring &= ~_inside(_scaled(_polygon(earlier), 1.2), _pixels(record))
        if inside.sum() < 40 or ring.sum() < 40:
            continue
        shown += 1
        # One colour and noise inside, up to near the outline, and another colour right outside.
        colour = np.median(colours[inside], axis=0)
        assert np.percentile(np.abs(colours[inside] - colour), 95) < 40
        assert np.linalg.norm(np.median(colours[ring], axis=0) - colour) > 25
    assert shown > 20


def _outline_crossings(polygon):
    """The farthest points of the outline straight above, right of, below and left of the centre."""
    centre = polygon.mean(axis=0)
    found = []
    for axis, sign in ((1, -1), (0, 1), (1, 1), (0, -1)):
        across, best = 1 - axis, 0.0
        for start, end in zip(polygon - centre, np.roll(polygon - centre, -1, axis=0), strict=True):
            if start[across] * end[across] <= 0 and start[across] != end[across]:
                share = start[across] / (start[across] - end[across])
                best = max(best, sign * (start[axis] + share * (end[axis] - start[axis])))
        point = centre.copy()
        point[axis] += sign * best
        found.append(point)
    return np.array(found)


def test_keypoints_lie_on_the_outline_around_the_centre(shapes):
    for annotation in shapes:
        points = np.array(annotation["keypoints"]).reshape(4, 3)[:, :2]
        np.testing.assert_allclose(points, _outline_crossings(_polygon(annotation)), atol=1e-6)


def test_a_mirrored_shape_has_the_mirrored_keypoints_with_left_and_right_swapped(shapes):
    for annotation in shapes:
        mirrored = _polygon(annotation) * [-1, 1] + [128, 0]
        top, right, bottom, left = np.array(annotation["keypoints"]).reshape(4, 3)[:, :2] * [-1, 1] + [128, 0]
        np.testing.assert_allclose([top, left, bottom, right], _outline_crossings(mirrored), atol=1e-6)


def test_keypoints_under_a_later_shape_are_marked_hidden(records):
    seen = Counter()
    for record in records:
        polygons = [_polygon(a) for a in record["annotations"]]
        for index, annotation in enumerate(record["annotations"]):
            points = np.array(annotation["keypoints"]).reshape(4, 3)
            covered = np.zeros(4, dtype=bool)
            for later in polygons[index + 1 :]:
                covered |= _inside(later, points[:, :2])
            assert points[:, 2].tolist() == np.where(covered, 1, 2).tolist()
            seen.update(points[:, 2].tolist())
    assert seen[1] > 20


# ---- mistakes


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"split": "vla"}, "train, val, test.*'vla'"),
        ({"height": 15}, "HEIGHT.*15"),
        ({"width": 0}, "WIDTH.*0"),
        ({"num": 0}, "NUM.*0"),
        ({"seed": -1}, "SEED.*-1"),
    ],
)
def test_a_bad_split_size_number_or_seed_is_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        load_shapes(**{"num": 1, **wrong})


def test_a_bad_declaration_is_refused_when_it_is_loaded():
    declare_dataset("toys", {"FORMAT": "shapes", "SPLIT": "vla"})
    with pytest.raises(UserError, match="vla"):
        DatasetCatalog.get("toys")


@pytest.mark.parametrize(
    "name",
    [
        "shapes://train/0",
        "shapes://vla/0?seed=0&height=32&width=32",
        "shapes://train/one?seed=0&height=32&width=32",
        "shapes://train/-1?seed=0&height=32&width=32",
        "shapes://train/0?seed=0&height=32",
        "shapes://train/0?seed=0&height=0&width=32",
    ],
)
def test_a_name_that_is_no_image_of_the_set_is_refused(name):
    with pytest.raises(UserError, match="does not name an image of the shapes set"):
        render(name)
