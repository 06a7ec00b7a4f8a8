"""Folders of safetensors: what is damaged, moved or means harm is refused; what fails while it is written leaves nothing."""

import json
import os
import pathlib
import random
import shutil

import numpy as np
import pytest
from peers import families as parity

from lm_jax.convert import description, hugging_face, safetensors, tensor_map
from lm_jax.errors import UserError


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    content, tensors, _ = parity.recorded("llama")
    described = description.describe(content, "config.json", "bytes")
    ours = tensor_map.parameters(described, tensors, "llama")
    hugging_face.write(str(tmp_path / "model"), described, ours, {}, shard_bytes=20_000)
    return tmp_path / "model"


def load(folder: pathlib.Path) -> dict:
    return hugging_face.read_parameters(str(folder), hugging_face.read_description(str(folder)))


class Canary:
    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle ran')",)


def test_a_pickle_is_refused_with_the_way_out_and_never_runs(folder):
    import pickle

    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary()))
    with pytest.raises(UserError, match="pytorch_model.bin is a pickle.*never read\n.*save_pretrained"):
        load(folder)


@pytest.mark.parametrize("name", ["../model/outside.safetensors", "/etc/passwd", "config.json", "a/b.safetensors"])
def test_an_index_names_files_of_its_own_folder_alone(folder, name):
    index = json.loads((folder / safetensors.INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / safetensors.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="only safetensors files beside it"):
        load(folder)


def write_bytes(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def another(name: str):
    """A whole safetensors file beside the model, with another array under a name that the model has."""
    arrays = {"model.norm.weight": np.full(36, 7, np.float32), "adapter.lora_A": np.zeros(3, np.float32)}
    return lambda folder: safetensors.write_file(str(folder / name), arrays)


def whole_and_index(folder):
    """One file with all arrays, which wins; the index beside it names parts that are not even there."""
    arrays = {
        name: x.read() + (name == "model.norm.weight") for name, x in safetensors.folder_tensors(str(folder)).items()
    }
    for path in folder.glob("model-*.safetensors"):
        path.unlink()
    safetensors.write_file(str(folder / safetensors.WHOLE), arrays)


def renamed(name: str):
    """All arrays in one file of another name, without an index."""

    def change(folder):
        whole_and_index(folder)
        (folder / safetensors.INDEX).unlink()
        (folder / safetensors.WHOLE).rename(folder / name)

    return change


def index(change):
    def changed(folder):
        path = folder / safetensors.INDEX
        content = json.loads(path.read_text())
        change(content["weight_map"])
        path.write_text(json.dumps(content))

    return changed


def moved(named: dict) -> None:
    """The index says another of its files for an array than the one that holds it."""
    named["model.norm.weight"] = next(file for file in named.values() if file != named["model.norm.weight"])


BESIDE = {  # what happens to a folder of several files and an index; by how much its last norm changes, or what is said
    "nothing": (lambda folder: None, 0),
    "a part too many": (another("model-00099-of-00099.safetensors"), 0),
    "another layout": (another("consolidated.safetensors"), 0),
    "an adapter": (another("adapter_model.safetensors"), 0),
    "no safetensors file": (write_bytes("zzz.safetensors", b"nonsense"), 0),
    "an index of PyTorch's": (write_bytes("pytorch_model.bin.index.json", b"{}"), 0),
    "one file and an index": (whole_and_index, 1),
    "one file of another name": (renamed("weights.safetensors"), "weights.safetensors is not read\nwhere it holds the whole"),
    "a part not there": (index(lambda named: named.update(x="model-7.safetensors")), "1 files that are not there: model-7"),
    "a path": (index(lambda named: named.update(x="../x.safetensors")), "only safetensors files beside it"),
    "another part": (index(moved), "does not hold model.norm.weight, which .*index.json says"),
    "an array less": (index(lambda named: named.pop("model.norm.weight")), "missing: norm.weight"),
    "an empty index": (index(lambda named: named.clear()), "is no index of safetensors files"),
}  # fmt: skip


@pytest.mark.parametrize("what", BESIDE)
def test_the_index_or_the_one_file_is_read_and_nothing_beside_it(folder, what):
    change, expected = BESIDE[what]
    before = load(folder)["norm"]["scale"]
    change(folder)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            load(folder)
        return
    np.testing.assert_array_equal(load(folder)["norm"]["scale"], before + expected)
    parts = {path.name for path in folder.glob("model-*.safetensors")} - {"model-00099-of-00099.safetensors"}
    assert set(safetensors.weight_files(str(folder))) == ({safetensors.WHOLE} if expected else parts)


@pytest.mark.parametrize("size", [2**63, 10**12, 100_000_001, 50_000])
def test_a_header_longer_than_its_file_is_refused(folder, size):
    path = min(folder.glob("*.safetensors"))
    path.write_bytes(size.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(UserError, match=f"a header of {size:,} bytes"):
        load(folder)


def test_mutated_folders_are_read_or_refused_and_nothing_else(folder):
    """100 mutants: a byte changed, a file cut short or emptied, a value of the config replaced."""
    draw, refused = random.Random(0), 0
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    for number in range(100):
        path = draw.choice(paths)
        before = path.read_bytes()
        if path.name == "config.json" and number % 3:
            content = json.loads(before)
            key = draw.choice(sorted(content))
            content[key] = draw.choice([None, -1, 0, 10**12, 1e400, "x", [], {}, True, [[[]]]])
            after = json.dumps(content).encode()
        else:
            at = draw.randrange(min(len(before), 400))  # headers, where there is something to break
            after = draw.choice(
                [before[:at], before[:at] + bytes([draw.randrange(256)]) + before[at + 1 :], before + b"\0", b""]
            )
        path.write_bytes(after)
        try:
            load(folder)
        except UserError as error:
            refused += 1
            assert 1 <= len(str(error).split("\n")) <= 5
        path.write_bytes(before)
    assert refused > 50
    load(folder)
    assert sorted(path for path in folder.iterdir()) == paths, "nothing was written"


def test_nothing_is_left_where_writing_fails(tmp_path):
    content, tensors, _ = parity.recorded("llama")
    described = description.describe(content, "config.json", "bytes")
    ours = tensor_map.parameters(described, tensors, "llama")

    def refuse(folder, arrays):
        assert os.listdir(folder) == ["config.json"] and arrays.keys() == tensors.keys(), (
            "proven before arrays are written"
        )
        raise UserError("logits differ")

    with pytest.raises(UserError, match="logits differ"):
        hugging_face.write(str(tmp_path / "out"), described, ours, {}, prove=refuse)
    assert os.listdir(tmp_path) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(UserError, match="there and not empty"):
        hugging_face.write(str(tmp_path / "out"), described, ours, {})
    assert os.listdir(tmp_path / "out") == ["mine"]


def test_a_disk_without_room_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    content, tensors, _ = parity.recorded("llama")
    described = description.describe(content, "config.json", "bytes")
    ours = tensor_map.parameters(described, tensors, "llama")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9 - 5_000, 5_000))
    with pytest.raises(UserError, match="0.00 GB are free there; name another disk"):
        hugging_face.write(str(tmp_path / "new" / "out"), described, ours, {}, lambda *given: pytest.fail("too late"))
    assert os.listdir(tmp_path) == []


def test_what_a_disk_gives_back_in_another_way_gets_no_name(tmp_path, monkeypatch):
    content, tensors, _ = parity.recorded("llama")
    described = description.describe(content, "config.json", "bytes")
    ours, write = tensor_map.parameters(described, tensors, "llama"), safetensors.write_folder

    def broken(folder, tensors, shard_bytes):
        write(folder, tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, shard_bytes)

    monkeypatch.setattr(safetensors, "write_folder", broken)
    with pytest.raises(UserError, match="gave model.norm.weight back in another way"):
        hugging_face.write(str(tmp_path / "out"), described, ours, {})
    assert os.listdir(tmp_path) == []


def test_our_safetensors_are_those_of_the_package(tmp_path):
    package = pytest.importorskip(
        "safetensors.numpy", reason="the package is of the extra [peers]", exc_type=ImportError
    )
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.zeros((0, 4), np.int64),
        "c": np.float16([1, 2]),
    }
    safetensors.write_file(str(tmp_path / "ours"), arrays)
    package.save_file(arrays, tmp_path / "theirs")
    found = package.load_file(tmp_path / "ours")
    mine = {name: x.read() for name, x in safetensors.file_tensors(str(tmp_path / "theirs")).items()}
    for name, x in arrays.items():
        np.testing.assert_array_equal(found[name], x)
        np.testing.assert_array_equal(mine[name], x)
