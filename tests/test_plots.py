"""Plots, and the script that plots the metrics of a run."""

import functools
import math
import re
import signal
import sys
import time
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image
from plot_metrics import format_curves, format_sparkline, format_state
from report_helpers import make_run
from script_helpers import assert_refused, script_output

from plaintrain.analysis import run_folder
from plaintrain.visualization import plots

ODD = "a <b> & $x_1$ \\frac{"


@functools.cache
def figures():
    lines = [{"label": ODD, "x": [0.0, 0.5, 1.0], "y": [1.0, 0.9, float("nan")], "color": 0}]
    panel = {"title": ODD, "type": "loss", "lines": lines, "log": True, "legend": True}
    return {
        "curve": plots.draw_curves([panel], 0.5, titles=False),
        "grid": plots.draw_curves([panel] * 2),
        "xy": plots.draw_xy(lines * 2, "x", ODD, diagonal=True, marker="o"),
        "bar": plots.draw_bars([ODD, "b"], {ODD: [1.0, None], "y": [2.0, 300.0]}, "AP"),
        "matrix": plots.draw_matrix([[1, 2], [0, 0]], [ODD, "b"], "x", "y"),
        "large": plots.draw_matrix(np.eye(20), list(map(str, range(20))), "x", "y"),
    }


@pytest.mark.parametrize("name", ["curve", "grid", "xy", "bar", "matrix", "large"])
def test_a_figure_in_a_page_has_the_colour_of_its_text_and_ids_of_its_own(name):
    texts = [plots.convert_to_svg(figures()[name]) for _ in range(2)]
    roots = [ET.fromstring(text) for text in texts]
    ids = [{e.get("id") for e in root.iter() if e.get("id")} for root in roots]
    assert not ids[0] & ids[1]
    values = [v for root in roots for e in root.iter() for v in e.attrib.values()]
    used = re.findall(r"#([\w-]+)", " ".join(values))
    assert all(i in ids[0] | ids[1] for i in used if not re.fullmatch("[0-9a-f]{6}", i))
    assert "currentColor" in texts[0] and plots.INK not in texts[0] and "<style" not in texts[0]
    assert "width" not in roots[0].attrib and roots[0].get("viewBox")
    words = " ".join("".join(e.itertext()) for e in roots[0].iter() if e.tag.endswith("}text"))
    # What it is drawn of is text, no TeX, and whole.
    assert "mathdefault" not in texts[0] and (name == "large" or ODD in words)


def plot(folder, *args, **kwargs):
    return script_output("plot_metrics.py", *args, folder=folder, **kwargs)


def test_script_draws_one_run_or_several(tmp_path):
    folder = make_run(tmp_path / "run")
    assert str(folder / "curves.png") in plot(tmp_path, folder, "--metrics", "total_loss", "--smooth", 0.5)
    pixels = np.asarray(Image.open(folder / "curves.png").convert("RGB"))
    assert (pixels == 255).all(axis=2).mean() > 0.5 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    both = [folder, make_run(tmp_path / "other", offset=3.0)]
    plot(tmp_path, *both, "--output", tmp_path / "new" / "two.svg", "--metrics", "*/AP", "lr")
    root = ET.parse(tmp_path / "new" / "two.svg").getroot()
    words = {"".join(e.itertext()) for e in root.iter() if e.tag.endswith("}text")}
    assert {"report_val/bbox/AP", "lr", "run", "other"} <= words and "total_loss" not in words


@pytest.mark.parametrize(
    "args, code, words",
    [
        (["run", "--smooth", "1"], 2, "--smooth"),
        (["run", "--output", "a.jpg"], 2, "must end in .png"),
        (["run", "--output", "a.png", "--watch"], 2, "writes no file"),
        (["run", "--metrics", "los"], 1, "no metric matches los; there are: data_time, loss_box_reg"),
        (["empty"], 1, "no metrics.json with values"),
        (["run", "--output", "file/a.png"], 1, "cannot write file/a.png"),
    ],
)
def test_script_answers_mistakes_in_a_sentence(tmp_path, args, code, words):
    make_run(tmp_path / "run")
    (tmp_path / "empty" / "inference").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    assert_refused("plot_metrics.py", args, words, tmp_path, codes=[code])


def test_script_watches_while_the_run_goes_on_also_without_matplotlib(tmp_path):
    folder = make_run(tmp_path / "run")
    words = 'pip install "plaintrain[plot]"'
    assert_refused("plot_metrics.py", [folder], words, tmp_path, codes=[1], faults=hide_matplotlib)
    shown = plot(tmp_path, folder, "--watch", faults=hide_matplotlib)
    assert (
        "run: finished, iteration 200 of 200" in shown
        and "total_loss" in shown
        and shown.isascii()
        and "\x1b" not in shown
    )
    shown = plot(tmp_path, folder, "--watch", "--interval", 0.001, faults=run_for_two_looks)
    # What has not changed is not said again.
    assert shown.count("run: running") == shown.count("run: finished") == 1
    # Ctrl-C ends it; a terminal shows blocks.
    shown = plot(tmp_path, folder, "--watch", faults=interrupt_between_looks)
    assert "\x1b[H\x1b[Jrun: running" in shown and "█" in shown


def test_text_of_a_run_has_its_state_and_metrics_and_fits_the_width(tmp_path):
    metrics = run_folder.read_metrics(make_run(tmp_path / "run"))
    state = run_folder.RunState("running", 99, 200)
    assert format_state("run", metrics, state) == "run: running, iteration 100 of 200, 0:00:50 left"
    lines = format_curves(metrics, [], 0, 80, "ab")
    shown = [line.split()[0] for line in lines]
    assert shown == ["total_loss", "report_val/bbox/AP", "lr", "time", "data_time"]
    assert max(map(len, lines)) <= 80 and "1.05 " in lines[0] and lines[0].endswith("1.05 to 6")
    lines = format_curves(metrics, ["loss_*"], 0, 80, "ab")
    assert [line.split()[0] for line in lines] == ["loss_cls", "loss_box_reg"]
    assert format_sparkline([4.0, 2.0, math.nan, 1.0], 4, "abcd") == "db a"
    assert format_sparkline([3.0, 3.0, 1.0, 0.0], 2, "abc") == "ca" and format_sparkline([], 2, "ab") == "  "


def hide_matplotlib():
    sys.modules["matplotlib"] = None


def run_for_two_looks():
    """Replace what the script asks for the state of a run."""
    states, ask = iter(["running", "running", "finished"]), run_folder.get_run_state
    run_folder.get_run_state = lambda *args: ask(*args)._replace(name=next(states))


def interrupt_between_looks():
    """Press Ctrl-C in a terminal while a run goes on."""
    sys.stdout.isatty = lambda: True
    ask = run_folder.get_run_state
    run_folder.get_run_state = lambda *args: ask(*args)._replace(name="running")
    time.sleep = lambda seconds: signal.raise_signal(signal.SIGINT)
