"""A fork of scripts/plain_train_net.py with a dataset, a loss and a metric of its own; see README.md here.

python examples/train_fork.py --config-file configs/quickstart.yaml OUTPUT_DIR output/fork \\
    DATASETS.TRAIN "('crowded_train',)" DATASETS.TEST "('crowded_val',)"
"""

import time
from itertools import chain

import torch

from plaintrain import accumulation, checkpoint, config, data, engine, evaluation, modeling, precision, solver
from plaintrain.data.shapes import CLASSES, load_shapes
from plaintrain.report.after_training import make_report_if_wanted
from plaintrain.utils import comm, events

LEFT_OUT = """MODEL.EMA.ENABLED SOLVER.ACCUMULATE_STEPS SOLVER.AMP.ENABLED SOLVER.MAX_TIME SOLVER.ON_NONFINITE
TEST.AMP TEST.AUG.ENABLED TEST.BEST_METRIC TEST.EVAL_START TEST.EXPECTED_RESULTS TEST.VAL_LOSS_PERIOD"""


def load_crowded(split):
    """1. The dataset: a function that returns a list of records, here images with three shapes or more."""
    return [record for record in load_shapes(split, 500)[0] if len(record["annotations"]) >= 3]


for name, split in (("crowded_train", "train"), ("crowded_val", "val")):
    data.DatasetCatalog.register(name, lambda split=split: load_crowded(split))
    data.MetadataCatalog.get(name).set(thing_classes=CLASSES, evaluator_type="coco")


def add_presence_loss(detector, maps):
    """2. The loss: from the backbone's coarsest map the detector also learns which classes there are."""
    presence = torch.nn.Linear(detector.backbone.out_channels, len(CLASSES))
    detector.presence = presence.to(next(detector.parameters()).device)
    detector.backbone.register_forward_hook(lambda module, inputs, outputs: maps.update(outputs))

    def add_loss(module, inputs, found):
        if module.training:
            logits = module.presence(list(maps.values())[-1].mean(dim=(2, 3))).float()
            labels = [sample["target"]["labels"].to(logits.device) for sample in inputs[0]]
            there = torch.stack([torch.zeros_like(logits[0]).index_fill(0, index, 1) for index in labels])
            found["loss_presence"] = 0.1 * torch.nn.functional.binary_cross_entropy_with_logits(logits, there)

    detector.register_forward_hook(add_loss)


# 3. The metric: by how many objects of each class the count in an image is off, on average.
class CountingError(evaluation.DatasetEvaluator):
    def __init__(self, dataset_name):
        records, self.off = data.DatasetCatalog.get(dataset_name), []
        self.truth = {r["image_id"]: [a["category_id"] for a in r["annotations"]] for r in records}

    def process(self, inputs, outputs):
        for sample, output in zip(inputs, outputs, strict=True):
            found, truth = output["labels"][output["scores"] >= 0.5].tolist(), self.truth[sample["image_id"]]
            self.off.append([abs(found.count(k) - truth.count(k)) for k in range(len(CLASSES))])

    def evaluate(self):
        off = torch.tensor(sum(comm.all_gather(self.off), []), dtype=torch.float32).mean(dim=0)
        return {"count": {f"error-{k}": value for k, value in zip(CLASSES, off.tolist(), strict=True)}}


def do_test(cfg, model):
    loader, (name,) = data.build_detection_test_loader(cfg, *cfg.DATASETS.TEST), cfg.DATASETS.TEST
    scorers = [evaluation.build_evaluator(cfg, name), CountingError(name)]
    return evaluation.flatten_results(comm.broadcast(evaluation.inference_on_dataset(model, loader, scorers)))


def do_train(cfg, model, resume):
    optimizer, loader = solver.build_optimizer(cfg, model), data.build_detection_train_loader(cfg)
    scheduler, clip = solver.build_lr_scheduler(cfg, optimizer), solver.build_gradient_clipper(cfg, model)
    parts = {"optimizer": optimizer, "scheduler": scheduler, "data_loader": loader}
    facts, scaler = {"config": cfg.dump(), "class_names": CLASSES}, torch.amp.GradScaler(enabled=False)
    saver = checkpoint.build_periodic_checkpointer(cfg, model, parts, facts)
    state, start = saver.checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume), time.perf_counter()
    first, max_iter, writers = state.get("iteration", -1) + 1, cfg.SOLVER.MAX_ITER, engine.build_writers(cfg)
    with events.EventStorage(first, state.get("log_window")) as storage, events.closing_all(writers), saver:
        for iteration, samples in zip(range(first - 1, max_iter), chain([None], loader), strict=False):
            storage.iter, data_time = iteration, time.perf_counter() - start
            test = iteration == max_iter - 1 or events.every(cfg.TEST.EVAL_PERIOD, iteration)
            write = test or events.every(cfg.LOG_PERIOD, iteration)
            if samples:  # A resumed run begins with the test and the log row of its last iteration.
                optimizer.zero_grad()
                loss_dict = model(samples)
                losses = accumulation.sum_losses(loss_dict)
                losses.backward()
                norm = clip()
                optimizer.step()
                storage.put_scalars(**scheduler.scalars(), smoothing_hint=False)
                scheduler.step()
                reduced = comm.reduce_dict({"total_loss": losses, **loss_dict})
                storage.put_scalars(**reduced, **norm, time=time.perf_counter() - start, data_time=data_time)
                if write or saver.is_due(iteration):
                    precision.check_finite(storage, scaler, loader.image_names)  # sync point
                    comm.average_buffers(model)
                saver.step(iteration)
            if test:
                storage.put_scalars(**do_test(cfg, model), smoothing_hint=False)
            if write:
                events.write_all(writers)
            start = time.perf_counter()


def main(args):
    if args.eval_only or args.dry_run:
        raise SystemExit("error: this fork only trains, without --eval-only and --dry-run")
    cfg = config.get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    for key in LEFT_OUT.split():
        engine.require_default(cfg, key, "this fork has left it out")
    engine.default_setup(cfg, args)
    add_presence_loss(model := modeling.build_model(cfg), {})
    do_train(cfg, engine.create_ddp_model(model), args.resume)
    make_report_if_wanted(cfg)


if __name__ == "__main__":
    args = engine.default_argument_parser(epilog=__doc__).parse_args()
    engine.launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (args,))
