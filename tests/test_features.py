"""What the training scripts do beside a plain step: as a user runs it, switched off, interrupted."""

import json
import logging
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from run_files import tensorboard_values
from test_scripts import HEADS, TINY

from plaintrain.config import get_cfg
from plaintrain.engine import default_argument_parser
from plaintrain.utils.errors import UserError

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
# No proposals are drawn, so that a resumed run can be compared to the last bit.
EXACT = [*HEADS["RetinaNet"][0], "SOLVER.CHECKPOINT_PERIOD", 3]
EPOCHS = ["SOLVER.MAX_EPOCHS", 4, "SOLVER.BY_EPOCH", True, "SOLVER.CHECKPOINT_PERIOD", 1]
WORKFLOW = ["WORKFLOW", "[['train', 1], ['val', 1]]"]
# Of a step: what a checkpoint has to bring back.
STEP = [
    *["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16", "SOLVER.ACCUMULATE_STEPS", 2],
    *["MODEL.EMA.ENABLED", True, "SOLVER.MOMENTUM_SCHEDULE", "[[0, 0.8], [9, 0.95]]"],
    *["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"],
]


class Killed(BaseException):
    """Ends a run where it stands, as SIGKILL would."""


@pytest.fixture
def run(tmp_path):
    """Function (folder, *overrides, script=..., flags=(), **replaced) -> results of the script's `main`.

    `replaced` are functions of the script by name.
    """
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)

    def call(folder, *overrides, script="plain", flags=(), **replaced):
        space = runpy.run_path(str(SCRIPTS / f"{script}_train_net.py"))
        space["main"].__globals__.update(replaced)
        options = ["OUTPUT_DIR", tmp_path / folder, *EXACT, *overrides]
        args = default_argument_parser().parse_args(
            ["--config-file", str(config), *flags, *map(str, options)]
        )
        return space["main"](args)

    yield call
    for handler in logging.getLogger("plaintrain").handlers[:]:
        logging.getLogger("plaintrain").removeHandler(handler)


def load(path):
    return torch.load(path, weights_only=True)


def weights(path):
    return load(path)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def without_times(folder):
    return [
        {k: v for k, v in line.items() if k not in ("time", "data_time", "max_mem")} for line in lines(folder)
    ]


def evaluations(*values, fail_at=None):
    """A `do_test` whose AP takes these values one after the other; it is killed in one of them."""
    left = list(values)

    def do_test(cfg, model):
        if len(values) - len(left) == fail_at:
            raise Killed
        return {"few_val": {"bbox": {"AP": left.pop(0), "AP50": 50.0}}}

    return do_test


def kill_at(iteration):
    """A `check_finite` that ends the run after a step, before it is saved."""

    def check_finite(storage, scaler, images_of):
        if storage.iter >= iteration:
            raise Killed

    return check_finite


# ---- the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["plain", "epoch"])
@pytest.mark.parametrize("model", ["RetinaNet", "GeneralizedRCNN"])
@pytest.mark.parametrize("iteration", [4, 6, 9])
def test_a_run_killed_and_resumed_is_the_run_that_was_not(run, tmp_path, script, model, iteration):
    options = [
        "MODEL.META_ARCHITECTURE",
        model,
        *STEP,
        *(EPOCHS if script == "epoch" else ()),
        "SOLVER.CHECKPOINT_PERIOD",
        2,
    ]
    options += ["SOLVER.BY_EPOCH", False, "TEST.BEST_METRIC", "auto", "TEST.EVAL_PERIOD", 3]
    options += [*WORKFLOW] if script == "epoch" else ["TEST.VAL_LOSS_PERIOD", 3]
    run("whole", *options, script=script)
    with pytest.raises(Killed):
        run("killed", *options, script=script, check_finite=kill_at(iteration))
    assert not (tmp_path / "killed/model_final.pth").exists()
    run("killed", *options, script=script, flags=["--resume"])
    for name in ("model_final.pth", "model_best.pth"):
        assert same(weights(tmp_path / "whole" / name), weights(tmp_path / "killed" / name))
    whole, killed = (load(tmp_path / folder / "model_0000011.pth") for folder in ("whole", "killed"))
    assert same(whole["model"], killed["model"]) and same(whole["ema"], killed["ema"])
    assert whole["best"] == killed["best"] and whole["scheduler"] == killed["scheduler"]
    # Medians of the window too.
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "killed")


def test_a_fork_resumes_with_keys_of_its_own(run, tmp_path):
    def forks_cfg():
        cfg = get_cfg()
        cfg.MY_WEIGHT = 1.0
        return cfg

    run("out", "SEED", -1, "SOLVER.MAX_ITER", 3, get_cfg=forks_cfg)
    before = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    run("out", "SEED", -1, "SOLVER.MAX_ITER", 6, "MY_WEIGHT", 2.0, flags=["--resume"], get_cfg=forks_cfg)
    now = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert (now["MY_WEIGHT"], now["SEED"]) == (2.0, before["SEED"])


def test_epochs_take_the_steps_of_the_plain_loop(run, tmp_path):
    run("plain", *STEP, "SOLVER.MAX_ITER", 12)
    run("epoch", *STEP, *EPOCHS, "SOLVER.BY_EPOCH", False, *WORKFLOW, script="epoch")
    plain, epoch = load(tmp_path / "plain/model_0000011.pth"), load(tmp_path / "epoch/model_0000011.pth")
    assert same(plain["model"], epoch["model"]) and same(plain["ema"], epoch["ema"])


def test_the_momentum_of_the_schedule_is_used_and_logged(run, tmp_path):
    run("out", "SOLVER.MOMENTUM_SCHEDULE", "[[0, 0.5], [11, 0.9]]", "LOG_PERIOD", 1)
    logged = [line["momentum"] for line in lines(tmp_path / "out")]
    assert logged == pytest.approx([0.5 + 0.4 * i / 11 for i in range(12)])
    run("constant")
    assert not same(weights(tmp_path / "out/model_final.pth"), weights(tmp_path / "constant/model_final.pth"))
    assert "momentum" not in lines(tmp_path / "constant")[0]


def test_another_momentum_takes_effect_when_a_run_is_resumed(run, tmp_path):
    run("out", "SOLVER.MOMENTUM_SCHEDULE", "[[0, 0.5]]", "SOLVER.MAX_ITER", 3)
    run("out", "SOLVER.MOMENTUM", 0.8, "SOLVER.MAX_ITER", 6, flags=["--resume"])
    (group, *_) = load(tmp_path / "out/model_final.pth")["optimizer"]["param_groups"]
    assert group["betas"] == (0.8, 0.999)


def test_float16_trains_and_logs_its_scale(run, tmp_path):
    run("out", "SOLVER.AMP.ENABLED", True)
    assert lines(tmp_path / "out")[-1]["amp_scale"] > 0
    assert load(tmp_path / "out/model_final.pth")["scaler"]["scale"] > 0
    early, late = (weights(tmp_path / "out" / f"model_{i:07d}.pth") for i in (2, 11))
    assert not torch.equal(
        early["head.classification_head.cls_logits.bias"], late["head.classification_head.cls_logits.bias"]
    )


# ---- averaged weights -----------------------------------------------------------------------------


def test_averaged_weights_are_evaluated_saved_and_final(run, tmp_path):
    seen = []

    def do_test(cfg, model):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {}

    run("out", "MODEL.EMA.ENABLED", True, "TEST.BEST_METRIC", "", do_test=do_test)
    last = load(tmp_path / "out/model_0000011.pth")
    averaged = {k.removeprefix("module."): v for k, v in last["ema"].items() if k.startswith("module.")}
    assert same(seen[-1], averaged) and not same(averaged, last["model"])
    assert same(weights(tmp_path / "out/model_final.pth"), averaged)
    assert (tmp_path / "out/last_checkpoint").read_text() == "model_0000011.pth"
    # The other choice, and none.
    run(
        "raw",
        "MODEL.EMA.ENABLED",
        True,
        "MODEL.EMA.EVALUATE",
        "raw",
        "MODEL.EMA.FINAL",
        "raw",
        do_test=do_test,
    )
    assert same(seen[-1], last["model"]) and same(weights(tmp_path / "raw/model_final.pth"), last["model"])
    run("off", do_test=do_test)
    assert same(seen[-1], last["model"]) and load(tmp_path / "off/model_final.pth")["ema"] == {}


def test_eval_only_takes_the_weights_that_the_config_says(run, tmp_path):
    results = run("out", "MODEL.EMA.ENABLED", True, "MODEL.EMA.DECAY", 0.5)
    raw = run("raw", "MODEL.EMA.ENABLED", True, "MODEL.EMA.EVALUATE", "raw")
    numbered = tmp_path / "out/model_0000011.pth"
    flags, ema = ["--eval-only"], ["MODEL.EMA.ENABLED", True]
    averaged = run("a", *ema, "MODEL.WEIGHTS", numbered, flags=flags)
    assert repr(averaged) == repr(results) != repr(raw)
    assert repr(run("b", "MODEL.WEIGHTS", numbered, flags=flags)) == repr(raw)
    assert repr(run("c", "MODEL.WEIGHTS", tmp_path / "out/model_final.pth", flags=flags)) == repr(results)
    assert repr(run("out", *ema, flags=[*flags, "--resume"])) == repr(results)


# ---- best, patience, time -------------------------------------------------------------------------

BEST = ["TEST.BEST_METRIC", "bbox/AP", "TEST.EVAL_PERIOD", 3]


@pytest.mark.parametrize("fail_at", [None, 0, 1, 2, 3])
def test_the_best_model_is_kept_also_when_an_evaluation_is_interrupted(run, tmp_path, fail_at):
    values = [0.0, 3.0, 3.0, 2.0]
    if fail_at is None:
        run("out", *BEST, do_test=evaluations(*values))
    else:
        with pytest.raises(Killed):
            run("out", *BEST, do_test=evaluations(*values, fail_at=fail_at))
        # The evaluation that was interrupted comes first.
        run("out", *BEST, flags=["--resume"], do_test=evaluations(*values[fail_at:]))
    best = load(tmp_path / "out/model_best.pth")
    assert (best["iteration"], best["class_names"]) == (5, ["circle", "square", "triangle"])
    assert same(best["model"], weights(tmp_path / "out/model_0000005.pth"))
    assert (tmp_path / "out/last_checkpoint").read_text() == "model_final.pth"
    tested = [line for line in lines(tmp_path / "out") if "few_val/bbox/AP" in line]
    assert [(line["iteration"], line["few_val/bbox/AP"]) for line in tested] == list(
        zip((2, 5, 8, 11), values, strict=True)
    )


def test_without_a_metric_no_best_model_is_kept(run, tmp_path):
    run("out", "TEST.EVAL_PERIOD", 3)
    assert not (tmp_path / "out/model_best.pth").exists()


@pytest.mark.parametrize("script", ["plain", "epoch"])
@pytest.mark.parametrize("fail_at", [None, 1, 2])
def test_a_run_ends_when_its_patience_does(run, tmp_path, script, fail_at):
    options = [*BEST, *(EPOCHS if script == "epoch" else ()), "SOLVER.PATIENCE", 2, "LOG_PERIOD", 1]
    options += ["SOLVER.BY_EPOCH", False, "SOLVER.CHECKPOINT_PERIOD", 3]
    values = [5.0, 4.0, 5.0, 9.0]
    if fail_at is not None:
        with pytest.raises(Killed):
            run("out", *options, script=script, do_test=evaluations(*values, fail_at=fail_at))
        values, flags = values[fail_at:], ["--resume"]
    else:
        flags = []
    results = run("out", *options, script=script, flags=flags, do_test=evaluations(*values))
    assert results["few_val"]["bbox"]["AP"] == 5.0
    assert lines(tmp_path / "out")[-1]["iteration"] == 8
    assert same(weights(tmp_path / "out/model_final.pth"), weights(tmp_path / "out/model_0000008.pth"))
    # It does not go on by itself, but with more patience.
    run("out", *options, script=script, flags=["--resume"], do_test=evaluations(5.0))
    assert lines(tmp_path / "out")[-1]["iteration"] == 8
    run(
        "out",
        *options,
        "SOLVER.PATIENCE",
        3,
        script=script,
        flags=["--resume"],
        do_test=evaluations(5.0, 9.0),
    )
    assert lines(tmp_path / "out")[-1]["iteration"] == 11


@pytest.mark.parametrize("script", ["plain", "epoch"])
def test_patience_with_validation_losses_ends_with_an_evaluation(run, tmp_path, script, capsys):
    values = iter([2.0, 3.0, 3.0])
    replaced = {
        "val_one_epoch" if script == "epoch" else "do_validate": lambda *_: {"val/total_loss": next(values)}
    }
    options = ["TEST.BEST_METRIC", "val/total_loss", "SOLVER.PATIENCE", 2]
    options += [*EPOCHS, *WORKFLOW] if script == "epoch" else ["TEST.VAL_LOSS_PERIOD", 3]
    results = run("out", *options, script=script, do_test=evaluations(5.0), **replaced)
    assert results["few_val"]["bbox"]["AP"] == 5.0
    last = lines(tmp_path / "out")[-1]
    assert (last["iteration"], last["few_val/bbox/AP"], last["val/total_loss"]) == (8, 5.0, 3.0)
    assert load(tmp_path / "out/model_best.pth")["iteration"] == 2
    values = iter([3.0])
    results = run("out", *options, script=script, flags=["--resume"], do_test=evaluations(5.0), **replaced)
    assert results["few_val"]
    assert capsys.readouterr().out.count("no better val/total_loss in SOLVER.PATIENCE 2 evaluations") == 2


def test_losses_before_the_first_step_count_for_the_best(run, tmp_path):
    values = iter([1.0, 2.0, 0.5])
    options = [
        *EPOCHS,
        "SOLVER.MAX_EPOCHS",
        3,
        "SOLVER.IMS_PER_BATCH",
        12,
        "TEST.BEST_METRIC",
        "val/total_loss",
    ]
    options += ["WORKFLOW", "[['val', 1], ['train', 1]]"]
    run("out", *options, script="epoch", val_one_epoch=lambda *_: {"val/total_loss": next(values)})
    assert load(tmp_path / "out/model_best.pth")["iteration"] == 1


def test_without_patience_the_run_goes_on(run, tmp_path):
    run("out", *BEST, "LOG_PERIOD", 1, do_test=evaluations(5.0, 4.0, 5.0, 3.0))
    assert lines(tmp_path / "out")[-1]["iteration"] == 11


@pytest.mark.parametrize("script", ["plain", "epoch"])
def test_a_run_ends_in_time_and_goes_on_from_there(run, tmp_path, script):
    options = [*(EPOCHS if script == "epoch" else ()), "LOG_PERIOD", 1]
    run("whole", *options, script=script)
    run("out", *options, "SOLVER.MAX_TIME", 1e-9, script=script)
    assert [line["iteration"] for line in lines(tmp_path / "out")] == [0]
    assert (tmp_path / "out/last_checkpoint").read_text() == "model_0000000.pth"
    assert not (tmp_path / "out/model_final.pth").exists() and not (tmp_path / "out/inference").exists()
    run("out", *options, "SOLVER.MAX_TIME", 1e-9, script=script, flags=["--resume"])
    assert (tmp_path / "out/last_checkpoint").read_text() == "model_0000001.pth"
    run("out", *options, script=script, flags=["--resume"])
    assert same(weights(tmp_path / "whole/model_final.pth"), weights(tmp_path / "out/model_final.pth"))


def test_the_last_iteration_is_not_cut_off_by_the_time(run, tmp_path):
    results = run("out", "SOLVER.MAX_ITER", 1, "SOLVER.MAX_TIME", 1e-9)
    assert results["few_val"] and (tmp_path / "out/model_final.pth").exists()


# ---- tests between --------------------------------------------------------------------------------


def test_validation_losses_are_logged_and_change_nothing(run, tmp_path):
    # Proposals are drawn, from the same state as without.
    options = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"]
    run("without", *options)
    run("with", *options, "TEST.VAL_LOSS_PERIOD", 4)
    assert same(weights(tmp_path / "without/model_final.pth"), weights(tmp_path / "with/model_final.pth"))
    logged = {line["iteration"]: line for line in lines(tmp_path / "with")}
    assert [i for i, line in logged.items() if "val/loss_rpn_cls" in line] == [3, 7, 11]
    total = sum(v for k, v in logged[3].items() if k.startswith("val/loss"))
    assert logged[3]["val/total_loss"] == pytest.approx(total)


def test_the_first_evaluation_can_be_put_off(run, tmp_path):
    run("out", "TEST.EVAL_PERIOD", 3, "TEST.EVAL_START", 5)
    tested = [line["iteration"] for line in lines(tmp_path / "out") if "few_val/bbox/AP" in line]
    assert tested == [4, 7, 10, 11]


def test_the_best_metric_may_be_a_validation_loss(run, tmp_path):
    losses = iter([{"val/total_loss": v} for v in (3.0, 1.0, 2.0)])
    options = ["TEST.VAL_LOSS_PERIOD", 4, "TEST.BEST_METRIC", "val/total_loss"]
    run("out", *options, do_validate=lambda cfg, model: next(losses))
    assert load(tmp_path / "out/model_best.pth")["iteration"] == 7


def test_evaluation_in_views_and_in_half_precision(run, tmp_path):
    plain = run("out", "TEST.IMS_PER_BATCH", 2)
    trained = ["MODEL.WEIGHTS", tmp_path / "out/model_final.pth", "TEST.IMS_PER_BATCH", 2]
    views = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.FLIP", False]
    one = run("one", *trained, *views, flags=["--eval-only"])
    assert one["few_val"]["bbox"]["AP"] == pytest.approx(plain["few_val"]["bbox"]["AP"], abs=1e-3)
    two = run("two", *trained, *views, "TEST.AUG.FLIP", True, flags=["--eval-only"])
    assert repr(two) != repr(one)
    run("half", *trained, "TEST.AMP", True, "SOLVER.AMP.PRECISION", "bfloat16", flags=["--eval-only"])
    whole, half = (
        json.loads((tmp_path / folder / "inference/few_val/coco_instances_results.json").read_text())
        for folder in ("out", "half")
    )
    assert half[0]["score"] != whole[0]["score"]
    assert half[0]["score"] == pytest.approx(whole[0]["score"], abs=0.02)


# ---- epochs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workflow", "epochs", "order"),
    [
        ("[['train', 2], ['val', 1]]", 5, "TTVTTVTV"),
        ("[['val', 1], ['train', 2]]", 3, "VTTVT"),
        ("[['train', 1]]", 2, "TT"),
    ],
)
def test_epochs_come_in_the_order_of_the_workflow(run, tmp_path, workflow, epochs, order):
    space = runpy.run_path(str(SCRIPTS / "epoch_train_net.py"))
    seen = []

    def noted(name, letter):
        def function(*args):
            seen.append(letter)
            return space[name](*args)

        return function

    replaced = {
        "train_one_epoch": noted("train_one_epoch", "T"),
        "val_one_epoch": noted("val_one_epoch", "V"),
    }
    options = [*EPOCHS, "SOLVER.MAX_EPOCHS", epochs, "WORKFLOW", workflow]
    run("out", *options, script="epoch", **replaced)
    assert "".join(seen) == order


def test_an_epoch_run_writes_one_line_an_iteration_and_its_losses_everywhere(run, tmp_path, capsys):
    run("out", *EPOCHS, *WORKFLOW, "TEST.EVAL_PERIOD", 2, "LOG_PERIOD", 2, script="epoch")
    logged = lines(tmp_path / "out")
    # 12 images, 4 a batch: 3 iterations an epoch, the last of which is written after the validation.
    assert [line["iteration"] for line in logged] == [1, 2, 3, 5, 7, 8, 9, 11]
    assert [line["iteration"] for line in logged if "val/loss_cls" in line] == [2, 5, 8, 11]
    assert [line["iteration"] for line in logged if "few_val/bbox/AP" in line] == [5, 11]
    assert [line["epoch"] for line in logged] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert capsys.readouterr().out.count("validation on 6 images:  total_loss: ") == 4
    assert set(tags(tmp_path / "out")["val/total_loss"]) == {2, 5, 8, 11}


def tags(folder):
    """{tag: {step: value}} of a folder's TensorBoard files."""
    found = {}
    for step, tag, value in tensorboard_values(folder):
        found.setdefault(tag, {})[step] = value.simple_value
    return found


def test_counts_of_epochs_become_iterations(run, tmp_path):
    run(
        "out",
        *EPOCHS,
        "SOLVER.STEPS",
        "(2, 3)",
        "SOLVER.WARMUP_ITERS",
        0,
        "LOG_PERIOD",
        1,
        "TEST.EVAL_PERIOD",
        4,
    )
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert (config["SOLVER"]["MAX_ITER"], config["SOLVER"]["STEPS"]) == (12, [6, 9])
    rates = [line["lr"] for line in lines(tmp_path / "out")]
    assert rates == pytest.approx([0.002] * 6 + [0.0002] * 3 + [0.00002] * 3)
    assert {path.name for path in (tmp_path / "out").glob("model_0*")} == {
        f"model_{i:07d}.pth" for i in (2, 5, 8, 11)
    }
    # The settled config, used again, means the same.
    args = ["--config-file", str(tmp_path / "out/config.yaml"), "OUTPUT_DIR", str(tmp_path / "again")]
    runpy.run_path(str(SCRIPTS / "epoch_train_net.py"))["main"](default_argument_parser().parse_args(args))
    assert same(weights(tmp_path / "out/model_final.pth"), weights(tmp_path / "again/model_final.pth"))


def test_a_script_refuses_the_keys_that_it_does_not_read(run):
    with pytest.raises(UserError, match=r"WORKFLOW is .*TEST\.VAL_LOSS_PERIOD"):
        run("out", *WORKFLOW)
    with pytest.raises(UserError, match=r"TEST\.VAL_LOSS_PERIOD is 2.*WORKFLOW"):
        run("out", *EPOCHS, "TEST.VAL_LOSS_PERIOD", 2, script="epoch")
    with pytest.raises(UserError, match=r"SOLVER\.MAX_EPOCHS is 0"):
        run("out", script="epoch")


# ---- the first hour -------------------------------------------------------------------------------


def test_overfit_trains_and_evaluates_on_the_same_images(run, tmp_path):
    options = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "SOLVER.BASE_LR", 0.01]
    options += ["SOLVER.MAX_ITER", 200, "SOLVER.CHECKPOINT_PERIOD", 0]
    run("out", *options, flags=["--overfit", "2"])
    found = json.loads((tmp_path / "out/inference/overfit_2/coco_instances_results.json").read_text())
    assert len({detection["image_id"] for detection in found}) == 2
    logged = lines(tmp_path / "out")
    assert logged[-1]["overfit_2/bbox/AP50"] > 80
    assert logged[-1]["total_loss"] < 0.5 * logged[0]["total_loss"]


@pytest.mark.parametrize("number", ["0", "13", "-1"])
def test_overfit_needs_as_many_images(run, tmp_path, number):
    if number == "0":
        run("out", "SOLVER.MAX_ITER", 1, flags=["--overfit", number])
        assert (tmp_path / "out/inference/few_val").is_dir()
        return
    with pytest.raises(UserError, match=rf"--overfit is {number}, but must be from 1 to the 12 training"):
        run("out", flags=["--overfit", number])


@pytest.mark.parametrize("script", ["plain", "epoch"])
def test_a_dry_run_says_ready_and_leaves_everything_as_it_was(run, tmp_path, script, capsys):
    options = [*STEP, *(EPOCHS if script == "epoch" else ()), "TEST.BEST_METRIC", "bbox/AP"]
    run("out", *options, script=script)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    capsys.readouterr()
    run("out", *options, script=script, flags=["--dry-run"])
    out = capsys.readouterr().out
    assert "ready: 2 iterations" in out and "of 2" in out
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {k: v for k, v in after.items() if k.name != "log.txt"} == {
        k: v for k, v in before.items() if k.name != "log.txt"
    }


def test_a_dry_run_tests_on_the_training_set_too(run, capsys):
    # Shortened to 8 images, which are one batch: an epoch of one iteration.
    options = [*EPOCHS, "SOLVER.IMS_PER_BATCH", 8, "DATASETS.TEST", "('few_train',)"]
    run("out", *options, script="epoch", flags=["--dry-run"])
    out = capsys.readouterr().out
    assert "results on few_train" in out and "ready: 1 iterations" in out


def test_overfit_on_several_sets_with_the_same_ids(run, tmp_path):
    options = ["DATASETS.TRAIN", "('few_train', 'few_train')", "SOLVER.MAX_ITER", 2]
    assert run("out", *options, flags=["--overfit", "15"])["overfit_15"]


def test_a_dry_run_says_what_is_wrong(run):
    with pytest.raises(UserError, match=r"TEST\.BEST_METRIC is 'bbox/APP'.*few_val/bbox/AP"):
        run("out", "TEST.BEST_METRIC", "bbox/APP", flags=["--dry-run"])
    with pytest.raises(UserError, match="leave out --resume and --eval-only"):
        run("out", flags=["--dry-run", "--resume"])


def test_a_dry_run_notices_a_checkpoint_that_does_not_come_back(run):
    results = iter([{"few_val": {"bbox": {"AP": 10.0}}}, {"few_val": {"bbox": {"AP": 12.0}}}])
    with pytest.raises(UserError, match=r"read back is another model: few_val/bbox/AP was 10 and is 12"):
        run("out", flags=["--dry-run"], do_test=lambda cfg, model: next(results))


# ---- another config on resume ---------------------------------------------------------------------


def test_what_can_change_on_resume_does_and_is_shown_as_a_table(run, tmp_path, capsys):
    run("out", "SOLVER.MAX_ITER", 4, "SOLVER.OPTIMIZER", "SGD", "SOLVER.WARMUP_ITERS", 0)
    changed = ["SOLVER.BASE_LR", 0.0005, "SOLVER.WEIGHT_DECAY", 0.5, "SOLVER.NESTEROV", True]
    changed += [
        "SOLVER.MAX_ITER",
        8,
        "LOG_PERIOD",
        1,
        "SOLVER.CHECKPOINT_PERIOD",
        2,
        "SOLVER.WARMUP_ITERS",
        0,
    ]
    run("out", "SOLVER.OPTIMIZER", "SGD", *changed, flags=["--resume"])
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["key", "before", "now", "effect"] in shown
    assert ["SOLVER.MAX_ITER", "4", "8", "from", "here", "on"] in shown
    assert ["SOLVER.WEIGHT_DECAY", "0.0001", "0.5", "from", "here", "on"] in shown
    assert not any(row[:1] == ["SEED"] for row in shown)
    (group, *_) = load(tmp_path / "out/model_0000007.pth")["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["nesterov"], group["lr"]) == (0.5, True, 0.0005)
    assert [line["iteration"] for line in lines(tmp_path / "out")][-4:] == [4, 5, 6, 7]
    assert (tmp_path / "out/model_0000005.pth").exists()


@pytest.mark.parametrize(
    "changed, key",
    [
        (["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"], "MODEL.META_ARCHITECTURE was RetinaNet in"),
        (["MODEL.TINY.OUT_CHANNELS", 32], "MODEL.TINY.OUT_CHANNELS was 16 .* and is 32 now"),
        (["SOLVER.OPTIMIZER", "SGD"], "SOLVER.OPTIMIZER was AdamW .* and is SGD now"),
        (["SOLVER.BIAS_LR_FACTOR", 2.0], "grouped by .*BIAS_LR_FACTOR"),
        (["DATALOADER.RANDOM_SUBSET_RATIO", 0.5], "DATASETS.TRAIN has 6 images, .* it had 12"),
    ],
)
def test_what_cannot_change_on_resume_is_refused_by_name(run, tmp_path, changed, key):
    run("out", "SOLVER.MAX_ITER", 4)
    before = (tmp_path / "out/last_checkpoint").read_text(), weights(tmp_path / "out/model_final.pth")
    if "RANDOM_SUBSET" in changed[0]:
        changed = [*changed, "DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"]
    with pytest.raises(UserError, match=key):
        run("out", "SOLVER.MAX_ITER", 8, *changed, flags=["--resume"])
    after = (tmp_path / "out/last_checkpoint").read_text(), weights(tmp_path / "out/model_final.pth")
    assert before[0] == after[0] and same(before[1], after[1])


def test_another_batch_in_the_middle_of_a_pass_goes_on_with_the_images_that_are_left(run, tmp_path, capsys):
    seen = []

    def check_finite(storage, scaler, images_of):
        seen.append((storage.iter, images_of(storage.iter)))

    # 12 images: 5 batches of 2, then 3 of 4, which take in two images of the next pass.
    grouped = ["DATALOADER.ASPECT_RATIO_GROUPING", True, "DATALOADER.GROUP_WINDOW", 2, "LOG_PERIOD", 1]
    run("out", *grouped, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 5, check_finite=check_finite)
    resumed = ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 10]
    run("out", *grouped, *resumed, flags=["--resume"], check_finite=check_finite)
    images = [image for _, batch in seen for image in batch]
    assert len(images) == 5 * 2 + 5 * 4 and [len(batch) for _, batch in seen] == [2] * 5 + [4] * 5
    assert len(set(images[:12])) == len(set(images[12:24])) == 12
    assert "from iteration 5 on a batch has 4 images and not 2" in capsys.readouterr().out
    # Killed and resumed again, with the same batch: the same images.
    (tmp_path / "out/last_checkpoint").write_text("model_0000005.pth")
    (tmp_path / "out/model_final.pth").unlink()
    before, seen[:] = seen[6:], []
    run("out", *grouped, *resumed, flags=["--resume"], check_finite=check_finite)
    assert seen == before


def test_another_batch_in_a_run_that_is_counted_in_epochs_is_refused(run, tmp_path):
    run("out", *EPOCHS, "SOLVER.MAX_EPOCHS", 1, script="epoch")
    changed = ["SOLVER.IMS_PER_BATCH", 6]
    with pytest.raises(UserError, match=r"SOLVER.IMS_PER_BATCH was 4 .* and is 6 now"):
        run("out", *EPOCHS, "SOLVER.MAX_EPOCHS", 2, *changed, script="epoch", flags=["--resume"])


def test_an_extended_run_evaluates_what_it_had_finished_with(run, tmp_path):
    best = ["TEST.BEST_METRIC", "bbox/AP", "SOLVER.MAX_ITER"]
    run("out", *best, 6, do_test=evaluations(9.0))
    # The best of the run before is the best still.
    run("out", *best, 12, flags=["--resume"], do_test=evaluations(9.0, 5.0))
    assert load(tmp_path / "out/model_best.pth")["iteration"] == 5
