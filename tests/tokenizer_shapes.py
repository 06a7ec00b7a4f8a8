"""Small tokenizers of the shapes that published models have, made here: `shape(name)` -> the files of a folder."""

import functools
import io
import json
import pathlib

import pytest

TEXTS = [
    "The capital of France is Paris, and the capital of Italy is Rome.\n",
    "def f(x):\n\treturn x  # two  spaces\n",
    "What's done isn't undone; 12 of 345 don't care. A café, naïve: ça va?\n",
    "import os\nfor line in open(path):\n    print(line.strip())\n",
    "Der schnelle braune Fuchs springt über den faulen Hund. Once upon a time there was a king.\n",
] * 8  # fmt: skip


def sentencepiece_model(model_type: str = "bpe", prefix: bool = True, size: int = 420, **more) -> bytes:
    """Llama's numbers unless `more` says others: <unk> 0, <s> 1, </s> 2, bytes, a space before every text."""
    import sentencepiece

    model = io.BytesIO()
    settings = dict(unk_id=0, bos_id=1, eos_id=2, pad_id=-1, byte_fallback=True, remove_extra_whitespaces=False)
    settings |= dict(normalization_rule_name="identity", num_threads=1, minloglevel=2, hard_vocab_limit=False) | more
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in TEXTS for line in text.split("\n") if line),
        model_writer=model, model_type=model_type, vocab_size=size, add_dummy_prefix=prefix, **settings,
    )  # fmt: skip
    return model.getvalue()


def made(model, trainer, normalizer=None, words=None, decoder=None):
    """A tokenizer of the package `tokenizers`, trained on the texts."""
    tokenizers = pytest.importorskip("tokenizers")
    found = tokenizers.Tokenizer(model)
    for name, part in (("normalizer", normalizer), ("pre_tokenizer", words), ("decoder", decoder)):
        if part is not None:
            setattr(found, name, part)
    found.train_from_iterator(TEXTS, trainer)
    return found


def around(found, single: str, *names: str):
    from tokenizers.processors import TemplateProcessing

    found.post_processor = TemplateProcessing(single=single, special_tokens=[(n, found.token_to_id(n)) for n in names])
    return found


def llama(legacy: bool):
    """BPE over bytes where a character is unknown; the space before a text by Metaspace, or (legacy) by a normalizer."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]) if legacy else None
    words = None if legacy else pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    found = made(model, trainer, normalizer, words, decoders.Sequence(steps))
    described = json.loads(found.to_str())
    described["added_tokens"] = described["added_tokens"][:3]  # its bytes are pieces like others
    return around(type(found).from_str(json.dumps(described)), "<s> $A", "<s>")


def gemma():
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    words = pre_tokenizers.Split(" ", "merged_with_previous")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    found = made(model, trainer, normalizers.Replace(" ", "▁"), words, decoders.Sequence(steps))
    described = json.loads(found.to_str())
    described["added_tokens"] = described["added_tokens"][:6]
    found = type(found).from_str(json.dumps(described))
    found.add_special_tokens(["<image_soft_token>"])  # beyond the table
    return around(found, "<bos> $A", "<bos>")


def byte_level(special: list[str], single: str = "$A", names: tuple[str, ...] = ()):
    from tokenizers import decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found = made(models.BPE(), trainer, None, words, decoders.ByteLevel())
    found.add_special_tokens(special)
    return around(found, single, *names)


def t5():
    """Unigram without bytes, white space made one space: line breaks and unknown characters are lost."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    one_space = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()])
    words = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    found = made(models.Unigram(), trainer, one_space, words, decoders.Metaspace("▁", prepend_scheme="always"))
    return around(found, "$A </s>", "</s>")


def wordpiece():
    """BERT's without capitals."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    model, lower = models.WordPiece(unk_token="[UNK]"), normalizers.BertNormalizer(lowercase=True)
    found = made(model, trainer, lower, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece())
    return around(found, "[CLS] $A [SEP]", "[CLS]", "[SEP]")


LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"]
# name: (tokenizer.json, else tokenizer.model; tokenizer_config.json; what config.json says beside model_type and vocab_size)
SHAPES = {
    "llama2": (lambda: llama(True), {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}, {}),
    "mistral": (
        lambda: llama(False),
        {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}}, {},
    ),
    "gemma3": (gemma, {"bos_token": "<bos>", "eos_token": "<eos>"}, {}),
    "llama3": (
        lambda: byte_level(LLAMA3, "<|begin_of_text|> $A", ("<|begin_of_text|>",)),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, {},
    ),
    "gpt2": (lambda: byte_level(["<|endoftext|>"]), {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, {}),
    "any name": (lambda: byte_level(["<~stop here~>"]), {"eos_token": "<~stop here~>"}, {}),
    "t5": (t5, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}, {}),
    "bert": (wordpiece, {"cls_token": "[CLS]", "sep_token": "[SEP]"}, {}),
    "llama's model": (sentencepiece_model, {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}, {}),
    "a model that adds nothing": (sentencepiece_model, {"add_bos_token": False}, {}),
    "a model alone": (sentencepiece_model, None, {}),
    "gemma's model": (
        lambda: sentencepiece_model(
            prefix=False, unk_id=3, bos_id=2, eos_id=1, pad_id=0, bos_piece="<bos>", eos_piece="<eos>"
        ),
        {"add_bos_token": True, "bos_token": "<bos>", "eos_token": "<eos>"}, {},
    ),
}  # fmt: skip
TYPES = {"gemma3": "gemma3_text", "gemma's model": "gemma", "t5": "t5", "bert": "bert", "gpt2": "gpt2"}


@functools.cache
def content(name: str) -> tuple[str, bytes]:
    """The name of a shape's tokenizer file, and the file."""
    found = SHAPES[name][0]()
    return ("tokenizer.model", found) if isinstance(found, bytes) else ("tokenizer.json", found.to_str().encode())


def write(folder: pathlib.Path, name: str, generation: dict | None = None, **config) -> pathlib.Path:
    """A folder as Hugging Face keeps one, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    file, its = content(name)
    (folder / file).write_bytes(its)
    told = SHAPES[name][1]
    if told is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(told))
    described = {"model_type": TYPES.get(name, "llama"), "vocab_size": 1000} | config
    (folder / "config.json").write_text(json.dumps(described))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def words(num: int, special: tuple[str, ...] = ("<|endoftext|>", "[MASK]", "[CLS]", "[SEP]")) -> bytes:
    """A tokenizer.json of `num` pieces: the special ones, then w4, w5 ... with spaces between them."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": name, "special": True} | flags for i, name in enumerate(special)]
    vocab = {name: i for i, name in enumerate([*special, *(f"w{k}" for k in range(len(special), num))])}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": f"w{len(special)}"}
    found = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    found |= {"version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    return json.dumps(found).encode()
