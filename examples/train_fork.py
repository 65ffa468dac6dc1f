"""Example of a fork of scripts/plain_train_net.py: another dataset, loss and metric; see README.md here.

python examples/train_fork.py --config-file configs/quickstart.yaml OUTPUT_DIR output/fork \\
    DATASETS.TRAIN "('crowded_train',)" DATASETS.TEST "('crowded_val',)"
"""

import torch
from torch.nn import functional as F

from plaintrain import data, engine, evaluation, modeling, solver
from plaintrain.checkpoint import build_checkpointer
from plaintrain.data.datasets.shapes import CLASSES, load_shapes
from plaintrain.engine.run_facts import write_report
from plaintrain.utils import comm
from plaintrain.utils.events import EventStorage, closing_all, write_all


def load_crowded(split):
    """Return the records of a dataset (step 1): images with at least three shapes."""
    return [record for record in load_shapes(split, 500)[0] if len(record["annotations"]) >= 3]


for name, split in (("crowded_train", "train"), ("crowded_val", "val")):
    data.DatasetCatalog.register(name, lambda split=split: load_crowded(split))
    data.MetadataCatalog.get(name).set(thing_classes=CLASSES, evaluator_type="coco")


def add_presence_loss(detector):
    """Add a loss (step 2): a linear layer predicts the classes in the image from the coarsest feature map."""
    detector.presence = torch.nn.Linear(detector.backbone.out_channels, len(CLASSES))
    detector.presence.to(next(detector.parameters()).device)
    maps = {}
    detector.backbone.register_forward_hook(lambda module, inputs, outputs: maps.update(outputs))

    def add_loss(module, inputs, loss_dict):
        if module.training:
            logits = module.presence(list(maps.values())[-1].mean(dim=(2, 3))).float()
            presence = torch.zeros_like(logits)
            for row, sample in zip(presence, inputs[0], strict=True):
                row[sample["target"]["labels"].to(row.device)] = 1
            loss_dict["loss_presence"] = 0.1 * F.binary_cross_entropy_with_logits(logits, presence)

    detector.register_forward_hook(add_loss)


class CountingError(evaluation.DatasetEvaluator):
    """Metric (step 3): mean absolute error of the number of detections per image and class."""

    def __init__(self, dataset_name):
        records = data.DatasetCatalog.get(dataset_name)
        self.ground_truth = {r["image_id"]: [a["category_id"] for a in r["annotations"]] for r in records}
        self.errors = []

    def process(self, inputs, outputs):
        for sample, output in zip(inputs, outputs, strict=True):
            detected = output["labels"][output["scores"] >= 0.5].tolist()
            labels = self.ground_truth[sample["image_id"]]
            self.errors.append([abs(detected.count(k) - labels.count(k)) for k in range(len(CLASSES))])

    def evaluate(self):
        errors = torch.tensor(sum(comm.all_gather(self.errors), []), dtype=torch.float32).mean(dim=0)
        return {"count": {f"error-{k}": value for k, value in zip(CLASSES, errors.tolist(), strict=True)}}


def do_test(cfg, model):
    (dataset_name,) = cfg.DATASETS.TEST
    data_loader = data.build_detection_test_loader(cfg, dataset_name)
    evaluators = [evaluation.build_evaluator(cfg, dataset_name), CountingError(dataset_name)]
    results = comm.broadcast(evaluation.inference_on_dataset(model, data_loader, evaluators))
    return evaluation.flatten_results(results)


def do_train(cfg, model, resume):
    optimizer = solver.build_optimizer(cfg, model)
    scheduler = solver.build_lr_scheduler(cfg, optimizer)
    clip_gradients = solver.build_gradient_clipper(cfg, model)
    data_loader = data.build_detection_train_loader(cfg)
    storage = EventStorage()
    states = {"optimizer": optimizer, "scheduler": scheduler, "data_loader": data_loader, "storage": storage}
    checkpointer = build_checkpointer(cfg, model, **states)
    start_iter = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume).get("iteration", -1) + 1
    with storage, closing_all(engine.build_writers(cfg)) as writers, checkpointer:
        for iteration, samples in data_loader.iterations(start_iter, cfg.SOLVER.MAX_ITER):
            storage.iter = iteration
            optimizer.zero_grad()
            loss_dict = model(samples)
            comm.check_loss_names(loss_dict)  # all ranks
            total_loss = sum(loss_dict.values())
            total_loss.backward()
            losses = {"total_loss": total_loss, **loss_dict, "grad_norm": clip_gradients()}
            optimizer.step()
            storage.put_scalars(**comm.reduce_dict(losses))
            storage.put_scalars(**scheduler.scalars(), smoothing_hint=False)
            scheduler.step()
            is_last = iteration == cfg.SOLVER.MAX_ITER - 1
            if is_last or solver.every(cfg.TEST.EVAL_PERIOD, iteration):
                storage.put_scalars(**do_test(cfg, model), smoothing_hint=False)
            if is_last or solver.every(cfg.LOG_PERIOD, iteration):
                write_all(writers)
            if is_last or solver.every(cfg.SOLVER.CHECKPOINT_PERIOD, iteration):
                storage.raise_if_nonfinite(data_loader.get_image_names)  # device sync
                checkpointer.save_iteration(iteration)
        checkpointer.save_final()


def main(args):
    if args.eval_only or args.dry_run:
        raise SystemExit("error: this fork only trains; --eval-only and --dry-run are not supported")
    cfg = engine.load_cfg(args)
    engine.reject_loop_options(cfg, used=["SOLVER.ASYNC_CHECKPOINT", "SOLVER.CHECKPOINT_MAX_TO_KEEP"])
    engine.default_setup(cfg, args)
    model = modeling.build_model(cfg)
    add_presence_loss(model)
    do_train(cfg, engine.create_ddp_model(model), args.resume)
    write_report(cfg)


if __name__ == "__main__":
    args = engine.default_argument_parser(epilog=__doc__).parse_args()
    engine.launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
