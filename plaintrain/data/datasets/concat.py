"""Several datasets as one."""

from plaintrain.data.catalog import select_classes
from plaintrain.data.keypoints import get_keypoint_metadata
from plaintrain.data.validation import check_annotation
from plaintrain.utils.class_lists import describe_class_difference
from plaintrain.utils.errors import UserError


def load_concat(names, read, classes=None, merge=False):
    """Join datasets, in order.

    Their class lists must be equal, unless `classes` or `merge` is given. Image ids that two parts
    share, or that are numbers here and strings there, become `<dataset>/<id>` in all parts.

    Args:
        names: the datasets.
        read: function name -> (records, metadata dict).
        classes: see `load_coco_json`; it may name classes that no part has.
        merge: take every class of any part, in order of first appearance.

    Returns:
        (records, metadata): of ids of categories and of keypoints, metadata holds what the parts agree on.
    """
    if not names or len(set(names)) != len(names):
        raise UserError(f"DATASETS of a concat dataset must name one or more, each once, not {names}")
    parts = [read(name) for name in names]
    for name, (_, metadata) in zip(names, parts, strict=True):
        if not metadata.get("thing_classes"):
            raise UserError(f"the dataset {name} names no classes, so it cannot be joined with others")
    found = [list(metadata["thing_classes"]) for _, metadata in parts]
    joined = _join_classes(names, found, classes, merge)
    label_of = {name: label for label, name in enumerate(joined)}
    ids = [{record["image_id"] for record in records} for records, _ in parts]
    collide = len(set().union(*ids)) < sum(map(len, ids)) or len({type(i) for part in ids for i in part}) > 1
    records = []
    for name, part_classes, (part, _) in zip(names, found, parts, strict=True):
        labels = [label_of.get(class_name) for class_name in part_classes]
        for record in part:
            record["annotations"] = _relabel(record, labels)
            if collide:
                record["image_id"] = f"{name}/{record['image_id']}"
            records.append(record)
    metadata = [metadata for _, metadata in parts]
    dataset_ids = {"thing_dataset_id_to_contiguous_id": _dataset_ids(joined, metadata)}
    return records, {"thing_classes": joined, **dataset_ids, **get_keypoint_metadata(metadata)}


def _join_classes(names, found, classes, merge):
    union = list(dict.fromkeys(name for part in found for name in part))
    if classes:
        return select_classes(union, classes, ", ".join(names), allow_missing=True)
    for name, part in zip(names[1:], found[1:], strict=True):
        if not merge and part != found[0]:
            difference = describe_class_difference(found[0], part)
            raise UserError(
                f"the datasets {names[0]} and {name} have different classes: {difference}; "
                "set MERGE_CLASSES: True, or choose them with CLASSES"
            )
    return union


def _relabel(record, labels):
    annotations = []
    for annotation in record["annotations"]:
        check_annotation(annotation, record["file_name"], len(labels))
        label = labels[annotation["category_id"]]
        if label is not None:
            annotations.append({**annotation, "category_id": label})
    return annotations


def _dataset_ids(joined, parts):
    """{dataset id: label}, the ids of the parts if they do not contradict each other."""
    pairs = set()
    for part in parts:
        mapping = part.get("thing_dataset_id_to_contiguous_id") or {}
        pairs |= {(part["thing_classes"][label], dataset_id) for dataset_id, label in mapping.items()}
    pairs = {(name, dataset_id) for name, dataset_id in pairs if name in joined}
    ids = {name: dataset_id for name, dataset_id in pairs}
    if len(ids) != len(pairs) or set(ids) != set(joined) or len(set(ids.values())) != len(ids):
        ids = {name: label + 1 for label, name in enumerate(joined)}
    return {ids[name]: label for label, name in enumerate(joined)}
