"""The section of images: where the detections are best and worst, beside what is there."""

import io
import os

from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog
from plaintrain.data.images import read_image
from plaintrain.data.shapes import is_drawn
from plaintrain.evaluation.errors import match_image
from plaintrain.evaluation.predictions import detections_of_image
from plaintrain.picture import to_pillow
from plaintrain.report.detections import ERROR_TYPES, by_dataset
from plaintrain.report.html import join, note, picture, tag
from plaintrain.utils.errors import UserError
from plaintrain.visualize import default_captions, draw_instances, record_instances, scale_to, skeleton_of

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
    """The images with the lowest and the highest F1."""

    def _make(dataset, analysed):
        ((run, analysis),) = analysed
        parts = []
        for which, number in _NUMBERS.items():
            entries = analysis["gallery"][which][:number]
            pairs = [_pair(dataset, entry, run, analysis["settings"]) for entry in entries]
            parts.append(tag("h3", f"{which.capitalize()} on {dataset}"))
            parts.append(tag("div", *pairs, class_="gallery") if pairs else note("There are none."))
        return parts

    marks = [
        tag("span", tag("span", class_="swatch", style=f"background:rgb{_COLORS[kind]}"), words)
        for kind, words in ERROR_TYPES.items()
    ]
    lead = "By F1 of the detections above the score threshold. First what is there, then what is found."
    return join(
        [
            tag("p", lead, class_="lead"),
            tag("p", *marks, class_="legend"),
            by_dataset(runs, _make, headings=False),
        ]
    )


def _pair(dataset, entry, run, settings):
    drawn = is_drawn(entry["file_name"])
    name = f"image {entry['image_id']}" if drawn else os.path.basename(entry["file_name"])
    objects = entry["found"] + entry["erroneous"] + entry["missed"]
    words = f"F1 {entry['f1']:.2f}: {entry['found']} of {objects} objects found, "
    words += f"{entry['wrong']} wrong detections"
    head = tag("p", tag("strong", name), " ", words)
    try:
        truth, found = _draw(dataset, entry["index"], run, settings)
    except UserError as e:
        return tag("div", head, note(f"It cannot be drawn: {e}"), class_="pair")
    pictures = [
        picture(_jpeg(truth), f"{name}, what is there", "what is there"),
        picture(_jpeg(found), f"{name}, what is found", "what is found"),
    ]
    return tag("div", head, tag("div", *pictures), class_="pair")


def _draw(dataset, index, run, settings):
    """The image twice: with its objects, and with its detections above the threshold."""
    record, metadata = DatasetCatalog.get(dataset)[index], MetadataCatalog.get(dataset)
    pixel_range = run.config.get("INPUT", {}).get("PIXEL_RANGE") or ()
    image, truth = read_image(record["file_name"], pixel_range), record_instances(record)
    found = detections_of_image(run.detections[dataset], index, settings["score_threshold"], record)
    # Of the objects nothing that detections do not have, either.
    truth = {key: value for key, value in truth.items() if key in found or key == "crowds"}
    objects = {"boxes": truth["boxes"], "labels": truth["labels"], "crowd": truth["crowds"]}
    matches = match_image(objects, found, settings["iou_threshold"])
    kinds = [[_STATES[state] for state in matches.states], matches.kinds.tolist()]
    drawn = []
    for instances, of_each in zip((truth, found), kinds, strict=True):
        scaled, instances = scale_to(image, instances, min(_SIDE, 2 * max(image.shape[-2:])))
        captions = _captions(instances, of_each, metadata.thing_classes)
        colors = [_COLORS[kind] for kind in of_each]
        options = {"captions": captions, "colors": colors, "skeleton": skeleton_of(metadata)}
        drawn.append(draw_instances(scaled, instances, metadata.thing_classes, **options))
    return drawn


def _captions(instances, kinds, class_names):
    names = default_captions(instances, class_names)
    few = len(names) <= _LABELLED
    return [n if few or kind != "correct" else "" for n, kind in zip(names, kinds, strict=True)]


def _jpeg(image):
    file = io.BytesIO()
    to_pillow(image).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()
