"""Chat templates in the shapes of published models, and what `transformers` makes of them: `tests/fixtures/chat.json.gz`.

    python tests/peers/chat.py        # needs transformers; writes the fixture that tests/test_chat_shapes.py holds us against

The templates are ours, in tests/fixtures/chat. {% generation %} stands around what an assistant writes; `plain` takes it out.
"""

import datetime
import gzip
import json
import pathlib
import re
import tempfile

import tokenizers

from lm_jax.generate import chat_template, chat_tokens

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures" / "chat.json.gz"
TEMPLATES = FIXTURE.parent / "chat"  # one file a shape
CHATML = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
LLAMA3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
FIRST = {
    "__type": "AddedToken",
    "content": "<s>",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
}
LLAMA2 = {"bos_token": FIRST, "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
BOTH, OPEN = {"bos_token": "<s>", "eos_token": "</s>"}, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>"}
# shape: (kind of tokenizer, special tokens)
KINDS: dict[str, tuple[str, dict]] = {
    "chatml": ("bytes", CHATML),
    "qwen2.5": ("bytes", CHATML),
    "qwen3": ("bytes", CHATML),
    "smollm2": ("bytes", CHATML | {"bos_token": "<|im_start|>"}),
    "smollm3": ("bytes", CHATML),
    "llama3": ("bytes", LLAMA3),
    "llama3.1": ("bytes", LLAMA3),
    "llama2": ("pieces", LLAMA2),
    "mistral1": ("pieces", LLAMA2),
    "mistral3": ("bytes", BOTH),
    "mixtral": ("pieces", LLAMA2),
    "gemma": ("bytes", GEMMA),
    "gemma3": ("bytes", GEMMA | {"image_token": "<image_soft_token>"}),
    "phi3": ("pieces", LLAMA2 | {"eos_token": "<|endoftext|>"}),
    "phi4": ("bytes", {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}),
    "olmo2": ("bytes", OPEN),
    "zephyr": ("pieces", LLAMA2),
    "deepseek": ("bytes", {"bos_token": "<|begin_of_text|>", "eos_token": "<|endoftext|>"}),
    "command-r": ("bytes", {"bos_token": "<bos>", "eos_token": "<|end|>"}),
    "granite": ("bytes", OPEN),
    "falcon": ("bytes", {"eos_token": "<|endoftext|>"}),
    "vicuna": ("pieces", LLAMA2),
    "alpaca": ("bytes", BOTH),
}
# shape: (kind of tokenizer, special tokens, template)
SHAPES = {shape: (*kind, (TEMPLATES / f"{shape}.jinja").read_text()) for shape, kind in KINDS.items()}


def says(role: str, content, **more) -> dict:
    return {"role": role, "content": content} | more


COLOUR, BLUE = says("user", "Name a colour."), says("assistant", "Blue, or blue.")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "São Paulo & <b>"}}}
CONVERSATIONS = {
    "one": [COLOUR, BLUE],
    "system": [says("system", "Be short."), COLOUR, BLUE, says("user", "Another?"), says("assistant", "Red.")],
    "several": [COLOUR, BLUE, says("user", "Thanks, and now two\nlines?"), says("assistant", "One.\nTwo."),
                says("user", "Bye!"), says("assistant", "Bye.")],
    "scripts": [says("user", "人工智能 🙂👩‍👩‍👧 é naïve שלום"), says("assistant", "模型 🙂 نعم — 'fin'")],
    "spaces": [says("system", " calm\n"), says("user", "  two\n\nlines?  "), says("assistant", " def f(x):\n\treturn 1 "),
               says("user", "\n\nagain\t"), says("assistant", "\n    indented\n\n")],
    "empty": [says("user", ""), says("assistant", "Well?"), says("user", "ok"), says("assistant", "")],
    "html": [says("user", "<b>&amp; \"quoted\" 'single' {{ braces }} {% raw %}</b>"), says("assistant", "</s <|im_end {# #}")],
    "thinking": [COLOUR, says("assistant", "<think>\nSky?\n</think>\n\nBlue."), says("user", "Sure?"),
                 says("assistant", "<think>\nYes.\n</think>\n\nSure.")],
    "reasoning": [COLOUR, says("assistant", "Blue.", reasoning_content="Sky?"), says("user", "Sure?"),
                  says("assistant", "Sure.", reasoning_content="Yes, I am.")],
    "unanswered": [COLOUR, BLUE, says("user", "And then?")],
    "two users": [COLOUR, says("user", "Please."), BLUE],
    "tools": [says("user", "Weather?"), says("assistant", None, tool_calls=[CALL]), says("tool", '{"sun": "é <"}'),
              says("assistant", "Sunny.")],
    "parts": [says("user", [{"type": "text", "text": " What is it? "}]), says("assistant", [{"type": "text", "text": "A dog."}])],
}  # fmt: skip


def plain(template: str) -> str:
    """A template without the marks of what is learnt; the white space that they took goes with them."""
    found = re.sub(r"\s*\{%-\s*(end)?generation\s*%\}", "", template)
    found = re.sub(r"\s*\{%-\s*(end)?generation\s*-%\}\s*", "", found)
    return re.sub(r"\{%\s*(end)?generation\s*%\}", "", found)


CONTROL = """<|endoftext|> <|im_start|> <|im_end|> <|im_sep|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>
<s> </s> <bos> <eos> <start_of_turn> <end_of_turn> <start_of_image> <image_soft_token> <|system|> <|user|> <|assistant|> <|end|>
<|start|> [INST] [/INST] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]""".split()
WORDS = """the assistant user system colour Blue Name ought Today Sure Thanks two lines function weather return indented again
Instruct Response helper curious person Human Falcon model Yes""".split()


def tokenizer_json(kind: str) -> str:
    """A byte-level BPE as Llama 3 and Qwen have ("bytes"), or one with spaces in front as Llama 2 and Mistral ("pieces")."""
    if kind == "bytes":
        alphabet, space, more = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "Ġ", ["ĊĊ"]
    else:
        alphabet, space, more = sorted({*map(chr, range(33, 127)), "\n", "▁", *"éàïã"}), "▁", ["▁▁"]
        alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *alphabet]
    vocab, merges = {piece: k for k, piece in enumerate(alphabet)}, []
    for word in [*more, *(space + word for word in WORDS)]:
        for k in range(1, len(word)):
            if word[: k + 1] not in vocab:
                vocab[word[: k + 1]] = len(vocab)
                merges.append((word[:k], word[k]))
    settings = {} if kind == "bytes" else {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges, **settings))
    parts, decoders = tokenizers.pre_tokenizers, tokenizers.decoders
    if kind == "bytes":
        words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        split = parts.Split(tokenizers.Regex(words), "isolated")
        made.pre_tokenizer = parts.Sequence([split, parts.ByteLevel(add_prefix_space=False, use_regex=False)])
        made.decoder = decoders.ByteLevel()
    else:
        normalizers = tokenizers.normalizers
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        fuse = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        made.decoder = decoders.Sequence(fuse)
    special = lambda name: tokenizers.AddedToken(name, special=True, normalized=False)
    made.add_special_tokens([special(name) for name in (["<unk>"] if kind == "pieces" else []) + CONTROL])
    made.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in ("<think>", "</think>", "<tool_call>")])
    return made.to_str()


def folder_of(place: pathlib.Path, shape: str, template: str) -> pathlib.Path:
    """A folder with the tokenizer of a shape, its special tokens and a template."""
    kind, special, _ = SHAPES[shape]
    (place / "tokenizer.json").write_text(tokenizer_json(kind))
    described = {"tokenizer_class": "PreTrainedTokenizerFast"} | special
    (place / "tokenizer_config.json").write_text(json.dumps(described))
    (place / chat_template.FILE).write_text(template)
    return place


def theirs(tokenizer, messages: list, tagged: str) -> dict:
    """What `transformers` makes of a conversation: text, ids and what is learnt of the whole, ids up to the answer."""
    import jinja2

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        asked = dict(chat_template=tagged, return_assistant_tokens_mask=True, return_dict=True)
        whole = tokenizer.apply_chat_template(messages, **asked)
    except (jinja2.TemplateError, TypeError) as error:
        return {"refused": str(error)}
    assert whole["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]  # the marks change no text
    return {"text": text, "prompt": prompt, "ids": whole["input_ids"], "mask": whole["assistant_masks"]}


def record() -> dict[str, dict]:
    """{"shape/conversation": what `transformers` gives}, its clock at what training shows."""
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return chat_tokens.TAUGHT

    usual, found = chat_template_utils.datetime, {}
    chat_template_utils.datetime = Clock
    try:
        for shape, (_, _, template) in SHAPES.items():
            with tempfile.TemporaryDirectory() as place:
                folder = folder_of(pathlib.Path(place), shape, plain(template))
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
                for name, messages in CONVERSATIONS.items():
                    found[f"{shape}/{name}"] = theirs(tokenizer, messages, template)
    finally:
        chat_template_utils.datetime = usual
    return found


def read() -> dict[str, dict]:
    return json.loads(gzip.decompress(FIXTURE.read_bytes()))


if __name__ == "__main__":
    FIXTURE.write_bytes(gzip.compress(json.dumps(record(), ensure_ascii=False).encode(), mtime=0))
    print(f"{FIXTURE}: {len(read())} conversations, {FIXTURE.stat().st_size:,} bytes")
