"""What a start imports: seconds that nobody should wait for."""

import os
import subprocess
import sys

import pytest
from processes import ROOT
from report_helpers import make_run

CODE = "import atexit, runpy, sys; atexit.register(lambda: print('LOADED', *sys.modules))\n"
SCRIPT = CODE + "sys.argv = sys.argv[1:]\n{before}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
# What a run needs for a write, an evaluation or an image, or never.
LATER = {
    *("cv2", "IPython", "matplotlib", "numpy.ma", "onnx", "pandas", "scipy", "tqdm.notebook", "xmlrpc"),
    *("faster_coco_eval", "hotcoco", "jinja2", "pycocotools.coco"),
    *("google.protobuf", "tensorboard", "tensorboardX", "torch.utils.tensorboard"),
    "torch._inductor.compile_fx",
}


def run(code, *args, cwd=ROOT):
    """(the modules that code has loaded, the finished process)."""
    env = {**os.environ, "PYTHONPATH": str(cwd)}
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("LOADED")]
    return set(line.split()[1:]), done


def run_script(script, *args, before=""):
    return run(SCRIPT.format(before=before), ROOT / "scripts" / f"{script}.py", *args)


QUESTIONS = {
    ("--help", 0, "usage"): "plain_train_net test_net visualize_data analyze_errors export_model",
    ("--hlep", 2, "unrecognized"): "epoch_train_net predict visualize_results analyze_model",
}


@pytest.mark.parametrize(
    ("script", "flag", "code", "answer"),
    [(script, *question) for question, scripts in QUESTIONS.items() for script in scripts.split()],
)
def test_a_question_and_a_wrong_flag_are_answered_without_the_heavy_imports(script, flag, code, answer):
    loaded, done = run_script(script, flag)
    assert not loaded & {"torch", "torchvision", "numpy", "PIL", "yaml", "pycocotools", "tqdm"}
    assert done.returncode == code and answer in done.stdout + done.stderr


def test_a_training_that_starts_imports_nothing_that_it_uses_later(tmp_path):
    config = ROOT / "configs" / "quickstart.yaml"
    options = ["DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 1, "OUTPUT_DIR", tmp_path / "out"]
    # It ends in the middle of the first step.
    before = "import torch; torch.Tensor.backward = None"
    loaded, done = run_script("plain_train_net", "--config-file", config, *options, before=before)
    assert "'NoneType' object is not callable" in done.stderr
    assert not loaded & LATER


def test_the_config_the_watch_and_the_measuring_of_benchmarks_import_no_torch(tmp_path):
    config = "import plaintrain.config as c; cfg = c.get_cfg(); c.check_cfg(cfg); cfg.dump()"
    for (loaded, done), forbidden in (
        (run(CODE + config), {"torch", "torchvision", "numpy"}),
        (run_script("plot_metrics", make_run(tmp_path / "run"), "--watch"), {"torch", "numpy", "matplotlib"}),
        (run(CODE + "import shared.measure", cwd=ROOT / "scripts" / "benchmarks"), {"torch"}),
    ):
        assert done.returncode == 0, done.stderr
        assert not loaded & forbidden
