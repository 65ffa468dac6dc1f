"""Event storage and writers: plaintrain.utils.storage and plaintrain.utils.events."""

import contextlib
import copy
import gc
import json
import math
import os
import random
import weakref

import pytest
import torch
from run_files import read_csv, read_events, read_values, tensorboard_values
from tensorboardX.proto.event_pb2 import SessionLog
from torch.utils._python_dispatch import TorchDispatchMode

from plaintrain.utils import events
from plaintrain.utils.errors import UserError
from plaintrain.utils.events import (
    WRITERS,
    CommonMetricPrinter,
    CSVWriter,
    EventStorage,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    closing_all,
    every,
    get_event_storage,
)
from plaintrain.utils.storage import HistoryBuffer

torch.set_num_threads(1)

# ---- helpers ---------------------------------------------------------------------------------

_READS = (
    "item",
    "tolist",
    "cpu",
    "numpy",
    "to",
    "__float__",
    "__int__",
    "__bool__",
    "__index__",
    "__format__",
    "__repr__",
)


def _spy(name, calls):
    original = getattr(torch.Tensor, name)

    def method(self, *args, **kwargs):
        calls.append(name)
        return original(self, *args, **kwargs)

    return method


@pytest.fixture
def transfers(monkeypatch):
    """Names of the tensor methods called that make the host wait for the device."""
    calls = []
    for name in _READS:
        monkeypatch.setattr(torch.Tensor, name, _spy(name, calls))
    return calls


class _WaitingOps(TorchDispatchMode):
    """Records the operators that would make the host wait for a device."""

    names = ("_local_scalar_dense", "_to_copy", "nonzero", "equal", "is_nonzero", "masked_select")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.names:
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def clock(monkeypatch):
    """A clock for the writers: `clock.now` is what time.perf_counter() says."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(events.time, "perf_counter", lambda: Clock.now)
    return Clock


def _refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def read_json_lines(path):
    """The objects of a JSON-lines file, read as strictly as the standard asks."""
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=_refuse_constant) for line in text.splitlines()]


# ---- every -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("period", "expected"),
    [(1, [0, 1, 2, 3, 4, 5, 6]), (2, [1, 3, 5]), (3, [2, 5]), (7, [6]), (8, []), (0, [])],
)
def test_every_is_true_after_that_many_finished_iterations(period, expected):
    assert [i for i in range(7) if every(period, i)] == expected


@pytest.mark.parametrize(
    ("period", "start", "expected"),
    [
        (3, 1, [0, 3, 6, 9]),
        (3, 2, [1, 4, 7]),
        (3, 3, [2, 5, 8]),
        (3, 5, [4, 7]),
        (3, 7, [6, 9]),
        (1, 4, [3, 4, 5, 6, 7, 8, 9]),
        (20, 4, [3]),
        (3, 11, []),
        (0, 4, []),
    ],
)
def test_every_may_begin_elsewhere_as_mmdetections_evaluation_does(period, start, expected):
    assert [i for i in range(10) if every(period, i, start=start)] == expected
    finished = range(1, 11)
    assert expected == [n - 1 for n in finished if n >= start and period and (n - start) % period == 0]


@pytest.mark.parametrize("start", [0, 1, 3])
def test_nothing_is_due_before_the_first_iteration(start):
    assert not every(3, -1, start=start)


# ---- storage: numbers ------------------------------------------------------------------------


def test_put_scalar_keeps_numbers_and_tensors_with_their_iteration():
    storage = EventStorage(5)
    storage.put_scalar("a", 1)
    storage.put_scalar("b", torch.tensor(2.5))
    storage.step()
    storage.put_scalars(a=3.0, b=torch.tensor(4))
    assert storage.history("a").values() == [(1.0, 5), (3.0, 6)]
    assert storage.history("b").values() == [(2.5, 5), (4.0, 6)]
    assert storage.latest() == {"a": (3.0, 6), "b": (4.0, 6)}
    assert storage.count_samples("a") == 2
    assert storage.iter == storage.iteration == 6


def test_put_scalars_takes_tensors_of_several_types_at_once():
    storage = EventStorage()
    storage.put_scalars(
        half=torch.tensor(0.5, dtype=torch.bfloat16),
        single=torch.tensor(0.1),
        double=torch.tensor(1e-300, dtype=torch.float64),
        whole=torch.tensor(7),
        plain=3,
    )
    latest = {name: value for name, (value, _) in storage.latest().items()}
    assert latest["half"] == 0.5
    assert latest["single"] == pytest.approx(0.1, rel=1e-6)
    assert latest["double"] == 1e-300
    assert latest["whole"] == 7
    assert latest["plain"] == 3


def test_a_one_element_tensor_is_stored_or_refused_when_it_is_put():
    storage = EventStorage()
    storage.put_scalar("loss", torch.tensor(1.0))
    try:
        storage.put_scalar("accuracy", torch.ones(1))
    except (TypeError, ValueError):
        assert storage.latest() == {"loss": (1.0, 0)}
    else:
        assert storage.latest() == {"loss": (1.0, 0), "accuracy": (1.0, 0)}


def test_cur_iter_overrides_the_iteration():
    storage = EventStorage(100)
    storage.put_scalar("x", 1.0, cur_iter=7)
    storage.put_scalars(y=torch.tensor(2.0), cur_iter=8)
    assert storage.latest() == {"x": (1.0, 7), "y": (2.0, 8)}


def test_order_of_numbers_and_tensors_of_one_name_is_kept():
    storage = EventStorage()
    values = [torch.tensor(0.0), 1.0, torch.tensor(2.0), 3]
    for value in values:
        storage.put_scalar("x", value)
        storage.step()
    assert storage.history("x").values() == [(float(i), i) for i in range(4)]


def test_an_unknown_scalar_is_a_key_error():
    with pytest.raises(KeyError):
        EventStorage().history("nothing")


def test_smoothing_hint_decides_between_median_and_latest():
    storage = EventStorage()
    for value in (1.0, 100.0, 2.0, 3.0):
        storage.put_scalars(smooth=value)
        storage.put_scalar("sharp", torch.tensor(value), smoothing_hint=False)
        storage.step()
    assert storage.latest_with_smoothing_hint(3) == {"smooth": (3.0, 3), "sharp": (3.0, 3)}
    assert storage.latest_with_smoothing_hint(4) == {"smooth": (2.5, 3), "sharp": (3.0, 3)}
    storage.put_scalars(smooth=50.0)
    assert storage.latest_with_smoothing_hint(3)["smooth"] == (3.0, 4)
    assert storage.latest_with_smoothing_hint(1)["smooth"] == (50.0, 4)
    assert storage.smoothing_hints() == {"smooth": True, "sharp": False}


def test_another_smoothing_hint_for_a_known_name_is_refused():
    storage = EventStorage()
    storage.put_scalar("lr", 1.0, smoothing_hint=False)
    with pytest.raises(ValueError, match="lr"):
        storage.put_scalar("lr", 1.0)


def test_history_buffer_averages_and_medians():
    buffer = HistoryBuffer(max_length=4)
    for i, value in enumerate([10.0, 1.0, 5.0, 3.0, 7.0]):
        buffer.update(value, i)
    assert buffer.values() == [(1.0, 1), (5.0, 2), (3.0, 3), (7.0, 4)]
    assert buffer.latest() == 7.0
    assert buffer.median(3) == 5.0
    assert buffer.median(4) == 4.0
    assert buffer.median(100) == 4.0
    assert buffer.avg(2) == 5.0
    assert buffer.global_avg() == pytest.approx(26 / 5)
    assert len(buffer) == 5


# ---- storage: scopes and nesting -------------------------------------------------------------


def test_name_scope_prefixes_scalars_images_and_histograms_and_ends_with_its_block():
    storage = EventStorage()
    with storage.name_scope("val"):
        storage.put_scalar("loss", 1.0)
        storage.put_scalars(ap=torch.tensor(2.0))
        storage.put_image("image", torch.zeros(3, 2, 2))
        storage.put_histogram("histogram", torch.zeros(4))
    storage.put_scalar("loss", 3.0)
    assert storage.latest() == {"val/loss": (1.0, 0), "val/ap": (2.0, 0), "loss": (3.0, 0)}
    assert storage.images[0][0] == "val/image"
    assert storage.histograms[0][0] == "val/histogram"


def test_name_scope_ends_also_when_its_block_raises():
    storage = EventStorage()
    with pytest.raises(ZeroDivisionError), storage.name_scope("val/"):
        storage.put_scalar("inside", 1.0)
        raise ZeroDivisionError
    storage.put_scalar("outside", 1.0)
    assert set(storage.latest()) == {"val/inside", "outside"}


def test_the_innermost_storage_is_the_current_one():
    with EventStorage() as outer:
        assert get_event_storage() is outer
        with pytest.raises(ZeroDivisionError), EventStorage() as inner:
            assert get_event_storage() is inner
            get_event_storage().put_scalar("x", 1.0)
            raise ZeroDivisionError
        assert get_event_storage() is outer
        assert outer.latest() == {}
        assert inner.latest() == {"x": (1.0, 0)}
    with pytest.raises(RuntimeError, match="EventStorage"):
        get_event_storage()


# ---- storage: no waiting for the device ------------------------------------------------------


def test_putting_tensors_never_reads_them_and_a_read_is_one_transfer(transfers):
    losses = [{"loss_a": torch.tensor(float(i)), "loss_b": torch.tensor(2.0 * i)} for i in range(50)]
    storage = EventStorage()
    with _WaitingOps() as waiting:
        for loss_dict in losses:
            storage.put_scalars(total_loss=sum(loss_dict.values()), **loss_dict)
            storage.put_scalar("grad_norm", loss_dict["loss_a"])
            storage.put_scalars(time=0.1, data_time=0.01)
            storage.step()
    assert transfers == []
    assert waiting.seen == []

    assert storage.latest()["loss_b"] == (98.0, 49)
    assert storage.history("total_loss").values() == [(3.0 * i, i) for i in range(50)]
    storage.raise_if_nonfinite()
    storage.latest_with_smoothing_hint()
    assert transfers == ["tolist"]


def test_a_tensor_changed_in_place_after_it_was_put_keeps_its_value():
    storage = EventStorage()
    alone, first, second = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)
    storage.put_scalar("alone", alone)
    storage.put_scalars(first=first, second=second)
    for tensor in (alone, first, second):
        tensor.fill_(-1.0)
    assert storage.latest() == {"alone": (1.0, 0), "first": (2.0, 0), "second": (3.0, 0)}


class _Marked(torch.autograd.Function):
    """A sum whose graph node owns `marker`."""

    @staticmethod
    def forward(ctx, x, marker):
        ctx.marker = marker
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def test_a_stored_loss_does_not_keep_its_graph_alive():
    class Marker:
        pass

    storage, marker = EventStorage(), Marker()
    freed = weakref.ref(marker)
    loss = _Marked.apply(torch.ones(2, requires_grad=True), marker)
    storage.put_scalar("loss", loss)
    del loss, marker
    gc.collect()
    assert freed() is None
    assert storage.latest() == {"loss": (2.0, 0)}


def test_what_waits_to_be_read_is_bounded(transfers):
    storage, value = EventStorage(), torch.tensor(1.0)
    for _ in range(12_500):
        storage.put_scalars(a=value, b=value)
        storage.step()
    # 25,000 scalars, of which at most 10,000 or so may wait.
    assert transfers == ["tolist"] * 2
    assert len(storage.history("a")) == len(storage.history("b")) == 12_500
    assert storage.history("a").values()[-1] == (1.0, 12_499)


def test_numbers_alone_are_bounded_too_and_none_is_lost():
    storage = EventStorage()
    for i in range(10_500):
        storage.put_scalar("x", i)
    assert len(storage._pending) <= 10_001
    assert storage.count_samples("x") == 10_500
    assert storage.history("x").global_avg() == pytest.approx(10_499 / 2)


# ---- storage: images and histograms ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "histogram"])
def test_an_image_or_histogram_changed_in_place_after_it_was_put_keeps_its_values(kind):
    storage, values = EventStorage(), torch.ones(3, 2, 2)
    if kind == "image":
        storage.put_image("x", values)
    else:
        storage.put_histogram("x", values)
    values.zero_()
    kept = (storage.images if kind == "image" else storage.histograms)[0][1]
    assert kept.eq(1).all()


# ---- storage: non-finite losses --------------------------------------------------------------


def _storage_with(*iterations):
    storage = EventStorage()
    for scalars in iterations:
        storage.put_scalars(**scalars)
        storage.step()
    return storage


def test_raise_if_nonfinite_names_the_first_bad_iteration_its_terms_and_its_images():
    nan, inf = float("nan"), float("inf")
    storage = _storage_with(
        {"loss_cls": torch.tensor(1.0), "loss_box": torch.tensor(1.0), "total_loss": torch.tensor(2.0)},
        {"loss_cls": torch.tensor(1.0), "loss_box": torch.tensor(inf), "total_loss": torch.tensor(inf)},
        {"loss_cls": torch.tensor(nan), "loss_box": torch.tensor(nan), "total_loss": torch.tensor(nan)},
    )
    with pytest.raises(FloatingPointError) as error:
        storage.raise_if_nonfinite(lambda iteration: [f"{iteration}-a.jpg", f"{iteration}-b.jpg"])
    message = str(error.value)
    assert "iteration 1" in message
    assert "loss_box, total_loss" in message
    assert "loss_cls" not in message
    assert "1-a.jpg, 1-b.jpg" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["total_loss", "loss_cls", "loss_rpn_cls", "grad_norm"])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_raise_if_nonfinite_sees_nan_and_inf_in_losses_and_grad_norm(name, value, kind):
    storage = _storage_with({name: kind(value)})
    with pytest.raises(FloatingPointError, match=name):
        storage.raise_if_nonfinite()


def test_raise_if_nonfinite_looks_at_losses_and_grad_norm_only():
    nan = float("nan")
    storage = _storage_with({"bbox/AP-cat": nan, "lr": torch.tensor(nan), "time": float("inf"), "loss": 1.0})
    storage.raise_if_nonfinite(lambda iteration: pytest.fail("asked for images"))


def test_raise_if_nonfinite_does_not_miss_what_a_writer_has_read_before():
    storage = _storage_with({"loss": torch.tensor(float("nan"))}, {"loss": torch.tensor(1.0)})
    storage.latest_with_smoothing_hint()
    with pytest.raises(FloatingPointError, match="iteration 0"):
        storage.raise_if_nonfinite()


def test_raise_if_nonfinite_reports_a_window_once():
    storage = _storage_with({"loss": float("nan")})
    with pytest.raises(FloatingPointError):
        storage.raise_if_nonfinite()
    storage.put_scalar("loss", 1.0)
    storage.raise_if_nonfinite()


def test_raise_if_nonfinite_can_leave_the_norm_out_for_good():
    nan = float("nan")
    storage = _storage_with({"grad_norm": torch.tensor(nan)}, {"grad_norm": nan, "loss": 1.0})
    storage.raise_if_nonfinite(lambda iteration: pytest.fail("asked for images"), norm_too=False)
    storage.raise_if_nonfinite()
    storage = _storage_with({"grad_norm": nan}, {"grad_norm": nan, "loss_cls": nan})
    with pytest.raises(FloatingPointError, match="^loss_cls became NaN or infinite at iteration 1;"):
        storage.raise_if_nonfinite(norm_too=False)


# ---- JSON lines ------------------------------------------------------------------------------


def test_json_writer_writes_one_object_a_line_that_can_be_read_at_once(tmp_path):
    path = tmp_path / "metrics.json"
    writer = JSONWriter(str(path), window_size=1)
    with EventStorage() as storage:
        for i in range(4):
            storage.iter = i
            storage.put_scalars(loss=torch.tensor(float(i)), lr=0.5)
            if every(2, i):
                writer.write()
    assert read_json_lines(path) == [
        {"iteration": 1, "loss": 1.0, "lr": 0.5},
        {"iteration": 3, "loss": 3.0, "lr": 0.5},
    ]
    writer.close()


def test_json_writer_smooths_over_its_window(tmp_path):
    path = tmp_path / "metrics.json"
    writer = JSONWriter(str(path), window_size=3)
    with EventStorage() as storage:
        for i, value in enumerate([9.0, 1.0, 50.0, 2.0]):
            storage.iter = i
            storage.put_scalar("loss", value)
            storage.put_scalar("lr", value, smoothing_hint=False)
        writer.write()
    writer.close()
    assert read_json_lines(path) == [{"iteration": 3, "loss": 2.0, "lr": 2.0}]


def test_json_writer_writes_null_for_what_json_cannot_hold(tmp_path):
    path = tmp_path / "metrics.json"
    writer = JSONWriter(str(path))
    with EventStorage() as storage:
        storage.put_scalars(a=float("nan"), b=torch.tensor(float("inf")), c=-float("inf"), d=1.5)
        writer.write()
    writer.close()
    assert read_json_lines(path) == [{"iteration": 0, "a": None, "b": None, "c": None, "d": 1.5}]


def test_json_writer_writes_no_iteration_twice_when_it_writes_twice(tmp_path):
    path = tmp_path / "metrics.json"
    writer = JSONWriter(str(path))
    with EventStorage() as storage:
        storage.put_scalar("loss", 1.0)
        writer.write()
        writer.write()
        storage.step()
        storage.put_scalar("loss", 1.0)
        writer.write()
        writer.write()
    writer.close()
    assert [line["iteration"] for line in read_json_lines(path)] == [0, 1]


def test_json_writer_puts_scalars_of_several_iterations_on_their_own_lines(tmp_path):
    path = tmp_path / "metrics.json"
    writer = JSONWriter(str(path))
    with EventStorage() as storage:
        storage.put_scalar("AP", 50.0, cur_iter=3)
        storage.put_scalar("loss", 1.0, cur_iter=5)
        writer.write()
        storage.put_scalar("loss", 2.0, cur_iter=6)
        writer.write()
    writer.close()
    lines = read_json_lines(path)
    assert lines[:2] == [{"iteration": 3, "AP": 50.0}, {"iteration": 5, "loss": 1.0}]
    assert lines[2] == {"iteration": 6, "loss": 1.5}


# ---- the CSV writer --------------------------------------------------------------------------


def test_csv_writer_writes_a_row_an_iteration(tmp_path):
    path = tmp_path / "run" / "metrics.csv"
    writer = CSVWriter(str(path), window_size=1)
    with EventStorage() as storage:
        for i in range(3):
            storage.iter = i
            storage.put_scalars(loss=torch.tensor(i / 2), lr=0.1)
            writer.write()
            writer.write()
    writer.close()
    assert path.read_text() == "iteration,lr,loss\n0,0.1,0.0\n1,0.1,0.5\n2,0.1,1.0\n"


def test_csv_writer_adds_a_column_for_a_scalar_that_comes_later(tmp_path):
    path = tmp_path / "metrics.csv"
    writer = CSVWriter(str(path), window_size=1)
    with EventStorage() as storage:
        storage.put_scalars(loss=1.0)
        writer.write()
        storage.iter = 1
        storage.put_scalars(loss=0.5)
        storage.put_scalars(**{"bbox/AP": float("nan"), "bbox/AP-a,b": 3.0}, smoothing_hint=False)
        writer.write()
        storage.iter = 2
        storage.put_scalars(loss=0.25)
        writer.write()
    writer.close()
    assert path.read_text() == ('iteration,loss,bbox/AP,"bbox/AP-a,b"\n0,1.0,,\n1,0.5,,3.0\n2,0.25,,\n')
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_csv_writer_of_a_resumed_run_cuts_what_lies_beyond_its_start_and_what_is_damaged(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("iteration,loss,bbox/AP\n0,1.0,\n1,0.5,20.0\nx,1,2\n1,2,3,4\n2,0.25,\n1,0.5,2")
    window = {"scalars": {"bbox/AR": [[[7.0, 1]], False]}, "unwritten": ["bbox/AR"]}
    with EventStorage(2, window) as storage, closing_all([CSVWriter(str(path))]):
        assert path.read_text() == "iteration,loss,bbox/AP\n0,1.0,\n1,0.5,20.0\n"
        storage.put_scalar("loss", 100.0)
    assert [list(row.values()) for row in read_csv(path)] == [
        ["0", "1.0", "", ""],
        ["1", "0.5", "20.0", "7.0"],
        ["2", "100.0", "", ""],
    ]


def test_csv_writer_begins_a_file_that_has_vanished_anew(tmp_path, log):
    path = tmp_path / "metrics.csv"
    writer = CSVWriter(str(path))
    with EventStorage() as storage:
        for i in range(2):
            storage.iter = i
            storage.put_scalar("loss", 1.0)
            writer.write()
            if i == 0:
                path.unlink()
    writer.close()
    assert [row["iteration"] for row in read_csv(path)] == ["1"] and "was deleted" in log.text


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_by_name_can_be_made_and_closed(tmp_path, name):
    writer = WRITERS[name](str(tmp_path), 5)
    with EventStorage() as storage:
        storage.put_scalar("loss", 1.0)
        writer.write()
    writer.close()


def test_json_writer_of_a_resumed_run_cuts_what_lies_beyond_its_start(tmp_path):
    path = tmp_path / "metrics.json"
    before = [{"iteration": i, "loss": float(i)} for i in range(10)]
    path.write_text("".join(json.dumps(line) + "\n" for line in before) + '{"iteration": 10, "lo')
    writer = JSONWriter(str(path))
    with EventStorage(6) as storage:
        for i in range(6, 9):
            storage.iter = i
            storage.put_scalar("loss", 100.0, smoothing_hint=False)
            writer.write()
    writer.close()
    after = [{"iteration": i, "loss": 100.0} for i in range(6, 9)]
    assert read_json_lines(path) == before[:6] + after
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_json_writer_of_a_resumed_run_keeps_the_earlier_lines_when_nothing_is_cut(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 4, "loss": null}\n{"iteration": 5, "lo')
    writer = JSONWriter(str(path))
    with EventStorage(5) as storage:
        storage.put_scalar("loss", 1.0)
        writer.write()
    writer.close()
    assert read_json_lines(path) == [{"iteration": 4, "loss": None}, {"iteration": 5, "loss": 1.0}]


def test_json_writer_of_a_resumed_run_that_evaluates_again_has_one_line_an_iteration(tmp_path):
    path = tmp_path / "metrics.json"
    before = [
        {"iteration": 3, "loss": 3.0},
        {"iteration": 4, "AP": 11.0, "AP50": 20.0, "loss": 4.0},
        {"iteration": 5, "loss": 5.0},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in before))
    writer = JSONWriter(str(path), window_size=1)
    with EventStorage(5) as storage:
        # What was lost or not of the evaluation after iteration 4; nothing is there of iteration 2.
        storage.put_scalars(AP=12.0, extra=float("nan"), cur_iter=4, smoothing_hint=False)
        storage.put_scalar("val/loss", 1.5, cur_iter=2)
        for i in (5, 6):
            storage.iter = i
            storage.put_scalar("loss", torch.tensor(100.0 + i))
            writer.write()
        writer.write()
    writer.close()
    assert read_json_lines(path) == [
        {"iteration": 2, "val/loss": 1.5},
        {"iteration": 3, "loss": 3.0},
        {"iteration": 4, "AP": 11.0, "AP50": 20.0, "loss": 4.0, "extra": None},
        {"iteration": 5, "loss": 105.0},
        {"iteration": 6, "loss": 106.0},
    ]


def test_json_writer_of_a_run_that_only_evaluates_again_writes_that(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 4, "loss": 4.0}\n')
    writer = JSONWriter(str(path))
    with EventStorage(5) as storage:
        storage.put_scalar("AP", 12.0, cur_iter=4, smoothing_hint=False)
        writer.write()
    writer.close()
    assert read_json_lines(path) == [{"iteration": 4, "loss": 4.0, "AP": 12.0}]


def test_json_writer_can_be_closed_twice_and_before_it_wrote(tmp_path):
    path = tmp_path / "metrics.json"
    JSONWriter(str(path)).close()
    assert not path.exists()
    writer = JSONWriter(str(path))
    with EventStorage() as storage:
        storage.put_scalar("loss", 1.0)
        writer.write()
    file = writer._file
    writer.close()
    writer.close()
    assert file.closed


# ---- TensorBoard -----------------------------------------------------------------------------


def test_tensorboard_holds_scalars_images_and_histograms_under_their_steps(tmp_path):
    writer = TensorboardXWriter(str(tmp_path), window_size=1)
    with EventStorage() as storage:
        storage.iter = 4
        storage.put_scalars(total_loss=torch.tensor(0.5), AP=float("nan"))
        storage.put_image("picture", torch.full((3, 5, 7), 200, dtype=torch.uint8))
        storage.put_histogram("weights", torch.arange(10.0), bins=5)
        writer.write()
        storage.iter = 9
        storage.put_scalar("total_loss", 0.25)
        writer.write()
        writer.write()
    writer.close()
    values = tensorboard_values(tmp_path)
    scalars = [(step, tag, v.simple_value) for step, tag, v in values if v.HasField("simple_value")]
    assert [s for s in scalars if s[1] == "total_loss"] == [(4, "total_loss", 0.5), (9, "total_loss", 0.25)]
    (nan,) = [s for s in scalars if s[1] == "AP"]
    assert nan[0] == 4 and math.isnan(nan[2])
    ((step, tag, value),) = [v for v in values if v[2].HasField("image")]
    assert (step, tag, value.image.height, value.image.width) == (4, "picture", 5, 7)
    ((step, tag, value),) = [v for v in values if v[2].HasField("histo")]
    assert (step, tag, value.histo.num, value.histo.min, value.histo.max) == (4, "weights", 10, 0, 9)


def test_tensorboard_takes_images_as_bytes_and_as_floats(tmp_path):
    writer = TensorboardXWriter(str(tmp_path))
    with EventStorage() as storage:
        storage.put_image("bytes", torch.full((3, 4, 4), 255, dtype=torch.uint8))
        storage.put_image("floats", torch.ones(3, 4, 4))
        writer.write()
        assert not storage.images and not storage.histograms
    writer.close()
    encoded = {tag: value.image.encoded_image_string for _, tag, value in tensorboard_values(tmp_path)}
    assert set(encoded) == {"bytes", "floats"}
    assert encoded["bytes"] == encoded["floats"]


def test_tensorboard_of_a_resumed_run_purges_what_lies_beyond_its_start(tmp_path):
    writer = TensorboardXWriter(str(tmp_path))
    with EventStorage(7) as storage:
        storage.put_scalar("loss", 1.0)
        writer.write()
    writer.close()
    starts = [event.step for event in read_events(tmp_path) if event.session_log.status == SessionLog.START]
    assert starts == [7]


def test_tensorboard_writer_that_never_wrote_closes_and_leaves_no_file(tmp_path):
    TensorboardXWriter(str(tmp_path)).close()
    assert list(tmp_path.iterdir()) == []


# ---- console ---------------------------------------------------------------------------------


def test_printer_shows_the_eta_on_its_first_line(log):
    with EventStorage() as storage:
        for i in range(20):
            storage.iter = i
            storage.put_scalars(time=2.0, total_loss=torch.tensor(0.5))
        CommonMetricPrinter(max_iter=100).write()
    # 80 iterations are left, 2 s each.
    assert len(log.messages) == 1
    assert "eta: 0:02:40" in log.messages[0]
    assert "iter: 19" in log.messages[0]


def test_printer_counts_down_to_zero_at_the_last_iteration(log):
    with EventStorage(99) as storage:
        storage.put_scalars(time=2.0)
        CommonMetricPrinter(max_iter=100).write()
    assert "eta: 0:00:00" in log.messages[0]


def test_printer_leaves_the_time_of_evaluations_out_of_the_eta(log, clock):
    printer = CommonMetricPrinter(max_iter=1000)
    with EventStorage() as storage:
        for i in range(20):
            storage.iter = i
            storage.put_scalars(time=1.0, loss=1.0)
            clock.now += 1.0
        printer.write()
        clock.now += 5000.0
        for i in range(20, 40):
            storage.iter = i
            storage.put_scalars(time=1.0, loss=1.0)
            clock.now += 1.0
        printer.write()
    assert "eta: 0:16:20" in log.messages[0]
    assert "eta: 0:16:00" in log.messages[1]


def test_printer_shows_every_loss_the_times_and_the_learning_rate(log):
    with EventStorage() as storage:
        storage.put_scalars(
            total_loss=torch.tensor(3.0), loss_cls=torch.tensor(1.0), loss_mine=torch.tensor(2.0)
        )
        storage.put_scalars(time=0.25, data_time=0.125)
        storage.put_scalar("val_loss", 4.5, smoothing_hint=False)
        storage.put_scalar("lr", 0.0125, smoothing_hint=False)
        CommonMetricPrinter(max_iter=10).write()
    for field in (
        "total_loss: 3",
        "loss_cls: 1",
        "loss_mine: 2",
        "val_loss: 4.5",
        "time: 0.2500",
        "data_time: 0.1250",
        "lr: 0.0125",
    ):
        assert field in log.messages[0]


def test_printer_leaves_out_validation_losses_which_would_be_old(log):
    with EventStorage() as storage:
        storage.put_scalars(total_loss=3.0)
        storage.put_scalars(**{"val/total_loss": 4.5, "val/loss_cls": 1.5}, smoothing_hint=False)
        CommonMetricPrinter().write()
    assert log.messages == ["iter: 0  total_loss: 3"]


def test_printer_without_an_end_or_anything_stored_prints_the_iteration(log):
    with EventStorage(3):
        CommonMetricPrinter().write()
    assert log.messages == ["iter: 3"]


def test_printer_of_a_loop_that_stores_no_time_takes_it_from_its_own_clock(log, clock):
    printer = CommonMetricPrinter(max_iter=101)
    with EventStorage() as storage:
        storage.iter = 20
        storage.put_scalar("total_loss", 1.0)
        printer.write()
        clock.now += 40.0
        storage.iter = 40
        storage.put_scalar("total_loss", 1.0)
        printer.write()
        printer.write()
    assert "eta" not in log.messages[0]
    assert "eta: 0:02:00" in log.messages[1]
    assert len(log.messages) == 3


def test_the_plain_loop_of_detectron2_writes_to_all_three_writers(tmp_path, log):
    start_iter, max_iter = 0, 40
    writers = (
        CommonMetricPrinter(max_iter),
        JSONWriter(str(tmp_path / "metrics.json")),
        TensorboardXWriter(str(tmp_path)),
    )
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    with EventStorage(start_iter) as storage:
        for iteration in range(start_iter, max_iter):
            iteration = iteration + 1
            storage.step()
            loss_dict = {"loss_a": parameter.square().sum(), "loss_b": parameter.abs().sum()}
            losses = sum(loss_dict.values())
            loss_dict_reduced = {k: v.item() for k, v in loss_dict.items()}
            losses_reduced = sum(loss for loss in loss_dict_reduced.values())
            storage.put_scalars(total_loss=losses_reduced, **loss_dict_reduced)
            optimizer.zero_grad()
            losses.backward()
            optimizer.step()
            storage.put_scalar("lr", optimizer.param_groups[0]["lr"], smoothing_hint=False)
            if iteration - start_iter > 5 and (iteration % 20 == 0 or iteration == max_iter):
                for writer in writers:
                    writer.write()
    for writer in writers:
        writer.close()
    lines = read_json_lines(tmp_path / "metrics.json")
    assert [line["iteration"] for line in lines] == [20, 40]
    assert set(lines[0]) == {"iteration", "total_loss", "loss_a", "loss_b", "lr"}
    assert [step for step, tag, _ in tensorboard_values(tmp_path) if tag == "total_loss"] == [20, 40]
    assert len(log.messages) == 2 and "eta: " in log.messages[1]


def test_a_writer_of_ones_own_need_not_define_close():
    class Mine(EventWriter):
        def write(self):
            pass

    Mine().close()


class Notes(EventWriter):
    """Notes when it writes and when it is closed, and may fail to close."""

    def __init__(self, name, notes, fails=False):
        self.name, self.notes, self.fails = name, notes, fails

    def write(self):
        self.notes.append(f"{self.name} writes {sorted(get_event_storage().latest())}")

    def close(self):
        self.notes.append(f"{self.name} closes")
        if self.fails:
            raise OSError(f"{self.name} cannot be closed")


@pytest.mark.parametrize("ends", [None, ZeroDivisionError, KeyboardInterrupt])
def test_writers_are_all_closed_whatever_ends_the_block(ends):
    notes = []
    with EventStorage():
        try:
            with closing_all([Notes("a", notes), EventWriter(), Notes("b", notes)]):
                assert notes == []
                if ends:
                    raise ends
        except (ZeroDivisionError, KeyboardInterrupt) as e:
            assert type(e) is ends
    assert sorted(notes) == ["a closes", "b closes"]


@pytest.mark.parametrize("ends", [None, ZeroDivisionError])
@pytest.mark.parametrize("is_written", [False, True])
def test_what_no_writer_has_seen_is_written_at_a_good_end(ends, is_written):
    notes = []
    with EventStorage() as storage:
        try:
            with closing_all([Notes("a", notes), Notes("b", notes)]):
                storage.put_scalar("AP", 12.5)
                storage.raise_if_nonfinite()
                assert storage.has_unwritten()
                if is_written:
                    storage.latest_with_smoothing_hint()
                    assert not storage.has_unwritten()
                if ends:
                    raise ends
        except ZeroDivisionError:
            pass
    writes = ["a writes ['AP']", "b writes ['AP']"] if not (ends or is_written) else []
    assert notes[:-2] == writes and sorted(notes[-2:]) == ["a closes", "b closes"]


def test_a_writer_that_cannot_be_closed_does_not_keep_the_others_open():
    notes = []
    writers = [Notes("a", notes), Notes("b", notes, fails=True), Notes("c", notes)]
    with pytest.raises(OSError, match="b cannot be closed"), EventStorage(), closing_all(writers):
        pass
    assert sorted(notes) == ["a closes", "b closes", "c closes"]


def test_there_may_be_no_writers_to_close():
    with EventStorage() as storage, closing_all([]):
        storage.put_scalar("AP", 12.5)


def test_the_window_of_a_storage_is_gone_on_with_and_not_written_again(tmp_path):
    with EventStorage() as storage:
        for value in range(30):
            storage.put_scalars(loss=torch.tensor(float(value)))
            storage.put_scalar("lr", 0.5, smoothing_hint=False)
            storage.step()
        assert storage.window()["unwritten"] == ["loss", "lr"]
        storage.latest_with_smoothing_hint()
        window = storage.window()
    scalars = window["scalars"]
    assert scalars["loss"] == [[[float(v), v] for v in range(10, 30)], True] and scalars["lr"][1] is False
    writer = JSONWriter(str(tmp_path / "metrics.json"))
    assert window["unwritten"] == []
    with EventStorage(30, window) as storage, closing_all([writer]):
        assert not storage.has_unwritten() and storage.latest() == {}
        storage.put_scalars(loss=torch.tensor(0.0))
    # The median of 11 to 29 and 0.
    line = json.loads((tmp_path / "metrics.json").read_text())
    assert line == {"iteration": 30, "loss": 19.5}


class KilledError(Exception):
    """In the place of SIGKILL, which no test in a process survives."""


class Kills:
    """Lets a run end at a random moment, with its files as they are on the disk then."""

    def __init__(self, rng, folder):
        self.rng, self.folder, self.files = rng, folder, {}

    def kill(self):
        # What Python still holds is not there.
        self.files = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        raise KilledError

    def moment(self):
        if self.rng.random() < 0.03:
            self.kill()

    def write(self, writer):
        """A write, which may end within the bytes it appends."""
        self.moment()
        sizes = {path: path.stat().st_size for path in self.folder.iterdir()}
        writer.write()
        for path, size in sizes.items():
            if self.rng.random() < 0.03 and path.stat().st_size > size:
                os.truncate(path, self.rng.randrange(size, path.stat().st_size))
                self.kill()


def loop(folder, saved, kills=None):
    """24 iterations with all that is written, from the iteration of `saved`, in the order of the scripts."""
    start = saved.get("iteration", -1) + 1
    moment, write = (kills.moment, kills.write) if kills else (lambda: None, lambda writer: writer.write())
    writers = [JSONWriter(str(folder / "metrics.json")), CSVWriter(str(folder / "metrics.csv"))]
    writers.append(TensorboardXWriter(str(folder)))
    with EventStorage(start, saved.get("window")) as storage, closing_all(writers):
        for i in range(start - 1, 24):
            storage.iter = max(i, 0)
            test = every(5, i)
            if i >= start:
                storage.put_scalars(loss=torch.tensor(1 / (i + 1)), time=random.random())
                storage.put_scalar("lr", i / 7, smoothing_hint=False)
                if i in (0, 7, 14):
                    storage.put_scalars(seldom=float(i), smoothing_hint=False)
                    storage.put_image("an image", torch.full((3, 2, 2), i, dtype=torch.uint8))
                    storage.put_histogram("numbers", torch.arange(i + 2.0), bins=3)
                moment()
                if every(4, i) or every(5, i):
                    saved.update(iteration=i, window=copy.deepcopy(storage.window()))
                moment()
            if test:
                storage.put_scalars(**{"bbox/AP": i / 3, "bbox/AP-none": math.nan}, smoothing_hint=False)
                moment()
            for writer in writers if test or every(8, i) else ():
                write(writer)


@pytest.mark.parametrize("seed", range(6))
def test_each_value_is_in_each_file_once_after_any_kills(tmp_path, seed):
    (tmp_path / "whole").mkdir()
    loop(tmp_path / "whole", {})
    rng, saved, kills = random.Random(seed), {}, None
    for number in range(100):
        folder = tmp_path / f"run-{number}"
        folder.mkdir()
        for name, content in kills.files.items() if kills else ():
            (folder / name).write_bytes(content)
        kills = Kills(rng, folder)
        try:
            loop(folder, saved, kills if number < 6 else None)
            break
        except KilledError:
            continue
    assert number > 0 and read_values(folder) == read_values(tmp_path / "whole")


def test_a_file_that_vanishes_is_begun_anew_with_a_warning(tmp_path, log):
    path = tmp_path / "run" / "metrics.json"
    path.parent.mkdir()
    writer = JSONWriter(str(path))
    with EventStorage() as storage:
        storage.put_scalar("loss", 1.0)
        writer.write()
        path.unlink()
        path.parent.rmdir()
        storage.iter = 1
        storage.put_scalar("loss", 3.0)
        writer.write()
        writer.close()
        assert json.loads(path.read_text()) == {"iteration": 1, "loss": 2.0}
    assert "metrics.json was deleted; creating a new file" in log.text


def test_a_file_that_cannot_be_written_is_one_clear_error(tmp_path):
    with EventStorage() as storage:
        storage.put_scalar("loss", 1.0)
        for writer in (JSONWriter("/proc/nowhere/metrics.json"), TensorboardXWriter("/proc/nowhere")):
            with pytest.raises(UserError, match="cannot write /proc/nowhere"):
                writer.write()
    writer = JSONWriter(str(tmp_path / "metrics.json"))
    with EventStorage() as storage:
        storage.put_scalar("loss", 1.0)
        writer.write()
        full = open("/dev/full", "w")  # noqa: SIM115 - closed below
        writer._file.close()
        writer._file = full
        storage.iter = 1
        storage.put_scalar("loss", 1.0)
        with pytest.raises(UserError, match=r"cannot write .*metrics.json: No space left"):
            writer.write()
        with contextlib.suppress(OSError):
            full.close()


@pytest.mark.parametrize(
    "line", ["[1]", '{"loss": 1}', '{"iteration": "x"}', "\xff\x00", "[" * 5000, "nonsense"]
)
def test_lines_that_are_none_do_not_stop_a_resumed_run(tmp_path, line):
    path = tmp_path / "metrics.json"
    path.write_bytes(b'{"iteration": 0, "loss": 1.0}\n' + line.encode("latin1") + b"\n")
    with EventStorage(1) as storage, closing_all([JSONWriter(str(path))]):
        storage.put_scalar("loss", 2.0)
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [0, 1]


def test_a_result_without_a_value_is_no_loss_that_diverged():
    with EventStorage() as storage:
        storage.put_scalars(
            **{"gloss_val/bbox/APl": math.nan, "a/bbox/AP-floss": math.nan, "val/loss": math.nan}
        )
        storage.raise_if_nonfinite()
        storage.put_scalar("loss", math.nan)
        with pytest.raises(FloatingPointError, match=r"^loss became NaN"):
            storage.raise_if_nonfinite()
