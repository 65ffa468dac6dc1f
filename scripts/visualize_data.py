#!/usr/bin/env python
"""Draw what is in datasets: annotations as they are, or samples as a model gets them in training.

python scripts/visualize_data.py shapes_val --grid shapes.jpg
python scripts/visualize_data.py --config-file configs/BCCD/faster_rcnn_tiny.yaml --output pictures
python scripts/visualize_data.py --config-file configs/quickstart.yaml --source dataloader --num 8 --show
python scripts/visualize_data.py coco_2017_val --class dog --class cat --shuffle --grid pets.jpg

NAMEs are built-in datasets or those that the config declares; without one they are those of DATASETS.TRAIN.
KEY VALUE pairs change the config, as INPUT.RANDOM_FLIP none or MODEL.MASK_ON True: with --source dataloader,
MODEL.MASK_ON and MODEL.KEYPOINT_ON say whether samples have masks and keypoints.

The samples are those of the training's own loader in batches of one, with what INPUT.* asks for. Pictures
smaller than --size are enlarged to it.
"""

from plaintrain.utils.arguments import add_image_arguments, build_parser

if __name__ == "__main__":
    # --help and a wrong flag are answered before the imports that take seconds.
    parser = build_parser(__doc__, "YAML config")
    parser.add_argument(
        "words", nargs="*", metavar="NAME | KEY VALUE", help="datasets, and config overrides after them"
    )
    parser.add_argument("--source", choices=("annotation", "dataloader"), default="annotation")
    parser.add_argument("--shuffle", action="store_true", help="random images; the loader's always are")
    parser.add_argument("--seed", type=int, help="of --shuffle and of the loader, in place of SEED")
    parser.add_argument(
        "--image-id", action="append", metavar="ID", help="this image only; may be given again"
    )
    add_image_arguments(parser)
    args = parser.parse_intermixed_args()

import itertools

import numpy as np

from plaintrain.analysis.command import load_tool_cfg
from plaintrain.config.defaults import split_overrides
from plaintrain.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_train_loader
from plaintrain.data.build import get_training_records
from plaintrain.data.catalog import get_common_class_names, load_class_names, select_classes
from plaintrain.data.images import check_image_size, get_pixel_range, read_image
from plaintrain.data.samplers import TrainingSampler
from plaintrain.engine.launch import launch
from plaintrain.utils.errors import UserError
from plaintrain.visualization.colors import get_class_colors
from plaintrain.visualization.drawing import (
    draw_instances,
    filter_instances,
    get_record_instances,
    get_skeleton,
    scale_longer_side,
)
from plaintrain.visualization.images import check_image_arguments, write_images


def select_images(records, image_ids):
    """Return the indices of the images with these ids, as the command line names them; of all without."""
    if not image_ids:
        return list(range(len(records)))
    indices = [i for i in range(len(records)) if str(records[i]["image_id"]) in image_ids]
    if not indices:
        raise UserError(
            f"--image-id {', '.join(image_ids)}: no such image among {len(records)}, the first of which is "
            f"{records[0]['image_id']}"
        )
    return indices


def annotated_images(cfg, args):
    """Iterate over (file name, image, instances) of the datasets' images with their annotations."""
    rng = np.random.default_rng(cfg.SEED)
    records = [DatasetCatalog.get(name) for name in cfg.DATASETS.TRAIN]
    records = list(itertools.chain(*records)) if len(records) > 1 else records[0]
    indices = select_images(records, args.image_id)
    for i in rng.permutation(indices) if args.shuffle else indices:
        record = records[int(i)]
        if args.labels and not args.labels & {a["category_id"] for a in record["annotations"]}:
            continue
        image = read_image(record["file_name"], get_pixel_range(cfg))
        check_image_size(record, image)
        yield record["file_name"], image, get_record_instances(record)


def training_samples(cfg, args):
    """Iterate over (file name, image, instances) of samples as the training's loader makes them."""
    options = {}
    if args.image_id:
        # Other images may still be pasted into them.
        records = get_training_records(cfg)
        kept = [records[i] for i in select_images(records, args.image_id)]
        options = {"dataset": kept, "mapper": DatasetMapper(cfg, is_train=True, records=records)}
        options["sampler"] = TrainingSampler(len(kept), 1, seed=cfg.SEED)
    loader = build_detection_train_loader(cfg, **options)
    # A class may be in no sample: one epoch, then.
    samples = itertools.chain.from_iterable(loader)
    for sample in itertools.islice(samples, loader.iters_per_epoch if args.labels else None):
        if args.labels and not args.labels & set(sample["target"]["labels"].tolist()):
            continue
        yield sample["file_name"], sample["image"], sample["target"]


def setup(args):
    """Return the config, after all checks of the command line that open no image."""
    names, args.opts = split_overrides(args.words)
    cfg = load_tool_cfg(args)
    names = names or list(cfg.DATASETS.TRAIN) or list(cfg.DATASETS.TEST)
    if not names:
        raise UserError("which dataset? Name one, or give a --config-file with DATASETS.TRAIN")
    check_image_arguments(args)
    classes = get_common_class_names(names)
    args.labels = {classes.index(name) for name in select_classes(classes, args.classes, names[0])}
    args.labels = args.labels if args.classes else set()
    seed = max(cfg.SEED, 0) if args.seed is None else args.seed
    cfg.merge_from_list(["DATASETS.TRAIN", names, "SEED", seed, "DATALOADER.NUM_WORKERS", 0])
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 1, "SOLVER.ACCUMULATE_STEPS", 1])
    return cfg


def draw(cfg, args, legend):
    """Iterate over (file name, caption, drawn image), and add the classes that are drawn to the legend."""
    names = load_class_names(cfg.DATASETS.TRAIN[0])
    skeleton, colors = get_skeleton(MetadataCatalog.get(cfg.DATASETS.TRAIN[0])), get_class_colors(len(names))
    source = annotated_images if args.source == "annotation" else training_samples
    for file_name, image, instances in itertools.islice(source(cfg, args), args.num):
        height, width = image.shape[-2:]
        if args.labels:
            instances = filter_instances(
                instances, np.isin(instances["labels"], list(args.labels)).nonzero()[0]
            )
        if max(height, width) < args.size:
            image, instances = scale_longer_side(image, instances, args.size)
        legend |= {names[label]: colors[label] for label in instances["labels"].tolist()}
        yield file_name, f"  {width}x{height}", draw_instances(image, instances, names, skeleton)


def main(args, cfg):
    """Draw, and write or show; prints what was made."""
    legend = {}
    if not write_images(draw(cfg, args, legend), args, ", ".join(cfg.DATASETS.TRAIN), legend):
        raise UserError(f"no image of {', '.join(cfg.DATASETS.TRAIN)} has what was asked for")


if __name__ == "__main__":
    try:
        cfg = setup(args)
    except UserError as e:
        parser.error(str(e))
    launch(main, args=(args, cfg))
