"""BERT, RoBERTa, DistilBERT and T5 as tables, in the form of families.py.

More kinds than there: `pieces`, a vector over the vocabulary, ours padded; `undivided`, a linear that makes queries whose
products with keys are not divided by the root of a head's width; `from_third`, a table of positions whose first two rows are
no positions; `one_row`, of which ours has as many copies as it has rows. The last two are only read.
"""

from lm_jax.convert import config_fields as fields
from lm_jax.convert.config_fields import Part, Settings, always, field, must_say, only, only_written, written
from lm_jax.convert.config_reader import HFConfigReader
from lm_jax.convert.families import Family, Head, Row, dense, norms
from lm_jax.errors import UserError

GATES = {"gated-gelu": "gelu", "gated-gelu_new": "gelu", "gated-silu": "silu", "gated-relu": "relu"}
BERT_SHARED = (
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
)
BERT_FIELDS = (
    *BERT_SHARED,
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

CLASSIFIER, ANSWER = dense("", "", labels="classifier"), dense("", "", labels="qa_outputs")
BERT_LABELS = Head("BertForSequenceClassification", CLASSIFIER)
BERT_HEADS = {
    "": Head("BertForMaskedLM", (), ("cls.seq_relationship.", "pooler.")),
    **{"labels": BERT_LABELS, "value": BERT_LABELS},
    **{"tags": Head("BertForTokenClassification", CLASSIFIER), "spans": Head("BertForQuestionAnswering", ANSWER)},
}

# RoBERTa: BERT with one type of token for both texts, its first position in the third row, and other names for its heads.
ROBERTA_OWN = {
    "segments/table": ("embeddings.token_type_embeddings.weight", "one_row"),
    "positions/table": ("embeddings.position_embeddings.weight", "from_third"),
    "unembedding/table": ("lm_head.decoder.weight", "table"),
    "output_bias": ("lm_head.bias", "pieces"),
}
ROBERTA: tuple[Row, ...] = (
    *((path, *ROBERTA_OWN.get(path, (name, kind))) for path, name, kind in BERT if not path.startswith("transform")),
    *dense("", "", transform="lm_head.dense"),
    *norms("", "", transform_norm="lm_head.layer_norm"),
)
ROBERTA_LABELS = Head(
    "RobertaForSequenceClassification", dense("", "classifier", pooler="dense", labels="out_proj")
)  # it has BERT's pooler within
ROBERTA_HEADS = {
    **{"labels": ROBERTA_LABELS, "value": ROBERTA_LABELS},
    **{"tags": Head("RobertaForTokenClassification", CLASSIFIER), "spans": Head("RobertaForQuestionAnswering", ANSWER)},
}
ROBERTA_FIELDS = (*BERT_SHARED, only(type_vocab_size=1))

# DistilBERT: without types of tokens, and without a pooler; what its classifier has in its place is not tanh.
DISTIL_I = "transformer.layer.{layer}"
DISTILBERT: tuple[Row, ...] = (
    ("embedding/table", "embeddings.word_embeddings.weight", "table"),
    ("unembedding/table", "vocab_projector.weight", "table"),
    ("output_bias", "vocab_projector.bias", "pieces"),
    ("positions/table", "embeddings.position_embeddings.weight", "conv"),
    ("segments/table", "embeddings.token_type_embeddings.weight", "conv"),
    *norms("", "embeddings", embedding_norm="LayerNorm"),
    *dense("block/attention", f"{DISTIL_I}.attention", query="q_lin", key="k_lin", value="v_lin", output="out_lin"),
    *norms("block", DISTIL_I, attention_norm="sa_layer_norm", mlp_norm="output_layer_norm"),
    *dense("block/mlp", f"{DISTIL_I}.ffn", up="lin1", down="lin2"),
    *dense("", "", pooler="pooler.dense", transform="vocab_transform", next_sentence="cls.seq_relationship"),
    *norms("", "", transform_norm="vocab_layer_norm"),
)
DISTILBERT_FIELDS = (
    must_say("vocab_size", "max_position_embeddings"),
    only(sinusoidal_pos_embds=False),
    always(kind="encoder", norm_place="post", norm_epsilon=1e-12),
    field("n_layers", "num_layers", fields.COUNT),
    field("dim", "model_dim"),
    field("n_heads", "num_heads"),
    field("hidden_dim", "mlp_dim"),
    field("activation", "activation", fields.ACTIVATION, "gelu"),
    field("tie_word_embeddings", "tie_embedding", fields.FLAG, True),
)
DISTILBERT_HEADS = {
    "tags": Head("DistilBertForTokenClassification", CLASSIFIER),
    "spans": Head("DistilBertForQuestionAnswering", ANSWER),
}

FAMILIES: dict[str, Family] = {
    "bert": Family(
        *("BertForPreTraining", "bert.", BERT, BERT_FIELDS),
        idle="directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type",
        kind="encoder",
        optional=("cls.predictions.", "cls.seq_relationship.", "pooler."),
        heads=BERT_HEADS,
    ),
    "roberta": Family(
        *("RobertaForMaskedLM", "roberta.", ROBERTA, ROBERTA_FIELDS, {"type_vocab_size": 2}),
        kind="encoder",
        optional=("lm_head.", "cls.seq_relationship.", "pooler."),
        heads=ROBERTA_HEADS,
        first_position=2,
        is_written=False,
    ),
    "distilbert": Family(
        *("DistilBertForMaskedLM", "distilbert.", DISTILBERT, DISTILBERT_FIELDS),
        idle="dropout qa_dropout seq_classif_dropout",
        kind="encoder",
        optional=("vocab_", "embeddings.token_type_embeddings.", "cls.seq_relationship.", "pooler."),
        heads=DISTILBERT_HEADS,
        is_written=False,
    ),
    "t5": Family(
        *("T5ForConditionalGeneration", "", T5, T5_FIELDS, {"n_positions": 512}, "dense_act_fn is_gated_act"),
        length="n_positions",
        kind="encoder_decoder",
    ),
}
