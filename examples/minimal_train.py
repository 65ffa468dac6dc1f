"""The training loop without options: minimal_train.py [--resume] configs/quickstart.yaml KEY VALUE ..."""

import argparse

from plaintrain import data, engine, modeling, solver
from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.evaluation import build_evaluator, flatten_results, inference_on_dataset
from plaintrain.utils.events import EventStorage, closing_all, write_all


def do_test(cfg, model):
    results = {}
    for name in cfg.DATASETS.TEST:
        data_loader = data.build_detection_test_loader(cfg, name)
        results[name] = inference_on_dataset(model, data_loader, build_evaluator(cfg, name))
    return flatten_results(results)


def main(args):
    cfg = engine.load_cfg(args)
    engine.reject_loop_options(cfg)
    engine.default_setup(cfg, args)
    model = engine.create_ddp_model(modeling.build_model(cfg))
    optimizer = solver.build_optimizer(cfg, model)
    scheduler = solver.build_lr_scheduler(cfg, optimizer)
    clip_gradients = solver.build_gradient_clipper(cfg, model)
    data_loader = data.build_detection_train_loader(cfg)
    storage = EventStorage()
    states = {"optimizer": optimizer, "scheduler": scheduler, "data_loader": data_loader, "storage": storage}
    checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR, **states)
    start_iter = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume).get("iteration", -1) + 1
    with storage, closing_all(engine.build_writers(cfg)) as writers:
        for iteration, samples in data_loader.iterations(start_iter, cfg.SOLVER.MAX_ITER):
            storage.iter = iteration
            loss_dict = model(samples)
            total_loss = sum(loss_dict.values())
            optimizer.zero_grad()
            total_loss.backward()
            clip_gradients()
            optimizer.step()
            storage.put_scalars(total_loss=total_loss, lr=scheduler.get_last_lr()[0], **loss_dict)
            scheduler.step()
            is_last = iteration == cfg.SOLVER.MAX_ITER - 1
            if is_last or solver.every(cfg.TEST.EVAL_PERIOD, iteration):
                storage.put_scalars(**do_test(cfg, model), smoothing_hint=False)
            if is_last or solver.every(cfg.LOG_PERIOD, iteration):
                write_all(writers)
            if is_last or solver.every(cfg.SOLVER.CHECKPOINT_PERIOD, iteration):
                storage.raise_if_nonfinite(data_loader.get_image_names)
                checkpointer.save(f"model_{iteration:07d}", iteration=iteration)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("config_file")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE")
    engine.launch(main, args=(parser.parse_args(),))
