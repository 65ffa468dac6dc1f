"""The benchmarks, each at its smallest size, and what they share; timing itself is no test."""

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from shared import measure
from test_scripts import TINY

from plaintrain.data.augmentations import ResizeShortestEdge
from plaintrain.data.mapper import DatasetMapper

ROOT = Path(__file__).resolve().parent.parent
SCRIPT, FOLDER = ROOT / "scripts" / "benchmark.py", ROOT / "scripts" / "benchmarks"
# What stands in the tables at least.
ROWS = {
    "loop": {"bare step", ".item() on every loss, as Detectron2's", "plain_train_net.py"},
    "data": {"as torchvision's references, 2 processes", "2 processes", "2 threads", "random order"},
    "records": {"json.load", "to the first batch"},
    "step": {
        "torchvision's loop, fp32",
        "plaintrain, fp32",
        "plaintrain, bf16, channels_last",
        "plaintrain, batch 2",
        "torchvision, batch 2",
    },
    "precision": {"float32"},
    "eval": {"pycocotools alone", "COCOEvaluator, pycocotools"},
    "checkpoint": {"torch.save, fsync", "plaintrain", "plaintrain, ASYNC_CHECKPOINT", "resume_or_load"},
    "startup": {"as Detectron2's", "plaintrain"},
}
# The numbers of targets.
TARGETS = {"loop": 1, "data": 2, "records": 0, "step": 4, "precision": 0, "checkpoint": 1, "startup": 1}


@pytest.fixture
def load():
    """Function (what) that imports a benchmark, which is forgotten after the test."""
    loaded = []

    def load_benchmark(what):
        loaded.append(what)
        return importlib.import_module(what)

    yield load_benchmark
    for name in loaded:
        sys.modules.pop(name, None)


def check(result, what):
    """What every report has; ratios are positive numbers."""
    assert {"command", "load", "machine", "tables", "targets"} == set(result)
    assert {"cpu", "cores", "python", "torch", "torchvision"} <= set(result["machine"])
    rows = [item for table in result["tables"].values() for item in table.items()]
    assert ROWS[what] <= {name for name, _ in rows}
    numbers = [row[key] for _, row in rows for key in row if key in ("median", "lowest", "times less")]
    assert all(isinstance(number, float) and 0 < number < float("inf") for number in numbers)
    assert len(numbers) > 2
    assert len(result["targets"]) == TARGETS.get(what, len(result["targets"]))
    for target in result["targets"]:
        assert set(target) == {"what", "wanted", "measured", "met"} and target["measured"] >= 0


# startup starts its processes itself.
@pytest.mark.parametrize("what", [what for what in ROWS if what != "startup"])
def test_every_benchmark_measures_at_its_smallest_size(what, load, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "tiny.yaml").write_text(TINY)
    options = {"precision": ["--config-file", tmp_path / "tiny.yaml"]}
    options = ["--folder", tmp_path] if what in ("records", "checkpoint") else options.get(what, [])
    module = load(what)
    # One benchmark measures bfloat16, and another does not, whatever this processor has.
    monkeypatch.setattr(module, "cpu_has_bfloat16", lambda: what == "step", raising=False)
    module.main(["--quick", "--output", str(tmp_path / "out.json"), *map(str, options)])
    result = json.loads((tmp_path / "out.json").read_text())
    check(result, what)
    rows = [row for table in result["tables"].values() for row in table.values()]
    assert all(row.get("same results", True) for row in rows)
    printed = capsys.readouterr().out
    assert all(title in printed for title in result["tables"])


@pytest.mark.parametrize("root", ["made up", "real"])
def test_starts_are_compared_on_the_same_files(root, load, tmp_path, monkeypatch):
    startup, commands = load("startup"), []

    def run_fresh(command, until=None):
        commands.append((list(map(str, command)), until))
        files.append(all(os.path.exists(path) for path in command[2:4]))
        return 2.0, 3.0

    files = []
    monkeypatch.setattr(startup, "run_fresh", run_fresh)
    if root == "real":
        startup.make_coco(str(tmp_path), 2)
    monkeypatch.setenv("PLAINTRAIN_DATASETS", str(tmp_path))
    startup.main(["--quick", "--output", str(tmp_path / "out.json")])
    check(json.loads((tmp_path / "out.json").read_text()), "startup")
    helps, starts = commands[:2], commands[-2:]
    assert [command[-1] for command, _ in helps] == ["--help"] * 2
    assert [until for _, until in starts] == ["iter: 0"] * 2 and files[-2]
    (theirs, _), (ours, _) = starts
    assert theirs[1].endswith("run_start.py") and ours[1].endswith("plain_train_net.py")
    assert theirs[2].startswith(str(tmp_path)) == (root == "real")


@pytest.mark.long
def test_a_benchmark_runs_in_a_process_of_its_own(tmp_path):
    out = tmp_path / "startup.json"
    # Without the real images, on made-up ones.
    env = {**os.environ, "PLAINTRAIN_DATASETS": str(tmp_path)}
    command = [sys.executable, SCRIPT, "startup", "--quick", "--parts", "iteration", "--output", out]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    check(json.loads(out.read_text()), "startup")
    assert json.loads(out.read_text())["command"].startswith("python scripts/benchmark.py startup --quick")


def test_all_runs_every_one_and_merges_what_they_wrote(tmp_path, monkeypatch, capfd):
    scripts = tmp_path / "benchmarks"
    scripts.mkdir()
    content = "import json, sys\nassert sys.argv[1:-1] == ['--quick', '--output']\n"
    content += "target = {'what': 'speed', 'measured': 2.5, 'wanted': '>= 2', 'met': True}\n"
    content += "json.dump({'targets': [target]}, open(sys.argv[-1], 'w'))\n"
    (scripts / "good.py").write_text(content)
    (scripts / "bad.py").write_text("raise SystemExit(3)\n")
    module = runpy.run_path(str(SCRIPT))
    monkeypatch.setitem(module["main"].__globals__, "FOLDER", str(scripts))
    monkeypatch.setitem(module["main"].__globals__, "WHAT", ("good", "bad"))
    monkeypatch.setattr(
        sys, "argv", ["benchmark.py", "all", "--quick", "--output", str(tmp_path / "all.json")]
    )
    assert module["main"]() == 1
    assert list(json.loads((tmp_path / "all.json").read_text())) == ["good"]
    printed = capfd.readouterr()
    assert "failed: bad" in printed.err and "speed: 2.5, wanted >= 2: met" in printed.out
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "bad"])
    assert module["main"]() == 3


def test_every_benchmark_can_be_chosen():
    module = runpy.run_path(str(SCRIPT))
    # Two others have no baseline, and are run by themselves.
    assert {path.stem for path in FOLDER.glob("*.py")} - {"scaling", "loader_memory"} == set(module["WHAT"])
    assert set(module["WHAT"]) == set(ROWS)
    assert all(f"\n{what} " in module["__doc__"] for what in module["WHAT"])


@pytest.mark.parametrize(
    ("what", "options", "sentence"),
    [
        ("loop", ["--iterations", "0"], "argument --iterations: '0' is not a whole number above 0"),
        ("step", ["--batch", "2", "x"], "argument --batch: 'x' is not a whole number above 0"),
        ("eval", ["--repeats", "-1"], "argument --repeats: '-1' is not a whole number above 0"),
        ("data", ["--parts", "speed"], "argument --parts: invalid choice: 'speed'"),
        ("step", ["--depth", "51"], "argument --depth: invalid choice: 51"),
    ],
)
def test_a_wrong_option_is_one_sentence(what, options, sentence, load, capsys):
    with pytest.raises(SystemExit) as error:
        load(what).main(options)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.value.code == 2 and said.startswith(f"benchmark.py {what}: error: {sentence}")


def test_a_wrong_config_is_one_sentence(load, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["precision.py", "--quick", "--config-file", "nope.yaml"])
    with pytest.raises(SystemExit, match="^error: config file not found: .*nope.yaml"):
        measure.run(load("precision").main)


def test_the_file_of_numbers_is_opened_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "folder" / "out.json"
    assert measure.output_file(str(out)) == str(out) and out.read_text() == ""
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "all", "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT))["main"]()
    sentence = f"benchmark.py: error: argument --output: cannot write {tmp_path}: Is a directory"
    assert capsys.readouterr().err.strip().splitlines()[-1] == sentence


def test_an_unknown_benchmark_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "lop"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT))["main"]()
    assert "invalid choice: 'lop'" in capsys.readouterr().err


# ---- what is compared is the same ----------------------------------------------------------------


def test_what_noise_makes_cheaper_than_the_bare_step_costs_nothing(load):
    loop = load("loop")
    over = loop.over_bare(
        {loop.BARE: [2.0, 3.0, 2.0], loop.ITEM: [1.0, 1.0, 3.0], loop.PLAIN: [4.0, 4.0, 2.0]}
    )
    assert over == {loop.ITEM: 1e-9, loop.PLAIN: 1.0}


def test_the_loaders_compared_give_the_same_images(load, tmp_path):
    data = load("data")
    records = data.write_images(tmp_path, 3)
    image, target = data.PillowDataset(records, (320,), 1333)[4]
    assert image.shape == (3, 320, 426) and image.dtype == torch.float32 and 0.5 < image.max() <= 1
    mapped = DatasetMapper(augmentations=[ResizeShortestEdge((320,), 1333)])(records[1])
    areas = [((b[:, 2:] - b[:, :2]).prod(1)) for b in (target["boxes"], mapped["target"]["boxes"])]
    torch.testing.assert_close(*areas, rtol=0.01, atol=1)


def test_the_steps_compared_have_the_same_weights_and_pixels(load):
    step = load("step")
    args = step.argparse.Namespace(device="cpu", depth=18, rois=16, classes=80)
    samples = [step.make_sample(64, 96, seed) for seed in range(2)]
    _, ours = step.plaintrain_steps(args, [samples], step.ROWS["plaintrain, fp32"])
    _, theirs = step.references.make_steps(args, [samples], ours.state_dict())
    images, targets = step.references.make_inputs(samples)
    for name, parameter in ours.named_parameters():
        other = theirs.get_parameter(name)
        assert other.equal(parameter) and other.requires_grad == parameter.requires_grad
    found, _ = ours.transform([sample["image"] for sample in samples])
    expected, _ = theirs.transform(images, targets)
    torch.testing.assert_close(found.tensors, expected.tensors, rtol=1e-4, atol=1e-3)


def test_the_batches_of_cocos_sizes_stand_for_a_pass(load):
    step = load("step")
    args = step.argparse.Namespace(size=(256, 320))
    (random, more), (alike, less) = (step.coco_batches(args, 2, 8, grouped) for grouped in (False, True))
    assert [len(batch) for batch in random + alike] == [8] * 4
    assert all(min(sample["image"].shape[1:]) <= 256 for batch in random + alike for sample in batch)
    assert 0.3 < more < 0.45 and less < more - 0.2


def test_a_start_like_detectron2s_reads_the_images_that_have_objects(load, tiny_coco):
    load("baselines.run_start")
    start = sys.modules["baselines.run_start"]
    data, ends, classes = start.read_records(str(tiny_coco.json), str(tiny_coco.images))
    assert classes == 3 and len(ends) == 2
    record = start.pickle.loads(data[: ends[0]])
    assert record["image_id"] == 2 and [a["category_id"] for a in record["annotations"]] == [0, 1]
    image, target = start.load(record, 15)
    assert image.shape == (3, 20, 15) and image.max() <= 1
    assert target["boxes"].tolist() == [[1.5, 2, 11.5, 17]] and target["labels"].tolist() == [2]


# ---- shared.measure --------------------------------------------------------------------------------


def test_variants_take_turns_and_the_first_does_not_count():
    calls = []
    values = measure.in_turns({name: lambda n=name: calls.append(n) or len(calls) for name in "ab"}, 2)
    assert calls == list("ababab") and values == {"a": [3, 5], "b": [4, 6]}
    assert measure.in_turns({"a": lambda: 1}, 2, warm_up=False) == {"a": [1, 1]}


def test_ratios_are_medians_over_the_turns():
    rows = measure.make_rows({"base": [2.0, 8.0, 3.0], "other": [1.0, 1.0, 1.0]}, scale=10)
    assert rows["base"] == {
        "median": 30, "lowest": 20, "highest": 80, "times less": 1, "values": [20, 80, 30]
    }  # fmt: skip
    assert rows["other"]["times less"] == 3


def test_a_table_is_markdown(capsys):
    measure.print_table("what", {"a": {"n": 1234, "x": 0.12345}, "bcd": {"n": 2, "list": [1], "same": True}})
    assert capsys.readouterr().out.splitlines() == [
        "| what |     n |     x | same |",
        "| ---- | ----- | ----- | ---- |",
        "| a    | 1,234 | 0.123 |      |",
        "| bcd  |     2 |       |  yes |",
        "",
    ]


def test_a_target_is_at_least_or_at_most():
    assert measure.target("a", 2, np.float64(2.5)) == {
        "what": "a", "wanted": ">= 2", "measured": 2.5, "met": True
    }  # fmt: skip
    assert not measure.target("a", 2, 2.5, at_most=True)["met"]


def test_a_fresh_process_is_measured_to_its_end_or_to_a_line():
    code = "import time, sys\nfor i in range({}): pass\nprint('there', flush=True)\ntime.sleep({})"
    small, _ = measure.run_fresh([sys.executable, "-c", code.format(1, 0)])
    cpu, wall = measure.run_fresh([sys.executable, "-c", code.format(5_000_000, 60)], until="there")
    assert 0 < small < cpu and wall < 60
    for command, until in (("raise ValueError('broken')", None), ("print('broken')", "there")):
        with pytest.raises(RuntimeError, match="broken"):
            measure.run_fresh([sys.executable, "-c", command], until)


def test_what_is_not_installed_is_said(capsys):
    assert measure.installed("json", "no_such_package") == ["json"]
    assert "not measured: no_such_package" in capsys.readouterr().out


def test_sizes_come_as_often_as_their_shares_say(tmp_path):
    (tmp_path / "sizes.json").write_text(json.dumps({"sizes": [[4, 3, 0.25], [3, 4, 0.75]]}))
    widths, heights = measure.read_sizes(tmp_path / "sizes.json", 8)
    assert widths.tolist() == [4] * 2 + [3] * 6 and heights.tolist() == [3] * 2 + [4] * 6


def test_nothing_of_measure_imports_torch():
    code = "import sys, shared.measure; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=FOLDER)
