"""The same logits and gradients in lm_jax and in PyTorch (`transformers`), for every family, from random weights.

    pip install -e '.[peers]'
    python tests/peers/families.py              compares every config of the table live, both ways
    python tests/peers/families.py --record     writes tests/fixtures/families.npz, which tests/test_convert.py is held to,
                                                 and config_defaults.json, which tests/test_fields.py is

The configs are odd on purpose: heads in threes, heads wider than dim / heads, windows shorter than the text, scaled positions.
"""

import argparse
import json
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.convert import description, hugging_face, safetensors, tensor_map
from lm_jax.loss import token_losses
from lm_jax.model.attention import Context

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures" / "families.npz"
DEFAULTS = FIXTURE.parent / "config_defaults.json"
LIMIT = 1e-4  # of every logit, absolute
LENGTH, PIECES = 24, 53

SMALL = dict(
    vocab_size=PIECES, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=None, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
NINE = dict(num_attention_heads=9, num_key_value_heads=3, hidden_size=36)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=4096, rope_theta=1e4)
LINEAR = dict(rope_type="linear", factor=4.0, rope_theta=1e5)
NEAR = dict(rope_type="default", rope_theta=300.0)
SLIDING, FULL = "sliding_attention", "full_attention"
# name: (model_type, what differs from SMALL); the first of a family is compared in gradients too.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2_untied": (
        "gpt2",
        dict(tie_word_embeddings=False, n_inner=36, activation_function="gelu", layer_norm_epsilon=1e-3),
    ),
    "llama": ("llama", NINE | dict(rope_parameters={"rope_theta": 500.0})),
    "llama_3": (
        "llama",
        dict(rope_parameters=LLAMA3 | {"rope_theta": 10_000.0}, tie_word_embeddings=True, head_dim=10),
    ),
    "llama_biases": ("llama", dict(attention_bias=True, mlp_bias=True, rope_parameters=LINEAR, rms_norm_eps=1e-2)),
    "mistral": ("mistral", NINE | dict(sliding_window=5, head_dim=6)),
    "mistral_whole": ("mistral", dict(sliding_window=None, rms_norm_eps=1e-3)),
    "qwen2": ("qwen2", NINE | dict(tie_word_embeddings=True)),
    "qwen2_window": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=6, max_window_layers=1, num_key_value_heads=1),
    ),
    "qwen3": ("qwen3", NINE | dict(head_dim=6)),
    "qwen3_tied": ("qwen3", dict(head_dim=16, tie_word_embeddings=True, rope_parameters={"rope_theta": 100.0})),
    "gemma3": (
        "gemma3_text",
        dict(head_dim=8, sliding_window=5, num_hidden_layers=3, layer_types=[SLIDING, SLIDING, FULL])
        | dict(query_pre_attn_scalar=20),
    ),
    "gemma3_scaled": (
        "gemma3_text",
        NINE
        | dict(head_dim=10, sliding_window=4, num_hidden_layers=4, layer_types=[SLIDING, FULL] * 2)
        | dict(query_pre_attn_scalar=10, rope_parameters={FULL: LINEAR, SLIDING: NEAR}),
    ),
    "mixtral": ("mixtral", dict(num_local_experts=3, num_experts_per_tok=2, sliding_window=None, head_dim=8)),
    "llama_yarn": ("llama", dict(rope_parameters=YARN, head_dim=16)),
    "qwen2_yarn": ("qwen2", dict(rope_parameters=YARN | dict(beta_fast=8.0, beta_slow=0.5), num_key_value_heads=4)),
    "gemma2": (
        "gemma2",
        dict(head_dim=8, sliding_window=5, num_hidden_layers=4, query_pre_attn_scalar=20)
        | dict(attn_logit_softcapping=3.0, final_logit_softcapping=4.0),
    ),
    "gemma2_attention_alone": (
        "gemma2",
        NINE
        | dict(head_dim=10, sliding_window=4, num_hidden_layers=3, layer_types=[SLIDING, SLIDING, FULL])
        | dict(query_pre_attn_scalar=10, attn_logit_softcapping=2.0, final_logit_softcapping=None),
    ),
    "gemma3_capped": (
        "gemma3_text",
        dict(head_dim=8, sliding_window=5, layer_types=[SLIDING, FULL], query_pre_attn_scalar=8)
        | dict(final_logit_softcapping=3.0),
    ),
    "phi3": (
        "phi3",
        dict(hidden_size=48, sliding_window=7, rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.5)),
    ),
    "phi3_whole": ("phi3", dict(NINE, rope_parameters=dict(rope_theta=500.0, partial_rotary_factor=1.0))),
    "olmo2": ("olmo2", dict(NINE, rope_parameters={"rope_theta": 500.0})),
    "olmo2_tied": ("olmo2", dict(tie_word_embeddings=True, rms_norm_eps=1e-3)),
    "smollm3": ("smollm3", dict(num_hidden_layers=4, tie_word_embeddings=True)),
    "smollm3_window": (
        "smollm3",
        dict(num_hidden_layers=3, no_rope_layers=[0, 1, 1], use_sliding_window=True, sliding_window=5)
        | dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    ),
    "qwen3_moe": (
        "qwen3_moe",
        NINE | dict(head_dim=6, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, norm_topk_prob=True),
    ),
    "qwen3_moe_window": (
        "qwen3_moe",
        dict(head_dim=8, num_experts=3, num_experts_per_tok=1, moe_intermediate_size=20, norm_topk_prob=True)
        | dict(use_sliding_window=True, sliding_window=6, mlp_only_layers=[]),
    ),
    "granite": (
        "granite",
        NINE | dict(embedding_multiplier=3.0, residual_multiplier=0.22, attention_multiplier=0.4, logits_scaling=7.0),
    ),
    "granite_biases": (
        "granite",
        dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, embedding_multiplier=12.0)
        | dict(logits_scaling=0.3, rope_parameters=LINEAR),
    ),
    "mixtral_window": ("mixtral", NINE | dict(num_local_experts=3, num_experts_per_tok=1, sliding_window=7)),
}
FIRST = tuple({kind: name for name, (kind, _) in reversed(CONFIGS.items())}.values())
RECORDED = (*FIRST, "llama_yarn")
GPT2_NAMES = dict(
    hidden_size="n_embd",
    num_hidden_layers="n_layer",
    num_attention_heads="n_head",
    max_position_embeddings="n_positions",
)


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """(tokens, lengths): two whole rows of LENGTH, the second padded on the right in the comparison."""
    return np.random.RandomState(0).randint(0, PIECES, (2, LENGTH)).astype(np.int32), np.array([LENGTH, 17])


def reference(name: str):
    """The model of a config in PyTorch, its weights random and no scale or bias left at one or nought."""
    import torch
    import transformers

    kind, changes = CONFIGS[name]
    settings = SMALL | changes
    if kind == "gpt2":
        dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        settings = {GPT2_NAMES.get(key, key): value for key, value in settings.items()} | dropout
        settings = {
            key: value for key, value in settings.items() if key not in ("intermediate_size", "num_key_value_heads")
        }
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(kind, **settings, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def logits_there(model, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    import torch

    seen = torch.tensor(np.arange(tokens.shape[1])[None] < lengths[:, None]).long()
    with torch.no_grad():
        return model(torch.tensor(tokens).long(), attention_mask=seen).logits.numpy()


def context(tokens: np.ndarray, lengths: np.ndarray) -> Context:
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32)[None], tokens.shape)
    return Context(jnp.asarray(positions), jnp.asarray(positions < lengths[:, None]).astype(jnp.int32))


def logits_here(graph, parameters: dict, tokens, seen: Context) -> np.ndarray:
    """Of the real pieces, compiled: [B, T, PIECES]."""

    @jax.jit
    def run(parameters, tokens, seen):
        model = graph.module(parameters)
        return model.logits(model(tokens, seen)[0])

    return np.asarray(run(parameters, jnp.asarray(tokens), seen))[..., :PIECES]


def packed(graph, parameters: dict, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The logits of both texts, which stand in one row one after the other: [sum of lengths, PIECES]."""
    row = np.concatenate([text[:n] for text, n in zip(tokens, lengths, strict=True)])
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    segments = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
    seen = Context(jnp.asarray(positions)[None], jnp.asarray(segments)[None])
    return logits_here(graph, parameters, row[None], seen)[0]


def apart(found: np.ndarray, expected: np.ndarray, lengths: np.ndarray) -> float:
    """The largest difference of a logit, padding left out."""
    return max(float(np.abs(a[:n] - b[:n]).max()) for a, b, n in zip(found, expected, lengths, strict=True))


def gradients_apart(model, described, ours: dict, tokens: np.ndarray) -> float:
    """The largest difference of a gradient of the mean loss over the largest gradient of its tensor, under their names."""
    import torch

    graph = description.graph_of(described)
    targets = torch.tensor(tokens[:, 1:]).long()
    logits = model(torch.tensor(tokens[:, :-1]).long()).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    seen = context(tokens[:, :-1], np.full(2, LENGTH))

    def loss(parameters):
        module = graph.module(parameters)
        return token_losses(
            module.logits(module(jnp.asarray(tokens[:, :-1]), seen)[0]), jnp.asarray(tokens[:, 1:])
        ).mean()

    gradients = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(ours))
    kept = {slot.name: slot.kind for slot in tensor_map.slots(description.FAMILIES[described.family], graph)}
    # A gradient goes as its tensor does, but for what is added to it on the way.
    shift = {name: 1.0 if kind == "one_more" else 0.0 for name, kind in kept.items()}
    mine = {name: x + shift[name] for name, x in tensor_map.their_tensors(described, gradients).items()}
    worst = 0.0
    for name, x in mine.items():
        theirs = gradient_of(model, name)
        worst = max(worst, float(np.abs(x - theirs).max() / np.abs(theirs).max()))
    return worst


def gradient_of(model, name: str) -> np.ndarray:
    """By the name on disk; in memory experts are stacked, gate and up side by side."""
    found = dict(model.named_parameters())
    if name in found:
        return found[name].grad.numpy()
    layer, rest = name.removeprefix("model.layers.").replace("block_sparse_moe", "mlp").split(".mlp.")
    if rest == "gate.weight":
        return found[f"model.layers.{layer}.mlp.gate.weight"].grad.numpy()
    _, expert, which, _ = rest.split(".")
    if which in ("w2", "down_proj"):
        return found[f"model.layers.{layer}.mlp.experts.down_proj"].grad.numpy()[int(expert)]
    both = found[f"model.layers.{layer}.mlp.experts.gate_up_proj"].grad.numpy()[int(expert)]
    return np.split(both, 2)[which in ("w3", "up_proj")]


def compare(name: str, folder: str) -> dict[str, float]:
    """How far lm_jax is from PyTorch: read padded and packed, written again and loaded there, gradients."""
    import transformers

    model, (tokens, lengths) = reference(name), inputs()
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(f"{folder}/there")
    described = hugging_face.read_description(f"{folder}/there")
    ours, graph = hugging_face.read_parameters(f"{folder}/there", described), description.graph_of(described)
    expected = logits_there(model, tokens, lengths)
    found = {"padded": apart(logits_here(graph, ours, tokens, context(tokens, lengths)), expected, lengths)}
    one_row = packed(graph, ours, tokens, lengths)
    found["packed"] = apart(np.split(one_row, [lengths[0]]), expected, lengths)
    again = description.description_of(described.config, described.vocab_size)
    hugging_face.write(f"{folder}/here", again, ours, {}, shard_bytes=20_000)
    back, told = transformers.AutoModelForCausalLM.from_pretrained(
        f"{folder}/here", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(told.values()), told
    found["written"] = apart(logits_there(back.eval(), tokens, lengths), expected, lengths)
    if name in FIRST:
        found["gradients"] = gradients_apart(model, described, ours, tokens)
    return found


def record() -> None:
    """For the first config of each family, and some more: config.json, weights as saved, logits at every third place."""
    arrays: dict[str, np.ndarray] = {}
    tokens, lengths = inputs()
    for name in RECORDED:
        with tempfile.TemporaryDirectory() as folder:
            model = reference(name)
            for parameter in model.parameters():
                parameter.data = parameter.data.half().float()  # weights that two bytes hold
            model.save_pretrained(folder)
            found = safetensors.folder_tensors(folder)
            arrays |= {f"{name}|{key}": tensor.read().astype(np.float16) for key, tensor in found.items()}
            arrays[f"{name}|config.json"] = np.array(pathlib.Path(folder, "config.json").read_text())
            arrays[f"{name}|logits"] = logits_there(model, tokens, lengths)[:, ::3]
    np.savez_compressed(FIXTURE, allow_pickle=False, **arrays)
    print(f"{FIXTURE.name}: {FIXTURE.stat().st_size:,} bytes")
    DEFAULTS.write_text(
        "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(d)}" for k, d in defaults().items()) + "\n}\n"
    )


def defaults() -> dict[str, dict[str, Any]]:
    """What `transformers` takes where a config.json says nothing but its model_type, of every family."""
    import transformers

    found = {kind: transformers.AutoConfig.for_model(kind).to_dict() for kind in description.FAMILIES}
    return json.loads(json.dumps(found))


def recorded(name: str, fixture: pathlib.Path = FIXTURE) -> tuple[dict, dict[str, np.ndarray], np.ndarray]:
    """(config.json, tensors in float32, logits) of what a fixture has under this name, of a family."""
    with np.load(fixture) as arrays:
        mine = {key.split("|")[1]: arrays[key] for key in arrays.files if key.startswith(f"{name}|")}
    config, logits = json.loads(str(mine.pop("config.json"))), mine.pop("logits")
    return config, {key: x.astype(np.float32) for key, x in mine.items()}, logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CONFIGS)}; none: all")
    flags = parser.parse_args()
    if flags.record:
        return record()
    for name in flags.names or CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            found = compare(name, folder)
        shown = "  ".join(f"{what} {value:.1e}" for what, value in found.items())
        print(f"{name:16} {shown}   {'agrees' if max(found.values()) < LIMIT else 'DIFFERS'}", flush=True)


if __name__ == "__main__":
    main()
