"""The benchmarks, each at its smallest size, and what they share; timing itself is no test."""

import functools
import json
import shutil
import sys

import data
import pytest
import step
import torch
from baselines import run_start as start
from processes import ROOT, run_script, write_config
from script_helpers import assert_refused, script_output
from shared import measure

from plaintrain.data.dataset_mapper import DatasetMapper
from plaintrain.data.transforms.geometric import ResizeShortestEdge

# What stands in the tables beside other rows.
ROWS = {
    "loop": {"bare step", ".item() on every loss, as Detectron2's", "plain_train_net.py"},
    "data": {"as torchvision's references, 2 processes", "2 threads", "random order"},
    "records": {"json.load", "to the first batch", "to the first batch, parsed before"},
    "step": {"torchvision's loop, fp32", "plaintrain, bf16, channels_last", "plaintrain, batch 2"},
    "precision": {"float32"},
    "eval": {"pycocotools alone", "COCOEvaluator, pycocotools"},
    "checkpoint": {"torch.save, fsync", "plaintrain, ASYNC_CHECKPOINT", "resume_or_load"},
    "startup": {"as Detectron2's", "plaintrain"},
    "scaling": {"stop agreement", "forward", "backward", "barrier"},
}


# Only the quickest is in the fast set.
@pytest.mark.parametrize(
    "what", [pytest.param(name, marks=() if name == "records" else pytest.mark.long) for name in ROWS]
)
def test_every_benchmark_measures_at_its_smallest_size(what, tmp_path):
    options = {
        "precision": ["--config-file", write_config(tmp_path)],
        "records": ["--folder", tmp_path],
        "checkpoint": ["--folder", tmp_path],
        "startup": ["--parts", "iteration"],
    }
    # One benchmark measures bfloat16, and another does not, whatever this processor has.
    processor = functools.partial(set_bfloat16, what == "step")
    command = [f"benchmarks/{what}.py", "--quick", "--output", tmp_path / "out.json", *options.get(what, ())]
    # Without the real images, on made-up ones.
    env = {"PLAINTRAIN_DATASETS": str(tmp_path)}
    output = script_output(*command, folder=tmp_path, cwd=ROOT, env=env, faults=processor)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["command"].startswith(f"python scripts/benchmark.py {what} --quick")
    assert {"cpu", "cores", "python", "torch", "torchvision"} <= set(result["machine"])
    assert all(title in output for title in result["tables"])
    rows = {name: row for table in result["tables"].values() for name, row in table.items()}
    assert ROWS[what] <= set(rows) and all(row.get("same results", True) for row in rows.values())
    numbers = [row[key] for row in rows.values() for key in ("median", "lowest", "times less") if key in row]
    assert len(numbers) > 2 or what == "scaling"
    assert all(isinstance(number, float) and 0 < number < 1e9 for number in numbers)
    assert all(target["measured"] >= 0 and target["met"] in (True, False) for target in result["targets"])


def set_bfloat16(has_it):
    measure.cpu_has_bfloat16 = lambda: has_it


def test_script_runs_all_and_merges_what_they_wrote(tmp_path):
    # It finds the benchmarks beside itself.
    shutil.copy(ROOT / "scripts" / "benchmark.py", tmp_path)
    shutil.copytree(ROOT / "scripts" / "benchmarks" / "shared", tmp_path / "benchmarks" / "shared")
    content = "import json, sys\nassert sys.argv[1:-1] == ['--quick', '--output']\n"
    content += "target = {'what': 'speed', 'measured': 2.5, 'wanted': '>= 2', 'met': True}\n"
    content += "json.dump({'targets': [target]}, open(sys.argv[-1], 'w'))\n"
    names = set(ROWS)
    for name in names:
        (tmp_path / "benchmarks" / f"{name}.py").write_text(content)
    (tmp_path / "benchmarks" / "loop.py").write_text("raise SystemExit(3)\n")
    options = ["--quick", "--output", tmp_path / "all.json"]
    output = run_script(tmp_path / "benchmark.py", "all", *options, folder=tmp_path, code=1).output
    assert "failed: loop" in output
    assert set(json.loads((tmp_path / "all.json").read_text())) == names - {"loop"}
    assert output.count("speed: 2.5, target >= 2: met") == len(names) - 1
    run_script(tmp_path / "benchmark.py", "loop", folder=tmp_path, code=3)


@pytest.mark.parametrize(
    ("what", "options", "words"),
    [
        ("loop", ["--iterations", "0"], "argument --iterations: '0' is not an integer above 0"),
        ("precision", ["--quick", "--config-file", "nope.yaml"], "error: config file not found: "),
        ("all", ["--output", "."], "benchmark.py: error: argument --output: cannot write .: Is a directory"),
        ("lop", [], "invalid choice: 'lop'"),
    ],
)
def test_script_answers_a_wrong_option_in_a_sentence(what, options, words, tmp_path):
    script = f"benchmarks/{what}.py" if what in ROWS else "benchmark.py"
    arguments = options if what in ROWS else [what, *options]
    assert_refused(script, arguments, words, tmp_path)


def test_the_loaders_compared_give_the_same_images(tmp_path):
    records = data.write_images(tmp_path, 3)
    image, target = data.PillowDataset(records, (320,), 1333)[4]
    assert image.shape == (3, 320, 426) and image.dtype == torch.float32 and 0.5 < image.max() <= 1
    mapped = DatasetMapper(augmentations=[ResizeShortestEdge((320,), 1333)])(records[1])
    areas = [((b[:, 2:] - b[:, :2]).prod(1)) for b in (target["boxes"], mapped["target"]["boxes"])]
    torch.testing.assert_close(*areas, rtol=0.01, atol=1)


def test_the_steps_compared_have_the_same_weights_and_pixels():
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


def test_a_start_like_detectron2s_reads_the_images_that_have_objects(tiny_coco):
    serialized, ends, classes = start.read_records(str(tiny_coco.json), str(tiny_coco.images))
    assert classes == 3 and len(ends) == 2
    record = start.pickle.loads(serialized[: ends[0]])
    assert record["image_id"] == 2 and [a["category_id"] for a in record["annotations"]] == [0, 1]
    image, target = start.load(record, 15)
    assert image.shape == (3, 20, 15) and image.max() <= 1
    assert target["boxes"].tolist() == [[1.5, 2, 11.5, 17]] and target["labels"].tolist() == [2]


def test_variants_take_turns_and_the_first_does_not_count():
    calls = []
    values = measure.in_turns({name: lambda n=name: calls.append(n) or len(calls) for name in "ab"}, 2)
    assert calls == list("ababab") and values == {"a": [3, 5], "b": [4, 6]}
    assert measure.in_turns({"a": lambda: 1}, 2, warm_up=False) == {"a": [1, 1]}
    # Ratios are medians over the turns.
    rows = measure.make_rows({"base": [2.0, 8.0, 3.0], "other": [1.0, 1.0, 1.0]}, scale=10)
    spread = {"median": 30, "lowest": 20, "highest": 80}
    assert rows["base"] == {**spread, "times less": 1, "values": [20, 80, 30]}
    assert rows["other"]["times less"] == 3


def test_a_fresh_process_is_measured_to_its_end_or_to_a_line():
    code = "import time, sys\nfor i in range({}): pass\nprint('there', flush=True)\ntime.sleep({})"
    small, _ = measure.run_fresh([sys.executable, "-c", code.format(1, 0)])
    cpu, wall = measure.run_fresh([sys.executable, "-c", code.format(5_000_000, 60)], until="there")
    assert 0 < small < cpu and wall < 60
    for command, until in (("raise ValueError('broken')", None), ("print('broken')", "there")):
        with pytest.raises(RuntimeError, match="broken"):
            measure.run_fresh([sys.executable, "-c", command], until)
