"""The start of a run: command line, output folder, checks, seeds, random generators, log."""

import gc
import io
import logging
import os
import random
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import rank_functions
import torch
from processes import Job
from tqdm import tqdm

from plaintrain import engine
from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.checkpoint.state import gather_rng_states, load_rng_states
from plaintrain.config import get_cfg, get_value
from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog
from plaintrain.engine.dry_run import finish_dry_run
from plaintrain.modeling import build_model
from plaintrain.structures import BoxMode
from plaintrain.utils import comm
from plaintrain.utils.env import seed_all_rng
from plaintrain.utils.errors import UserError
from plaintrain.utils.events import CommonMetricPrinter, EventStorage, JSONWriter, TensorboardXWriter
from plaintrain.utils.file_io import PathManager
from plaintrain.utils.logger import build_progress_bar, log_every_n_seconds, setup_logger


def make_weights():
    """Return a checkpoint that fits `rank_functions.TINY_CONFIG`, each byte as a character."""
    cfg, file = get_cfg(), io.BytesIO()
    cfg.merge_from_other_cfg(rank_functions.TINY_CONFIG)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    torch.save({"model": build_model(cfg).state_dict()}, file)
    return file.getvalue().decode("latin-1")


WEIGHTS = make_weights()
RUN_FILES = {
    "model_0000099.pth": "weights at 99",
    "model_final.pth": WEIGHTS,
    "model_best.pth": "best weights",
    "last_checkpoint": "model_0000099.pth",
    "config.yaml": "SEED: 41\n",
    "metrics.json": '{"iteration": 99}\n',
    "log.txt": "an earlier line\n",
    "log.txt.rank1": "an earlier line of rank 1\n",
    "events.out.tfevents.17.host": "events",
    "inference/shapes_val/results.json": "[]",
    "metrics.csv": "iteration\n99\n",
    "report.html": "<html>",
    "run.json": '{"starts": []}',
}
NEW_FILES = ["config.yaml", "log.txt", "run.json", "run.lock"]


@pytest.fixture(autouse=True)
def leave_no_trace():
    """Restore the generators and the log, which belong to the whole process."""
    before, precision = gather_rng_states(), torch.get_float32_matmul_precision()
    with torch.backends.cudnn.flags(enabled=True):
        yield
    load_rng_states(before)
    torch.set_float32_matmul_precision(precision)
    logger = logging.getLogger("plaintrain")
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


def setup(output, *overrides, freeze=False, **args):
    """Set up a run that trains on four declared images and tests on two; returns its config."""
    cfg = get_cfg()
    cfg.merge_from_other_cfg(rank_functions.TINY_CONFIG)
    cfg.merge_from_list(["OUTPUT_DIR", str(output), *overrides])
    if freeze:
        cfg.freeze()
    engine.default_setup(cfg, Namespace(**args))
    return cfg


def load_saved(output):
    """Return the config in config.yaml."""
    cfg = get_cfg()
    cfg.merge_from_file(output / "config.yaml")
    return cfg


def setup_error(output, *overrides, **args):
    """Return the message of the `UserError` that `engine.default_setup` must raise."""
    with pytest.raises(UserError) as error:
        setup(output, *overrides, **args)
    assert "\n" not in str(error.value)
    return str(error.value)


def leave_run(folder):
    """Fill a folder with what an earlier run leaves."""
    for name, text in RUN_FILES.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("latin-1"))


def contents(folder):
    """Return {path: text} of every file under a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes().decode("latin-1") for path in files}


def assert_only_log_grew(folder):
    """Check that the files of `leave_run` are as they were, except that log.txt may have more lines."""
    files = contents(folder)
    assert files.pop("log.txt").startswith(RUN_FILES["log.txt"])
    assert files == {name: text for name, text in RUN_FILES.items() if name != "log.txt"}


def register(name, *, classes=("circle", "square", "triangle"), file_name="shapes://train/0", **metadata):
    """Register a dataset of one image in code, as a fork's script does."""
    annotation = {"bbox": [1.0, 2.0, 30.0, 40.0], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    record = {"file_name": file_name, "image_id": 1, "height": 64, "width": 64, "annotations": [annotation]}
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(thing_classes=list(classes), **metadata)


def test_parser_takes_flags_and_then_overrides(capsys):
    parser = engine.default_argument_parser()
    line = "--config-file a.yaml --resume --eval-only --debug --num-gpus 2 --num-machines 3 --machine-rank 1"
    line += " --overfit 4 --dry-run --quiet --dist-url tcp://h:1 SEED -1 MODEL.WEIGHTS"
    switches = dict.fromkeys(("resume", "eval_only", "dry_run", "quiet", "debug"), True)
    job = {"num_gpus": 2, "num_machines": 3, "machine_rank": 1, "dist_url": "tcp://h:1"}
    options = {"config_file": "a.yaml", "overfit": 4, "opts": ["SEED", "-1", "MODEL.WEIGHTS", ""]}
    assert vars(parser.parse_args([*line.split(), ""])) == switches | job | options
    for flag in (["--resume"], ["--num-gpus", "2"], ["--config-file=a.yaml"]):
        with pytest.raises(SystemExit, match="^2$"):
            parser.parse_args(["SOLVER.BASE_LR", "0.1", *flag])
        text = capsys.readouterr().err
        assert flag[0] in text and "before the overrides" in text


def test_setup_writes_the_resolved_config_and_the_log(output, capsys):
    register("engine_unscored")
    keys = ["SEED", "7", "CUDNN_BENCHMARK", "True", "FLOAT32_PRECISION", "highest"]
    cfg = setup(output, *keys, "DATASETS.TEST", "('engine_unscored',)")
    assert torch.backends.cudnn.benchmark is True and torch.backends.cudnn.allow_tf32 is False
    assert torch.get_float32_matmul_precision() == "highest"
    assert sorted(os.listdir(output)) == NEW_FILES
    assert load_saved(output) == cfg and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    log = (output / "log.txt").read_text()
    console = capsys.readouterr().out
    for text in (
        f"torch: {torch.__version__}",
        "command line:",
        "CUDNN_BENCHMARK: true",
        "CLASSES is 3",
    ):
        assert text in log and text not in console
    for text in (log, console):
        assert "  classes        3, circle, square, triangle\n" in text and text.count("  schedule ") == 1
    assert len(console.splitlines()) <= 15
    # A dataset without an evaluator type is scored with COCO's metrics.
    assert MetadataCatalog.get("engine_unscored").evaluator_type == "coco"
    warnings = [line for line in log.splitlines() if "WARNING" in line]
    assert any("engine_unscored" in line and "COCO" in line for line in warnings)


def test_setup_takes_the_number_of_classes_from_the_dataset(output):
    keys = {"GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES", "RetinaNet": "MODEL.RETINANET.NUM_CLASSES"}
    for freeze, (architecture, key) in enumerate(keys.items()):
        (other,) = {*keys.values()} - {key}
        cfg = setup(output, "MODEL.META_ARCHITECTURE", architecture, other, 80, freeze=freeze)
        assert (get_value(cfg, key), get_value(cfg, other)) == (3, 80) and cfg.is_frozen() == freeze
        # A number that agrees is accepted.
        assert get_value(setup(output, "MODEL.META_ARCHITECTURE", architecture, key, 3), key) == 3


def test_setup_writes_the_schedule_in_iterations(output):
    torch.set_float32_matmul_precision("medium")
    keys = ["SOLVER.MAX_EPOCHS", "3", "SOLVER.BY_EPOCH", "True", "SOLVER.STEPS", "(2,)"]
    cfg = setup(output, *keys, "SOLVER.IMS_PER_BATCH", "3", "TEST.EVAL_PERIOD", "1", freeze=True)
    # 4 images in batches of 3.
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.TEST.EVAL_PERIOD) == (6, (4,), 2)
    log = (output / "log.txt").read_text().split("config:")[0]
    assert "the schedule of this run:" in log and "SOLVER.STEPS: (2,) -> (4,)" in log
    assert load_saved(output).SOLVER == cfg.SOLVER and not cfg.SOLVER.BY_EPOCH
    # Without FLOAT32_PRECISION it is left as it was.
    assert torch.get_float32_matmul_precision() == "medium"


def draw():
    return random.random(), float(np.random.rand()), float(np.random.randn()), torch.rand(2).tolist()


def test_setup_draws_a_seed_unless_resumed_and_seeds_all_generators(output, tmp_path):
    cfg = setup(output, resume=True)
    assert cfg.SEED >= 0 and load_saved(output).SEED == cfg.SEED
    assert f"SEED -1 is now {cfg.SEED}" in (output / "log.txt").read_text()
    assert setup(output, resume=True, freeze=True).SEED == cfg.SEED
    assert setup(output, "SEED", "0", resume=True).SEED == 0
    assert setup(output).SEED not in (0, cfg.SEED)
    draws = []
    for seed in ("5", "5", "6"):
        setup(tmp_path / f"run {len(draws)}", "SEED", seed)
        draws.append(draw())
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(*draws[1:], strict=True))
    (output / "config.yaml").write_text("SEED: text")
    with pytest.raises(UserError, match=r"SEED in .*config\.yaml must be -1, .* got 'text'"):
        setup(output, resume=True)
    # SEED and a rank may add up to more than NumPy takes.
    seed_all_rng(2**40)


def test_generators_continue_from_a_checkpoint_that_is_resumed_only(tmp_path, log):
    np.random.randn()
    random.gauss(0, 1)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpointer = DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer)
    with EventStorage():
        checkpointer.save("model_0000000", iteration=0)
    expected = [draw(), draw()]
    state = checkpointer.resume_or_load("")
    assert [draw(), draw()] == expected and "rng_states" not in state
    # Loading weights moves no generator.
    path = str(tmp_path / "model_0000000.pth")
    DetectionCheckpointer(model).resume_or_load(path, resume=False)
    assert draw() not in expected
    # Neither do the states of another number of processes.
    for number in (0, 2):
        states = gather_rng_states() * number
        torch.manual_seed(5)
        load_rng_states(states)
        assert torch.initial_seed() == 5
        assert f"the checkpoint has RNG states of {number} processes, this run has 1" in log.text


def test_setup_freezes_what_is_imported_once(tmp_path):
    gc.unfreeze()
    setup(tmp_path / "run")
    frozen = gc.get_freeze_count()
    # A second setup freezes nothing more: the objects of the first run would never be freed.
    kept = [[] for _ in range(1000)]
    setup(tmp_path / "again")
    assert frozen > 50_000 and len(kept) == 1000 and gc.get_freeze_count() <= frozen


@pytest.mark.parametrize("freeze", [False, True])
def test_earlier_run_is_moved_with_its_weights_and_other_files_stay(tmp_path, monkeypatch, freeze):
    monkeypatch.chdir(tmp_path)
    output = Path("out") if freeze else tmp_path / "out"
    leave_run(output)
    others = ["config-1.yaml", "dataset.json", "model_of_mine.pth"]
    for name in others:
        (output / name).write_bytes(WEIGHTS.encode("latin-1"))
    cfg = setup(output, "SEED", "1", "MODEL.WEIGHTS", str(output / "model_final.pth"), freeze=freeze)
    assert Path(cfg.MODEL.WEIGHTS).read_bytes().decode("latin-1") == WEIGHTS
    assert cfg.is_frozen() is freeze and load_saved(output).MODEL.WEIGHTS == cfg.MODEL.WEIGHTS
    moved = {**RUN_FILES, "config-1.yaml": WEIGHTS}
    assert contents(output / "old-1") == moved
    assert sorted(os.listdir(output)) == sorted([*NEW_FILES, *others[1:], "old-1"])
    assert str(output / "old-1") in (output / "log.txt").read_text()
    weights = output / "model_of_mine.pth"
    cfg = setup(output, "SEED", "2", "MODEL.WEIGHTS", str(weights))
    assert str(weights) == cfg.MODEL.WEIGHTS and weights.read_bytes() == WEIGHTS.encode("latin-1")
    assert contents(output / "old-1") == moved
    assert "SEED: 1\n" in (output / "old-2" / "config.yaml").read_text()
    assert "SEED: 2\n" in (output / "config.yaml").read_text()


def test_resume_moves_nothing_and_writes_the_config_anew(output):
    leave_run(output)
    setup(output, "SEED", "1", resume=True)
    rewritten = ("config.yaml", "log.txt", "run.json")
    kept = {name: text for name, text in RUN_FILES.items() if name not in rewritten}
    assert kept.items() <= contents(output).items() and not (output / "old-1").exists()
    assert (output / "log.txt").read_text().startswith(RUN_FILES["log.txt"])
    setup(output, "SEED", "1", "SOLVER.BASE_LR", "0.5", resume=True)
    assert "BASE_LR: 0.5" in (output / "config.yaml").read_text()


def test_eval_only_changes_only_the_log_and_needs_no_schedule_and_no_training_set(output):
    leave_run(output)
    keys = ["MODEL.WEIGHTS", str(output / "model_final.pth"), "SEED", "9", "SOLVER.BY_EPOCH", "True"]
    assert setup(output, *keys, eval_only=True).SOLVER.MAX_ITER == get_cfg().SOLVER.MAX_ITER
    gone = [f"DATASETS.DECLARE.gone.{word}" for word in ("FORMAT coco", "JSON /no.json", "IMAGE_ROOT /no")]
    for words in (" ".join([*gone, "DATASETS.TRAIN ('gone',)"]), "DATASETS.TRAIN ()"):
        assert setup(output, *keys, *words.split(), eval_only=True).MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert_only_log_grew(output)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["DATASETS.TRAIN", "('engine_tiny_trian',)"], ["'engine_tiny_trian'", "engine_tiny_train"]),
        (["DATASETS.TRAIN", "()", "DATASETS.TEST", "()"], ["DATASETS.TRAIN"]),
        (["DATASETS.DECLARE.engine_tiny_val.FORMAT", "png"], ["DATASETS.DECLARE.engine_tiny_val", "coco"]),
        (["MODEL.WEIGHTS", "/nowhere/weights.pth"], ["MODEL.WEIGHTS", "/nowhere/weights.pth"]),
        (
            ["MODEL.ROI_HEADS.NUM_CLASSES", "80"],
            ["NUM_CLASSES must be 3", "engine_tiny_train (circle, square, triangle), got 80"],
        ),
        (["SOLVER.BY_EPOCH", "True"], ["SOLVER.MAX_EPOCHS must be set if SOLVER.BY_EPOCH"]),
        (["MODEL.BACKBONE.NAME", "build_resnet50"], ["MODEL.BACKBONE.NAME", "build_resnet50"]),
        (["MODEL.DEVICE", "cuda:77"], ["MODEL.DEVICE", "'cuda:77'"]),
        (["DATASETS.TEST", "('odd_type',)"], ["odd_type", "'cityscapes'", "coco", "pascal_voc"]),
        (["DATASETS.TEST", "('odd_file',)"], ["/nowhere/gone.jpg"]),
        (["DATASETS.TEST", "('odd_class',)"], ["engine_tiny_train", "odd_class", "circle", "dog"]),
        (["DATASETS.TEST", "('odd_order',)"], ["engine_tiny_train", "odd_order"]),
    ],
)
def test_setup_errors_name_the_key_and_leave_the_earlier_run_in_place(output, overrides, words):
    register("odd_type", evaluator_type="cityscapes")
    register("odd_file", evaluator_type="coco", file_name="/nowhere/gone.jpg")
    register("odd_class", evaluator_type="coco", classes=("cat", "dog"))
    register("odd_order", evaluator_type="coco", classes=("square", "circle", "triangle"))
    leave_run(output)
    message = setup_error(output, *overrides)
    assert all(word in message for word in words), message
    assert_only_log_grew(output)


def test_setup_errors_name_missing_weights_and_bad_folders(output):
    message = setup_error(output, eval_only=True)
    assert "MODEL.WEIGHTS" in message and "--resume" in message
    output.write_text("in the way")
    for folder in (output, output / "below"):
        message = setup_error(folder)
        assert "OUTPUT_DIR" in message and str(folder) in message
    assert output.read_text() == "in the way"


def test_overfit_tests_on_the_same_images_and_dry_run_keeps_nothing(output, capsys):
    leave_run(output)
    cfg = setup(output, overfit=2, dry_run=True)
    assert cfg.DATASETS.TRAIN == cfg.DATASETS.TEST == ("overfit_2",)
    records = DatasetCatalog.get("engine_tiny_train")
    assert list(DatasetCatalog.get("overfit_2")) == [{**records[i], "image_id": i} for i in range(2)]
    cfg = setup(output, dry_run=True)
    assert cfg.SOLVER.MAX_ITER == 2 and str(output / "dry-run") == cfg.OUTPUT_DIR
    # It compares the resumed model.
    results = {"engine_tiny_val": {"bbox": {"AP": 30.0, "AP-circle": float("nan")}}}
    args = Namespace(dry_run=True)
    for again in ({}, {"engine_tiny_val": {"bbox": {"AP": float("nan"), "AP-circle": float("nan")}}}):
        with pytest.raises(UserError, match="resumed model has different results: .*bbox/AP was 30"):
            finish_dry_run(args, cfg, results, lambda *args, again=again, **kwargs: again)
    args.quiet = True
    finish_dry_run(args, cfg, results, lambda *args, **kwargs: results)
    assert capsys.readouterr().out.splitlines()[-1].startswith("ready: 2 iterations")
    assert contents(output) == RUN_FILES
    for flag in ("resume", "eval_only"):
        assert "--dry-run" in setup_error(output, dry_run=True, **{flag: True})


def test_two_ranks_agree_on_seed_classes_and_folder(tmp_path):
    leave_run(tmp_path / "job" / "output")
    job = Job(rank_functions.setup_frozen, tmp_path / "job", num_gpus_per_machine=2).wait(code=0)
    first, second = job.results()
    assert first == second
    assert first["seed"] >= 0 and first["classes"] == 3 and first["frozen"]
    assert Path(first["weights"]).read_bytes().decode("latin-1") == WEIGHTS
    output = job.folder / "output"
    assert sorted(os.listdir(output)) == sorted([*NEW_FILES, "log.txt.rank1", "old-1"])
    assert f"SEED: {first['seed']}\n" in (output / "config.yaml").read_text()
    assert "rank 0 of 2" in (output / "log.txt").read_text()
    assert "rank 1 of 2" in (output / "log.txt.rank1").read_text()
    # The global generators of the ranks differ.
    draws = [float((job.folder / f"draw-{rank}.txt").read_text()) for rank in (0, 1)]
    assert draws[0] != draws[1]


def test_ddp_shares_gradients_without_copies_and_sends_no_buffers(monkeypatch):
    model = torch.nn.Linear(1, 1)
    assert engine.create_ddp_model(model) is model

    def wrap(model, device_ids, gradient_as_bucket_view, broadcast_buffers=True):
        return device_ids, gradient_as_bucket_view, broadcast_buffers

    def wrap_since_2_14(
        model, device_ids, gradient_as_bucket_view, broadcast_buffers=None, forward_sync_buffers=None
    ):
        assert broadcast_buffers is None
        return device_ids, gradient_as_bucket_view, forward_sync_buffers

    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for wrapper in (wrap, wrap_since_2_14):
        monkeypatch.setattr(sys.modules["plaintrain.engine.launch"], "DistributedDataParallel", wrapper)
        assert engine.create_ddp_model(model) == (None, True, False)


def test_build_writers_takes_those_of_the_config_on_rank_0_only(tmp_path, monkeypatch):
    cfg = get_cfg()
    types = [type(writer) for writer in engine.default_writers(str(tmp_path), 10)]
    assert types == [CommonMetricPrinter, JSONWriter, TensorboardXWriter]
    cfg.merge_from_list(["OUTPUT.WRITERS", ("csv",), "OUTPUT_DIR", str(tmp_path)])
    (writer,) = engine.build_writers(cfg)
    with EventStorage(0) as storage:
        storage.put_scalars(total_loss=1.5)
        writer.write()
        writer.close()
    assert os.listdir(tmp_path) == ["metrics.csv"]
    monkeypatch.setattr("plaintrain.utils.comm.get_rank", lambda: 1)
    assert engine.default_writers(str(tmp_path), 10) == [] == engine.build_writers(cfg)


def test_log_goes_to_the_console_on_rank_0_and_to_a_file_of_each_rank(tmp_path, capsys):
    (tmp_path / "log.txt").write_text("earlier\n")
    for _ in range(2):
        setup_logger(str(tmp_path), 0)
    logging.getLogger("plaintrain.some.module").info("from rank 0")
    setup_logger(str(tmp_path), 1)
    logging.getLogger("plaintrain.some.module").warning("from rank 1")
    console = capsys.readouterr()
    assert console.out.count("from rank 0") == 1 and "from rank 1" not in console.out + console.err
    log, other = (tmp_path / "log.txt").read_text(), (tmp_path / "log.txt.rank1").read_text()
    assert log.startswith("earlier\n") and log.count("from rank 0") == 1
    assert "plaintrain.some.module" in log and "from rank 1" not in log
    assert "WARNING" in other and "from rank 1" in other and "from rank 0" not in other
    # Names cannot control a terminal; lines stay.
    (tmp_path / "log.txt.rank1").unlink()
    logging.getLogger("plaintrain").warning("\x1b[2J\r\u202e\ud800\0\ntwo")
    assert r"\x1b[2J\r\u202e\ud800\x00" + "\ntwo" in (tmp_path / "log.txt.rank1").read_text()
    os.mkfifo(tmp_path / "log.txt.rank2")
    with pytest.raises(UserError, match=r"log\.txt\.rank2: it is a pipe"):
        setup_logger(str(tmp_path), 2)


def test_repeated_messages_of_a_line_are_limited_by_time(monkeypatch, caplog):
    now = iter((0.0, 0.0, 0.5, 0.5, 2.0, 2.0))
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    for i in range(3):
        log_every_n_seconds(40, f"first {i}", n=2)
        log_every_n_seconds(40, f"second {i}", n=2, name="own")
    assert caplog.messages == ["first 0", "second 0", "first 2", "second 2"]
    assert {record.name for record in caplog.records} == {__name__, "own"}


def test_path_manager_accepts_local_paths_only(tmp_path):
    copy, folder = f"{tmp_path}/a/b", PathManager.get_local_path(f"{tmp_path}/a")
    PathManager.mkdirs(folder)
    assert PathManager.copy(__file__, copy) and PathManager.ls(folder) == ["b"]
    for name, *arguments in (("copy", __file__, copy), ("open", "https://b"), ("mkdirs", "s3://b")):
        with pytest.raises(UserError, match="b exists|path must be local, got .*://b"):
            getattr(PathManager, name)(*arguments)
    PathManager.rm(copy)
    assert PathManager.isdir(folder) and not PathManager.exists(copy) and not PathManager.isfile(copy)


def test_log_continues_where_the_console_is_closed_or_lost(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    for stream in (None, os.fdopen(writer, "w", buffering=1)):
        for name in ("stdout", "stderr", "__stdout__", "__stderr__"):
            monkeypatch.setattr(sys, name, stream)
        logger = setup_logger(str(tmp_path))
        logger.info("to the file")
        print("to nobody", flush=True)
        assert list(tqdm(range(2))) == [0, 1]
    assert (tmp_path / "log.txt").read_text().count("to the file") == 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("name", ["terminal", "rank 1", "file", "quiet"])
def test_progress_bar_shows_on_the_terminal_of_rank_0_unless_quiet(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *args: int(name == "rank 1"))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *args: 2)
    monkeypatch.setattr(sys, "stderr", io.StringIO() if name == "file" else Terminal())
    logger = setup_logger(str(tmp_path), quiet=name == "quiet")
    logger.info("all is well")
    logger.warning("look here")
    assert list(build_progress_bar(range(3), desc="training", total=3)) == [0, 1, 2]
    assert ("training" in sys.stderr.getvalue()) is (name == "terminal")
    console = capsys.readouterr().out
    assert "look here" in console and ("all is well" in console) is (name != "quiet")
    assert "all is well" in (tmp_path / "log.txt").read_text()
