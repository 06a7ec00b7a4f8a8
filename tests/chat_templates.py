"""Six chat templates in the manner of what models bring, and small tokenizers that have their control tokens."""

import json
import os
import pathlib

import pytest

from lm_jax.generate import chat_template

CHINESE = """\
人工智能模型从文本中学习：它读到一个词，然后猜下一个词。“你好，世界！”他说（声音很轻）。
价格是￥１２８．００；折扣为２０％——真的吗？是的……请看《说明》第３章、第【４】节。
简体中文与繁體中文都應該完整保留，標點「全形」也一樣。
"""
CONTROL = """<|im_start|> <|im_end|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <s> </s> <bos>
<start_of_turn> <end_of_turn> <|system|> <|user|> <|assistant|> <|end|>""".split()
LOOP = "{% for m in messages %}"
# name: (the token that begins a text, template, prompt's end). A template may refuse a system.
TEMPLATES = {
    "chatml": (
        "",
        LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    "llama3": (
        "<|begin_of_text|>",
        "{{ bos_token }}" + LOOP + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    ),
    "llama2": (
        "<s>",
        "{% set first = '' %}{% if messages[0].role == 'system' %}"
        "{% set first = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}{% set messages = messages[1:] %}{% endif %}"
        + LOOP
        + "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ (first if loop.first else '') + m.content.strip() }} [/INST]"
        "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}",
    ),
    "mistral": (
        "<s>",
        "{{ bos_token }}" + LOOP + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}"
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    ),
    "gemma": (
        "<bos>",
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + LOOP
        + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    ),
    "zephyr": (
        "",
        LOOP + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    ),
}  # fmt: skip


def library() -> list[str]:
    folder = pathlib.Path(os.__file__).parent
    return [(folder / name).read_text() for name in ("argparse.py", "ast.py", "calendar.py", "csv.py", "difflib.py")]


def byte_level() -> bytes:
    """A byte-level BPE as Hugging Face keeps one, with the special tokens of a chat model."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([*library(), CHINESE], trainer)
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "</s>"])
    made.enable_truncation(8)  # a file may ask for it; a corpus must not lose text to it
    return made.to_str().encode()


def tokenizer_json(first: str) -> bytes:
    """A byte-level BPE with the control tokens of all six; a text begins with `first` and ends with </s>."""
    tokenizers = pytest.importorskip("tokenizers")
    described = json.loads(byte_level())
    described["added_tokens"] = [t for t in described["added_tokens"] if t["content"] != "<|endoftext|>"]
    made = tokenizers.Tokenizer.from_str(json.dumps(described))
    made.no_truncation()
    made.add_special_tokens(CONTROL)
    # Llama 3's words: line breaks stay together, also before a word
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    parts = tokenizers.pre_tokenizers
    split = parts.Split(tokenizers.Regex(words), "isolated")
    made.pre_tokenizer = parts.Sequence([split, parts.ByteLevel(add_prefix_space=False, use_regex=False)])
    around = [name for name in (first, "</s>") if name]
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{first} $A </s>".strip(), special_tokens=[(name, made.token_to_id(name)) for name in around]
    )
    return made.to_str().encode()


def chat_folder(folder: pathlib.Path) -> str:
    """The folder, with the tokenizer of all six and the template `chatml` in it."""
    (folder / "tokenizer.json").write_bytes(tokenizer_json(""))
    (folder / chat_template.FILE).write_text(TEMPLATES["chatml"][1])
    return str(folder)
