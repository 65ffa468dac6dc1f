"""The shape of the project: import directions, budgets, and what the files promise."""

import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache

import pytest
from mutation_list import MUTATIONS, PLANTED
from processes import ROOT

from plaintrain.config import check_cfg, get_cfg
from plaintrain.data.datasets.builtin import declare_datasets
from plaintrain.solver.lr_scheduler import build_lr_factor
from plaintrain.utils.errors import UserError

PACKAGE = sorted((ROOT / "plaintrain").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py")) + sorted((ROOT / "scripts").glob("benchmarks/*.py"))
# What benchmarks import is no script.
SHARED = sorted((ROOT / "scripts" / "benchmarks").glob("*/*.py"))
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

# What a run needs, and what looks at one afterwards: the first never imports the second.
TRAINING = {
    *("config", "engine", "solver", "checkpoint", "data", "modeling", "evaluation", "utils", "structures"),
}
TOOLS = {"analysis", "export", "predict", "report", "visualization"}
_ABOVE_DATA = "engine solver checkpoint modeling evaluation"
# What a package may not import besides; of others than plaintrain's only torch.
FORBIDDEN = {
    "config": f"torch data {_ABOVE_DATA}",
    "utils": f"config data {_ABOVE_DATA}",
    "utils.arguments": "torch config data utils.logger utils.files utils.comm",
    "structures": f"data {_ABOVE_DATA}",
    "solver": "engine checkpoint data modeling evaluation",
    "modeling": "engine solver checkpoint data evaluation utils.events utils.storage",
    "data": _ABOVE_DATA,
    "checkpoint": "engine data.build data.loader modeling evaluation",
    "evaluation": "engine solver checkpoint data.build data.loader data.dataset_mapper modeling",
    "engine.launch": "data modeling evaluation",
    "analysis.run_folder": "torch",
    "visualization": "engine solver checkpoint modeling",
    "report": "engine solver checkpoint modeling",
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE}


@cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path):
    """The modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
    return found


def is_in(module, package):
    return module == package or module.startswith(package + ".")


def importers(package, forbidden):
    """{module of a package: those of the forbidden ones that it imports}, of modules that import any."""
    full = [name if name == "torch" else f"plaintrain.{name}" for name in forbidden]
    wrong = {
        name: [m for m in imports(path) for f in full if is_in(m, f)]
        for name, path in MODULES.items()
        if is_in(name, f"plaintrain.{package}")
    }
    return {name: modules for name, modules in wrong.items() if modules}


def test_every_module_is_in_a_package_and_training_imports_no_tool():
    assert {name.split(".")[1] for name in MODULES if name != "plaintrain"} == TRAINING | TOOLS
    wrong = {name: m for package in TRAINING for name, m in importers(package, TOOLS).items()}
    # Detectron2's path of a tool, which nothing here imports.
    assert wrong.keys() <= {"plaintrain.utils.visualizer"}
    assert not [path for path in [*PACKAGE, *SCRIPTS] if imports(path) & wrong.keys()]
    loops = [*ROOT.glob("scripts/*_train_net.py"), *ROOT.glob("examples/*train*.py")]
    assert len(loops) == 4
    assert not [m for path in loops for m in imports(path) for t in TOOLS if is_in(m, f"plaintrain.{t}")]


def test_imports_have_directions_and_no_cycle():
    assert not {n: m for package, f in FORBIDDEN.items() for n, m in importers(package, f.split()).items()}
    users = [name for name, path in MODULES.items() if any(is_in(m, "yacs") for m in imports(path))]
    assert users == ["plaintrain.config.config"]
    stems = {path.stem for path in SCRIPTS}
    for path in [*PACKAGE, *SCRIPTS, *SHARED]:
        assert not {m for m in imports(path) if m in stems or is_in(m, "scripts")}, path
    graph = {name: {m for m in imports(path) if m in MODULES} for name, path in MODULES.items()}
    done, trail = set(), []

    def visit(name):
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            trail.append(name)
            for other in sorted(graph[name]):
                visit(other)
            done.add(trail.pop())

    for name in graph:
        visit(name)


DETECTRON2 = """
checkpoint: DetectionCheckpointer, PeriodicCheckpointer
config: CfgNode, get_cfg
data: DatasetCatalog, DatasetMapper, MetadataCatalog
data: build_detection_test_loader, build_detection_train_loader
data.build: build_detection_test_loader, build_detection_train_loader
data.coco: register_coco_instances
data.datasets.coco: convert_to_coco_dict, load_coco_json, register_coco_instances
data.dataset_mapper: DatasetMapper
data.detection_utils: annotations_to_target, build_augmentation, read_image, transform_instance_annotations
data.datasets: register_coco_instances, register_lvis_instances
data.datasets.lvis: load_lvis_json, register_lvis_instances
data.transforms: Augmentation, AugmentationList, AugInput, CropTransform, HFlipTransform, NoOpTransform
data.transforms: RandomCrop, RandomFlip, VFlipTransform
data.transforms: Resize, ResizeShortestEdge, Transform, TransformList
engine: default_argument_parser, default_setup, default_writers, launch
evaluation: COCOEvaluator, PascalVOCDetectionEvaluator, inference_on_dataset, print_csv_format
evaluation.lvis_evaluation: LVISEvaluator
modeling: build_model
evaluation: CityscapesInstanceEvaluator, CityscapesSemSegEvaluator, COCOPanopticEvaluator, SemSegEvaluator
solver: LRMultiplier, WarmupParamScheduler, build_lr_scheduler, build_optimizer
structures: BoxMode
utils: comm
utils.comm: get_rank, get_world_size, is_main_process, reduce_dict, synchronize
utils.collect_env: collect_env_info
utils.events: CommonMetricPrinter, EventStorage, JSONWriter, TensorboardXWriter, get_event_storage
utils.visualizer: Visualizer
utils.logger: log_every_n_seconds, setup_logger
"""


@pytest.mark.parametrize("line", DETECTRON2.strip().split("\n"))
def test_import_paths_of_detectron2_are_valid(line):
    module, names = line.split(": ")
    for name in names.split(", "):
        imported = getattr(importlib.import_module(f"plaintrain.{module}"), name)
        # A module of that name would hide the function.
        assert not inspect.ismodule(imported) or name == "comm"


UNSUPPORTED = """
from plaintrain.engine import DefaultTrainer: use the loop of scripts/plain_train_net.py
from plaintrain.engine.hooks import HookBase: cannot import hooks from plaintrain.engine; use a line in
from plaintrain.structures import Boxes: torchvision.ops
from plaintrain.structures.masks import BitMasks: torchvision.ops
from plaintrain import model_zoo: configs/Detectron2
from plaintrain.utils import nothing: docs/FROM_DETECTRON2.md
from plaintrain.evaluation import SemSegEvaluator as E; E("name"): SemSegEvaluator is not .* COCOEvaluator
"""


@pytest.mark.parametrize("line", UNSUPPORTED.strip().split("\n"))
def test_unsupported_names_of_detectron2_say_what_to_use(line):
    statement, words = line.split(": ", 1)
    with pytest.raises((ImportError, UserError), match=words):
        exec(statement)
    assert not hasattr(importlib.import_module("plaintrain.engine"), "DefaultTrainer")


def test_files_and_functions_are_short_and_public_ones_say_what_they_do():
    lines = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in [*PACKAGE, *SCRIPTS, *SHARED]}
    assert not {p.name: n for p, n in lines.items() if n > 300 and p.name != "defaults.py"}
    assert sum(lines[path] for path in PACKAGE) <= 18_620
    assert sum(lines[path] for path in SCRIPTS if path.parent.name == "scripts") <= 2_700
    assert sum(lines[path] for path in lines if "benchmarks" in path.parts) <= 2_400
    assert sum(len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")) <= 22_000
    lengths = {}
    for path in lines:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{path.name}:{node.name}"
                lengths[name] = node.end_lineno - node.lineno + 1
                short = lengths[name] <= 8 or node.name.startswith("_") or path not in PACKAGE
                assert short or ast.get_docstring(node), name
    loops = [lengths.pop(f"{script}_train_net.py:do_train") for script in ("plain", "epoch")]
    assert max(loops) <= 75 and max(lengths.values()) <= 60, max(lengths, key=lengths.get)
    assert sum(lengths.values()) / len(lengths) <= 16


@pytest.mark.parametrize("script", ["plain_train_net.py", "epoch_train_net.py"])
def test_loop_keeps_its_limits(script):
    functions = {n.name: n for n in parsed(ROOT / "scripts" / script).body if isinstance(n, ast.FunctionDef)}
    step, loop = functions["train_step"], functions["do_train"]
    names = {n.id for n in ast.walk(loop) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    branches = sum(isinstance(n, ast.If | ast.IfExp | ast.For | ast.While) for n in ast.walk(loop))
    assert step.end_lineno - step.lineno < 30 and len(names) <= 28 and branches <= 12
    source = ast.unparse(step) + ast.unparse(loop)
    for line in ("model(", ".backward()", "scaler.step(optimizer)", "scheduler.step()", "ema.update(model)"):
        assert line in source
    for line in ("save_iteration(", "evaluate(", "write_all(", "put_scalars("):
        assert line in source


def test_each_defect_of_the_mutation_check_fits_the_code():
    for changes in (MUTATIONS, *PLANTED.values()):
        for path in changes:
            text = (ROOT / path).read_text(encoding="utf-8")
            for old, new in changes[path]:
                assert text.count(old) == 1 and old != new, (path, old)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.relative_to(ROOT / "configs").as_posix())
def test_every_config_merges_and_opens_with_its_command_and_result(path):
    cfg = get_cfg()
    cfg.merge_from_file(path)
    check_cfg(cfg)
    declare_datasets(cfg)
    build_lr_factor(cfg)
    header = re.match(r"(#.*\n)*", path.read_text(encoding="utf-8")).group()
    assert "Expected result:" in header
    if not path.name.startswith("Base-"):
        assert f"--config-file {path.relative_to(ROOT).as_posix()}" in header


def test_an_editable_install_is_imported_next_to_the_folder_of_its_clone(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    clone, site = tmp_path / "plaintrain", tmp_path / "site"
    shutil.copytree(ROOT / "plaintrain", clone / "plaintrain", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, clone)
    site.mkdir()
    build = f"from setuptools import build_meta; build_meta.build_editable({str(site)!r})"
    subprocess.run([sys.executable, "-c", build], check=True, cwd=clone, capture_output=True)
    zipfile.ZipFile(*site.glob("*.whl")).extractall(site)
    code = f"import site; site.addsitedir({str(site)!r}); import plaintrain; print(plaintrain.__file__)"
    # -S and no PYTHONPATH: nothing else that is installed is seen.
    command, env = [sys.executable, "-S", "-c", code], {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert str(clone / "plaintrain" / "__init__.py") in done.stdout, done.stderr
