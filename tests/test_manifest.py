"""A step is hashed by those that write it and verified by those that read it: each its share, each what it reads."""

import base64
import hashlib
import itertools
import json
import random
import shutil
import subprocess
import sys

import jax
import pytest
from etils import epath
from helpers import LIMIT, ROOT, outputs, start_processes, tiny
from save_and_restore import digest, run_program

from lm_jax import checkpoint, distributed, load_model, manifest, remote, step_folders
from lm_jax.config import Mesh
from lm_jax.errors import UserError
from lm_jax.mesh import make_mesh

MESHES = {"8x1": (8, 1, 1), "2x4": (2, 4, 1), "1x8": (1, 8, 1), "2x2x2": (2, 2, 2)}


def told(num_processes: int, mesh: str, **what) -> list[dict]:
    """What each of the processes of `save_and_restore.py` says."""
    arguments = json.dumps(
        {"mesh": MESHES[mesh]} | {name: x if name == "steps" else str(x) for name, x in what.items()}
    )
    line = [sys.executable, str(ROOT / "tests" / "save_and_restore.py"), arguments]
    texts = outputs(start_processes(line, num_processes, 8))
    return [json.loads(text.split("TOLD ")[1].split("\n")[0]) for text in texts]


def files_in_manifest(place, step: int) -> dict[str, dict]:
    return json.loads((epath.Path(place) / "checkpoints" / str(step) / "MANIFEST.json").read_text())["files"]


def check_shares(said: list[dict], what: str, place, steps) -> None:
    """Every file of these steps was hashed by one process, and where there is enough to do each had something."""
    names = [f"{step}/{name}" for step in steps for name in files_in_manifest(place, step)]
    assert sorted(itertools.chain(*(process[what] for process in said))) == sorted(names)
    assert all(process[what] for process in said)


def test_what_two_processes_saved_is_verified_in_shares_and_restored_by_any_number(tmp_path, eight):
    """A bit of a file that falls to the second process turned: both fall back to the step before."""
    saved = told(2, "2x4", save=tmp_path, steps=[3, 5])
    check_shares(saved, "written", tmp_path, (3, 5))
    assert all(manifest.writer_of(name) == k for k, process in enumerate(saved) for name in process["written"])
    mine, theirs = manifest.shared_out(files_in_manifest(tmp_path, 5), 2)
    path = tmp_path / "checkpoints" / "5" / theirs[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    found = told(2, "8x1", restore=tmp_path)
    assert found[0]["said"] == [
        f"checkpoint 5 is broken: {theirs[0]} is not as it was written; set aside, trying the one before"
    ]
    verified = [{name for name in process["verified"] if name.startswith("5/")} for process in found]
    assert verified == [{f"5/{name}" for name in share} for share in (mine, theirs)]
    for process in found:
        assert process["step"] == 3 and process["state"] == saved[0]["state"] and process["data"] == saved[0]["data"]
    with jax.set_mesh(make_mesh(Mesh(*MESHES["1x8"]), eight)):
        state, data = checkpoint.restore(epath.Path(tmp_path), 3, run_program())
        assert digest(state) == saved[0]["state"] and data[:3] == (3, 7, ((3, 5),))


@pytest.mark.proof
def test_every_product_of_processes_and_meshes_is_restored_to_the_bit(tmp_path):
    """1, 2 and 4 processes: from every number to every other, and to every mesh."""
    for writers, written in ((4, "2x4"), (2, "2x2x2"), (1, "8x1")):
        place = tmp_path / f"{writers}"
        saved = told(writers, written, save=place)
        check_shares(saved, "written", place, (3,))
        for readers, read in itertools.product((1, 2, 4), MESHES):
            again = tmp_path / f"{writers}-{readers}-{read}"
            found = told(readers, read, restore=place, save=again)
            check_shares(found, "verified", place, (3,))
            check_shares(found, "written", again, (3,))
            for process in found:
                assert (process["state"], process["data"]) == (saved[0]["state"], saved[0]["data"])
            back = told(writers, written, restore=again)
            assert {process["state"] for process in back} == {saved[0]["state"]}
            print(
                f"{writers} processes {written} -> {readers} processes {read} and back: {back[0]['state'][:16]}",
                flush=True,
            )


@pytest.mark.proof
def test_in_a_bucket_nothing_is_read_back_and_every_damage_is_found(bucket, tmp_path):
    """Two processes save; what the manifest says is the MD5 of what is there; one process finds each of the damages."""
    place = epath.Path(f"{bucket}/runs/shares")
    saved = told(2, "2x4", save=place)
    assert [process["written"] for process in saved] == [[], []]
    step, files = place / "checkpoints" / "3", files_in_manifest(place, 3)
    assert len(files) == len(manifest.names_below(step)) > 100
    for name, file in files.items():
        raw = (step / name).read_bytes()
        assert file == {"bytes": len(raw), "md5": hashlib.md5(raw).hexdigest()}
    parts = [json.loads((step / f"MANIFEST.p{k}.json").read_text()) for k in range(2)]
    assert sum(map(len, parts)) == len(files) and all(len(part) > len(files) / 4 for part in parts)
    for readers, mesh in ((1, "8x1"), (2, "1x8")):
        found = told(readers, mesh, restore=place)
        check_shares(found, "verified", place, (3,))
        assert {process["state"] for process in found} == {saved[0]["state"]}
    chance = random.Random(0)
    for name in chance.sample(sorted(files), 3):
        raw = bytearray((step / name).read_bytes())
        turned = bytes(raw[:-1]) + bytes([raw[-1] ^ 1])
        for content in (turned, bytes(raw[:-1])):
            (step / name).write_bytes(content)
            assert manifest.invalid_reason(step) == f"{name} is not as it was written"
        (step / name).unlink()
        assert manifest.invalid_reason(step) == f"{name} is missing"
        (step / name).write_bytes(bytes(raw))
    assert manifest.invalid_reason(step) == ""
    (step / files.popitem()[0]).unlink()
    with pytest.raises(UserError, match="no checkpoint in .* is whole"):
        step_folders.newest_valid(place, print, quarantine=True)
    assert not step.exists() and (place / "checkpoints" / "3.broken" / "MANIFEST.json").exists()


SIZES = {
    "none": [],
    "one": [5],
    "fewer than processes": [5, 3],
    "equal": [4] * 16,
    "one large": [1000, *[1] * 50],
    "empty files": [0] * 9,
    "all kinds": [2**k for k in range(20)],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_have_each_file_once_and_nearly_the_same_bytes(sizes, count):
    files = {f"f{i}": {"bytes": size} for i, size in enumerate(sizes)}
    shares = manifest.shared_out(files, count)
    assert shares == manifest.shared_out(dict(reversed(files.items())), count)  # the order of a dict does not enter
    assert len(shares) == count and sorted(itertools.chain(*shares)) == sorted(files)
    loads = [sum(files[name]["bytes"] for name in share) for share in shares]
    fullest = [
        files[name]["bytes"] for name in max(shares, key=lambda share: sum(files[name]["bytes"] for name in share))
    ]
    assert sum(fullest) - min(fullest, default=0) <= min(loads)  # its last file went to who had least


def test_a_file_of_a_step_that_its_manifest_does_not_know_is_damage(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (step,) = (tmp_path / "run" / "checkpoints").iterdir()
    (step / "parameters" / "more").write_bytes(b"x")
    assert manifest.invalid_reason(epath.Path(step)) == "parameters/more is not as it was written"
    with pytest.raises(UserError, match="whole"):
        load_model.locate(str(tmp_path / "run"), lambda line: None)


WRITERS = {
    "parameters/ocdbt.process_0/d/a": 0,
    "parameters/ocdbt.process_3/d/a": 3,
    "optimizer/ocdbt.process_12/manifest.ocdbt": 12,
    "optimizer/array_metadatas/process_7": 7,
    "optimizer/d/abc": 0,
    "data/metadata": 0,
    "_CHECKPOINT_METADATA": 0,
}


@pytest.mark.parametrize("name", WRITERS)
def test_who_wrote_a_file_on_a_disk(name):
    assert manifest.writer_of(name) == WRITERS[name]


@pytest.mark.parametrize(
    ("about", "found"),
    [
        (
            {"size": 3, "md5Hash": base64.b64encode(hashlib.md5(b"abc").digest()).decode()},
            hashlib.md5(b"abc").hexdigest(),
        ),
        ({"size": 3, "crc32c": "7aMT0Q=="}, None),  # joined from parts: its MD5 is not known
        ({"size": 3, "ETag": '"900150983cd24fb0d6963f7d28e17f72"'}, None),  # of another store
    ],
)
def test_what_a_store_says_of_an_object(about, found):
    assert remote.store_hash(about) == (found and {"bytes": 3, "md5": found})


# {who answers what: what all of them are told}; a number is an OSError's.
ANSWERS = {
    "nothing": (["", "", ""], ""),
    "the leading one": (["a", "", ""], "a"),
    "the last one": (["", "", "c"], "c"),
    "several": (["", "b", "c"], "b"),
    "cannot be read": (["", 5, "c"], OSError),
    "the leading one cannot": ([13, "b"], OSError),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_all_processes_have_the_first_answer(case, monkeypatch):
    """As each of the processes: what it asks, beside what the others sent."""
    answers, expected = ANSWERS[case]
    sent = [[x, "refused", "a file"] if isinstance(x, int) else [0, x, ""] for x in answers]
    monkeypatch.setattr(distributed, "share", lambda: (0, len(answers)))
    for k, mine in enumerate(answers):

        def ask(mine=mine) -> str:
            if isinstance(mine, int):
                raise OSError(mine, "refused", "a file")
            return mine

        def everyone(value, about, k=k) -> list:
            assert value == sent[k]
            return sent

        monkeypatch.setattr(distributed, "everyone", everyone)
        if expected is OSError:
            with pytest.raises(OSError, match="refused: 'a file'"):
                distributed.first_answer(ask, "a question")
        else:
            assert distributed.first_answer(ask, "a question") == expected


# {what changes: what of a step is read for the parameters that are the model}
READ = {
    "as it is": ({}, {"parameters"}),
    "an average": ({"optimizer__ema": 0.9}, {"optimizer"}),
    "an average of a part": ({"optimizer__ema": 0.9, "optimizer__trainable": "mlp"}, {"optimizer", "parameters"}),
    "a part": ({"optimizer__trainable": "mlp"}, {"parameters"}),
}


@pytest.mark.parametrize("case", READ)
def test_what_is_read_for_a_model(case, corpus):
    changes, expected = READ[case]
    located = load_model.ModelRef(epath.Path("x"), 0, tiny(**changes), corpus.tokenizer)
    assert load_model.items_read(located) == expected
    assert load_model.items_read(located._replace(base=located)) == {"parameters"}


# {a file of a step: whether `evaluate` and `generate` refuse a run where it is damaged}
DAMAGES = {
    "parameters/_METADATA": True,
    "parameters/manifest.ocdbt": True,
    "parameters/ocdbt.process_0/d/*": True,
    "_CHECKPOINT_METADATA": True,
    "MANIFEST.json": True,
    "optimizer/_METADATA": False,
    "optimizer/ocdbt.process_0/d/*": False,
    "optimizer/manifest.ocdbt": False,
    "data/metadata": False,
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("how", ["turned", "gone"])
def test_only_what_is_read_is_verified(finished, tmp_path, name, how):
    """Training reads all of a step; who only wants the model does not ask for the optimizer's state."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (step,) = (run / "checkpoints").iterdir()
    path = max(step.glob(name), key=lambda path: path.stat().st_size)
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1])) if how == "turned" else path.unlink()
    if how == "gone" and name == "MANIFEST.json":
        assert step_folders.complete_steps(epath.Path(run / "checkpoints")) == []
        return
    assert manifest.invalid_reason(epath.Path(step))
    for model in (str(run), f"{run}@{step.name}"):
        if DAMAGES[name]:
            with pytest.raises(UserError, match="whole"):
                load_model.locate(model, lambda line: None)
        else:
            assert load_model.locate(model).step == int(step.name)


@pytest.mark.proof
def test_memory_does_not_grow_over_fifty_saves():
    """In a process of its own, whose memory is kept as that of a run is."""
    line = ["tools/benchmark", "save", "--layers", "2", "--width", "256", "--rounds", "1", "--saves", "50"]
    result = subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    found = json.loads(result.stdout.strip().split("\n")[-1])
    print(found)
    assert found["saves"] == 50 and found["growth"] < 0.02, found
