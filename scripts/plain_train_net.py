#!/usr/bin/env python
"""Train and evaluate a detector in one plain loop.

python scripts/plain_train_net.py --config-file configs/quickstart.yaml
python scripts/plain_train_net.py --config-file configs/quickstart.yaml --resume
python scripts/plain_train_net.py --config-file configs/quickstart.yaml --eval-only \\
    MODEL.WEIGHTS output/quickstart/model_final.pth

The file is made to be copied: change the data, the evaluator or the loss where they are called.
"""

import contextlib
import logging
import os
import time

from torch.nn.parallel import DistributedDataParallel

from plaintrain.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
from plaintrain.config import get_cfg
from plaintrain.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from plaintrain.engine import default_argument_parser, default_setup, default_writers, launch
from plaintrain.evaluation import (
    COCOEvaluator,
    PascalVOCDetectionEvaluator,
    flatten_results,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from plaintrain.modeling import build_model
from plaintrain.solver import build_gradient_clipper, build_lr_scheduler, build_optimizer
from plaintrain.utils import comm
from plaintrain.utils.events import EventStorage, every
from plaintrain.utils.logger import progress

logger = logging.getLogger("plaintrain")


def get_evaluator(cfg, dataset_name, output_folder):
    """The evaluator that the model and the dataset's metadata ask for."""
    proposals = cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork"
    if MetadataCatalog.get(dataset_name).evaluator_type == "pascal_voc" and not proposals:
        return PascalVOCDetectionEvaluator(dataset_name, output_dir=output_folder)
    return COCOEvaluator(
        dataset_name,
        tasks=("box_proposals",) if proposals else None,
        output_dir=output_folder,
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
    )


def dataset_classes(dataset_names):
    """The class names by which published weights are taken over, or None."""
    return MetadataCatalog.get(dataset_names[0]).get("thing_classes") if dataset_names else None


def do_test(cfg, model):
    """Evaluate on every dataset of DATASETS.TEST; {dataset: {task: {metric: number}}} on rank 0."""
    results = {}
    for dataset_name in cfg.DATASETS.TEST:
        data_loader = build_detection_test_loader(cfg, dataset_name)
        output_folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        evaluator = get_evaluator(cfg, dataset_name, output_folder)
        results[dataset_name] = inference_on_dataset(model, data_loader, evaluator)
        if comm.is_main_process():
            logger.info(f"results on {dataset_name}:")
            print_csv_format(results[dataset_name])
    return results


def do_train(cfg, model, resume=False):
    """Train for SOLVER.MAX_ITER iterations; returns the results of the last evaluation."""
    model.train()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    clip_gradients = build_gradient_clipper(cfg, model)
    checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR, optimizer=optimizer, scheduler=scheduler)
    # Only a resumed run goes on counting; weights of another run start at 0.
    classes = dataset_classes(cfg.DATASETS.TRAIN)
    state = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume, class_names=classes)
    start_iter, max_iter = state.get("iteration", -1) + 1, cfg.SOLVER.MAX_ITER
    keep = cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP
    saver = PeriodicCheckpointer(checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, max_iter, keep)
    data_loader = build_detection_train_loader(cfg, start_iter=start_iter)
    writers = default_writers(cfg.OUTPUT_DIR, max_iter) if comm.is_main_process() else []
    results, config = {}, cfg.dump()
    logger.info(f"starting training from iteration {start_iter} of {max_iter}")
    with EventStorage(start_iter) as storage, contextlib.ExitStack() as closing:
        for writer in writers:
            closing.callback(writer.close)
        start = time.perf_counter()
        iterations = progress(
            range(start_iter, max_iter), desc="training", initial=start_iter, total=max_iter
        )
        for iteration, data in zip(iterations, data_loader, strict=False):
            storage.iter = iteration
            data_time = time.perf_counter() - start
            # The model returns a dict of losses, whatever the task.
            loss_dict = model(data)
            losses = sum(loss for name, loss in loss_dict.items() if "loss" in name)
            # Read the losses of the window only when somebody writes, saves or evaluates.
            test = every(cfg.TEST.EVAL_PERIOD, iteration) or iteration == max_iter - 1
            write = every(cfg.LOG_PERIOD, iteration) or test
            save = saver.is_due(iteration)
            read = write or save
            optimizer.zero_grad()
            losses.backward()
            grad_norm = clip_gradients(need_norm=read)
            optimizer.step()
            storage.put_scalar("lr", optimizer.param_groups[0]["lr"], smoothing_hint=False)
            scheduler.step()
            reduced = comm.reduce_dict({"total_loss": losses, **loss_dict})
            storage.put_scalars(**reduced, time=time.perf_counter() - start, data_time=data_time)
            if grad_norm is not None:
                storage.put_scalar("grad_norm", grad_norm)
            if read:
                storage.raise_if_nonfinite(data_loader.file_names)  # sync point
            if save or test:
                comm.average_buffers(model)
            # The checkpoint comes first: a failing evaluation loses nothing.
            saver.step(iteration, config=config, class_names=classes)
            if test:
                results = do_test(cfg, model)
                storage.put_scalars(**flatten_results(results), smoothing_hint=False)
                comm.synchronize()
            if write:
                for writer in writers:
                    writer.write()
            start = time.perf_counter()
    return results


def setup(args):
    """The config of the command line, after the checks that can be made before training."""
    cfg = get_cfg()
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def main(args):
    """One process' work."""
    cfg = setup(args)
    model = build_model(cfg)
    logger.info(f"model:\n{model}")
    if args.eval_only:
        checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR)
        classes = dataset_classes(cfg.DATASETS.TEST)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume, class_names=classes)
        results = do_test(cfg, model)
    else:
        if comm.get_world_size() > 1:
            model = DistributedDataParallel(
                model,
                device_ids=[comm.get_local_rank()] if next(model.parameters()).is_cuda else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        results = do_train(cfg, model, resume=args.resume)
    if comm.is_main_process() and results:
        verify_results(cfg.TEST.EXPECTED_RESULTS, next(iter(results.values())))
    return results


if __name__ == "__main__":
    args = default_argument_parser(epilog=__doc__).parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
