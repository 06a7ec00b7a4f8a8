"""Every tokenizer gives back every byte of every script, and text cannot spell a special token."""

import hashlib
import json

import numpy as np
import pytest
from chat_templates import CHINESE, byte_level, library
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lm_jax import checkpoint, run_folder
from lm_jax.data import hugging_face_tokenizer, special_ids, tokenizer, tokenizer_files, tokenizer_training
from lm_jax.errors import UserError

OTHERS = (
    "日本語のテスト。한국어 문장. Привет, мир! שלום עולם. مرحبا بالعالم। नमस्ते दुनिया। Γειά σου Κόσμε· ภาษาไทย 🙂👩‍👩‍👧"
)
CODE = "def f(x):\n\treturn 'né▁e' * x  #  two  spaces\n"
AWKWARD = [
    "",
    " ",
    "\n\n",
    "▁▁ a▁b",
    "<|endoftext|>",
    "</s>",
    "[SEP] [CLS]",
    "\x00\x01",
    "<0x41>",
    "\r\n",
    " \n \n",
    "\u200b",
]


@pytest.fixture(scope="module")
def made():
    texts = [*library(), CHINESE]
    return {
        "bpe": tokenizer_training.make("sentencepiece:600", texts),
        "unigram": tokenizer_training.make("unigram:600", texts),
        "bytes": tokenizer_training.make("bytes", []),
    }


@pytest.fixture(params=["bpe", "unigram", "bytes", "hugging_face"])
def one(request, made) -> tokenizer.Tokenizer:
    if request.param == "hugging_face" and request.param not in made:
        made[request.param] = hugging_face_tokenizer.HuggingFace(byte_level())
    return made[request.param]


@pytest.mark.parametrize("text", [CHINESE, OTHERS, CODE, *AWKWARD, CODE * 50 + CHINESE * 50])
def test_text_of_every_script_comes_back(one, text):
    ids = one.encode(text)
    assert one.decode(ids) == text
    assert ids.dtype == np.int32 and one.bytes_per_piece[ids].sum() == len(text.encode())
    assert one.document_id not in ids, "a text spelled the mark between documents"


def test_any_text_comes_back(one):
    @settings(max_examples=150, deadline=None)
    @given(st.text())
    @example("▁")
    def check(text):
        assert one.decode(one.encode(text)) == text

    check()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_chinese_has_no_unknown_piece(made, kind):
    unknown = made[kind]._processor.unk_id()
    assert unknown not in made[kind].encode(CHINESE + OTHERS)
    assert made["bytes"].encode("，").tolist() == [0xEF, 0xBC, 0x8C]


def test_half_a_character_is_not_lost_silently(one):
    ids = one.encode("€")
    if len(ids) > 1:
        assert one.decode(ids[:1]) == "\ufffd"


def test_a_batch_is_encoded_as_each_text_alone(one):
    texts = ["def f(x):\n    return x\n", "", "a \u2581 b", "tail", "\u2581\u2581"]
    for text, ids in zip(texts, one.encode_batch(texts), strict=True):
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, one.encode(text))


def test_pieces_beyond_the_vocabulary_and_the_mark_are_no_text(one):
    ids = [one.document_id, *one.encode("ab"), one.vocab_size, one.vocab_size + 5]  # a padded model may draw them
    assert one.decode(ids) == "ab"


def test_a_name_is_encoded_as_if_there_were_no_such_token():
    tokenizers = pytest.importorskip("tokenizers")
    described = json.loads(byte_level())
    described["added_tokens"] = []
    plain = tokenizers.Tokenizer.from_str(json.dumps(described | {"truncation": None}))
    text = "say <|endoftext|>, </s> or <|im_start|>user"
    assert hugging_face_tokenizer.HuggingFace(byte_level()).encode(text).tolist() == plain.encode(text).ids


def test_a_name_in_the_words_of_a_unigram_model_is_taken_apart():
    tokenizers = pytest.importorskip("tokenizers")
    words = [("<unk>", 0.0), ("</s>", -0.1), *((c, -5.0) for c in "</s>abc ")]
    described = tokenizers.Tokenizer(tokenizers.models.Unigram(words, 0))
    described.add_special_tokens(["</s>"])
    described.decoder = tokenizers.decoders.Fuse()
    made = hugging_face_tokenizer.HuggingFace(described.to_str().encode())
    assert made.encode("a</s>b").tolist() == [made._tokenizer.token_to_id(c) for c in "a</s>b"]
    assert made.decode(made.encode("a</s>b</s></s>")) == "a</s>b</s></s>"


def test_the_sample_is_the_smallest_hashes_whatever_the_order():
    texts = [f"{i} " * (i % 50 + 1) for i in range(500)]
    ordered = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    kept = tokenizer_training.sample(iter(texts), 5000)
    assert kept == ordered[: len(kept)] == tokenizer_training.sample(reversed(texts), 5000)
    assert sum(map(len, kept)) > 5000 >= sum(map(len, kept[:-1]))


def test_long_lines_are_trained_on_in_pieces():
    line = CHINESE.replace("\n", "") * 100
    pieces = list(tokenizer_training.lines([line + "\n\nshort"]))
    assert "".join(pieces) == line + "short" and max(len(piece.encode()) for piece in pieces) <= 4192


def test_training_is_a_function_of_the_texts(made):
    again = tokenizer_training.make("unigram:600", [CHINESE, *reversed(library())])
    assert again.fingerprint == made["unigram"].fingerprint != made["bpe"].fingerprint


def test_a_run_and_a_corpus_keep_the_file_under_its_name(one, tmp_path):
    place = checkpoint.epath.Path(tmp_path)
    for name, content in special_ids.files(one, special_ids.of_documents(one)).items():
        run_folder.write_run_file(place, name, content, print)
    assert {path.name for path in place.iterdir()} == {one.file_name, tokenizer_files.BESIDE}
    found = tokenizer_files.load(str(tmp_path))
    assert type(found) is type(one) and found.fingerprint == one.fingerprint
    assert tokenizer_files.load(str(place / one.file_name)).model == one.model


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.json", b"{", "not a tokenizer.json"),
        ("x.json", b"[]", "not a tokenizer.json"),
        ("x.bytes", b"lm_jax bytes 2\n", "not the byte tokenizer"),
        ("x.model", b"", "the file is empty"),
        ("x.model", bytes(range(256)), "not a SentencePiece model"),
        ("folder/readme", b"", "none of tokenizer.json, tokenizer.model, tokenizer.bytes"),
    ],
)
def test_what_is_no_tokenizer_is_refused_by_its_place(tmp_path, name, content, words):
    if name.endswith("json"):
        pytest.importorskip("tokenizers")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    place = str(tmp_path / name.removesuffix("/readme"))
    with pytest.raises(UserError, match=words) as error:
        tokenizer_files.load(place)
    assert place in str(error.value)
