#!/usr/bin/env python
"""Draw the ground truth of datasets, or the training samples after augmentation.

python scripts/visualize_data.py shapes_val --grid shapes.jpg
python scripts/visualize_data.py --config-file configs/BCCD/faster_rcnn_tiny.yaml --output images
python scripts/visualize_data.py --config-file configs/quickstart.yaml --source dataloader --max-images 8
python scripts/visualize_data.py coco_2017_val --class dog --class cat --shuffle --grid pets.jpg

NAMEs are built-in datasets or those that the config declares (default: DATASETS.TRAIN). KEY VALUE pairs
override the config, for example INPUT.RANDOM_FLIP none. With --source dataloader, the samples are those of
the training loader in batches of one; MODEL.MASK_ON and MODEL.KEYPOINT_ON add masks and keypoints.
"""

from plaintrain.utils.arguments import add_image_arguments, build_parser

if __name__ == "__main__":
    # Parse before the slow imports, so that --help and errors are instant.
    parser = build_parser(__doc__, "YAML config")
    parser.add_argument(
        "words", nargs="*", metavar="NAME | KEY VALUE", help="datasets, then config overrides"
    )
    parser.add_argument("--source", choices=("annotation", "dataloader"), default="annotation")
    parser.add_argument("--shuffle", action="store_true", help="random order (always, with the dataloader)")
    parser.add_argument("--seed", type=int, help="of --shuffle and of the dataloader (default: SEED)")
    parser.add_argument("--image-id", action="append", metavar="ID", help="only this image; repeatable")
    add_image_arguments(parser)
    args = parser.parse_intermixed_args()

import itertools
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from plaintrain.analysis.command import load_tool_cfg
from plaintrain.config import CfgNode
from plaintrain.config.defaults import split_overrides
from plaintrain.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_train_loader
from plaintrain.data.build import get_training_records
from plaintrain.data.catalog import get_common_class_names, load_class_names, select_classes
from plaintrain.data.images import check_image_size, get_pixel_range, read_image
from plaintrain.data.samplers import TrainingSampler
from plaintrain.engine.launch import launch
from plaintrain.utils.errors import UserError
from plaintrain.visualization.colors import Color, get_class_colors
from plaintrain.visualization.drawing import (
    Instances,
    draw_instances,
    filter_instances,
    get_record_instances,
    get_skeleton,
    scale_longer_side,
)
from plaintrain.visualization.images import check_image_arguments, write_images


def select_images(records: Sequence[dict[str, Any]], image_ids: Sequence[str] | None) -> list[int]:
    """Return the indices of the records with these ids; without ids, all indices."""
    if not image_ids:
        return list(range(len(records)))
    indices = [i for i in range(len(records)) if str(records[i]["image_id"]) in image_ids]
    if not indices:
        raise UserError(
            f"--image-id {', '.join(image_ids)}: no such image among {len(records)}; the first one is "
            f"{records[0]['image_id']}"
        )
    return indices


def iterate_annotations(cfg: CfgNode, args: Namespace) -> Iterator[tuple[str, Tensor, Instances]]:
    """Yield (file name, image, instances) of the datasets."""
    rng = np.random.default_rng(cfg.SEED)
    datasets = [DatasetCatalog.get(name) for name in cfg.DATASETS.TRAIN]
    records = list(itertools.chain(*datasets)) if len(datasets) > 1 else datasets[0]
    indices = select_images(records, args.image_id)
    if args.shuffle:
        indices = rng.permutation(indices).tolist()
    for i in indices:
        record = records[i]
        if args.labels and not args.labels & {a["category_id"] for a in record["annotations"]}:
            continue
        image = read_image(record["file_name"], get_pixel_range(cfg))
        check_image_size(record, image)
        yield record["file_name"], image, get_record_instances(record)


def iterate_samples(cfg: CfgNode, args: Namespace) -> Iterator[tuple[str, Tensor, Instances]]:
    """Yield (file name, image, instances) of the training loader."""
    options: dict[str, Any] = {}
    if args.image_id:
        # Copy-paste may still draw from all records.
        records = get_training_records(cfg)
        kept = [records[i] for i in select_images(records, args.image_id)]
        options = {"dataset": kept, "mapper": DatasetMapper(cfg, is_train=True, records=records)}
        options["sampler"] = TrainingSampler(len(kept), 1, seed=cfg.SEED)
    loader = build_detection_train_loader(cfg, **options)
    # No sample may have the class: stop after one epoch.
    samples = itertools.chain.from_iterable(loader)
    for sample in itertools.islice(samples, loader.iters_per_epoch if args.labels else None):
        if args.labels and not args.labels & set(sample["target"]["labels"].tolist()):
            continue
        yield sample["file_name"], sample["image"], sample["target"]


def setup(args: Namespace) -> CfgNode:
    """Check the command line and return the config."""
    names, args.opts = split_overrides(args.words)
    cfg = load_tool_cfg(args)
    names = names or list(cfg.DATASETS.TRAIN) or list(cfg.DATASETS.TEST)
    if not names:
        raise UserError("no dataset; give NAME, or a --config-file with DATASETS.TRAIN")
    check_image_arguments(args)
    classes = get_common_class_names(names)
    args.labels = {classes.index(name) for name in select_classes(classes, args.classes, names[0])}
    args.labels = args.labels if args.classes else set()
    seed = max(cfg.SEED, 0) if args.seed is None else args.seed
    cfg.merge_from_list(["DATASETS.TRAIN", names, "SEED", seed, "DATALOADER.NUM_WORKERS", 0])
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 1, "SOLVER.ACCUMULATE_STEPS", 1])
    return cfg


def draw(cfg: CfgNode, args: Namespace, legend: dict[str, Color]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (file name, caption, drawn image), and add the drawn classes to the legend."""
    names = load_class_names(cfg.DATASETS.TRAIN[0])
    skeleton = get_skeleton(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]))
    colors = get_class_colors(len(names))
    iterate = iterate_annotations if args.source == "annotation" else iterate_samples
    for file_name, image, instances in itertools.islice(iterate(cfg, args), args.max_images):
        height, width = image.shape[-2:]
        if args.labels:
            instances = filter_instances(
                instances, np.isin(instances["labels"], list(args.labels)).nonzero()[0]
            )
        if max(height, width) < args.size:
            image, instances = scale_longer_side(image, instances, args.size)
        legend |= {names[label]: colors[label] for label in instances["labels"].tolist()}
        yield file_name, f"  {width}x{height}", draw_instances(image, instances, names, skeleton)


def main(args: Namespace, cfg: CfgNode) -> None:
    """Draw the images and write or show them."""
    legend: dict[str, Color] = {}
    if not write_images(draw(cfg, args, legend), args, ", ".join(cfg.DATASETS.TRAIN), legend):
        raise UserError(f"no image of {', '.join(cfg.DATASETS.TRAIN)} matches --class and --image-id")


if __name__ == "__main__":
    try:
        cfg = setup(args)
    except UserError as e:
        parser.error(str(e))
    launch(main, args=(args, cfg))
