"""Other people's weights on a mesh: each device has its part to the bit, and no process holds a model that it reads."""

import json
import math
import sys

import jax
import numpy as np
import pytest
from flax.nnx.traversals import flatten_mapping
from helpers import LLAMA, ROOT, outputs, start_processes, tiny
from peers import families as parity

from lm_jax.config import Mesh
from lm_jax.convert import description, hugging_face, safetensors, tensor_map
from lm_jax.mesh import make_mesh
from lm_jax.train_state import abstract, make_program


def with_other_numbers(tensors: dict) -> dict:
    """Another number in every place, so that nothing that lands elsewhere is equal by chance."""
    chance = np.random.default_rng(0)
    return {name: chance.random(x.shape).astype(np.float32) for name, x in tensors.items()}


@pytest.mark.parametrize(
    ("name", "at_once"),
    [
        *(pytest.param(name, 2**24, id=f"{name}, whole") for name in parity.FIRST),
        *(
            pytest.param(name, 1, id=f"{name}, row by row", marks=[] if name == "mixtral" else pytest.mark.proof)
            for name in parity.FIRST
        ),
    ],
)
def test_on_every_mesh_a_device_has_its_part_to_the_bit(name, at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_map, "AT_ONCE", at_once)
    content, tensors, _ = parity.recorded(name)
    described = description.describe(content, name, "bytes")
    safetensors.write_folder(str(tmp_path), with_other_numbers(tensors), shard_bytes=20_000)
    whole = hugging_face.read_parameters(str(tmp_path), described)
    program = make_program(described.config, described.vocab_size)
    for mesh in (Mesh(2, 2, 1), Mesh(1, 2, 1)) if at_once > 1 else (Mesh(2, 2, 1),):
        with jax.set_mesh(make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor])):
            like = abstract(program).parameters
            found = hugging_face.read_on_mesh(str(tmp_path), described, like)
            for x, expected, wanted in zip(*map(jax.tree.leaves, (found, like, whole)), strict=True):
                assert x.sharding == expected.sharding and x.dtype == np.float32
                np.testing.assert_array_equal(np.asarray(x), wanted)


class Asked:
    """One of their tensors that notes when it is read."""

    def __init__(self, name: str, x: np.ndarray, names: list[str]):
        self.name, self.x, self.names, self.shape = name, x, names, x.shape

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        self.names.append(self.name)
        return self.x


@pytest.mark.parametrize("name", parity.FIRST)
def test_a_part_of_a_parameter_asks_for_the_tensors_of_that_part(name):
    """Of every parameter a half of each dim, as a device has it: no tensor of another layer, and each once."""
    content, tensors, _ = parity.recorded(name)
    tensors, names = with_other_numbers(tensors), []
    described = description.describe(content, name, "bytes")
    whole = flatten_mapping(tensor_map.parameters(described, tensors, name))
    asked = {key: Asked(key, x, names) for key, x in tensors.items()}
    for path, x in tensor_map.stored(described, asked, name).items():
        for bounds in ([(n // 2, n) for n in x.shape], [(0, max(1, n // 2)) for n in x.shape]):
            names.clear()
            np.testing.assert_array_equal(x.read(bounds), whole[path][tuple(slice(*both) for both in bounds)])
            num_stacked = len(next(iter(x.parts)))
            assert len(names) == np.prod([end - first for first, end in bounds[:num_stacked]], dtype=int)


SHARD = 64 * 2**20  # bytes


@pytest.mark.proof
@pytest.mark.parametrize(("num_processes", "mesh"), [(1, (1, 1, 1)), (1, (1, 8, 1)), (2, (1, 8, 1)), (4, (1, 4, 2))])
def test_no_process_holds_a_model_that_it_reads(num_processes, mesh, tmp_path, monkeypatch):
    """Eight files of 64 MB: beside the arrays of its devices a process needs less than one and a half of them."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")  # what is freed goes back: what is measured is what is held
    sizes = dict(
        model__num_layers=11, model__model_dim=1024, model__mlp_dim=2816, model__num_heads=16, model__num_kv_heads=16
    )
    config = tiny(**LLAMA | sizes | {"data__tokenizer": "bytes"})
    described = description.description_of(config, 4096)
    places = tensor_map.slots(description.FAMILIES[described.family], description.graph_of(described))
    chance = np.random.default_rng(0)
    tensors = {x.name: chance.random(x.their_shape(described.vocab_size), np.float32) for x in places}
    safetensors.write_folder(str(tmp_path), tensors, SHARD)
    (tmp_path / "config.json").write_text(json.dumps(described.content))
    assert len(list(tmp_path.glob("*.safetensors"))) >= 8
    line = [
        sys.executable,
        str(ROOT / "tests" / "import_folder.py"),
        json.dumps({"folder": str(tmp_path), "mesh": mesh}),
    ]
    texts = outputs(start_processes(line, num_processes, math.prod(mesh)))
    for text in texts:
        told = json.loads(text.split("TOLD ")[1].split("\n")[0])
        beyond = told["peak"] - told["held"]
        print(
            f"{num_processes} processes, mesh {mesh}: {beyond / 2**20:.0f} MB beyond {told['held'] / 2**20:.0f} MB",
            flush=True,
        )
        assert told["held"] < 1.05 * told["whole"] / num_processes and beyond < 1.5 * SHARD
