"""The stream of a run does not know how it is computed: processes, meshes, workers, and where it was saved."""

import hashlib
import itertools
import json
import sys

import numpy as np
import pytest
from etils import epath
from helpers import ROOT, lines_of, made_up, outputs, start_processes, write_shards
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lm_jax import manifest

ROWS = 8  # of a global batch


@pytest.fixture(scope="module")
def sources(corpus, tmp_path_factory) -> dict[str, float]:
    """Two prepared folders of several shards each, with their weights."""
    folder = tmp_path_factory.mktemp("sources")
    for name, num, seed in (("books", 300, 1), ("code", 150, 2)):
        documents = {"train": made_up(num, seed), "validation": made_up(20, seed + 10)}
        write_shards(folder / name, corpus, documents, 3000)
    return {str(folder / "books"): 0.7, str(folder / "code"): 0.3}


def stream_hash(sources, packing, num_processes=1, mesh=(-1, 1, 1), num_workers=0, first=0, num=20, devices=8) -> str:
    """sha256 over `num` global batches, put together from what the processes hold."""
    arguments = json.dumps([list(sources.items()), packing, mesh, num_workers, first, num])
    rows: dict[int, str] = {}
    line = [sys.executable, str(ROOT / "tests" / "print_rows.py"), arguments]
    for text in outputs(start_processes(line, num_processes, devices)):
        mine = json.loads(text.split("ROWS ")[1].split("\n")[0])
        for row, digest in mine.items():
            assert rows.setdefault(int(row), digest) == digest, "two processes hold different rows of one place"
    assert sorted(rows) == list(range(first, first + num * ROWS))
    return hashlib.sha256("".join(rows[row] for row in sorted(rows)).encode()).hexdigest()


MESHES = {"1x8": (1, 8, 1), "2x4": (2, 4, 1), "4x2": (4, 1, 2), "2x2x2": (2, 2, 2)}


def test_two_processes_see_the_stream_of_one(sources):
    """With a worker each, on a mesh where some devices have the same rows; the product is a proof."""
    expected = stream_hash(sources, "best_fit", devices=1)
    assert stream_hash(sources, "best_fit", 2, MESHES["4x2"], num_workers=1) == expected


@pytest.mark.proof
@pytest.mark.parametrize("way", ["split", "best_fit"])
def test_every_product_of_processes_meshes_and_workers(sources, way):
    """200 global batches each."""
    expected = stream_hash(sources, way, devices=1, num=200)
    for num_processes, mesh, num_workers in itertools.product((1, 2, 4), ("1x8", "2x4", "4x2"), (0, 1, 3)):
        found = stream_hash(sources, way, num_processes, MESHES[mesh], num_workers, num=200)
        print(f"{way} {num_processes} processes, mesh {mesh}, {num_workers} workers: {found[:16]}", flush=True)
        assert found == expected


TRAIN = [
    "--config=experiments/quickstart.py:smoke", "--config.optimizer.decay_over=4", "--config.checkpoint.every=2",
    "--config.evaluate.every=2", "--config.evaluate.prompt=", "--config.data.num_workers=1",
]  # fmt: skip


def train(sources, workdir, num_steps: int, num_processes: int = 1, devices: int = 1) -> str:
    """The output of the leading process."""
    given = f"--config.data.sources={tuple(sources.items())!r}"
    line = [sys.executable, "-u", "-m", "lm_jax.main", *TRAIN, given, f"--workdir={workdir}"]
    line.append(f"--config.train.num_steps={num_steps}")
    return outputs(start_processes(line, num_processes, devices))[0]


def check_resume(sources, tmp_path, num_processes: int) -> None:
    """Two steps by several processes, two more by one; and what the several wrote."""
    train(sources, tmp_path / "run", 2, num_processes, devices=4)
    step = tmp_path / "run" / "checkpoints" / "2"
    parts = [json.loads((step / f"MANIFEST.p{k}.json").read_text()) for k in range(num_processes)]
    joined = json.loads((step / "MANIFEST.json").read_text())["files"]
    assert all(parts) and sum(map(len, parts)) == len(joined) and manifest.invalid_reason(epath.Path(step)) == ""
    said = train(sources, tmp_path / "run", 4)
    assert "resumed at step 2, row 16" in said
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
    last = [line for line in lines if "final/loss" in line][-1]
    assert {"final/books/loss", "final/code/bits_per_byte", "final/bits_per_byte"} <= last.keys()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"eval/books/loss", "eval/code/loss", "eval/code/bits_per_byte"} <= {*events.Tags()["scalars"]}


@pytest.mark.proof  # two minutes, nearly all of them waiting
def test_what_two_processes_saved_one_goes_on_with(sources, tmp_path):
    check_resume(sources, tmp_path, 2)


@pytest.mark.proof
def test_what_four_processes_saved_one_goes_on_with(sources, tmp_path):
    check_resume(sources, tmp_path, 4)
    train(sources, tmp_path / "whole", 4)
    losses = lambda place: [line["train/loss"] for line in lines_of(place) if "train/loss" in line]
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "whole"), rtol=1e-5)
    expected = stream_hash(sources, "split", devices=1, first=16, num=200)
    assert stream_hash(sources, "split", 4, MESHES["2x4"], 1, first=16, num=200) == expected
