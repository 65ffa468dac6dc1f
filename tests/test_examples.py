"""The fork of the loop, and the worked examples of CONTRIBUTING.md, as they are printed."""

import re

import pytest
import torch
from model_helpers import ARCHITECTURES, make_cfg, two_samples
from processes import ROOT, run_script, write_config
from run_files import lines, load, same, value_differences

from plaintrain.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from plaintrain.data.datasets import shapes
from plaintrain.data.datasets.shapes import load_shapes
from plaintrain.data.records import get_detection_dataset_dicts
from plaintrain.modeling import build, build_model

FORK = ROOT / "examples" / "train_fork.py"
MINIMAL = ROOT / "examples" / "minimal_train.py"


def load_fewer_shapes():
    shapes.load_shapes = lambda split, num: load_shapes(split, 30)


def train(folder, *options, flags=(), code=0):
    """Run the fork, which ends with this exit code, and return what it prints."""
    command = ["--config-file", write_config(folder.parent), *flags, "OUTPUT_DIR", folder]
    command += ["DATASETS.TRAIN", "('crowded_train',)", "DATASETS.TEST", "('crowded_val',)"]
    command += ["SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 3, "TEST.EVAL_PERIOD", 3]
    command += ["TEST.BEST_METRIC", "", "LOG_PERIOD", 20, *options]
    return run_script(FORK, *command, folder=folder.parent, faults=load_fewer_shapes, code=code).output


def test_fork_trains_and_resumes_exactly_with_its_dataset_its_loss_and_its_metric(tmp_path):
    assert len(FORK.read_text().splitlines()) <= 120 and len(MINIMAL.read_text().splitlines()) <= 60
    whole = tmp_path / "whole"
    train(whole, "OUTPUT.REPORT", True)
    assert (whole / "report.html").exists()
    row = lines(whole)[5]
    assert row["loss_presence"] > 0 and row["count/error-circle"] >= 0
    assert {f"count/error-{name}" for name in ("circle", "square", "triangle")} < set(row)
    # Killed between the first checkpoint and what follows it.
    killed = tmp_path / "killed"
    train(killed, "SOLVER.MAX_ITER", 3)
    (killed / "model_final.pth").unlink()
    for path in [*killed.glob("metrics.*"), *killed.glob("events.*")]:
        path.unlink()
    assert "resumed from" in train(killed, flags=["--resume"])
    assert value_differences(whole, killed) == []
    first, second = (load(folder / "model_final.pth")["model"] for folder in (whole, killed))
    assert {"presence.weight", "backbone.stages.0.0.0.weight"} <= set(first) and same(first, second)


@pytest.mark.parametrize(
    ("flags", "options", "words"),
    [
        ([], ["MODEL.EMA.ENABLED", "True"], "EMA.ENABLED must be False.*plain_train_net.py supports it"),
        (["--eval-only"], [], "only trains"),
        (["--dry-run"], [], "only trains"),
    ],
)
def test_fork_rejects_what_it_has_left_out(tmp_path, flags, options, words):
    assert re.search(words, train(tmp_path / "run", *options, flags=flags, code=1))
    assert not (tmp_path / "run").exists()


def test_minimal_loop_trains_and_resumes_exactly(tmp_path):
    def train(folder, *options, flags=(), code=0):
        command = [*flags, write_config(tmp_path), "OUTPUT_DIR", folder, "SOLVER.CHECKPOINT_PERIOD", 2]
        command += ["TEST.EVAL_PERIOD", 3, "TEST.BEST_METRIC", "", "LOG_PERIOD", 2, *options]
        return run_script(MINIMAL, *command, folder=tmp_path, code=code).output

    train(tmp_path / "whole", "SOLVER.MAX_ITER", 6)
    assert "few_val/bbox/AP" in lines(tmp_path / "whole")[5]
    train(tmp_path / "ended", "SOLVER.MAX_ITER", 6, "SOLVER.STEPS", "()")
    for name in ("model_0000005.pth", "last_checkpoint"):
        (tmp_path / "ended" / name).unlink()
    assert "resumed from" in train(tmp_path / "ended", "SOLVER.MAX_ITER", 6, flags=["--resume"])
    assert value_differences(tmp_path / "whole", tmp_path / "ended") == []
    assert same(*(load(tmp_path / name / "model_0000005.pth")["model"] for name in ("whole", "ended")))
    output = train(tmp_path / "out", "SOLVER.AMP.ENABLED", True, code=1)
    assert "SOLVER.AMP.ENABLED must be False" in output and not (tmp_path / "out").exists()


def worked_example(heading):
    """Return what the example under a heading of CONTRIBUTING.md defines."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(rf"## {heading}\n.*?```python\n(.*?)```", text, re.S)
    assert sum(line != "" for line in code.splitlines()) <= 25
    names = {"__name__": heading}
    exec(compile(code, heading, "exec"), names)
    return names


def test_example_of_a_dataset_format(tmp_path, monkeypatch, write_image):
    monkeypatch.chdir(tmp_path)
    header = "image,height,width,class,x0,y0,x1,y1\n"
    (tmp_path / "boxes.csv").write_text(header + "a.png,30,40,dog,1,2,11,12\na.png,30,40,ant,5,5,25,20\n")
    write_image(tmp_path / "images" / "a.png", 40, 30)
    worked_example("A dataset format")
    (record,) = get_detection_dataset_dicts("mine")
    target = DatasetMapper(use_masks=False, augmentations=[])(record)["target"]
    assert target["boxes"].tolist() == [[1, 2, 11, 12], [5, 5, 25, 20]]
    assert target["labels"].tolist() == [1, 0]
    assert MetadataCatalog.get("mine").thing_classes == ["ant", "dog"]


def test_example_of_a_model(monkeypatch):
    monkeypatch.setattr(build, "META_ARCHITECTURES", dict(build.META_ARCHITECTURES))
    worked_example("A model")
    model = build_model(make_cfg(*ARCHITECTURES["faster_rcnn"], "MODEL.META_ARCHITECTURE", "OneBox"))
    samples = two_samples()
    losses = model(samples)
    sum(losses.values()).backward()
    assert set(losses) == {"loss_cls", "loss_box"} and model.head.weight.grad.abs().sum() > 0
    found = model.eval()(samples)
    assert [f["boxes"].shape for f in found] == [(1, 4)] * 2 and 0 <= found[0]["labels"].item() < 3


def test_example_of_a_loss():
    model, samples = build_model(make_cfg(*ARCHITECTURES["faster_rcnn"])), two_samples()
    usual = model(samples)["loss_box_reg"]
    worked_example("A loss")["use_diou"](model)
    losses = model(samples)
    sum(losses.values()).backward()
    # 1 - DIoU lies between 0 and 2 for each match.
    assert 0 < losses["loss_box_reg"] < 2 and losses["loss_box_reg"] != usual
    assert all(p.grad.isfinite().all() for p in model.roi_heads.parameters() if p.grad is not None)


def test_example_of_a_metric():
    records, _ = load_shapes("val", 2)
    DatasetCatalog.register("few", lambda: records)
    evaluator = worked_example("A metric")["ObjectRecall"]("few")
    evaluator.reset()
    boxes = [torch.tensor([a["bbox"] for a in r["annotations"]]) for r in records]
    evaluator.process(records, [{"boxes": boxes[0]}, {"boxes": boxes[1][:0]}])
    share = len(boxes[0]) / (len(boxes[0]) + len(boxes[1]))
    assert evaluator.evaluate()["objects"]["recall"] == pytest.approx(100 * share)
