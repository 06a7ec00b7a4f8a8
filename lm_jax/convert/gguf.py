"""A GGUF file of the Llama family -> what a Hugging Face folder would hold: config, tensors, tokenizer.json, chat template."""

import json
from typing import Any, NamedTuple

import numpy as np

from lm_jax.config import UserError

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
CONTROL = 3  # a token's type: a mark, no text
# How a text is cut before byte-pair merges, by `tokenizer.ggml.pre`.
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CUTS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES],
}


class Contents(NamedTuple):
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    files: dict[str, bytes]


def read(path: str) -> Contents:
    """Quantised weights come back as float32. Raises UserError for another architecture, or what is no whole GGUF file."""
    try:
        import gguf
    except ImportError:
        raise UserError("a GGUF file needs the package gguf: pip install 'lm_jax[gguf]'") from None
    try:
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
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "tie_word_embeddings": "output.weight" not in {tensor.name for tensor in reader.tensors},
    }
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        name, part = their_name(path, tensor.name)
        x = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        tensors[name] = in_halves(x, heads[part]) if part in heads else x
    files = {"tokenizer.json": tokenizer(path, value)}
    if template := value("tokenizer.chat_template"):
        files["chat_template.jinja"] = template.encode()
    return Contents(config, tensors, files)


def their_name(path: str, name: str) -> tuple[str, str]:
    """(the name in a Hugging Face folder, what it is) of `blk.3.attn_q.weight`."""
    if name in NAMES:
        return NAMES[name], name
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in NAMES and layer.isdigit():
            return f"model.layers.{layer}.{NAMES[part]}.weight", part
    raise UserError(f"{path}: {name} is no tensor of a Llama that is read here; take the original weights")


def in_halves(x: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of queries or keys in pairs (k, k + half) as rotary positions turn them, of the neighbours that GGUF keeps."""
    return x.reshape(num_heads, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


def tokenizer(path: str, value) -> bytes:
    """The byte-pair tokenizer of a file as a tokenizer.json."""
    kind, cut = value("tokenizer.ggml.model"), value("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or cut not in CUTS:
        raise UserError(f"{path}: its tokenizer {kind!r}, {cut!r} is not read; known are gpt2 with {', '.join(CUTS)}")
    pieces, kinds = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    mark = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    marks = [
        {"id": i, "content": piece, **mark}
        for i, (piece, k) in enumerate(zip(pieces, kinds, strict=True))
        if k == CONTROL
    ]
    content = {
        "version": "1.0",
        **{"truncation": None, "padding": None, "normalizer": None, "post_processor": None},
        "added_tokens": marks,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": CUTS[cut]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            **{"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None},
            **{"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False},
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": value("tokenizer.ggml.merges"),
        },
    }
    return json.dumps(content, ensure_ascii=False).encode()
