"""The fork of the loop, and the worked examples of CONTRIBUTING.md, as they are printed."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from model_helpers import ARCHITECTURES, make_cfg, two_samples
from test_scripts import TINY

from plaintrain.arguments import default_argument_parser
from plaintrain.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from plaintrain.data.records import get_detection_dataset_dicts
from plaintrain.data.shapes import load_shapes
from plaintrain.modeling import build, build_model
from plaintrain.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def fork(monkeypatch):
    """The module examples/train_fork.py, loaded afresh."""
    spec = importlib.util.spec_from_file_location("train_fork", ROOT / "examples" / "train_fork.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_fork", module)
    spec.loader.exec_module(module)
    # Fewer images.
    monkeypatch.setattr(module, "load_shapes", lambda split, num: load_shapes(split, 30))
    return module


@pytest.fixture
def train(fork, tmp_path):
    """Function (folder, *arguments) that runs the fork; returns the lines of metrics.json by iteration."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    size = ["INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "3"]
    names = ["DATASETS.TRAIN", "('crowded_train',)", "DATASETS.TEST", "('crowded_val',)"]

    def run(folder, *args):
        flags = ["--config-file", str(tmp_path / "tiny.yaml"), *[a for a in args if a.startswith("--")]]
        given = [*size, *names, "OUTPUT_DIR", str(folder), "OUTPUT.REPORT", "False"]
        given += [a for a in args if not a.startswith("--")]
        fork.main(default_argument_parser().parse_args([*flags, *given]))
        lines = (folder / "metrics.json").read_text().splitlines()
        return {line["iteration"]: line for line in map(json.loads, lines)}

    return run


def test_the_fork_has_at_most_120_lines_and_the_loop_of_the_script():
    fork = (ROOT / "examples" / "train_fork.py").read_text().splitlines()
    assert len(fork) <= 120
    script = (ROOT / "scripts" / "plain_train_net.py").read_text()
    for line in (
        "optimizer.zero_grad()",
        "scheduler.step()",
        "write_all(writers)",
        "comm.average_buffers(model",
    ):
        assert line in script and any(line in row for row in fork), line


def test_the_fork_trains_on_its_dataset_with_its_loss_and_its_metric(train, fork, tmp_path, monkeypatch):
    reports = []
    monkeypatch.setattr(fork, "make_report_if_wanted", reports.append)
    lines = train(tmp_path / "run")
    assert [cfg.OUTPUT_DIR for cfg in reports] == [str(tmp_path / "run")]
    assert {len(r["annotations"]) >= 3 for r in DatasetCatalog.get("crowded_train")} == {True}
    assert lines[5]["loss_presence"] > 0 and lines[5]["count/error-circle"] >= 0
    assert {f"count/error-{name}" for name in ("circle", "square", "triangle")} < set(lines[5])
    saved = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    assert "presence.weight" in saved["model"] and "backbone.stages.0.0.0.weight" in saved["model"]


def test_the_fork_resumes_exactly(train, tmp_path):
    periods = ["TEST.EVAL_PERIOD", "3", "LOG_PERIOD", "20"]
    whole = train(tmp_path / "run", *periods)
    (tmp_path / "run" / "model_final.pth").unlink()
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000002.pth")
    for path in (tmp_path / "run").glob("model_0000005*"):
        path.unlink()
    # Killed between that checkpoint and what follows it.
    (tmp_path / "run" / "metrics.json").unlink()
    resumed = train(tmp_path / "run", "--resume", *periods)
    assert "resumed from" in (tmp_path / "run" / "log.txt").read_text()
    assert list(resumed) == [2, 5] and "count/error-circle" in resumed[2]
    for at, row in resumed.items():
        assert {k: v for k, v in row.items() if k not in ("time", "data_time")} == {
            k: v for k, v in whole[at].items() if k not in ("time", "data_time")
        }


def test_the_fork_refuses_what_it_has_left_out(train, tmp_path):
    with pytest.raises(UserError, match="MODEL.EMA.ENABLED is True.*left it out"):
        train(tmp_path / "run", "MODEL.EMA.ENABLED", "True")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--eval-only", "--dry-run"])
def test_the_fork_only_trains(train, tmp_path, flag):
    with pytest.raises(SystemExit, match="only trains"):
        train(tmp_path / "run", flag)


def test_the_metric_counts(fork):
    DatasetCatalog.get("crowded_val")
    evaluator = fork.CountingError("crowded_val")
    record = DatasetCatalog.get("crowded_val")[0]
    truth = torch.tensor([a["category_id"] for a in record["annotations"]])
    right = {"labels": truth, "scores": torch.full((len(truth),), 0.9)}
    one_more = {
        "labels": torch.cat([truth, torch.tensor([1, 1])]),
        "scores": torch.tensor([*right["scores"], 0.6, 0.4]),
    }
    evaluator.process([record, record], [right, one_more])
    assert evaluator.evaluate() == {
        "count": {"error-circle": 0.0, "error-square": 0.5, "error-triangle": 0.0}
    }


def worked_example(heading):
    """What the example under a heading of CONTRIBUTING.md defines."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(rf"## {heading}\n.*?```python\n(.*?)```", text, re.S)
    assert sum(line != "" for line in code.splitlines()) <= 25
    names = {"__name__": heading}
    exec(compile(code, heading, "exec"), names)
    return names


def test_the_example_of_a_dataset_format(tmp_path, monkeypatch, write_image):
    monkeypatch.chdir(tmp_path)
    header = "image,height,width,class,x0,y0,x1,y1\n"
    (tmp_path / "boxes.csv").write_text(header + "a.png,30,40,dog,1,2,11,12\na.png,30,40,ant,5,5,25,20\n")
    write_image(tmp_path / "images" / "a.png", 40, 30)
    worked_example("A dataset format")
    (record,) = get_detection_dataset_dicts("mine")
    target = DatasetMapper(use_masks=False, augmentations=[])(record)["target"]
    assert target["boxes"].tolist() == [[1, 2, 11, 12], [5, 5, 25, 20]] and target["labels"].tolist() == [
        1,
        0,
    ]
    assert MetadataCatalog.get("mine").thing_classes == ["ant", "dog"]


def test_the_example_of_a_model(monkeypatch):
    monkeypatch.setattr(build, "META_ARCHITECTURES", dict(build.META_ARCHITECTURES))
    worked_example("A model")
    model = build_model(make_cfg(*ARCHITECTURES["faster_rcnn"], "MODEL.META_ARCHITECTURE", "OneBox"))
    samples = two_samples()
    losses = model(samples)
    sum(losses.values()).backward()
    assert set(losses) == {"loss_cls", "loss_box_reg"} and model.head.weight.grad.abs().sum() > 0
    found = model.eval()(samples)
    assert [f["boxes"].shape for f in found] == [(1, 4)] * 2 and 0 <= found[0]["labels"].item() < 3


def test_the_example_of_a_loss():
    model, samples = build_model(make_cfg(*ARCHITECTURES["faster_rcnn"])), two_samples()
    usual = model(samples)["loss_box_reg"]
    worked_example("A loss")["use_diou"](model)
    losses = model(samples)
    sum(losses.values()).backward()
    # 1 - DIoU lies between 0 and 2 for each match.
    assert 0 < losses["loss_box_reg"] < 2 and losses["loss_box_reg"] != usual
    assert all(p.grad.isfinite().all() for p in model.roi_heads.parameters() if p.grad is not None)


def test_the_example_of_a_metric():
    records, _ = load_shapes("val", 2)
    DatasetCatalog.register("few", lambda: records)
    evaluator = worked_example("A metric")["Found"]("few")
    evaluator.reset()
    boxes = [torch.tensor([a["bbox"] for a in r["annotations"]]) for r in records]
    evaluator.process(records, [{"boxes": boxes[0]}, {"boxes": boxes[1][:0]}])
    share = len(boxes[0]) / (len(boxes[0]) + len(boxes[1]))
    assert evaluator.evaluate()["found"]["recall"] == pytest.approx(100 * share)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "examples/README.md"])
def test_the_guides_name_files_that_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for path in re.findall(r"(?:plaintrain|scripts|tests|configs|examples)/[\w/\-]+\.(?:py|yaml|md)", text):
        assert (ROOT / path).is_file(), path
