"""plaintrain.data.cache: the records of a COCO file come back as they were, or are read anew."""

import errno
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import rank_functions
from processes import Job

from plaintrain.data import DatasetCatalog, MetadataCatalog, cache, register_coco_instances
from plaintrain.data.cache import get_cache_folder, load_cached_records
from plaintrain.data.datasets.coco import read_coco_json
from plaintrain.data.serialized import SerializedRecords


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """The files that were parsed, in order; the cache is empty and takes small files too."""
    monkeypatch.setattr(cache, "_MIN_BYTES", 0)
    monkeypatch.setenv("PLAINTRAIN_CACHE", str(tmp_path / "cache"))
    return []


@pytest.fixture
def read(parsed):
    """Function (files, root, classes) -> (records as a list, metadata), through the cache."""

    def load(json_file, image_root, classes):
        parsed.append(json_file)
        return read_coco_json(json_file, image_root, classes)

    def read(files, root=None, classes=None):
        records, metadata = load_cached_records(load, str(files.json), str(root or files.images), classes)
        assert isinstance(records, SerializedRecords)
        return list(records), metadata

    return read


def _files():
    return sorted(Path(get_cache_folder()).iterdir())


def test_arrays_give_back_every_record(tiny_coco):
    content = tiny_coco.content
    box = {"image_id": 5, "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 0}
    odd = [[[1, 2, 3.5, 4, 5, 6], [7, 8]], [[]], [[10**400, "x"]], "RLE", {"size": [2, 2], "counts": "abc"}]
    content["annotations"] += [{"id": 200 + i, **box, "segmentation": s} for i, s in enumerate(odd)]
    content["annotations"] += [{"id": 300, **box, "score": 0.5, "difficult": 1, "area": 0}]
    content["images"][0]["file_name"] = "weit\u00e4\ud800 \u4e2d..png"
    tiny_coco.save()
    for records in (read_coco_json(str(tiny_coco.json), "root")[0], []):
        plain = SerializedRecords(records)
        packed = SerializedRecords.from_arrays(plain.to_arrays())
        assert list(packed) == records
        for name in ("file_name", "height", "width"):
            assert packed.columns[name].tolist() == plain.columns[name].tolist()
        for name, array in vars(plain.annotations).items():
            np.testing.assert_array_equal(getattr(packed.annotations, name), array)
        # As a worker process gets them, and between other records.
        sent = pickle.loads(pickle.dumps(SerializedRecords.join([plain, packed])))  # noqa: S301 - own bytes
        assert list(sent) == records + records


def test_files_are_parsed_once_and_known_by_their_content(tiny_coco, read, parsed, tmp_path, log):
    first = read(tiny_coco)
    assert first == read_coco_json(str(tiny_coco.json), str(tiny_coco.images))
    # A copy elsewhere.
    tiny_coco.json = tiny_coco.json.rename(tmp_path / "moved.json")
    assert read(tiny_coco) == first and len(parsed) == 1
    assert "from the cache" in log.text
    # Other folders or classes are other records.
    assert read(tiny_coco, root="/data")[0][1]["file_name"] == "/data/empty.png" and len(parsed) == 2
    assert read(tiny_coco, classes=["dog"])[1]["thing_classes"] == ["dog"] and len(parsed) == 3
    # Other content of the same size and time.
    before = tiny_coco.json.stat()
    text = tiny_coco.json.read_text()
    tiny_coco.json.write_text(text.replace("[4, 5, 10.5, 8]", "[9, 5, 10.5, 8]"))
    os.utime(tiny_coco.json, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert tiny_coco.json.stat().st_size == before.st_size
    assert read(tiny_coco)[0][2]["annotations"][0]["bbox"] == [9, 5, 10.5, 8] and len(parsed) == 4


def test_damaged_files_are_never_trusted_and_replaced(tiny_coco, read, parsed, log):
    first, (path,) = read(tiny_coco), _files()
    # In a folder that several users share all may read it.
    umask = os.umask(0o022)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    content = bytearray(path.read_bytes())
    for at in range(40, len(content), 97):
        damaged = content.copy()
        damaged[at] ^= 0x11
        path.write_bytes(damaged)
        assert read(tiny_coco) == first
    for length in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert read(tiny_coco) == first
    assert len(parsed) > 10 and _files() == [path]
    assert f"cannot read the cache file {path}" in log.text


class _Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_hostile_files_in_the_cache_run_nothing(tiny_coco, read, parsed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, path = read(tiny_coco), _files()[0]
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(path, **{**arrays, "labels": np.array([_Payload()], dtype=object)})
    assert read(tiny_coco) == first and len(parsed) == 2
    payload = np.frombuffer(pickle.dumps(_Payload()), dtype=np.uint8)
    np.savez(path, **{**arrays, "data": payload, "ends": np.array([0, len(payload)])})
    with pytest.raises(pickle.UnpicklingError, match=r"plain data, got (posix|nt)\.mkdir"):
        read(tiny_coco)
    assert not os.path.exists("executed")


def test_records_are_read_without_a_cache(tiny_coco, read, parsed, monkeypatch, tmp_path, log):
    monkeypatch.setenv("PLAINTRAIN_CACHE", "")
    first = read(tiny_coco)
    assert read(tiny_coco) == first
    assert not log.records
    # Small files are not kept.
    monkeypatch.setenv("PLAINTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_MIN_BYTES", 10**6)
    read(tiny_coco)
    assert not os.path.exists(get_cache_folder())
    monkeypatch.setattr(cache, "_MIN_BYTES", 0)

    # Neither are files that change while they are read.
    def load(json_file, image_root, classes):
        found = read_coco_json(json_file, image_root, classes)
        tiny_coco.json.write_text(json.dumps(tiny_coco.content) + " ")
        return found

    load_cached_records(load, str(tiny_coco.json), str(tiny_coco.images))
    assert not os.path.exists(get_cache_folder())

    def save(file, **arrays):
        file.write(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", save)
    assert read(tiny_coco) == first
    assert _files() == []
    assert "cannot write the cache (cannot write " in log.text and "No space left on device" in log.text
    assert len(parsed) == 4
    monkeypatch.delenv("PLAINTRAIN_CACHE")
    monkeypatch.setenv("HOME", "/home/her")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert get_cache_folder() == "/home/her/.cache/plaintrain"
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert get_cache_folder() == "/fast/plaintrain"


def test_one_rank_of_a_machine_parses(tiny_coco, tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    tiny_coco.json.rename(folder / "instances.json")
    env = {"PLAINTRAIN_CACHE": str(tmp_path / "cache")}
    job = Job(rank_functions.read_through_cache, folder, env=env, num_gpus_per_machine=2).wait(code=0)
    first, second = job.results()
    assert (first["parsed"], second["parsed"]) == (1, 0)
    assert first["boxes"] == second["boxes"] and len(first["boxes"]) == 4


def test_registered_datasets_are_read_through_the_cache(tiny_coco, parsed, log):
    for name in ("one", "two"):
        register_coco_instances(name, {"thing_classes": ["dog", "cat"]}, str(tiny_coco.json), "pictures")
        assert DatasetCatalog.get(name)[0]["file_name"] == "pictures/more/upright.png"
        assert MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id == {7: 0, 3: 1}
    assert log.text.count("from the cache") == 1
