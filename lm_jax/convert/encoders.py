"""BERT and T5 as tables, in the form of families.py.

Two kinds more than there: `pieces`, a vector over the vocabulary, ours padded; `undivided`, a linear that makes queries whose
products with keys are not divided by the root of a head's width.
"""

from lm_jax.convert import config_fields as fields
from lm_jax.convert.config_fields import Part, Settings, always, field, must_say, only, only_written, written
from lm_jax.convert.config_reader import HFConfigReader
from lm_jax.convert.families import Family, Row, dense, norms
from lm_jax.errors import UserError

GATES = {"gated-gelu": "gelu", "gated-gelu_new": "gelu", "gated-silu": "silu", "gated-relu": "relu"}
BERT_FIELDS = (
    must_say("vocab_size", "max_position_embeddings"),
    only(is_decoder=False, position_embedding_type="absolute"),
    always(kind="encoder", norm_place="post"),
    field("num_hidden_layers", "num_layers", fields.COUNT),
    field("hidden_size", "model_dim"),
    field("num_attention_heads", "num_heads"),
    field("intermediate_size", "mlp_dim"),
    field("layer_norm_eps", "norm_epsilon", fields.NUMBER, 1e-12),
    field("hidden_act", "activation", fields.ACTIVATION, "gelu"),
    field("tie_word_embeddings", "tie_embedding", fields.FLAG, True),
    only_written(type_vocab_size=2),
    written(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
)


def check_version(reader: HFConfigReader) -> Settings:
    """Settings of T5 1.1. Raises UserError for the first T5, which has one table and no gates."""
    reader.only(num_decoder_layers=reader.size("num_layers", largest=fields.LARGEST))
    scales = reader("scale_decoder_outputs", bool, reader("tie_word_embeddings", bool))
    if scales or reader("feed_forward_proj", str) not in GATES:
        raise UserError(f"{reader.where}: this is the first T5 (one table, no gates); T5 1.1 is supported")
    return {"tie_embedding": False}


T5_FIELDS = (
    must_say("vocab_size"),
    only(is_decoder=False),
    always(kind="encoder_decoder", positions="relative", norm="rmsnorm", bias=False, gated=True),
    field("num_layers", "num_layers", fields.COUNT),
    Part({"num_decoder_layers": None}, check_version, lambda model: {"num_decoder_layers": model.num_layers}),
    field("d_model", "model_dim"),
    field("num_heads", "num_heads"),
    field("d_kv", "head_dim"),
    field("d_ff", "mlp_dim"),
    field("layer_norm_epsilon", "norm_epsilon", fields.NUMBER, 1e-6),
    Part({"tie_word_embeddings": True, "scale_decoder_outputs": None}),
    field("feed_forward_proj", "activation", fields.choice(GATES), "relu"),
    only_written(relative_attention_num_buckets=32, relative_attention_max_distance=128),
    written(tie_word_embeddings=False),
    only_written(is_encoder_decoder=True),
    written(dropout_rate=0.0),
)


LAYER_I = "encoder.layer.{layer}"
BERT: tuple[Row, ...] = (
    ("embedding/table", "embeddings.word_embeddings.weight", "table"),
    ("unembedding/table", "cls.predictions.decoder.weight", "table"),
    ("output_bias", "cls.predictions.bias", "pieces"),
    ("positions/table", "embeddings.position_embeddings.weight", "conv"),
    ("segments/table", "embeddings.token_type_embeddings.weight", "conv"),
    *norms("", "embeddings", embedding_norm="LayerNorm"),
    *dense("block/attention", f"{LAYER_I}.attention.self", query="query", key="key", value="value"),
    *dense("block/attention", f"{LAYER_I}.attention.output", output="dense"),
    *norms("block", f"{LAYER_I}.attention.output", attention_norm="LayerNorm"),
    *dense("block/mlp", LAYER_I, up="intermediate.dense", down="output.dense"),
    *norms("block", f"{LAYER_I}.output", mlp_norm="LayerNorm"),
    *dense("", "", pooler="pooler.dense", transform="cls.predictions.transform.dense"),
    *norms("", "", transform_norm="cls.predictions.transform.LayerNorm"),
    *dense("", "", next_sentence="cls.seq_relationship"),
)


def attention(ours: str, theirs: str) -> tuple[Row, ...]:
    """T5 does not divide the products of queries and keys: its queries are smaller."""
    names = {"query": "q", "key": "k", "value": "v", "output": "o"}
    kind = lambda own: "undivided" if own == "query" else "linear"
    return tuple((f"{ours}/{own}/kernel", f"{theirs}.{its}.weight", kind(own)) for own, its in names.items())


def stack(name: str, mlp: int) -> tuple[Row, ...]:
    """The encoder or the decoder; `mlp` is the position of the MLP in a block."""
    layer, ours = f"{name}.block.{{layer}}.layer", f"{name}_layers"
    return (
        (f"{name}_bias/table", f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "conv"),
        *norms(ours, f"{layer}.0", attention_norm="layer_norm"),
        *attention(f"{ours}/attention", f"{layer}.0.SelfAttention"),
        *norms(ours, f"{layer}.{mlp}", mlp_norm="layer_norm"),
        *dense(f"{ours}/mlp", f"{layer}.{mlp}.DenseReluDense", gate="wi_0", up="wi_1", down="wo"),
        *norms("", name, **{f"{name}_norm": "final_layer_norm"}),
    )


T5: tuple[Row, ...] = (
    ("embedding/table", "shared.weight", "table"),
    ("unembedding/table", "lm_head.weight", "table"),
    *stack("encoder", 1),
    *stack("decoder", 2),
    *norms("decoder_layers", "decoder.block.{layer}.layer.1", cross_norm="layer_norm"),
    *attention("decoder_layers/cross", "decoder.block.{layer}.layer.1.EncDecAttention"),
)

FAMILIES: dict[str, Family] = {
    "bert": Family(
        *("BertForPreTraining", "bert.", BERT, BERT_FIELDS),
        idle="directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type",
        kind="encoder",
        optional=("cls.", "pooler."),
    ),
    "t5": Family(
        *("T5ForConditionalGeneration", "", T5, T5_FIELDS, {"n_positions": 512}, "dense_act_fn is_gated_act"),
        length="n_positions",
        kind="encoder_decoder",
    ),
}
