"""BERT and T5 as tables, in the form of families.py.

Two kinds more than there: `pieces`, a vector over the vocabulary, ours padded; `undivided`, a linear that makes queries whose
products with keys are not divided by the root of a head's width.
"""

from typing import Any

from lm_jax.config import Model
from lm_jax.convert.families import ACTIVATIONS, Family, Row, dense, norm, their_activation
from lm_jax.convert.fields import LARGEST, Theirs
from lm_jax.errors import UserError

GATES = {"gated-gelu": "gelu", "gated-gelu_new": "gelu", "gated-silu": "silu", "gated-relu": "relu"}


def read_bert(theirs: Theirs) -> dict[str, Any]:
    theirs.only(type_vocab_size=2, is_decoder=False, position_embedding_type="absolute")
    return {
        **{"kind": "encoder", "norm_place": "post"},
        "num_layers": theirs.size("num_hidden_layers", largest=LARGEST),
        "model_dim": theirs.size("hidden_size"),
        "num_heads": theirs.size("num_attention_heads"),
        "mlp_dim": theirs.size("intermediate_size"),
        "norm_epsilon": theirs("layer_norm_eps", float),
        "activation": theirs.choice("hidden_act", ACTIVATIONS),
        "tie_embedding": theirs("tie_word_embeddings", bool),
    }


def write_bert(model: Model) -> dict[str, Any]:
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.model_dim,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_dim,
        "layer_norm_eps": model.norm_epsilon,
        "hidden_act": their_activation(model.activation),
        "tie_word_embeddings": model.tie_embedding,
        **{"type_vocab_size": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    }


def read_t5(theirs: Theirs) -> dict[str, Any]:
    """T5 1.1. The first version has one table, and divides what goes into the output by a root."""
    num_layers = theirs.size("num_layers", largest=LARGEST)
    theirs.only(relative_attention_num_buckets=32, relative_attention_max_distance=128, is_decoder=False)
    theirs.only(is_encoder_decoder=True, num_decoder_layers=num_layers)
    scales = theirs("scale_decoder_outputs", bool, theirs("tie_word_embeddings", bool))
    if scales or theirs("feed_forward_proj", str) not in GATES:
        raise UserError(f"{theirs.where}: this is the first T5 (one table, no gates); T5 1.1 is supported")
    return {
        **{"kind": "encoder_decoder", "positions": "relative", "norm": "rmsnorm", "bias": False},
        **{"tie_embedding": False, "gated": True},
        "num_layers": num_layers,
        "model_dim": theirs.size("d_model"),
        "num_heads": theirs.size("num_heads"),
        "head_dim": theirs.size("d_kv"),
        "mlp_dim": theirs.size("d_ff"),
        "norm_epsilon": theirs("layer_norm_epsilon", float),
        "activation": theirs.choice("feed_forward_proj", GATES),
    }


def write_t5(model: Model) -> dict[str, Any]:
    known = [theirs for theirs, ours in GATES.items() if ours == model.activation]
    return {
        **{"num_layers": model.num_layers, "num_decoder_layers": model.num_layers},
        "d_model": model.model_dim,
        "num_heads": model.num_heads,
        "d_kv": model.head_dim,
        "d_ff": model.mlp_dim,
        "layer_norm_epsilon": model.norm_epsilon,
        "feed_forward_proj": known[0] if known else "gated-gelu",
        **{"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
        **{"tie_word_embeddings": False, "is_encoder_decoder": True, "dropout_rate": 0.0},
    }


BERT: tuple[Row, ...] = (
    ("embedding/table", "embeddings.word_embeddings.weight", "table"),
    ("unembedding/table", "cls.predictions.decoder.weight", "table"),
    ("output_bias", "cls.predictions.bias", "pieces"),
    ("positions/table", "embeddings.position_embeddings.weight", "conv"),
    ("segments/table", "embeddings.token_type_embeddings.weight", "conv"),
    *norm("embedding_norm", "embeddings.LayerNorm"),
    *dense("block/attention/query", "encoder.layer.{layer}.attention.self.query"),
    *dense("block/attention/key", "encoder.layer.{layer}.attention.self.key"),
    *dense("block/attention/value", "encoder.layer.{layer}.attention.self.value"),
    *dense("block/attention/output", "encoder.layer.{layer}.attention.output.dense"),
    *norm("block/attention_norm", "encoder.layer.{layer}.attention.output.LayerNorm"),
    *dense("block/mlp/up", "encoder.layer.{layer}.intermediate.dense"),
    *dense("block/mlp/down", "encoder.layer.{layer}.output.dense"),
    *norm("block/mlp_norm", "encoder.layer.{layer}.output.LayerNorm"),
    *dense("pooler", "pooler.dense"),
    *dense("transform", "cls.predictions.transform.dense"),
    *norm("transform_norm", "cls.predictions.transform.LayerNorm"),
    *dense("next_sentence", "cls.seq_relationship"),
)


def attention(ours: str, theirs: str) -> tuple[Row, ...]:
    """T5 does not divide the products of queries and keys: its queries are smaller."""
    return (
        (f"{ours}/query/kernel", f"{theirs}.q.weight", "undivided"),
        (f"{ours}/key/kernel", f"{theirs}.k.weight", "linear"),
        (f"{ours}/value/kernel", f"{theirs}.v.weight", "linear"),
        (f"{ours}/output/kernel", f"{theirs}.o.weight", "linear"),
    )


def stack(name: str, mlp: int) -> tuple[Row, ...]:
    """The encoder or the decoder; `mlp` is the place of the MLP in a block."""
    layer = f"{name}.block.{{layer}}.layer"
    bias = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        (f"{name}_bias/table", bias, "conv"),
        *norm(f"{name}_layers/attention_norm", f"{layer}.0.layer_norm"),
        *attention(f"{name}_layers/attention", f"{layer}.0.SelfAttention"),
        *norm(f"{name}_layers/mlp_norm", f"{layer}.{mlp}.layer_norm"),
        *dense(f"{name}_layers/mlp/gate", f"{layer}.{mlp}.DenseReluDense.wi_0"),
        *dense(f"{name}_layers/mlp/up", f"{layer}.{mlp}.DenseReluDense.wi_1"),
        *dense(f"{name}_layers/mlp/down", f"{layer}.{mlp}.DenseReluDense.wo"),
        *norm(f"{name}_norm", f"{name}.final_layer_norm"),
    )


T5: tuple[Row, ...] = (
    ("embedding/table", "shared.weight", "table"),
    ("unembedding/table", "lm_head.weight", "table"),
    *stack("encoder", 1),
    *stack("decoder", 2),
    *norm("decoder_layers/cross_norm", "decoder.block.{layer}.layer.1.layer_norm"),
    *attention("decoder_layers/cross", "decoder.block.{layer}.layer.1.EncDecAttention"),
)

FAMILIES: dict[str, Family] = {
    "bert": Family(
        "BertForPreTraining", "bert.", BERT, read_bert, write_bert, kind="encoder", optional=("cls.", "pooler.")
    ),
    "t5": Family("T5ForConditionalGeneration", "", T5, read_t5, write_t5, "n_positions", "encoder_decoder"),
}
