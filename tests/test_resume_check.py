"""A config that differs from that of the run that is resumed: plaintrain.checkpoint.resume_check."""

import copy

import pytest
import torch
import yaml
from torch import nn

from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.checkpoint.resume_check import check_changes, diff_configs
from plaintrain.data.serialized import SerializedRecords
from plaintrain.utils.errors import UserError

CONFIG = {
    "MODEL": {"META_ARCHITECTURE": "RetinaNet", "FPN": {"OUT_CHANNELS": 64}, "WEIGHTS": "a.pth"},
    "SOLVER": {"BASE_LR": 0.1, "IMS_PER_BATCH": 2, "MAX_EPOCHS": 0, "STEPS": [1, 2]},
    "OUTPUT_DIR": "here",
}


def config(**changes):
    """Return the YAML of CONFIG with `SECTION__KEY=value`."""
    tree = copy.deepcopy(CONFIG)
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (tree[section] if section else tree)[key] = value
    return yaml.safe_dump(tree)


@pytest.fixture
def check(tmp_path):
    """Function (saved config, config, classes, model) that saves a run and checks its continuation."""

    def call(saved, now, classes=("a", "b"), model=None, before=(), data=()):
        metadata = {"config": saved, "class_names": ["a", "b"], "data_hashes": list(before)}
        DetectionCheckpointer(nn.Linear(2, 2), str(tmp_path), metadata=metadata).save(
            "model_final", iteration=7
        )
        check_changes(str(tmp_path), now, list(classes), model or nn.Linear(2, 2, device="meta"), data)

    return call


def test_diff_configs_lists_changes_at_any_depth():
    now = config(SOLVER__BASE_LR=0.2, SOLVER__STEPS=[1], SOLVER__NEW=True)
    assert diff_configs(config(MODEL__OLD="x"), now) == [
        ("MODEL.OLD", "x", "-"),
        ("SOLVER.BASE_LR", 0.1, 0.2),
        ("SOLVER.NEW", "-", True),
        ("SOLVER.STEPS", [1, 2], [1]),
    ]


def test_check_changes_logs_the_changes_and_their_effect(check, log):
    check(config(), config())
    assert "differs" not in log.text
    # A smaller batch is a change like others, in a run that is counted in iterations.
    check(config(), config(SOLVER__IMS_PER_BATCH=4, OUTPUT_DIR="there", MODEL__WEIGHTS="b" * 99))
    assert log.text.partition("differs")[2].splitlines()[1:] == [
        f"  MODEL.WEIGHTS: a.pth -> {'b' * 30}…{'b' * 9} (none: the checkpoint's weights are used)",
        "  OUTPUT_DIR: here -> there (environment)",
        "  SOLVER.IMS_PER_BATCH: 2 -> 4 (from now on)",
    ]


def test_changed_model_is_rejected_if_its_weights_no_longer_fit(check, log):
    now = config(MODEL__FPN={"OUT_CHANNELS": 32})
    check(config(), now)
    with pytest.raises(UserError, match="FPN.OUT_CHANNELS must be 64 as in the resumed run, got 32"):
        check(config(), now, model=nn.Linear(2, 3, device="meta"))
    assert "rejected" in log.text


def test_changes_of_architecture_classes_and_epochs_are_rejected(check):
    with pytest.raises(UserError, match="MODEL.META_ARCHITECTURE must be RetinaNet"):
        check(config(), config(MODEL__META_ARCHITECTURE="FCOS"))
    with pytest.raises(UserError, match="was trained for the classes .*, but the dataset has"):
        check(config(), config(), ("a",))
    with pytest.raises(UserError, match="SOLVER.IMS_PER_BATCH must be 2"):
        check(config(SOLVER__MAX_EPOCHS=3), config(SOLVER__MAX_EPOCHS=3, SOLVER__IMS_PER_BATCH=4))


@pytest.mark.parametrize(
    ("now", "differs"), [([60, "a", "b"], False), ([65, "x", "y"], False), ([60, "a", "y"], True)]
)
def test_changed_annotations_are_reported(check, log, now, differs):
    check(config(), config(), before=[[60, "a", "b"]], data=[now])
    assert ("the annotations of DATASETS.TRAIN differ" in log.text) == differs
    check(config(), config(), data=[now])
    with pytest.raises(UserError, match="the images of DATASETS.TRAIN must be those of"):
        check(config(), config(), before=[[now[0], "other", "b"]], data=[now])


def test_hashes_depend_on_images_and_annotations_but_not_on_the_folder():
    def compute(folder="/a", file_name="b.jpg", width=9, **changes):
        box = {"bbox": [1, 2, 3, 4], "bbox_mode": 0, "category_id": 0, "segmentation": [[1, 2, 3, 4, 5, 6]]}
        names = [f"{folder}/c.jpg", f"{folder}/{file_name}"]
        records = [
            dict(file_name=n, image_id=n, height=9, width=width, annotations=[box | changes]) for n in names
        ]
        return SerializedRecords(records).compute_hashes()

    assert compute() == compute(folder="/x/y") and compute()[0] == 2
    assert compute()[1] != compute(file_name="d.jpg")[1] != compute(width=8)[1] != compute()[1]
    for change in (
        {"bbox": [1, 2, 3, 5]},
        {"category_id": 1},
        {"iscrowd": 1},
        {"segmentation": [[1, 2, 3, 4, 5, 7]]},
    ):
        assert compute(**change)[1] == compute()[1] and compute(**change)[2] != compute()[2]


def test_max_iter_below_the_finished_iterations_is_rejected(check):
    check(config(), config(SOLVER__MAX_ITER=8))
    with pytest.raises(UserError, match=r"MAX_ITER .*at least the 8 iterations of .*model_final\.pth, got 7"):
        check(config(), config(SOLVER__MAX_ITER=7))


def test_folder_without_a_run_is_not_compared(tmp_path, log):
    model = nn.Linear(2, 2)
    check_changes(str(tmp_path), config(), ["a"], model)
    (tmp_path / "model_final.pth").write_bytes(b"damaged")
    check_changes(str(tmp_path), config(), ["a"], model)
    saved = {"model": {"a_extra_state": 3}, "iteration": 1, "config": config()}
    torch.save(saved, tmp_path / "model_final.pth")
    check_changes(str(tmp_path), config(), ["a"], model)
    assert log.text == ""
