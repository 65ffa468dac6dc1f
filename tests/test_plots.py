"""Pictures, and the script that draws a run's curves."""

import functools
import re
import runpy
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_helpers import make_run

from plaintrain import charts, plots
from plaintrain.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
ODD = "a <b> & $x_1$ \\frac{"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "scripts" / "plot_metrics.py"), run_name="script")


def run(script, *args):
    return script["main"](script["parse_args"](list(map(str, args))))


@functools.cache
def figures():
    lines = [{"label": ODD, "x": [0.0, 0.5, 1.0], "y": [1.0, 0.9, float("nan")], "color": 0, "points": True}]
    panel = {"title": ODD, "kind": "loss", "lines": lines, "log": True, "legend": True}
    return {
        "curve": plots.curve_figure(panel, 0.5),
        "grid": plots.curve_grid([panel] * 2),
        "xy": charts.xy_figure(lines * 2, "x", ODD, limits=(0, 1), diagonal=True),
        "bar": charts.bar_figure([ODD, "b"], {ODD: [1.0, None], "y": [2.0, 300.0]}, "AP"),
        "histogram": charts.histogram_figure([1, 10, 100], {"n": [3, 4]}, "x", ODD),
        "matrix": charts.matrix_figure([[1, 2], [0, 0]], [ODD, "b"], ["c", "d"], "x", "y"),
        "large": charts.matrix_figure(np.eye(20), range(20), list(map(str, range(20))), "x", "y"),
    }


@pytest.mark.parametrize("name", ["curve", "grid", "xy", "bar", "histogram", "matrix", "large"])
def test_a_figure_in_a_page_has_the_colour_of_its_text_and_ids_of_its_own(name):
    texts = [plots.svg_text(figures()[name], salt) for salt in ("one", "two")]
    roots = [ET.fromstring(text) for text in texts]
    ids = [{e.get("id") for e in root.iter() if e.get("id")} for root in roots]
    assert not ids[0] & ids[1]
    used = {
        i
        for root in roots
        for e in root.iter()
        for v in e.attrib.values()
        for i in re.findall(r"#([\w-]+)", v)
    }
    assert all(i in ids[0] | ids[1] for i in used if not re.fullmatch("[0-9a-f]{6}", i))
    assert "currentColor" in texts[0] and plots.INK not in texts[0] and "<style" not in texts[0]
    assert "width" not in roots[0].attrib and roots[0].get("viewBox")
    words = " ".join("".join(e.itertext()) for e in roots[0].iter() if e.tag.endswith("}text"))
    # What it is drawn of is text, no TeX, and whole.
    assert "mathdefault" not in texts[0] and (name == "large" or ODD in words)


def test_a_run_is_drawn(script, tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    assert run(script, folder, "--metrics", "total_loss", "--smooth", 0.5) == 0
    assert str(folder / "curves.png") in capsys.readouterr().out
    pixels = np.asarray(Image.open(folder / "curves.png").convert("RGB"))
    assert (pixels == 255).all(axis=2).mean() > 0.5 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    both = [folder, make_run(tmp_path / "other", offset=3.0)]
    assert run(script, *both, "--output", tmp_path / "new" / "two.svg", "--metrics", "*/AP", "lr") == 0
    root = ET.parse(tmp_path / "new" / "two.svg").getroot()
    words = {"".join(e.itertext()) for e in root.iter() if e.tag.endswith("}text")}
    assert {"report_val/bbox/AP", "lr", "run", "other"} <= words and "total_loss" not in words


@pytest.mark.parametrize(
    "args, words",
    [
        (["RUN", "--smooth", "1"], "--smooth"),
        (["RUN", "--output", "a.jpg"], "must end in .png"),
        (["RUN", "--output", "a.png", "--watch"], "writes nothing"),
        (["/nowhere"], "there is no folder /nowhere"),
    ],
)
def test_a_wrong_command_line_exits_with_2(script, tmp_path, capsys, args, words):
    folder = make_run(tmp_path / "run")
    with pytest.raises(SystemExit, match="2"):
        run(script, *[str(folder) if arg == "RUN" else arg for arg in args])
    assert words in capsys.readouterr().err


def test_what_cannot_be_drawn_is_said(script, tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    assert run(script, folder, "--metrics", "los") == 1
    assert "no metric matches los; there are: data_time, loss_box_reg" in capsys.readouterr().err
    (folder / "metrics.json").write_text("")
    assert run(script, folder) == 1
    assert "nothing to draw" in capsys.readouterr().err


def test_without_matplotlib_drawing_says_what_to_install_and_watching_works(
    script, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = make_run(tmp_path / "run")
    assert run(script, folder) == 1
    assert 'pip install "plaintrain[plot]"' in capsys.readouterr().err
    assert run(script, folder, "--watch") == 0
    shown = capsys.readouterr().out
    assert "run: finished, iteration 200 of 200" in shown and "total_loss" in shown and "\x1b" not in shown


def test_watching_goes_on_as_long_as_the_run_does(script, tmp_path, capsys, monkeypatch):
    folder, states = make_run(tmp_path / "run"), iter(["running", "running", "finished"])
    watch = script["main"].__globals__
    state = watch["run_state"](folder)
    monkeypatch.setitem(watch, "run_state", lambda *_: state._replace(name=next(states)))
    assert run(script, folder, "--watch", "--interval", "0.001") == 0
    shown = capsys.readouterr().out
    # What has not changed is not said again.
    assert shown.count("run: running") == shown.count("run: finished") == 1

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(watch, "run_state", interrupt)
    assert run(script, folder, "--watch") == 0


def test_the_watch_needs_no_torch(tmp_path):
    import subprocess

    folder = make_run(tmp_path / "run")
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    code += "finally: print({'torch', 'matplotlib', 'numpy'} & {*sys.modules})"
    command = [sys.executable, "-c", code, ROOT / "scripts" / "plot_metrics.py", folder, "--watch"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "set()", done.stdout + done.stderr


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*a\.png"):
        plots.save_figure(figures()["xy"], str(tmp_path / "file" / "a.png"))
