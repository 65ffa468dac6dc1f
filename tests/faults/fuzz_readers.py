#!/usr/bin/env python
"""Feed broken files to the readers: each must give records or one clear `UserError`, nothing else.

python tests/faults/fuzz_readers.py --inputs 10000 --seed 0
python tests/faults/fuzz_readers.py --reader coco --first 17 --inputs 1

Input number i of a reader depends on the seed, the reader and i alone. Half of the inputs are changed
as bytes, half as the tree that the file holds. Exit code: 0 if every error was clear, else 1.
"""

import argparse
import contextlib
import functools
import logging
import random
import re
import signal
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from mutations import mutate
from seed_files import FILES, build_run

from plaintrain.analysis import run_folder
from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.checkpoint.pretrained import load_weights
from plaintrain.config import check_cfg, get_cfg
from plaintrain.data import DatasetCatalog, MetadataCatalog
from plaintrain.data.datasets.builtin import declare_dataset, declare_datasets, read_dataset
from plaintrain.data.images import read_image
from plaintrain.data.records import check_image_files, get_detection_dataset_dicts
from plaintrain.data.validation import check_problems, check_records
from plaintrain.evaluation.detections import load_ground_truth
from plaintrain.evaluation.predictions import read_detections
from plaintrain.report import build, detections, runs
from plaintrain.utils.errors import UserError
from plaintrain.visualization.plots import convert_to_svg

# An error is one line that can be read, and an input is refused soon.
MAX_MESSAGE, MAX_SECONDS = 1500, 10
NAME = "fuzzed"
# A file by its name alone or by its path, or a key of the config.
_NAMED = re.compile(
    r"\b[\w-]+\.(xml|yaml|json|txt|png|pth)\b|(^| )/\S|\b[A-Z][A-Z_]+(\.[A-Z0-9_]+)* (is|must)"
)


@dataclass
class Report:
    """The results of a reader; `foreign` and `unclear` hold lines to repeat a failure by."""

    counts: Counter = field(default_factory=Counter)
    foreign: list = field(default_factory=list)
    unclear: list = field(default_factory=list)
    slowest: float = 0.0


def _errors(*actions):
    """Return the errors of actions, each of which is to be safe also where the one before it has failed."""
    found = []
    for action, *args in actions:
        try:
            action(*args)
        except UserError as e:
            found.append(e)
    return found


def _read_all(name):
    """Read as scripts/check_dataset.py does."""
    problems = []
    records, metadata = read_dataset(name, problems)
    check_problems(problems)
    check_records(records, metadata)


def check_dataset(spec):
    """Do what a script does with a declared dataset before it trains on it, or scores it.

    Returns (errors, errors that only training with masks or keypoints has).
    """
    declare_dataset(NAME, spec)
    always = _errors(
        (get_detection_dataset_dicts, NAME),
        (load_ground_truth, NAME),
        (lambda: check_image_files(DatasetCatalog.get(NAME), NAME),),
        (_read_all, NAME),
    )
    with_targets = _errors(
        (get_detection_dataset_dicts, NAME, True, 0, True), (get_detection_dataset_dicts, NAME, True, 1)
    )
    return always, with_targets


def _run_config(folder):
    overrides = (folder / "overrides").read_bytes().decode(errors="surrogateescape").split("\n")
    cfg = get_cfg()
    errors = _errors(
        (cfg.merge_from_file, folder / "config.yaml"),
        (cfg.merge_from_list, overrides),
        (check_cfg, cfg),
        (declare_datasets, cfg),
    )
    if not errors:
        # What was accepted can be written and read again.
        again = folder / "again.yaml"
        again.write_text(cfg.dump(), encoding="utf-8", errors="surrogatepass")
        get_cfg().merge_from_file(again)
    return errors, []


def _spec(folder, name, **more):
    """Return the declaration of a dataset of a format in the folder."""
    files = {
        "coco": {"JSON": f"{folder}/a.json", "IMAGE_ROOT": f"{folder}/images"},
        "voc": {"ROOT": str(folder), "SPLIT": "train"},
        "yolo": {"DATA": f"{folder}/data.yaml", "SPLIT": "train"},
    }
    return {"FORMAT": name, **files[name], **more}


def _run_dataset(folder):
    return check_dataset(_spec(folder, folder.name))


def _run_results(folder):
    declare_dataset(f"{NAME}_truth", _spec(folder, "coco"))
    path = f"{folder}/results.json"
    errors, more = check_dataset(_spec(folder, "coco", FORMAT="coco_results", RESULTS=path))
    return errors + _errors((lambda: read_detections(path, f"{NAME}_truth"),)), more


def _run_image(folder):
    return _errors(*((read_image, str(path)) for path in sorted(folder.glob("a.*")))), []


def _read_run(folder):
    run_folder.read_metrics(folder / "csv")
    run = runs.Run(str(folder), "run")
    for id_, _, build_section in build.SECTIONS:
        getattr(build.load_template(), id_.replace("-", "_"))(build_section([run]))
    # An exception in the analysis becomes a note.
    if failed := [problem for problem in run.problems.values() if "analysis failed" in problem]:
        raise AssertionError(failed[0])


def _run_report(folder):
    """Load a run folder and build all sections of its report; few curves are drawn, which is slow."""
    checksum = sum(zlib.crc32(path.read_bytes()) for path in folder.rglob("*.*") if path.is_file())
    with contextlib.ExitStack() as stack:
        stub = functools.partial(patch.object, return_value=[])
        for module, name in [(m, n) for m in (runs, detections) for n in vars(m) if n.startswith("draw_")]:
            if name != "draw_curves" or checksum % 1000:
                stack.enter_context(stub(module, name))
        stack.enter_context(
            patch.object(build, "convert_to_svg", lambda f: f and convert_to_svg(f) or "<svg>")
        )
        return _errors((_read_run, folder)), []


def _run_checkpoint(folder):
    model, states, step = build_run()
    errors = _errors((DetectionCheckpointer(model, str(folder), **states).resume_or_load, ""))
    if not errors:
        # What was accepted can be trained on.
        step(2)
    return errors, _errors((load_weights, model, f"{folder}/model_0000001.pth", ["a", "b"]))


# {reader: (the files that are changed, function that reads them)}.
READERS = {
    "checkpoint": (tuple(FILES["checkpoint"]), _run_checkpoint),
    "config": (("config.yaml", "overrides"), _run_config),
    "coco": (("a.json",), _run_dataset),
    "results": (("results.json",), _run_results),
    "voc": (("Annotations/a.xml", "ImageSets/Main/train.txt"), _run_dataset),
    "yolo": (("data.yaml", "labels/train/a.txt", "list.txt"), _run_dataset),
    "image": (tuple(FILES["image"]), _run_image),
    "report": (tuple(FILES["report"]), _run_report),
}


@contextlib.contextmanager
def _time_limit():
    def stop(*_):
        raise TimeoutError(f"took longer than {MAX_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _forget(known):
    for catalog in (DatasetCatalog, MetadataCatalog):
        for name in set(catalog.list()) - known:
            catalog.remove(name)


def why_unclear(message, folder):
    """Return what is wrong with an error's message, or None."""
    if not message.strip() or len(message.splitlines()) != 1:
        return f"is not one line: {message[:200]!r}"
    if len(message) > MAX_MESSAGE:
        return f"has {len(message)} characters: {message[:200]}"
    named = any(word in message for word in (str(folder), NAME, "command line", "overrides", "DECLARE"))
    if not named and not _NAMED.search(message):
        return f"names neither file nor key: {message[:200]}"
    return None


def _attempt(read, folder, report, where):
    start = time.perf_counter()
    try:
        with _time_limit():
            errors, more = read(folder)
        report.counts["refused" if errors else "ok"] += 1
        unclear = [why for why in (why_unclear(str(e), folder) for e in errors + more) if why]
        report.unclear += [f"{where}: the error {why}" for why in unclear[:1]]
    except Exception as e:  # The point of it all: whatever else may come.
        report.counts["foreign"] += 1
        report.foreign.append(f"{where}: {type(e).__name__}: {str(e)[:200]}")
    report.slowest = max(report.slowest, time.perf_counter() - start)


def fuzz(name, inputs, seed=0, first=0):
    """Give `inputs` broken inputs to the reader `name` of `READERS`; returns a `Report`."""
    report, files, (names, read) = Report(), FILES[name], READERS[name]
    known = {*DatasetCatalog.list(), *MetadataCatalog.list()}
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        folder = Path(root).resolve() / name
        try:
            for path, data in files.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(data)
            for i in range(first, first + inputs):
                rng = random.Random(f"{seed} {name} {i}")
                changed = rng.sample(names, 1 if rng.random() < 0.8 else min(2, len(names)))
                for path in changed:
                    (folder / path).write_bytes(mutate(path, files[path], rng))
                _attempt(read, folder, report, f"--seed {seed} --reader {name} --first {i}")
                _forget(known)
                for path in changed:
                    (folder / path).write_bytes(files[path])
        finally:
            logging.disable(logging.NOTSET)
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input, to repeat one")
    parser.add_argument("--reader", choices=READERS, action="append", help="default: all")
    args = parser.parse_args()
    failed, row = False, "{:<8}{:>10}{:>10}{:>10}{:>10}{:>10}{:>12}"
    print(row.format("reader", "inputs", "ok", "refused", "foreign", "unclear", "slowest (s)"))
    for name in args.reader or READERS:
        report = fuzz(name, args.inputs, args.seed, args.first)
        counts = [report.counts.total(), report.counts["ok"], report.counts["refused"]]
        counts += [len(report.foreign), len(report.unclear), f"{report.slowest:.3f}"]
        print(row.format(name, *counts), flush=True)
        for line in report.foreign[:3] + report.unclear[:3]:
            print(f"    {line}")
        failed |= bool(report.foreign or report.unclear)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
