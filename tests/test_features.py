"""Options of the training scripts, from the command line."""

import json
import os
import re
import shutil
import signal
from functools import partial

import pytest
import torch
import yaml
from processes import EPOCHS, STEP, Run, change_losses
from run_files import differences, lines, load, same, tensorboard_values

from plaintrain import config, evaluation
from plaintrain.utils import comm

# 12 iterations; 3 an epoch.
SMALL = ["SOLVER.MAX_ITER", 12, "SOLVER.IMS_PER_BATCH", 8, "SOLVER.CHECKPOINT_PERIOD", 3]
SMALL += ["TEST.EVAL_PERIOD", 0]
OPTIONS = {"plain": [*STEP, "MODEL.EMA.DECAY", 0.5], "epoch": [*STEP, "MODEL.EMA.DECAY", 0.5, *EPOCHS]}
BEST = ["TEST.BEST_METRIC", "bbox/AP", "TEST.EVAL_PERIOD", 3]
RESULTS = "inference/few_val/coco_instances_results.json"


def train(folder, *options, code=0, **kwargs):
    """Run a training script to its end, which has this exit code."""
    return Run(folder, [*SMALL, *options], **kwargs).wait(code=code)


@pytest.fixture
def run(tmp_path):
    return lambda folder, *options, **kwargs: train(tmp_path / folder, *options, **kwargs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """{script: folder of a finished run on OPTIONS}."""
    root = tmp_path_factory.mktemp("finished")
    for script, options in OPTIONS.items():
        train(root / script, *options, script=script)
    return {script: root / script for script in OPTIONS}


def weights(folder, name="model_final"):
    return load(folder / f"{name}.pth")["model"]


def iterations_with(folder, name):
    return [iteration for iteration, row in lines(folder).items() if name in row]


def set_results(*values, kill_at=None):
    """Let the evaluations give these AP, and kill the run in one of them."""
    left = list(values)

    def inference(*args):
        if len(values) - len(left) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"bbox": {"AP": left.pop(0), "AP50": 50.0}}

    evaluation.inference_on_dataset = inference


def set_losses(*values):
    """Let the validations give these losses, and the evaluations an AP of 5."""
    left = iter(values)
    evaluation.compute_validation_losses = lambda *args: {"val/total_loss": next(left)}
    evaluation.inference_on_dataset = lambda *args: {"bbox": {"AP": 5.0}}


# ---- the step -------------------------------------------------------------------------------------


def test_float16_clips_the_gradients_that_are_not_scaled(run, finished, tmp_path):
    run("out", *STEP, "SOLVER.AMP.PRECISION", "float16", "SOLVER.MAX_ITER", 6)
    first, *_, last = lines(tmp_path / "out").values()
    assert last["amp_scale"] > 1 and load(tmp_path / "out/model_0000005.pth")["scaler"]["scale"] > 1
    assert first["grad_norm"] == pytest.approx(lines(finished["plain"])[0]["grad_norm"], rel=0.1)
    assert not same(weights(tmp_path / "out", "model_0000002"), weights(tmp_path / "out", "model_0000005"))


def test_averaged_weights_are_final_and_evaluated_unless_told_otherwise(run, finished, tmp_path):
    last = load(finished["plain"] / "model_0000011.pth")
    averaged = {k.removeprefix("module."): v for k, v in last["ema"].items() if k.startswith("module.")}
    assert same(weights(finished["plain"]), averaged) and not same(averaged, last["model"])
    # The other script takes the same steps.
    epoch = load(finished["epoch"] / "model_0000011.pth")
    assert same(last["model"], epoch["model"]) and same(last["ema"], epoch["ema"])
    raw = ["MODEL.EMA.EVALUATE", "raw", "MODEL.EMA.FINAL", "raw"]
    run("raw", *OPTIONS["plain"], *raw)
    assert same(weights(tmp_path / "raw"), last["model"])
    found, found_raw = ((folder / RESULTS).read_bytes() for folder in (finished["plain"], tmp_path / "raw"))
    assert found != found_raw
    numbered, ema = ["MODEL.WEIGHTS", finished["plain"] / "model_0000011.pth"], ["MODEL.EMA.ENABLED", True]
    run("a", *numbered, *ema, script="epoch", flags=["--eval-only"])
    run("b", *numbered, flags=["--eval-only"])
    run("raw", *ema, flags=["--eval-only", "--resume"])
    assert (tmp_path / "a" / RESULTS).read_bytes() == (tmp_path / "raw" / RESULTS).read_bytes() == found
    assert (tmp_path / "b" / RESULTS).read_bytes() == found_raw


def add_rank_loss():
    """Add to the losses the rank and what is no loss."""

    def add(model, losses):
        return losses | {"loss_rank": torch.tensor(float(comm.get_rank())), "accuracy": torch.tensor(7.0)}

    change_losses(add)


@pytest.mark.parametrize("script", OPTIONS)
def test_two_ranks_average_their_losses_and_statistics(run, tmp_path, script):
    options = [*OPTIONS[script], "SOLVER.MAX_ITER", 1, "SOLVER.IMS_PER_BATCH", 22, "SOLVER.MAX_TIME", 1e-9]
    options += ["SOLVER.MAX_EPOCHS", 1] if script == "epoch" else []
    run("out", *options, script=script, ranks=2, faults=add_rank_loss)
    # The last iteration is not cut off by the time.
    assert (tmp_path / "out/model_final.pth").exists() and (tmp_path / "out/inference").exists()
    row = lines(tmp_path / "out")[0]
    assert row["loss_rank"] == 0.5 and row["accuracy"] == 7
    assert row["total_loss"] == pytest.approx(sum(v for k, v in row.items() if k.startswith("loss_")))
    saved = load(tmp_path / "out/model_0000000.pth")
    means = [name for name in saved["model"] if name.endswith("running_mean")]
    assert means and all(torch.equal(saved["model"][n], saved["ema"][f"module.{n}"]) for n in means)
    final = weights(tmp_path / "out")
    assert all(torch.equal(final[n], saved["ema"][f"module.{n}"]) for n in means)


# ---- best, patience, time -------------------------------------------------------------------------


def test_best_model_is_kept_also_when_an_evaluation_is_interrupted(run, tmp_path):
    values = [0.0, 3.0, 3.0, 2.0]
    run("out", *BEST, faults=partial(set_results, *values, kill_at=2), code=-signal.SIGKILL)
    # The evaluation that was interrupted comes first.
    run("out", *BEST, flags=["--resume"], faults=partial(set_results, *values[2:]))
    best = load(tmp_path / "out/model_best.pth")
    assert (best["iteration"], best["class_names"]) == (5, ["circle", "square", "triangle"])
    assert same(best["model"], weights(tmp_path / "out", "model_0000005"))
    rows = {i: row.get("few_val/bbox/AP") for i, row in lines(tmp_path / "out").items()}
    assert [rows.pop(i) for i in (2, 5, 8, 11)] == values and set(rows.values()) == {None}
    # A longer run still knows the best.
    run("out", *BEST, "SOLVER.MAX_ITER", 15, flags=["--resume"], faults=partial(set_results, 2.5, 2.5))
    assert load(tmp_path / "out/model_best.pth")["iteration"] == 5
    assert load(tmp_path / "out/model_final.pth")["iteration"] == 14


@pytest.mark.parametrize(("script", "kill_at"), [("plain", 1), ("epoch", 2)])
def test_patience_ends_a_run_which_more_patience_extends(run, tmp_path, script, kill_at):
    out, values = tmp_path / "out", [5.0, 4.0, 5.0, 9.0]
    options = [*(EPOCHS if script == "epoch" else []), *BEST, "SOLVER.PATIENCE", 2]
    call = partial(run, "out", *options, script=script)
    call(faults=partial(set_results, *values, kill_at=kill_at), code=-signal.SIGKILL)
    call(flags=["--resume"], faults=partial(set_results, *values[kill_at:]))
    assert max(lines(out)) == 8 and lines(out)[8]["few_val/bbox/AP"] == 5
    assert same(weights(out), weights(out, "model_0000008"))
    call(flags=["--resume"], faults=partial(set_results, 5.0))
    assert max(lines(out)) == 8
    call("SOLVER.PATIENCE", 3, flags=["--resume"], faults=partial(set_results, 5.0, 9.0))
    assert max(lines(out)) == 11


@pytest.mark.parametrize("script", OPTIONS)
def test_validation_losses_choose_the_best_and_end_the_run_with_an_evaluation(run, tmp_path, script):
    options = ["TEST.BEST_METRIC", "val/total_loss", "SOLVER.PATIENCE", 2]
    options += EPOCHS if script == "epoch" else ["TEST.VAL_LOSS_PERIOD", 3]
    first = run("out", *options, script=script, faults=partial(set_losses, 2.0, 3.0, 3.0))
    last = lines(tmp_path / "out").popitem()
    assert last[0] == 8 and (last[1]["few_val/bbox/AP"], last[1]["val/total_loss"]) == (5.0, 3.0)
    assert load(tmp_path / "out/model_best.pth")["iteration"] == 2
    again = run("out", *options, script=script, flags=["--resume"], faults=partial(set_losses, 3.0))
    for output in (first.output, again.output):
        assert output.count("early stopping: val/total_loss has not improved for 2 evaluations") == 1
        assert "results on few_val" in output


@pytest.mark.parametrize("script", OPTIONS)
def test_run_that_is_out_of_time_resumes_where_it_ended(run, finished, tmp_path, script):
    options, out = OPTIONS[script], tmp_path / "out"
    for iteration, flags in ((0, []), (1, ["--resume"])):
        run("out", *options, "SOLVER.MAX_TIME", 1e-9, script=script, flags=flags)
        assert (out / "last_checkpoint").read_text() == f"model_000000{iteration}.pth"
        assert not (out / "model_final.pth").exists() and not (out / "inference").exists()
    run("out", *options, script=script, flags=["--resume"])
    assert differences(finished[script], out) == []


def test_each_script_resumes_the_checkpoints_of_the_other(run, finished, tmp_path):
    out, resume = tmp_path / "out", {"flags": ["--resume"]}
    evaluated = ["TEST.EVAL_PERIOD", 3]
    a_step = ["SOLVER.MAX_TIME", 1e-9]
    run("out", *OPTIONS["plain"], *a_step)
    run("out", *OPTIONS["epoch"], *a_step, script="epoch", **resume)
    # Killed in the evaluation after the first epoch, which the other one repeats.
    killed = {"faults": partial(set_results, kill_at=0), "code": -signal.SIGKILL}
    run("out", *OPTIONS["epoch"], *evaluated, script="epoch", **resume, **killed)
    assert (out / "last_checkpoint").read_text() == "model_0000002.pth"
    run("out", *OPTIONS["plain"], *evaluated, *a_step, **resume)
    assert iterations_with(out, "few_val/bbox/AP") == [2] and max(lines(out)) == 3
    run("out", *OPTIONS["plain"], *evaluated, **resume, **killed)
    run("out", *OPTIONS["epoch"], *evaluated, script="epoch", **resume)
    assert iterations_with(out, "few_val/bbox/AP") == [2, 5, 8, 11]
    last, expected = (load(folder / "model_0000011.pth") for folder in (out, finished["epoch"]))
    assert all(same(last[name], expected[name]) for name in ("model", "ema"))
    names = ("total_loss", "grad_norm", "lr")
    rows, expected_rows = lines(out), lines(finished["plain"])
    assert all(rows[i][name] == row[name] for i, row in expected_rows.items() for name in names)


# ---- tests between --------------------------------------------------------------------------------


def test_validation_losses_and_evaluations_come_when_due_and_change_nothing(run, finished, tmp_path):
    due = ["TEST.VAL_LOSS_PERIOD", 4, "TEST.EVAL_PERIOD", 3, "TEST.EVAL_START", 5]
    run("out", *OPTIONS["plain"], *due)
    assert same(weights(finished["plain"]), weights(tmp_path / "out"))
    assert iterations_with(tmp_path / "out", "val/loss_rpn_cls") == [3, 7, 11]
    assert iterations_with(tmp_path / "out", "few_val/bbox/AP") == [4, 7, 10, 11]
    row = lines(tmp_path / "out")[3]
    assert row["val/total_loss"] == pytest.approx(sum(v for k, v in row.items() if k.startswith("val/loss")))


def test_epochs_are_written_once_with_all_that_follows_them(run, tmp_path):
    options = ["SOLVER.MAX_EPOCHS", 5, "WORKFLOW", "[['train', 2], ['val', 1]]"]
    output = run("out", *options, "TEST.EVAL_PERIOD", 4, "LOG_PERIOD", 2, script="epoch").output
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.json").read_text().splitlines()]
    written = [(row["iteration"], row["epoch"]) for row in rows]
    assert written == [(i, i // 3) for i in (1, 2, 3, 5, 7, 8, 9, 11, 13, 14)]
    assert re.findall(r" iter: (\d+) ", output) == [str(i) for i, _ in written]
    assert iterations_with(tmp_path / "out", "val/loss_cls") == [5, 11, 14]
    # At the end of the epochs in which one is due.
    assert iterations_with(tmp_path / "out", "few_val/bbox/AP") == [5, 8, 11, 14]
    events = {step for step, tag, _ in tensorboard_values(tmp_path / "out") if tag == "val/total_loss"}
    assert events == {5, 11, 14}


def test_losses_before_the_first_step_count_for_the_best(run, tmp_path):
    options = ["SOLVER.MAX_EPOCHS", 3, "SOLVER.IMS_PER_BATCH", 22, "WORKFLOW", "[['val', 1], ['train', 1]]"]
    options += ["TEST.BEST_METRIC", "val/total_loss"]
    run("out", *options, script="epoch", faults=partial(set_losses, 1.0, 2.0, 0.5))
    assert load(tmp_path / "out/model_best.pth")["iteration"] == 1


# ---- the first hour -------------------------------------------------------------------------------


@pytest.mark.parametrize("script", OPTIONS)
def test_dry_run_says_ready_and_leaves_everything_as_it_was(run, finished, tmp_path, script):
    out = shutil.copytree(finished[script], tmp_path / "out")

    def times():
        paths = [path for path in out.rglob("*") if path.is_file() and path.name != "log.txt"]
        return {path: path.stat().st_mtime_ns for path in paths}

    before, options = times(), [*OPTIONS[script], "TEST.BEST_METRIC", "bbox/AP"]
    # A test set that is trained on is shortened to one batch: an epoch of one iteration.
    options += ["DATASETS.TEST", "('few_train',)"] if script == "epoch" else []
    output = run("out", *options, script=script, flags=["--dry-run"]).output
    assert f"ready: {1 if script == 'epoch' else 2} iterations" in output and times() == before


# ---- another config on resume ---------------------------------------------------------------------


def add_a_key():
    """A fork whose config has a key of its own."""
    get_cfg = config.get_cfg

    def forks_cfg():
        cfg = get_cfg()
        cfg.MY_WEIGHT = 1.0
        return cfg

    config.get_cfg = forks_cfg


def test_changes_on_resume_take_effect_and_are_shown(run, tmp_path):
    start = ["SOLVER.OPTIMIZER", "SGD", "SOLVER.WARMUP_ITERS", 0, "SEED", -1, "SOLVER.CHECKPOINT_PERIOD", 2]
    momentum = ["SOLVER.MOMENTUM_SCHEDULE", "[[0, 0.5], [4, 0.9]]"]
    run("out", *start, *momentum, "SOLVER.MAX_ITER", 2, faults=add_a_key)
    seed = yaml.safe_load((tmp_path / "out/config.yaml").read_text())["SEED"]
    changed = ["SOLVER.BASE_LR", 0.0005, "SOLVER.WEIGHT_DECAY", 0.5, "SOLVER.NESTEROV", True]
    changed += ["SOLVER.MOMENTUM", 0.8, "SOLVER.MAX_ITER", 4, "SOLVER.IMS_PER_BATCH", 4, "MY_WEIGHT", 2.0]
    output = run("out", *start, *changed, flags=["--resume"], faults=add_a_key).output
    assert "  SOLVER.MAX_ITER: 2 -> 4 (from now on)" in output.splitlines()
    assert "the batch size changes from 8 to 4 at iteration 2" in output
    (group, *_) = load(tmp_path / "out/model_0000003.pth")["optimizer"]["param_groups"]
    names = ("weight_decay", "nesterov", "lr", "momentum")
    assert [group[name] for name in names] == [0.5, True, 0.0005, 0.8]
    rows = lines(tmp_path / "out")
    assert [row.get("momentum") for row in rows.values()] == [0.5, pytest.approx(0.6), None, None]
    now = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert (now["SEED"], now["MY_WEIGHT"]) == (seed, 2.0)


CANNOT_CHANGE = [
    ("plain", ["MODEL.TINY.OUT_CHANNELS", 32], "MODEL.TINY.OUT_CHANNELS must be 16 .*, got 32"),
    ("plain", ["SOLVER.BIAS_LR_FACTOR", 2.0], "grouped by .*BIAS_LR_FACTOR"),
    ("plain", ["DATASETS.DECLARE.few_train.NUM", 11], "DATASETS.TRAIN has 11 images, but had 22"),
    ("epoch", ["SOLVER.IMS_PER_BATCH", 6], "SOLVER.IMS_PER_BATCH must be 8 .*, got 6"),
]


@pytest.mark.parametrize(("script", "changed", "words"), CANNOT_CHANGE)
def test_changes_on_resume_that_cannot_be_are_named(run, finished, tmp_path, script, changed, words):
    out = shutil.copytree(finished[script], tmp_path / "out")
    more = ["SOLVER.MAX_EPOCHS", 5] if script == "epoch" else ["SOLVER.MAX_ITER", 15]
    output = run("out", *OPTIONS[script], *more, *changed, script=script, flags=["--resume"], code=1).output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert re.search(words, line), line
    assert (out / "last_checkpoint").read_text() == (finished[script] / "last_checkpoint").read_text()
    assert same(weights(out), weights(finished[script]))
