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

import argparse

from plaintrain.utils.arguments import add_picture_arguments

if __name__ == "__main__":
    # --help and a wrong flag are answered before the imports that take seconds.
    parser = argparse.ArgumentParser(epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "words", nargs="*", metavar="NAME | KEY VALUE", help="datasets, and config overrides after them"
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML config")
    parser.add_argument("--source", choices=("annotation", "dataloader"), default="annotation")
    parser.add_argument("--shuffle", action="store_true", help="random images; the loader's always are")
    parser.add_argument("--seed", type=int, help="of --shuffle and of the loader, in place of SEED")
    parser.add_argument(
        "--image-id", action="append", metavar="ID", help="this image only; may be given again"
    )
    add_picture_arguments(parser)
    args = parser.parse_intermixed_args()

import itertools
import os

import numpy as np

from plaintrain.config import get_cfg, set_value
from plaintrain.config.defaults import split_overrides
from plaintrain.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_train_loader
from plaintrain.data.build import training_records
from plaintrain.data.catalog import class_names, common_class_names, select_classes
from plaintrain.data.datasets.builtin import declare_datasets
from plaintrain.data.images import check_image_size, get_pixel_range, read_image
from plaintrain.data.samplers import TrainingSampler
from plaintrain.engine.launch import launch
from plaintrain.utils.errors import UserError
from plaintrain.utils.logger import progress
from plaintrain.visualization.drawing import (
    class_colors,
    contact_sheet,
    draw_instances,
    record_instances,
    scale_to,
    select,
    skeleton_of,
)
from plaintrain.visualization.images import check_picture_arguments, save_picture, show_picture

# Classes that the legend of a sheet has room for.
_LEGEND = 24


def chosen(records, image_ids):
    """The indices of the images with these ids, as the command line names them; of all without."""
    if not image_ids:
        return list(range(len(records)))
    found = [i for i in range(len(records)) if str(records[i]["image_id"]) in image_ids]
    if not found:
        raise UserError(
            f"--image-id {', '.join(image_ids)}: no such image among {len(records)}, the first of which is "
            f"{records[0]['image_id']}"
        )
    return found


def annotated_images(cfg, args):
    """(file name, image, instances) of the datasets' images with their annotations."""
    rng = np.random.default_rng(cfg.SEED)
    records = [DatasetCatalog.get(name) for name in cfg.DATASETS.TRAIN]
    records = list(itertools.chain(*records)) if len(records) > 1 else records[0]
    indices = chosen(records, args.image_id)
    for i in rng.permutation(indices) if args.shuffle else indices:
        record = records[int(i)]
        if args.labels and not args.labels & {a["category_id"] for a in record["annotations"]}:
            continue
        image = read_image(record["file_name"], get_pixel_range(cfg))
        check_image_size(record, image)
        yield record["file_name"], image, record_instances(record)


def training_samples(cfg, args):
    """(file name, image, instances) of samples as the training's loader makes them."""
    parts = {}
    if args.image_id:
        # Other images may still be pasted into them.
        records = training_records(cfg)
        kept = [records[i] for i in chosen(records, args.image_id)]
        parts = {"dataset": kept, "mapper": DatasetMapper(cfg, is_train=True, records=records)}
        parts["sampler"] = TrainingSampler(len(kept), 1, seed=cfg.SEED)
    loader = build_detection_train_loader(cfg, **parts)
    # A class may be in no sample: one pass over the images, then.
    samples = itertools.chain.from_iterable(loader)
    for sample in itertools.islice(samples, loader.iters_per_epoch if args.labels else None):
        if args.labels and not args.labels & set(sample["target"]["labels"].tolist()):
            continue
        yield sample["file_name"], sample["image"], sample["target"]


def only(labels, instances):
    """The instances of some classes, a set of labels; of all if it is empty."""
    if not labels:
        return instances
    return select(instances, np.isin(instances["labels"].numpy(), list(labels)).nonzero()[0])


def stem_of(file_name):
    """A file's name without folder and ending, also that of a drawn image."""
    return os.path.splitext(os.path.basename(file_name.split("?")[0]))[0]


def setup(args):
    """The config, after all checks of the command line that open no image."""
    cfg = get_cfg()
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    names, overrides = split_overrides(args.words)
    cfg.merge_from_list(overrides)
    declare_datasets(cfg)
    names = names or list(cfg.DATASETS.TRAIN) or list(cfg.DATASETS.TEST)
    if not names:
        raise UserError("which dataset? Name one, or give a --config-file with DATASETS.TRAIN")
    check_picture_arguments(args)
    classes = common_class_names(names)
    args.labels = {classes.index(name) for name in select_classes(classes, args.classes, names[0])}
    args.labels = args.labels if args.classes else set()
    seed = max(cfg.SEED, 0) if args.seed is None else args.seed
    for key, value in {
        "DATASETS.TRAIN": names,
        "SEED": seed,
        "SOLVER.IMS_PER_BATCH": 1,
        "SOLVER.ACCUMULATE_STEPS": 1,
        "DATALOADER.NUM_WORKERS": 0,
    }.items():
        set_value(cfg, key, value)
    return cfg


def main(args, cfg):
    """Draw, and write or show; prints what was made."""
    names = class_names(cfg.DATASETS.TRAIN[0])
    skeleton = skeleton_of(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]))
    source = annotated_images if args.source == "annotation" else training_samples
    pictures, captions, seen = [], [], set()
    items = itertools.islice(source(cfg, args), args.num)
    for i, (file_name, image, instances) in enumerate(progress(items, desc="pictures", total=args.num)):
        size, instances = tuple(image.shape[-2:]), only(args.labels, instances)
        if max(size) < args.size:
            image, instances = scale_to(image, instances, args.size)
        picture = draw_instances(image, instances, names, skeleton)
        if args.output:
            save_picture(os.path.join(args.output, f"{i + 1:04d}_{stem_of(file_name)}.jpg"), picture)
        seen |= set(instances["labels"].tolist())
        captions.append(f"{stem_of(file_name)}  {size[1]}x{size[0]}")
        pictures.append(picture if args.grid or args.show else None)
    if not pictures:
        raise UserError(f"no image of {', '.join(cfg.DATASETS.TRAIN)} has what was asked for")
    if args.output:
        print(f"wrote {len(pictures)} pictures to {args.output}")
    if pictures[0] is None:
        return
    colors = class_colors(len(names))
    legend = {names[label]: colors[label] for label in sorted(seen)} if len(seen) <= _LEGEND else None
    columns = min(args.columns, len(pictures))
    sheet = contact_sheet(pictures, captions, columns, columns * max(args.size, 320), legend)
    if args.grid:
        save_picture(args.grid, sheet)
        print(f"wrote {len(pictures)} pictures to {args.grid}")
    if args.show:
        show_picture(sheet, ", ".join(cfg.DATASETS.TRAIN))


if __name__ == "__main__":
    try:
        cfg = setup(args)
    except UserError as e:
        parser.error(str(e))
    launch(main, args=(args, cfg))
