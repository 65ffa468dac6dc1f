"""Event storage and writers: plaintrain.utils.storage and plaintrain.utils.events."""

import gc
import json
import math
import os
import weakref
from unittest.mock import Mock

import pytest
import torch
from run_files import read_csv, read_events, tensorboard_values
from tensorboardX.proto.event_pb2 import SessionLog

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
    get_event_storage,
    has_event_storage,
)
from plaintrain.utils.storage import HistoryBuffer

NAN, INF = math.nan, math.inf


@pytest.fixture
def transfers(monkeypatch):
    """Names of the tensor methods called that make the host wait for the device."""
    calls = []

    def spy(name, original):
        return lambda *args, **kwargs: calls.append(name) or original(*args, **kwargs)

    names = "item tolist cpu numpy to __float__ __int__ __bool__ __index__ __format__ __repr__"
    for name in names.split():
        monkeypatch.setattr(torch.Tensor, name, spy(name, getattr(torch.Tensor, name)))
    return calls


def read_json_lines(path):
    """The objects of a JSON-lines file, read as strictly as the standard asks."""
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


# ---- storage ---------------------------------------------------------------------------------


def test_storage_keeps_numbers_and_tensors_with_their_iteration():
    storage = EventStorage(5)
    for value in (torch.tensor(0.0), 1, torch.tensor(2.0), 3.0):
        storage.put_scalar("loss", value)
        storage.step()
    storage.put_scalars(
        half=torch.tensor(0.5, dtype=torch.bfloat16),
        double=torch.tensor(1e-300, dtype=torch.float64),
        whole=torch.tensor(7),
        one_element=torch.ones(1),
    )
    storage.put_scalars(AP=torch.tensor(2.0), cur_iter=8)
    assert storage.history("loss").values() == [(0.0, 5), (1.0, 6), (2.0, 7), (3.0, 8)]
    assert storage.latest() == {
        "loss": (3.0, 8),
        "half": (0.5, 9),
        "double": (1e-300, 9),
        "whole": (7.0, 9),
        "one_element": (1.0, 9),
        "AP": (2.0, 8),
    }
    assert storage.iter == storage.iteration == 9
    with pytest.raises(KeyError):
        storage.history("nothing")


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
    # A window is of iterations.
    storage.put_scalars(rare=1.0, cur_iter=0)
    storage.put_scalars(rare=3.0)
    assert [storage.count_samples(name, 3) for name in ("smooth", "rare")] == [3, 1]
    assert storage.latest_with_smoothing_hint(4)["rare"] == (3.0, 4)
    assert storage.latest_with_smoothing_hint(5)["rare"] == (2.0, 4)
    with pytest.raises(ValueError, match="sharp"):
        storage.put_scalar("sharp", 1.0)
    buffer = HistoryBuffer(max_length=4)
    for i, value in enumerate([10.0, 1.0, 5.0, 3.0, 7.0]):
        buffer.update(value, i)
    assert buffer.values() == [(1.0, 1), (5.0, 2), (3.0, 3), (7.0, 4)]
    assert (buffer.latest(), buffer.median(3), buffer.median(100), buffer.avg(2)) == (7.0, 5.0, 4.0, 5.0)
    assert buffer.global_avg() == pytest.approx(26 / 5)


def test_name_scope_and_current_storage_end_with_their_block():
    with EventStorage() as outer:
        with pytest.raises(ZeroDivisionError), EventStorage() as storage, storage.name_scope("val/"):
            assert get_event_storage() is storage
            storage.put_scalar("loss", 1.0)
            storage.put_scalars(ap=torch.tensor(2.0))
            storage.put_image("image", torch.zeros(3, 2, 2))
            storage.put_histogram("histogram", torch.zeros(4))
            raise ZeroDivisionError
        assert get_event_storage() is outer and has_event_storage()
    assert not has_event_storage()
    with pytest.raises(RuntimeError, match="EventStorage"):
        get_event_storage()
    storage.put_scalar("loss", 3.0)
    assert storage.latest() == {"val/loss": (1.0, 0), "val/ap": (2.0, 0), "loss": (3.0, 0)}
    assert (storage.images[0][0], storage.histograms[0][0]) == ("val/image", "val/histogram")


def test_tensors_are_read_in_one_transfer_when_needed_or_too_many(transfers):
    losses = [{"loss_a": torch.tensor(float(i)), "loss_b": torch.tensor(2.0 * i)} for i in range(50)]
    storage = EventStorage()
    for loss_dict in losses:
        storage.put_scalars(total_loss=sum(loss_dict.values()), **loss_dict)
        storage.put_scalar("grad_norm", loss_dict["loss_a"])
        storage.put_scalars(time=0.1, data_time=0.01)
        storage.step()
    assert transfers == []
    assert storage.latest()["loss_b"] == (98.0, 49)
    assert storage.history("total_loss").values() == [(3.0 * i, i) for i in range(50)]
    storage.raise_if_nonfinite()
    storage.latest_with_smoothing_hint()
    assert transfers == ["tolist"]
    # 18,000 scalars, of which at most 10,000 or so may wait.
    storage, value = EventStorage(), torch.tensor(1.0)
    for i in range(6000):
        storage.put_scalars(a=value, b=value, number=i)
        storage.step()
    assert transfers == ["tolist"] * 2
    assert len(storage.history("a").values()) == len(storage.history("b").values()) == 6000
    assert storage.history("number").global_avg() == pytest.approx(5999 / 2)


def test_stored_tensors_are_copies_without_their_graph():
    def hook(grad):
        """An object that the graph owns."""

    storage, freed = EventStorage(), weakref.ref(hook)
    alone, first, second, image = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0), torch.ones(3, 2, 2)
    loss = torch.ones(2, requires_grad=True).exp()
    loss.register_hook(hook)
    loss = loss.sum()
    storage.put_scalar("alone", alone)
    storage.put_scalars(first=first, second=second, loss=loss)
    storage.put_image("image", image)
    storage.put_histogram("histogram", image)
    for tensor in (alone, first, second, image):
        tensor.fill_(-1.0)
    del loss, hook
    gc.collect()
    values = [storage.latest()[name] for name in ("alone", "first", "second")]
    assert freed() is None and values == [(1.0, 0), (2.0, 0), (3.0, 0)]
    assert storage.latest()["loss"] == (pytest.approx(2 * math.e), 0)
    assert storage.images[0][1].eq(1).all() and storage.histograms[0][1].eq(1).all()


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"loss_a": 1.0, "loss_b": INF, "total_loss": torch.tensor(INF)}, {"loss_a": NAN}],
            {},
            "^loss_b, total_loss became NaN or infinite at iteration 0;.* batch: 0-a.jpg, 0-b.jpg$",
        ),
        ([{"loss": torch.tensor(-INF)}], {}, "^loss became"),
        ([{"lr": 1.0}, {"grad_norm": torch.tensor(NAN)}], {}, "^grad_norm became.*iteration 1;"),
        ([{"grad_norm": NAN}, {"grad_norm": NAN, "loss": NAN}], {"check_norm": False}, "^loss became.* 1;"),
        ([{"grad_norm": NAN, "loss": 1.0}], {"check_norm": False}, None),
        # Results without a value: of datasets and classes with "loss" in their names too.
        ([{"gloss_val/bbox/APl": NAN, "a/bbox/AP-floss": NAN, "val/loss": NAN, "lr": NAN}], {}, None),
    ],
)
def test_raise_if_nonfinite_names_the_first_iteration_its_losses_and_its_images(rows, options, message):
    storage = EventStorage()
    for row in rows:
        storage.put_scalars(**row)
        storage.step()
    # A writer reads before.
    storage.latest_with_smoothing_hint()
    if message is None:
        storage.raise_if_nonfinite(lambda iteration: pytest.fail("asked for images"), **options)
    else:
        with pytest.raises(FloatingPointError, match=message):
            storage.raise_if_nonfinite(lambda i: [f"{i}-a.jpg", f"{i}-b.jpg"], **options)
    storage.put_scalar("loss", 1.0)
    storage.raise_if_nonfinite()


def test_window_of_a_storage_continues_its_medians_and_is_not_written_again():
    with EventStorage() as storage:
        for value in range(30):
            storage.put_scalars(loss=torch.tensor(float(value)))
            storage.put_scalar("lr", 0.5, smoothing_hint=False)
            storage.step()
        storage.iter = 29
        unwritten = storage.state_dict()
        storage.latest_with_smoothing_hint()
        state = storage.state_dict()
    assert state["scalars"]["loss"] == [[[float(v), v] for v in range(10, 30)], True]
    assert state["scalars"]["lr"][1] is False and state["unwritten"] == []
    resumed = EventStorage()
    resumed.load_state_dict(unwritten)
    assert resumed.has_unwritten() and resumed.latest() == {"loss": (29.0, 29), "lr": (0.5, 29)}
    resumed = EventStorage()
    resumed.load_state_dict(state)
    assert (resumed.iter, resumed.start_iter) == (29, 30)
    assert not resumed.has_unwritten() and resumed.latest() == {}
    resumed.iter = 30
    resumed.put_scalars(loss=torch.tensor(0.0))
    # The median of 11 to 29 and 0.
    assert resumed.latest_with_smoothing_hint(20) == {"loss": (19.5, 30)}


# ---- JSON lines and CSV ----------------------------------------------------------------------


def test_json_writer_writes_one_line_an_iteration_that_can_be_read_at_once(tmp_path):
    path = tmp_path / "metrics.json"
    writer = JSONWriter(str(path), window_size=3)
    with EventStorage() as storage, closing_all([writer]):
        for i, value in enumerate([9.0, 1.0, 50.0, 2.0]):
            storage.iter = i
            storage.put_scalar("loss", torch.tensor(value))
            storage.put_scalars(lr=value, a=NAN, b=torch.tensor(-INF), smoothing_hint=False)
        storage.put_scalar("AP", 40.0, cur_iter=1)
        writer.write()
        writer.write()
        expected = [
            {"iteration": 1, "AP": 40.0},
            {"iteration": 3, "a": None, "b": None, "loss": 2.0, "lr": 2.0},
        ]
        assert read_json_lines(path) == expected
        storage.step()
        storage.put_scalar("loss", 3.0)
        writer.write()
    assert read_json_lines(path) == [*expected, {"iteration": 4, "loss": 3.0}]


def test_csv_writer_writes_a_row_an_iteration_and_adds_columns(tmp_path):
    path = tmp_path / "run" / "metrics.csv"
    writer = CSVWriter(str(path), window_size=1)
    with EventStorage() as storage, closing_all([writer]):
        storage.put_scalars(loss=1.0)
        writer.write()
        storage.iter = 1
        storage.put_scalars(loss=torch.tensor(0.5))
        storage.put_scalars(**{"bbox/AP": NAN, "bbox/AP-a,b": 3.0}, smoothing_hint=False)
        writer.write()
        writer.write()
        storage.iter = 2
        storage.put_scalars(loss=0.25, lr=0.1)
        writer.write()
    header = 'iteration,loss,bbox/AP,"bbox/AP-a,b",lr\n'
    assert path.read_text() == header + "0,1.0,,,\n1,0.5,,3.0,\n2,0.25,,,0.1\n"
    assert [p.name for p in path.parent.iterdir()] == ["metrics.csv"]


JSON_ROWS = [
    '{"iteration": 0, "AP": 11.0, "loss": null}',
    '{"iteration": 1, "loss": 0.5}',
    '{"iteration": 2}',
]
DAMAGED_JSON = ["[1]", '{"loss": 1}', '{"iteration": "x"}', "\xff\x00", "[" * 5000, '{"iteration": 1, "lo']
CSV_ROWS = ["iteration,AP,loss", "0,11.0,", "1,,0.5", "2,,0.25"]
DAMAGED_CSV = ["x,1,2", "1,2,3,4", "1,2", "1,20.0,0."]


@pytest.mark.parametrize(
    ("writer_class", "rows", "damaged", "read"),
    [(JSONWriter, JSON_ROWS, DAMAGED_JSON, read_json_lines), (CSVWriter, CSV_ROWS, DAMAGED_CSV, read_csv)],
)
def test_a_file_of_a_resumed_run_is_cut_and_joined_with_what_is_evaluated_again(
    tmp_path, writer_class, rows, damaged, read
):
    path = tmp_path / "metrics"
    path.write_bytes("\n".join([*rows, *damaged]).encode("latin1"))
    with EventStorage(2) as storage, closing_all([writer_class(str(path), 1)]):
        # What was lost or not of the evaluation after iteration 0.
        storage.put_scalars(AP=12.0, extra=7.0, cur_iter=0, smoothing_hint=False)
        storage.put_scalar("loss", 100.0)
    values = [
        {name: str(value) for name, value in row.items() if value not in ("", None)} for row in read(path)
    ]
    assert values == [
        {"iteration": "0", "AP": "11.0", "extra": "7.0"},
        {"iteration": "1", "loss": "0.5"},
        {"iteration": "2", "loss": "100.0"},
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics"]


@pytest.mark.parametrize(("writer_class", "read"), [(JSONWriter, read_json_lines), (CSVWriter, read_csv)])
def test_a_file_that_was_deleted_is_created_again_and_a_full_disk_is_an_error(tmp_path, writer_class, read):
    path = tmp_path / "run" / "metrics"
    writer = writer_class(str(path))
    with EventStorage() as storage:
        storage.put_scalar("loss", 1.0)
        writer.write()
        path.unlink()
        path.parent.rmdir()
        storage.iter = 1
        storage.put_scalar("loss", 3.0)
        writer.write()
        assert [int(row["iteration"]) for row in read(path)] == [1]
        for other in (writer_class("/proc/nowhere/metrics"), TensorboardXWriter("/proc/nowhere")):
            with pytest.raises(UserError, match="cannot write /proc/nowhere"):
                other.write()
        storage.put_scalar("loss", 1.0, cur_iter=2)
        writer._path = "/dev/full"
        with pytest.raises(UserError, match=r"cannot write /dev/full: No space left"):
            writer.write()


# ---- TensorBoard and the console -------------------------------------------------------------


def test_tensorboard_holds_scalars_images_and_histograms_under_their_steps(tmp_path, monkeypatch):
    # A flush hands the data to the system and does not wait for the disk.
    monkeypatch.setattr(os, "fsync", lambda fd: pytest.fail("the loop waited for the disk"))
    writer = TensorboardXWriter(str(tmp_path), window_size=1)
    with EventStorage(4) as storage, closing_all([writer]):
        storage.put_scalars(total_loss=torch.tensor(0.5), AP=NAN)
        storage.put_image("bytes", torch.full((3, 5, 7), 255, dtype=torch.uint8))
        storage.put_image("floats", torch.ones(3, 5, 7))
        storage.put_histogram("weights", torch.arange(10.0), bins=5)
        writer.write()
        assert not storage.images and not storage.histograms
        storage.iter = 9
        storage.put_scalar("total_loss", 0.25)
        writer.write()
        writer.write()
    values = tensorboard_values(tmp_path)
    scalars = [(step, tag, v.simple_value) for step, tag, v in values if v.HasField("simple_value")]
    assert [s for s in scalars if s[1] == "total_loss"] == [(4, "total_loss", 0.5), (9, "total_loss", 0.25)]
    ((step, value),) = [(step, value) for step, tag, value in scalars if tag == "AP"]
    assert step == 4 and math.isnan(value)
    images = {tag: (step, v.image) for step, tag, v in values if v.HasField("image")}
    assert (images["bytes"][0], images["bytes"][1].height, images["bytes"][1].width) == (4, 5, 7)
    assert images["bytes"] == images["floats"]
    ((step, tag, value),) = [v for v in values if v[2].HasField("histo")]
    assert (step, tag, value.histo.num, value.histo.min, value.histo.max) == (4, "weights", 10, 0, 9)
    # A TensorBoard that is open forgets what an earlier run wrote from there on.
    starts = [event.step for event in read_events(tmp_path) if event.session_log.status == SessionLog.START]
    assert starts == [4]
    # A resumed run cuts what was written from its start iteration on, and what was written in part.
    monkeypatch.undo()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + path.read_bytes()[:30])
    with EventStorage(9) as storage, closing_all([TensorboardXWriter(str(tmp_path))]):
        storage.put_scalars(AP=1.0, cur_iter=4)
        storage.put_scalar("total_loss", 0.5)
    scalars = [(step, tag) for step, tag, v in tensorboard_values(tmp_path) if v.HasField("simple_value")]
    assert scalars == [(4, "AP"), (4, "total_loss"), (9, "total_loss")]


def test_printer_shows_losses_times_learning_rate_and_the_time_left(log, clock):
    printer = CommonMetricPrinter(max_iter=100)
    with EventStorage() as storage:
        for iteration in (19, 39, 79, 99):
            storage.iter = iteration
            storage.put_scalars(time=0.25, data_time=0.125, total_loss=3.0, loss_mine=torch.tensor(2.0))
            storage.put_scalars(lr=0.0125, **{"val/total_loss": 4.5, "val_loss": 1.5}, smoothing_hint=False)
            printer.write()
            # The time left includes evaluations; the first write has only the time of an iteration.
            clock.now += 500 if iteration == 19 else 0
    shown = "total_loss: 3  loss_mine: 2  val_loss: 1.5  time: 0.2500  data_time: 0.1250  lr: 0.0125"
    assert log.messages == [
        f"eta: 0:00:20  iter: 19  {shown}",
        f"eta: 0:25:00  iter: 39  {shown}",
        f"eta: 0:04:10  iter: 79  {shown}".replace("4:10", "2:46"),
        f"eta: 0:00:00  iter: 99  {shown}",
    ]
    # Of a loop that stores no time it is that of its own clock.
    log.clear()
    printer = CommonMetricPrinter(max_iter=101)
    with EventStorage(20) as storage:
        printer.write()
        clock.now += 40.0
        storage.iter = 40
        printer.write()
        printer.write()
    assert log.messages == ["iter: 20", *["eta: 0:02:00  iter: 40"] * 2]


# ---- beginning and closing writers -----------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_by_name_leaves_no_file_before_it_wrote_and_is_closed_twice(tmp_path, name):
    with EventStorage() as storage:
        WRITERS[name](str(tmp_path), 5).close()
        assert list(tmp_path.iterdir()) == []
        storage.put_scalar("loss", 1.0)
        writer = WRITERS[name](str(tmp_path), 5)
        writer.write()
        writer.close()
        writer.close()
    assert len(list(tmp_path.iterdir())) == (name != "console")


@pytest.mark.parametrize(
    ("ends", "is_written"),
    [(None, False), (None, True), (ZeroDivisionError, False), (KeyboardInterrupt, True)],
)
def test_writers_are_all_closed_and_a_good_end_leaves_nothing_unwritten(ends, is_written):
    calls = Mock()
    calls.b.close.side_effect = OSError("b cannot be closed")
    writers = [calls.a, EventWriter(), calls.b, calls.c]
    with EventStorage() as storage, pytest.raises(OSError, match="b cannot be closed"), closing_all(writers):
        storage.put_scalar("AP", 12.5)
        # A look by others than writers.
        storage.raise_if_nonfinite()
        if is_written:
            storage.latest_with_smoothing_hint()
        if ends:
            raise ends
    writes = [] if ends or is_written else ["write"]
    for writer in (calls.a, calls.b, calls.c):
        assert [name for name, *_ in writer.mock_calls] == ["begin", *writes, "close"]
