"""Decoding apart is not decoding together: what continues a text is what the whole has more than its start, in every path."""

import jax
import numpy as np
import pytest
import tokenizer_shapes as shapes
from helpers import tiny

from lm_jax.config import Mesh
from lm_jax.data import hugging_face_tokenizer, objectives, shard_writer, shards, tokenizer
from lm_jax.data.packing import HeldOutRows
from lm_jax.data.special_ids import SpecialIds
from lm_jax.data.tokenizer import continuation
from lm_jax.evaluator import Evaluator, by_source
from lm_jax.generate import beam_search
from lm_jax.generate.command import grown
from lm_jax.generate.decoding import complete, stream, written_by
from lm_jax.generate.growing_text import GrowingText
from lm_jax.generate.sampling import GREEDY
from lm_jax.mesh import make_mesh
from lm_jax.model.build import build

LOSSLESS = ["llama3", "gpt2", "llama's model", "gemma's model"]
LOSES = {  # what each says that it loses; "..." = among others
    "llama2": ("the character U+2581",),
    "mistral": ("spaces at the ends", "the character U+2581"),  # as in transformers: it puts no space before one
    "gemma3": ("the character U+2581",),
    "t5": ("line breaks", "spaces beside each other", "tabs", "characters without a piece", ...),
    "bert": ("line breaks", "capital letters", "characters without a piece", ...),
}
SENTENCE = "The capital of France is Paris, naïve café"


@pytest.fixture(scope="module")
def made():
    def one(name: str) -> tokenizer.Tokenizer:
        file, its = shapes.content(name)
        kind = hugging_face_tokenizer.HuggingFace if file.endswith("json") else tokenizer.SentencePiece
        return kind(its, tokenizer.Stated("<|eot_id|>" if name == "llama3" else "<~stop here~>"))

    return {name: one(name) for name in shapes.SHAPES}


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_a_text_in_two_parts_is_the_text(name, made):
    """Wherever its ids are parted: start and continuation are together what the whole is."""
    by = made[name]
    ids = by.encode(SENTENCE)
    for cut in range(len(ids) + 1):
        start = by.decode(ids[:cut]).rstrip("\ufffd")  # half a character belongs to what completes it
        assert start + continuation(by, ids[:cut], ids[cut:]) == by.decode(ids)
    assert continuation(by, [], ids) == by.decode(ids)


@pytest.mark.parametrize(
    "name", ["llama2", "mistral", "gemma3", "t5", "bert", "llama's model", "a model alone", "gpt2"]
)
def test_a_word_that_continues_a_prompt_keeps_its_space(name, made):
    """The instance of the issue, and words, marks and line breaks after prompts of other ends."""
    by = made[name]
    lower = str.lower if name == "bert" else str
    for prompt, more in (
        ("The capital of France is", " Paris"),
        ("The king", " is"),
        ("import os", " return"),
        ("a", " a"),
    ):
        before, after = by.encode(lower(prompt)), by.encode(lower(more.strip()))
        if name in ("gemma3", "gpt2"):
            after = by.encode(more)  # no space before a text: what continues it brings its own
        assert lower(prompt) + continuation(by, before, after) == lower(prompt + more)
        assert not by.decode(after).startswith(" ") or name in ("gemma3", "gpt2")


@pytest.mark.parametrize("name", ["llama's model", "a model alone", "gemma's model"])
def test_a_sentencepiece_model_gives_back_every_text(name, made):
    """With a space before every text or without: as many spaces as there were, and U+2581 as itself."""
    texts = ["a b", " a", "  a  ", "", " ", "▁", "▁a", "a▁b", "▁▁ a▁ b▁", "\n a\n", "猫▁猫", "é"]
    for text, ids in zip(texts, made[name].encode_batch(texts), strict=True):
        assert made[name].decode(ids) == text
        np.testing.assert_array_equal(ids, made[name].encode(text))


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma3", "llama's model", "llama3", "gpt2"])
def test_a_character_that_is_cut_comes_whole_in_a_stream(name, made):
    by, text = made[name], "is 猫🙂 a"
    before, ids = by.encode("The king"), by.encode(text)
    shown: list[str] = []
    so_far = ""
    for num in range(1, len(ids) + 1):
        now = written_by(by, before, ids[:num], ids[:num], 99, (), ())[0].text
        so_far += grown(so_far, now.rstrip("\ufffd"), shown.append)
    assert len(ids) > 7 and "".join(shown) == so_far == continuation(by, before, ids)
    assert "猫" in shown and "🙂" in shown and not any("\ufffd" in part for part in shown)


def test_what_is_written_at_last_is_shown_though_it_be_half():
    shown: list[str] = []
    assert grown("ab", "abc\ufffd", shown.append) == "c\ufffd" and shown == ["c\ufffd"]
    assert grown("abc", "abc", shown.append) == "" and len(shown) == 1 and grown("", "x", None) == "x"


def test_a_stop_string_may_begin_with_the_space_that_the_first_word_brings(made):
    by = made["llama's model"]
    before, ids = by.encode("The capital of France is"), by.encode("Paris")
    text, ended = written_by(by, before, ids, ids, 99, (" Par",), ())
    assert text.text == "" and ended
    assert written_by(by, before, ids, ids, 99, (), ())[0].text == " Paris"


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma3", "llama's model", "llama3", "gpt2"])
def test_a_growing_text_is_the_continuation_and_ends_before_a_stop_string(name, made):
    """Token by token, with a stop string across tokens; what may become one waits, and comes where it does not."""
    by, text = made[name], "is 猫🙂 a b ab naïve"
    before, ids = by.encode("The king"), by.encode(text)
    whole = continuation(by, before, ids)
    for stop in ("", "\u732b🙂 a", "b ab n", "naive", "b abc"):
        growing, parts = GrowingText(by, before, (stop,) if stop else ()), []
        for token in ids:
            growing.add(int(token))
            parts.append(growing.take())
            if growing.stopped:
                break
        growing.end()
        parts.append(growing.take(everything=True))
        found = stop and stop in whole
        assert "".join(parts) == (whole[: whole.index(stop)] if found else whole) and growing.stopped == bool(found)
        assert not any("\ufffd" in part for part in parts)


@pytest.fixture(scope="module")
def model(made):
    by = made["llama's model"]
    graph = build(tiny(model__positions="rotary", model__init_scale=0.2).model, by.vocab_size, 64)
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        yield graph, jax.jit(lambda: graph.init(jax.random.key(0), sharded=True))(), by


def test_every_path_writes_what_the_whole_has_more_than_the_prompt(model):
    """Greedy, streamed and by beams: a prompt and its continuation decode together to prompt + text."""
    graph, parameters, by = model
    prompts, marks = ["The capital of France is", "a", "def f(x):"], SpecialIds((1,), (), 1, (2,))
    found = {
        "greedy": complete(graph, parameters, by, prompts, 12, GREEDY, marks=marks),
        "stream": list(stream(graph, parameters, by, prompts, 12, GREEDY, tokens_at_once=4, marks=marks))[-1],
        "beams": beam_search.search(graph, parameters, by, prompts, 12, 2, 1.0, marks),
    }
    brought = []
    for completions in found.values():
        for prompt, one in zip(prompts, completions, strict=True):
            assert prompt + one.text == by.decode([1, *by.encode(prompt), *one.tokens])
            brought.append(by.decode(one.tokens) != one.text)
    assert any(brought), "no text begins with a space: the test would see nothing"
    assert found["greedy"] == found["stream"]


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_what_a_tokenizer_loses_is_said_in_one_line(name, made):
    said: list[str] = []
    tokenizer.tell_losses(made[name], said.append)
    expected = LOSES.get(name, ())
    if not expected or name in LOSSLESS:
        assert said == []
        return
    [line] = said
    assert line.startswith("the tokenizer loses text: ") and all(x in line for x in expected if x is not ...)
    assert ... in expected or made[name].losses == expected


def corpus_of(by, texts: list[str], folder):
    writer = shard_writer.ShardWriter(str(folder), by)
    for text in texts:
        writer.add("validation", by.encode(text), len(text.encode()))
    writer.close(source="here", left_out={})
    return shards.read(str(folder), "make it again")


@pytest.mark.parametrize("name", ["t5", "llama's model", "gpt2"])
def test_bits_per_byte_count_the_bytes_of_the_text(name, made, tmp_path):
    """Of a whole corpus; of some of its rows only where the pieces add up to the text."""
    by, texts = made[name], ["A line\n\nand  a cat 猫, " * 9, "Once upon a time\n" * 9, "x = [1, 2]\n" * 9]
    split = corpus_of(by, texts, tmp_path / "corpus").splits["validation"]
    held = HeldOutRows(split, 64, by.document_id)
    graph, mesh = build(tiny().model, by.vocab_size, 64), make_mesh(Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        parameters = jax.jit(lambda: graph.init(jax.random.key(0), sharded=True))()
        evaluator = Evaluator(graph, mesh, by, 2)
        whole, part = evaluator(parameters, held), evaluator(parameters, held, num_rows=2)
    size = sum(len(text.encode()) for text in texts)
    bits = whole.loss / np.log(2) / size
    assert whole.num_bytes == size and whole.metrics("eval")["eval/bits_per_byte"] == pytest.approx(bits)
    assert held.num_rows > 2 and ("eval/bits_per_byte" in part.metrics("eval")) == (name == "gpt2")
    assert ("eval/bits_per_byte" in by_source({"a": whole, "b": part}, "eval")) == (name == "gpt2")


@pytest.mark.parametrize("name", ["mistral", "llama's model"])
def test_a_word_begins_where_its_piece_brings_the_space(name, made):
    """Whole words are hidden by the pieces that begin one; a Llama's decoder leaves the space of a lone piece out."""
    starts = objectives.starts_of_words(made[name])
    piece = made[name]._tokenizer.id_to_token if name == "mistral" else made[name]._processor.id_to_piece
    pieces = {i: piece(i) for i in range(made[name].vocab_size)}
    spaced = [i for i, text in pieces.items() if text.startswith("▁") and text[1:].isalpha()]
    inside = [i for i, text in pieces.items() if text.isalpha()]
    assert spaced and inside and starts[spaced].all() and not starts[inside].any()


def test_a_special_name_in_a_text_brings_no_space_into_it():
    """A model whose words hold a special token, and which puts a space before every text: the name is text, in one piece."""
    tokenizers = pytest.importorskip("tokenizers")
    words = [("<unk>", 0.0), ("</s>", -0.1), *((c, -5.0) for c in "</s>ab▁[]UNK")]
    found = tokenizers.Tokenizer(tokenizers.models.Unigram(words, 0))
    found.add_special_tokens(["<unk>", "</s>"])
    found.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    found.decoder = tokenizers.decoders.Metaspace("▁", prepend_scheme="always")
    by = hugging_face_tokenizer.HuggingFace(found.to_str().encode(), tokenizer.Stated("</s>"))
    for text in ("a</s>b", "</s>", "a </s></s> b", "<unk>a"):
        ids = by.encode(text)
        assert not {*by.special.values()} & {*ids.tolist()} or text == "<unk>a"
        assert by.decode(ids).replace("unk", "") == text.replace("unk", "")
