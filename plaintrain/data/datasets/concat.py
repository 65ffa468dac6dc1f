"""Concatenation of several datasets."""

from collections.abc import Callable, Sequence

from plaintrain.data.catalog import select_classes
from plaintrain.data.datasets.coco import LoadedDataset
from plaintrain.data.keypoints import get_keypoint_metadata
from plaintrain.data.validation import check_annotation
from plaintrain.utils.class_lists import describe_class_difference
from plaintrain.utils.errors import UserError


def load_concat(
    names: Sequence[str],
    read: Callable[[str], LoadedDataset],
    classes: Sequence[str] | None = None,
    merge: bool = False,
) -> LoadedDataset:
    """Concatenate the datasets that `read` returns for `names`.

    Image ids that are not unique, or not all of one type, become `<dataset>/<id>`. Category ids and
    keypoint metadata are kept where the datasets agree. The class lists must be equal unless `classes`
    selects from them or `merge` uses their union.
    """
    if not names or len(set(names)) != len(names):
        raise UserError(f"DATASETS of a concat dataset must be one or more distinct names, got {names}")
    datasets = [read(name) for name in names]
    all_metadata = [metadata for _, metadata in datasets]
    for name, metadata in zip(names, all_metadata, strict=True):
        if not metadata.get("thing_classes"):
            raise UserError(f"the dataset {name} has no class names; concat requires them")
    class_lists = [list(metadata["thing_classes"]) for metadata in all_metadata]
    joined = _join_classes(names, class_lists, classes, merge)
    label_of = {name: label for label, name in enumerate(joined)}
    ids = [image_id for records, _ in datasets for image_id in {record["image_id"] for record in records}]
    add_prefix = len(set(ids)) < len(ids) or len(set(map(type, ids))) > 1
    joined_records = []
    for name, class_names, (records, _) in zip(names, class_lists, datasets, strict=True):
        labels = [label_of.get(class_name) for class_name in class_names]
        for record in records:
            for annotation in record["annotations"]:
                check_annotation(annotation, record["file_name"], len(labels))
            record["annotations"] = [
                {**annotation, "category_id": labels[annotation["category_id"]]}
                for annotation in record["annotations"]
                if labels[annotation["category_id"]] is not None
            ]
            if add_prefix:
                record["image_id"] = f"{name}/{record['image_id']}"
            joined_records.append(record)
    dataset_ids = {"thing_dataset_id_to_contiguous_id": _map_dataset_ids(joined, all_metadata)}
    return joined_records, {"thing_classes": joined, **dataset_ids, **get_keypoint_metadata(all_metadata)}


def _join_classes(names, class_lists, classes, merge):
    union = list(dict.fromkeys(name for class_names in class_lists for name in class_names))
    if classes:
        return select_classes(union, classes, ", ".join(names), allow_missing=True)
    for name, class_names in zip(names[1:], class_lists[1:], strict=True):
        if not merge and class_names != class_lists[0]:
            difference = describe_class_difference(class_lists[0], class_names)
            raise UserError(
                f"the datasets {names[0]} and {name} have different classes: {difference}; "
                "set MERGE_CLASSES: True, or select classes with CLASSES"
            )
    return union


def _map_dataset_ids(joined, all_metadata):
    """Return {dataset id: label} with the datasets' own ids, or 1, 2, ... if these conflict."""
    pairs = set()
    for metadata in all_metadata:
        mapping = metadata.get("thing_dataset_id_to_contiguous_id") or {}
        pairs |= {(metadata["thing_classes"][label], dataset_id) for dataset_id, label in mapping.items()}
    pairs = {(name, dataset_id) for name, dataset_id in pairs if name in joined}
    ids = {name: dataset_id for name, dataset_id in pairs}
    if len(ids) != len(pairs) or set(ids) != set(joined) or len(set(ids.values())) != len(ids):
        ids = {name: label + 1 for label, name in enumerate(joined)}
    return {ids[name]: label for label, name in enumerate(joined)}
