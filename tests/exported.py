"""Models of random weights as they leave, in every family and kind of tokenizer, and lm_jax itself as the peer of a folder."""

import functools
import json
import pathlib
import pydoc_data.topics

import jax
import numpy as np
from helpers import FAMILIES, tiny

from lm_jax.config import Mesh
from lm_jax.convert import (
    description,
    export,
    proof,
    tensor_map,
    text_files,
    tokenizer_json,
)
from lm_jax.data import hugging_face_tokenizer, tokenizer, tokenizer_training
from lm_jax.data.special_ids import SpecialIds
from lm_jax.generate import chat_template, chat_tokens
from lm_jax.generate.decoding import complete
from lm_jax.generate.sampling import Sampling
from lm_jax.mesh import make_mesh
from lm_jax.model.build import build

GREEDY = Sampling(temperature=0.0)
ENCODERS = {
    "bert": dict(model__kind="encoder", model__norm_place="post", model__activation="gelu_exact", data__objective="masked"),
    "t5": dict(
        FAMILIES["llama"], model__kind="encoder_decoder", model__positions="relative", model__num_kv_heads=0,
        model__activation="gelu", data__objective="span_corruption",
    ),
}  # fmt: skip


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAGE = pydoc_data.topics.topics["for"]


@functools.cache
def tokenizer_of(kind: str) -> tokenizer.Tokenizer:
    """Tokenizers as runs have them; `chat` is a tokenizer.json with the control tokens of a chat model."""
    if kind == "bytes":
        return tokenizer.Bytes()
    if kind == "chat":
        content = json.loads(tokenizer_json.of(tokenizer_of("bpe")))
        names = ("<|im_start|>", "<|im_end|>")
        content["added_tokens"] += [tokenizer_json.special_token(400 + k, name) for k, name in enumerate(names)]
        return hugging_face_tokenizer.HuggingFace(json.dumps(content).encode())
    return tokenizer_training.train([PAGE, pydoc_data.topics.topics["strings"]], 400, kind)


def on_one(work):
    """On a mesh of one device, as the command is."""

    @functools.wraps(work)
    def wrapped(*arguments, **keywords):
        with jax.set_mesh(make_mesh(Mesh(data=1), jax.devices()[:1])):
            return work(*arguments, **keywords)

    return wrapped


LLAMA = FAMILIES["llama"]
MORE = {  # families that are Llama and a setting or two
    "phi3": dict(LLAMA, model__rotary_share=(0.5,)),
    "smollm3": dict(LLAMA, model__num_layers=4, model__window=(0,) * 4, model__rotary_share=(1.0, 1.0, 1.0, 0.0)),
    "qwen3_moe": dict(LLAMA, model__num_experts=4, model__qk_norm=True),
    "gemma2_gelu": dict(FAMILIES["gemma2"], model__activation="gelu"),
    "granite": dict(LLAMA, model__multipliers=(3.0, 0.4, 0.1, 2.0)),
}


@functools.cache
@on_one
def leaving(
    family: str = "llama", kind: str = "bpe", ends: tuple[int, ...] = (), context: int = 0, model_dim: int = 64
) -> export.Leaving:
    """A model of random weights, large enough to say various things; `ends` are there beside the tokenizer's own."""
    changes = dict(FAMILIES | ENCODERS | MORE)[family] | dict(model__init_scale=0.3, data__sequence_length=128)
    changes |= dict(model__model_dim=model_dim, model__head_dim=model_dim // 4)
    changes = changes | ({"model__positions": "learned"} if family == "gpt2" else {})
    config, by = tiny(**changes), tokenizer_of(kind)
    first = by.document_id
    ids = SpecialIds((first,), (), first, (first, *ends))
    template, added = TEMPLATE if kind == "chat" else "", text_files.added_pieces(config.data.objective, by)
    ids, no_chat = export.with_turns(ids, chat_template.Template(template) if template else None, by)
    num = by.vocab_size + len(added)
    graph = build(config.model, num, config.data.sequence_length)
    ours = jax.jit(lambda: graph.init(jax.random.key(1)))()
    fields = text_files.id_fields(ids, config.model.kind == "encoder_decoder")
    described = description.description_of(config, num, fields, context)
    return export.Leaving(described, ours, text_files.Text(by, ids, added, template), no_chat)


@functools.cache
def built(config, vocab_size: int):
    """A graph is compiled by its identity: one for all mutants of the same config."""
    return description.graph_of(description.Description("", config, vocab_size, {}))


class Here:
    """lm_jax itself as the peer of a folder, with a mistake in its config.json, its arrays or its small files."""

    name, remark = "a mutant", ""

    def __init__(self, folder: str, tensors: dict, mistake=lambda content, tensors, files: None):
        content = json.loads(pathlib.Path(folder, "config.json").read_text())
        files = {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}
        tensors = {name: np.array(x) for name, x in tensors.items()}
        mistake(content, tensors, files)
        described = description.describe(content, "a mutant", "bytes")
        graph = built(described.config, described.vocab_size)
        by = hugging_face_tokenizer.HuggingFace(files["tokenizer.json"])
        ends = json.loads(files["generation_config.json"])["eos_token_id"]
        source = files.get("chat_template.jinja", b"").decode()
        template = chat_template.Template(source) if source else None
        ids = SpecialIds(tuple(by.around()[0]), (), ends[0], tuple(ends))
        parameters = tensor_map.parameters(described, tensors, "a mutant")
        self.ours = proof.Exported(described, graph, parameters, by, ids, template)
        self.ends = set(ends)

    def logits(self, batch):
        found = proof.heads(self.ours.graph, self.ours.parameters, batch)
        return [np.asarray(found[0])[..., : self.ours.described.vocab_size], *map(np.asarray, found[1:])]

    def encode(self, text):
        return [*self.ours.ids.first, *self.ours.tokenizer.encode(text).tolist()]

    def encode_chat(self, messages):
        return chat_tokens.encode(self.ours.template, messages, self.ours.tokenizer).tolist()

    def write(self, ids, limit):
        ours, prompt = self.ours, np.array(ids, np.int32)
        [found] = complete(ours.graph, ours.parameters, ours.tokenizer, [prompt], limit, GREEDY, marks=ours.ids)
        ended = len(found.tokens) < limit
        return [
            *found.tokens,
            *[end for end in ours.ids.ends if proof.likeliest(ours, ids, [*found.tokens, end])][:ended],
        ]

    def decode(self, ids):
        return self.ours.tokenizer.decode(ids)


def tensor(name: str, change):
    """A mistake in the arrays whose names end so."""

    def mistake(content, tensors, files):
        for key in [key for key in tensors if key.endswith(name)]:
            tensors[key] = np.ascontiguousarray(change(tensors[key]))

    return mistake


def setting(**changes):
    return lambda content, tensors, files: content.update(changes)


def swapped(content, tensors, files):
    gate, up = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


def in_file(name: str, change):
    """A mistake in a small file."""

    def mistake(content, tensors, files):
        files[name] = change(files[name])

    return mistake


def rope(base: float):
    return setting(rope_theta=base, rope_parameters={"rope_type": "default", "rope_theta": base})


def without_first(model: bytes) -> bytes:
    return json.dumps(json.loads(model) | {"post_processor": None}).encode()


@on_one
def met(family: str, model_dim: int = 64) -> tuple[int]:
    """What a model of random weights writes after some tokens: as an end it ends texts."""
    described, parameters, text = leaving(family, "chat", model_dim=model_dim)[:3]
    prompt, graph = (
        [*text.ids.first, *text.tokenizer.encode(proof.PROMPTS[1]).tolist()],
        description.graph_of(described),
    )
    [found] = complete(
        graph, parameters, text.tokenizer, [np.array(prompt)], 12, GREEDY, marks=text.ids._replace(ends=())
    )
    return (found.tokens[5],)
