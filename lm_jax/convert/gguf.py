"""A GGUF file of the Llama family <-> what a Hugging Face folder would hold: config, tensors, tokenizer.json, chat template."""

import json
from typing import Any, NamedTuple

import numpy as np

from lm_jax.convert.text_files import TEMPLATE, Text
from lm_jax.convert.tokenizer_json import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, pairs_model, special_token, vocab_of
from lm_jax.data.hugging_face_tokenizer import HuggingFace
from lm_jax.data.special_ids import SpecialIds
from lm_jax.errors import UserError, needs
from lm_jax.files import draft
from lm_jax.regular_files import opened

# Their names, which hold for weights alone; a number of a layer stands for `{layer}`.
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEADER, MOST_TENSORS = 2**27, 2**20  # bytes before the tensors, and how many of these, that a file may have
# How a text is cut before byte-pair merges, by `tokenizer.ggml.pre`.
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CUTS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES],
}
ENDS = ("eos", "eot", "eom")  # a file names these: of a text, of a turn, of a message; a reader stops at any


class Contents(NamedTuple):
    """What a GGUF file holds, in the terms of a Hugging Face folder: config.json, tensors, ids, other files."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    ids: SpecialIds
    files: dict[str, bytes]


def package():
    """The package gguf. Raises UserError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise needs("a GGUF file", "gguf", "gguf") from None
    return gguf


def read(path: str) -> Contents:
    """Reads a GGUF file; quantised weights become float32. Raises UserError for another architecture or a broken one."""
    gguf = package()
    try:
        check_counts(path)
        reader = gguf.GGUFReader(path)
    except Exception as error:  # the package raises whatever its arrays do
        raise UserError(f"{path} is no whole GGUF file: {str(error)[:100]}") from None
    value = lambda name, default=None: reader.fields[name].contents() if name in reader.fields else default
    if (kind := value("general.architecture")) != "llama":
        raise UserError(f"{path} has the architecture {kind!r}; of GGUF files llama is read")
    scaling = [key for key in reader.fields if ".rope.scaling" in key and value(key) not in (None, "none", 1.0)]
    if scaling or "llama.expert_count" in reader.fields:
        raise UserError(
            f"{path}: {', '.join(scaling) or 'experts'} of GGUF files is not supported; take the original weights"
        )
    config = {
        **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32", "torch_dtype": "float32"},
        "num_hidden_layers": value("llama.block_count"),
        "hidden_size": value("llama.embedding_length"),
        "num_attention_heads": value("llama.attention.head_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv", value("llama.attention.head_count")),
        "head_dim": value("llama.attention.key_length") or value("llama.rope.dimension_count"),
        "intermediate_size": value("llama.feed_forward_length"),
        "max_position_embeddings": value("llama.context_length"),
        "rms_norm_eps": float(np.float32(value("llama.attention.layer_norm_rms_epsilon", 1e-6)).astype(str)),
        "rope_theta": value("llama.rope.freq_base", 10_000.0),
        "rope_parameters": {"rope_type": "default", "rope_theta": value("llama.rope.freq_base", 10_000.0)},
        "vocab_size": len(value("tokenizer.ggml.tokens", [])),
        "tie_word_embeddings": "output.weight" not in {tensor.name for tensor in reader.tensors},
    }
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        name, part = their_name(path, tensor.name)
        x = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        tensors[name] = in_halves(x, heads[part]) if part in heads else x
    files = {HuggingFace.file_name: tokenizer(path, value)}
    if template := value("tokenizer.chat_template"):
        files[TEMPLATE] = template.encode()
    return Contents(config, tensors, ids_in(value), files)


def ids_in(value) -> SpecialIds:
    """What begins a text, and its ends."""
    first, ends = value("tokenizer.ggml.bos_token_id"), [value(f"tokenizer.ggml.{name}_token_id") for name in ENDS]
    known = tuple(dict.fromkeys(end for end in ends if end is not None))
    before = () if first is None or not value("tokenizer.ggml.add_bos_token", False) else (first,)
    return SpecialIds(before, (), -1, known)


SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value by its type
STRING, ARRAY = 8, 9


def check_counts(path: str) -> None:
    """Raises ValueError for a file that is shorter than its counts say: the package would read on for ever."""
    with opened(path) as file:
        content = file.read(HEADER)

    def number(at: int, size: int) -> int:
        if at + size > len(content):
            raise ValueError(f"it ends at byte {len(content):,}, inside its header")
        return int.from_bytes(content[at : at + size], "little")

    def after(at: int, kind: int, depth: int = 0) -> int:
        """Where a value ends."""
        if kind == STRING:
            return at + 8 + number(at, 8)
        if kind != ARRAY or depth > 3:
            return at + SIZES[kind]
        kind, count, at = number(at, 4), number(at + 4, 8), at + 12
        if count > len(content):
            raise ValueError(f"a list of {count:,} values in a header of {len(content):,} bytes")
        if kind in SIZES:
            return at + count * SIZES[kind]
        for _ in range(count):
            at = after(at, kind, depth + 1)
        return at

    at = 24
    for _ in range(number(16, 8)):
        at = after(at, STRING)
        at = after(at + 4, number(at, 4))
    number(at, 0)
    if number(8, 8) > MOST_TENSORS:
        raise ValueError(f"{number(8, 8):,} tensors")


def their_name(path: str, name: str) -> tuple[str, str]:
    """(name in a Hugging Face folder, kind of tensor) of a name such as `blk.3.attn_q.weight`."""
    if name in NAMES:
        return NAMES[name], name
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in NAMES and layer.isdigit():
            return f"model.layers.{layer}.{NAMES[part]}.weight", part
    raise UserError(f"{path}: {name} is no tensor of a Llama that is read here; take the original weights")


def in_halves(x: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of queries or keys in pairs (k, k + half), as rope takes them here, from GGUF's neighbours (2k, 2k + 1)."""
    return x.reshape(num_heads, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


def in_neighbours(x: np.ndarray, num_heads: int) -> np.ndarray:
    """The inverse of `in_halves`."""
    return x.reshape(num_heads, 2, -1, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


def tokenizer(path: str, value) -> bytes:
    """The byte-pair tokenizer of a file as a tokenizer.json."""
    kind, cut = value("tokenizer.ggml.model"), value("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or cut not in CUTS:
        raise UserError(f"{path}: its tokenizer {kind!r}, {cut!r} is not read; known are gpt2 with {', '.join(CUTS)}")
    pieces, kinds = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    marks = [special_token(i, piece) for i, (piece, k) in enumerate(zip(pieces, kinds, strict=True)) if k == CONTROL]
    content = {
        "version": "1.0",
        **{"truncation": None, "padding": None, "normalizer": None, "post_processor": None},
        "added_tokens": marks,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": CUTS[cut]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": pairs_model({piece: i for i, piece in enumerate(pieces)}, value("tokenizer.ggml.merges")),
    }
    return json.dumps(content, ensure_ascii=False).encode()


def write(path: str, config: dict[str, Any], tensors: dict[str, np.ndarray], text: Text) -> None:
    """Writes a GGUF file of float32 weights, whole or not at all.

    The tokenizer is a SentencePiece model of byte pairs (`llama`), else one of byte pairs in a tokenizer.json (`gpt2`).
    No reader but ours is known to take it. Raises UserError for another family, and for a text that GGUF cannot say.
    """
    if "id2label" in config:
        raise UserError(f"{path}: a GGUF file has no place for the head of a task; name a folder")
    gguf = package()
    if config["model_type"] != "llama" or config["rope_parameters"]["rope_type"] != "default":
        raise UserError(
            f"{path}: of GGUF files llama without scaled positions is written, not {config['model_type']!r}"
        )
    if config["attention_bias"]:
        raise UserError(f"{path}: a Llama with biases has no place in a GGUF file")
    with draft(path) as file:
        fill(gguf.GGUFWriter(file.name, "llama"), path, config, tensors, text)  # which opens the file by its name


def fill(writer, path: str, config: dict[str, Any], tensors: dict[str, np.ndarray], text: Text) -> None:
    """Writes everything that the file holds; `path` is for messages."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if text.tokenizer.file_name == "tokenizer.model":
        add_sentencepiece(writer, text.tokenizer.model, config["vocab_size"])
    elif text.tokenizer.file_name == HuggingFace.file_name:
        add_byte_pairs(path, writer, json.loads(text.tokenizer.model), config["vocab_size"])
    else:
        raise UserError(f"{path}: a GGUF file has no tokenizer of plain bytes; train with one of SentencePiece")
    add_ids(path, writer, text.ids)
    if text.template:
        writer.add_chat_template(text.template)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    ours = {theirs: own for own, theirs in NAMES.items()}
    for name, x in tensors.items():
        own = ours.get(name)
        if own is None:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            own = f"blk.{layer}.{ours[part]}.weight"
            x = in_neighbours(x, heads[part.split(".")[-1]]) if part.split(".")[-1] in heads else x
        writer.add_tensor(own, np.ascontiguousarray(x, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_ids(path: str, writer, ids: SpecialIds) -> None:
    """Writes what begins a text, and all its ends. Raises UserError where there are more than a file has names for."""
    if len(ids.ends) > len(ENDS) or len(ids.first) > 1:
        raise UserError(
            f"{path}: texts begin with {list(ids.first)} and end at any of {list(ids.ends)}; "
            f"a GGUF file says one first token and {len(ENDS)} ends"
        )
    for name, end in zip(ENDS, ids.ends, strict=False):
        getattr(writer, f"add_{name}_token_id")(end)
    for first in ids.first:
        writer.add_bos_token_id(first)
    writer.add_add_bos_token(bool(ids.first))


def add_sentencepiece(writer, model: bytes, vocab_size: int) -> None:
    """Writes pieces with their scores and types; no space is put before a text, as ours are trained."""
    import sentencepiece

    by = sentencepiece.SentencePieceProcessor(model_proto=model)
    kinds = ((by.is_unknown, UNKNOWN), (by.is_control, CONTROL), (by.is_byte, BYTE), (by.is_unused, UNUSED))
    known = range(min(vocab_size, by.get_piece_size()))
    added = [f"<unused_{i}>" for i in range(len(known), vocab_size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([by.id_to_piece(i) for i in known] + added)
    writer.add_token_scores([by.get_score(i) for i in known] + [0.0] * len(added))
    found = [next((kind for is_one, kind in kinds if is_one(i)), NORMAL) for i in known]
    writer.add_token_types(found + [UNUSED] * len(added))
    writer.add_add_space_prefix(False)


def add_byte_pairs(path: str, writer, described: dict[str, Any], vocab_size: int) -> None:
    """Writes the vocabulary and the merges of a tokenizer.json of byte pairs. Raises UserError for any other kind."""
    cut = described.get("pre_tokenizer") or {}
    cuts = cut.get("pretokenizers", [cut])
    names = [name for name, known in CUTS.items() if known == cuts]
    if described["model"]["type"] != "BPE" or not names:
        raise UserError(f"{path}: the tokenizer is neither SentencePiece nor byte pairs cut as {' or '.join(CUTS)} do")
    marks = {mark["id"] for mark in described["added_tokens"] if mark["special"]}
    pieces = {i: piece for piece, i in vocab_of(described).items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(names[0])
    writer.add_token_list([pieces.get(i, f"<unused_{i}>") for i in range(vocab_size)])
    kind = lambda i: UNUSED if i not in pieces else CONTROL if i in marks else NORMAL
    writer.add_token_types([kind(i) for i in range(vocab_size)])
    merges = described["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
