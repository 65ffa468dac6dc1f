"""What a start imports: seconds that nobody should wait for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

HELP = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("LOADED", *sys.modules)
"""

# Stops in the middle of the first step.
TRAIN = """
import runpy, sys
names = runpy.run_path(sys.argv[1], run_name="script")
class Done(Exception):
    pass
def stop(losses):
    raise Done
main = names["main"]
main.__globals__["sum_losses"] = stop
try:
    main(names["default_argument_parser"]().parse_args(sys.argv[2:]))
except Done:
    print("LOADED", *sys.modules)
"""

# What a run needs for a write, an evaluation or a picture, or never.
LATER = {
    *("cv2", "IPython", "matplotlib", "numpy.ma", "onnx", "pandas", "scipy", "tqdm.notebook", "xmlrpc"),
    *("faster_coco_eval", "hotcoco", "pycocotools.coco"),
    *("google.protobuf", "tensorboard", "tensorboardX", "torch.utils.tensorboard"),
    "torch._inductor.compile_fx",
}


def _loaded(code, *args):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("LOADED")]
    assert found, done.stderr
    return set(found[0]), done


SCRIPTS = [
    *("plain_train_net", "epoch_train_net", "test_net", "predict", "visualize_data", "visualize_results"),
    *("analyze_errors", "analyze_model", "export_model"),
]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("flag", "code", "answer"), [("--help", 0, "usage"), ("--hlep", 2, "unrecognized")])
def test_a_question_and_a_wrong_flag_are_answered_without_the_heavy_imports(script, flag, code, answer):
    loaded, done = _loaded(HELP, ROOT / "scripts" / f"{script}.py", flag)
    assert not loaded & {"torch", "torchvision", "numpy", "PIL", "yaml", "pycocotools", "tqdm"}
    assert done.returncode == code
    assert answer in done.stdout + done.stderr


def test_a_training_that_starts_imports_nothing_that_it_uses_later(tmp_path):
    config = ROOT / "configs" / "quickstart.yaml"
    more = ["DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 1, "OUTPUT_DIR", tmp_path / "out"]
    script = ROOT / "scripts" / "plain_train_net.py"
    loaded, _ = _loaded(TRAIN, script, "--config-file", config, *more)
    assert "torchvision" in loaded
    assert not loaded & LATER
