"""The section of images: where the detections are best and worst, beside what is there."""

import base64
import io
import os

from plaintrain.analysis.errors import match_image
from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog
from plaintrain.data.datasets.shapes import is_drawn
from plaintrain.data.images import read_image
from plaintrain.evaluation.predictions import detections_of_image
from plaintrain.report.detections import ERROR_TYPES, by_dataset
from plaintrain.utils.errors import UserError
from plaintrain.visualization.drawing import (
    default_captions,
    draw_instances,
    record_instances,
    scale_to,
    skeleton_of,
)
from plaintrain.visualization.images import to_pillow

# Images of each kind; the longer side of each, pixels.
_NUMBERS, _SIDE, _QUALITY = {"worst": 8, "best": 4}, 480, 80
# With more instances only those that are not right have a label.
_LABELLED = 12
_COLORS = {
    "correct": (42, 157, 82),
    "localisation": (226, 113, 29),
    "class": (194, 71, 155),
    "both": (138, 99, 210),
    "duplicate": (59, 125, 216),
    **dict.fromkeys(("background", "missed"), (217, 45, 45)),
    "ignored": (130, 140, 150),
}
_STATES = {"found": "correct", "erroneous": "localisation", "missed": "missed", "crowd": "ignored"}


def gallery(runs):
    """Return the images with the lowest and the highest F1, and a legend of their colours."""
    legend = [(_COLORS[name], words) for name, words in ERROR_TYPES.items()]
    return {"legend": legend, "test_sets": by_dataset(_best_and_worst, runs)}


def _best_and_worst(dataset, analysed):
    ((run, analysis),) = analysed
    return [
        (name, [_entry(dataset, e, run, analysis["settings"]) for e in analysis["gallery"][name][:most]])
        for name, most in _NUMBERS.items()
    ]


def _entry(dataset, entry, run, settings):
    file_name = entry["file_name"]
    name = f"image {entry['image_id']}" if is_drawn(file_name) else os.path.basename(file_name)
    objects = entry["found"] + entry["erroneous"] + entry["missed"]
    try:
        drawn, problem = _draw(dataset, entry["index"], run, settings), ""
    except UserError as e:
        drawn, problem = {}, e
    images = [(caption, _jpeg(image)) for caption, image in drawn.items()]
    return {**entry, "name": name, "objects": objects, "images": images, "problem": problem}


def _draw(dataset, index, run, settings):
    """Draw the image with its objects, and with its detections above the threshold."""
    record, metadata = DatasetCatalog.get(dataset)[index], MetadataCatalog.get(dataset)
    pixel_range = run.config.get("INPUT", {}).get("PIXEL_RANGE") or ()
    image, truth = read_image(record["file_name"], pixel_range), record_instances(record)
    found = detections_of_image(run.detections[dataset], index, settings["score_threshold"], record)
    # Of the objects nothing that detections do not have, either.
    truth = {key: value for key, value in truth.items() if key in found or key == "crowds"}
    objects = {"boxes": truth["boxes"], "labels": truth["labels"], "crowd": truth["crowds"]}
    matches = match_image(objects, found, settings["iou_threshold"])
    shown = {
        "what is there": (truth, [_STATES[state] for state in matches.states]),
        "what is found": (found, matches.kinds.tolist()),
    }
    drawn = {}
    for caption, (instances, kinds) in shown.items():
        scaled, instances = scale_to(image, instances, min(_SIDE, 2 * max(image.shape[-2:])))
        captions = _captions(instances, kinds, metadata.thing_classes)
        colors = [_COLORS[kind] for kind in kinds]
        options = {"captions": captions, "colors": colors, "skeleton": skeleton_of(metadata)}
        drawn[caption] = draw_instances(scaled, instances, metadata.thing_classes, **options)
    return drawn


def _captions(instances, kinds, class_names):
    names = default_captions(instances, class_names)
    few = len(names) <= _LABELLED
    return [n if few or kind != "correct" else "" for n, kind in zip(names, kinds, strict=True)]


def _jpeg(image):
    file = io.BytesIO()
    to_pillow(image).save(file, "JPEG", quality=_QUALITY)
    return base64.b64encode(file.getvalue()).decode()
