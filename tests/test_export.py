"""A model as a Hugging Face folder or a GGUF file: what it says of its text, its ends and its turns, and what is refused."""

import json
import os
import sys
import types

import jax
import numpy as np
import pytest
from exported import MORE, PAGE, Here, leaving, met, on_one, rope, tokenizer_of

from lm_jax import load_model
from lm_jax.convert import (
    export,
    gguf,
    proof,
    safetensors,
    tensor_map,
    text_files,
    transformers_peer,
)
from lm_jax.data import hugging_face_tokenizer, special_ids
from lm_jax.data.special_ids import SpecialIds
from lm_jax.errors import UserError
from lm_jax.generate.decoding import Completion


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
