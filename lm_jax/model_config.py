"""The settings of a model, and which kinds of model there are for which objectives and tasks."""

import dataclasses
from typing import Any

from lm_jax.knob import knob

RECURRENT = ("rnn", "gru", "lstm")
# {kind of model: objectives}; the other kinds are causal.
OBJECTIVES = {"encoder": ("masked", "masked_words"), "encoder_decoder": ("span_corruption",)}
# {task: (the head of its model (lm_jax/model/task_heads.py), the kinds of model that can have it)}.
ONE_TEXT = ("encoder", "transformer", *RECURRENT)
DECODERS = ("transformer", *RECURRENT)
HEADS = ("", "labels", "value", "tags", "spans")
TASKS = {
    "classification": ("labels", ONE_TEXT),
    "regression": ("value", ONE_TEXT),
    "token_classification": ("tags", ONE_TEXT),
    "question_answering": ("spans", ("encoder",)),  # the start of an answer is known by the words after it
    "text_to_text": ("", ("encoder_decoder", *DECODERS)),
    "instruction": ("", DECODERS),
    "preference": ("", DECODERS),
}
WRITING = ("text_to_text", "instruction")  # the tasks whose answers are texts
NUM_SENTINELS = 100  # marks of hidden spans, as T5 has

# Settings that say how a model is trained and computed; the others say what it is.
OF_TRAINING = frozenset(
    "dropout init_scale attention remat unroll compute_dtype lora_rank lora_alpha lora_pattern".split()
)

ATTENDING = {"model.kind": ("transformer", "encoder", "encoder_decoder")}
ONE_STACK = {"model.kind": ("transformer", "encoder")}
ROTARY = {"model.positions": ("rotary",)}
LARGEST_HEAD = 1024  # what every backend of attention takes
# What "auto" is where nothing is decided by the counts (lm_jax/decide.py), because nothing is trained: as on a CPU.
PLAIN = {"remat": "none", "unroll": True, "compute_dtype": "float32"}
MOST_UNROLLED = 24  # layers as straight code: beyond, a compile takes minutes


@dataclasses.dataclass(frozen=True)
class Model:
    """The architecture of a model, and how it is computed."""

    kind: str = knob(
        "transformer",
        "decoder-only Transformer; BERT's encoder; T5's encoder_decoder, num_layers each; or recurrent cells, the old baselines",
        choices=("transformer", "encoder", "encoder_decoder", *RECURRENT),
    )
    num_layers: int = knob(4, "Transformer blocks", within=(1, 1000))
    model_dim: int = knob(256, "width of the residual stream", within=(1, 2**20))
    num_heads: int = knob(4, "query heads", within=(1, 2**16), reach=ATTENDING)
    num_kv_heads: int = knob(
        0, "key and value heads, shared by groups of query heads; 0 = num_heads", within=(0, 2**16), reach=ATTENDING
    )
    head_dim: int = knob(0, "width of one head; 0 = model_dim / num_heads", within=(0, LARGEST_HEAD), reach=ATTENDING)
    mlp_dim: int = knob(0, "width of the MLP's hidden layer; 0 = 4 * model_dim", within=(0, 2**22), reach=ATTENDING)
    positions: str = knob(
        "learned",
        "how a token knows its position; relative: as in T5, for an encoder_decoder",
        choices=("learned", "rotary", "sinusoidal", "relative", "none"),
        reach=ATTENDING,
        idle=("none",),
    )
    rotary_base: float = knob(
        10_000.0, "base of the rope frequencies base^(-2k / width)", within=(1.0, 1e12), reach=ROTARY
    )
    rotary_local_base: float = knob(
        0.0,
        "rotary_base of layers with a window, without scaling; 0 = as the other layers",
        within=(0.0, 1e12),
        reach=ROTARY | {"model.window": ()},
    )
    rotary_scaling: tuple[float, float, float, float] = knob(
        (1.0, 1.0, 4.0, 8192.0),
        "(factor, low, high, length), rope for longer texts: frequencies with fewer than low rotations in length tokens are "
        "divided by factor, those with more than high are kept; length 0: all are divided; factor 1 = off",
        within=(0.0, 1e9),
        reach=ROTARY | ONE_STACK,
    )
    rotary_scaling_kind: str = knob(
        "llama3",
        "how frequencies between low and high are scaled: linearly in their rotations (Llama 3), or in their index in the "
        "head (YaRN, which also scales queries and keys up)",
        choices=("llama3", "yarn"),
        reach=ROTARY | ONE_STACK | {"model.rotary_scaling": ()},
    )
    rotary_share: tuple[float, ...] = knob(
        (1.0,),
        "share of a head's width that is rotated, from its start; of all layers, or one a value of window: (1, 1, 1, 0) with "
        "window (0, 0, 0, 0) leaves every fourth layer without positions",
        within=(0.0, 1.0),
        reach=ROTARY | ONE_STACK,
    )
    norm: str = knob("layernorm", "normalisation", choices=("layernorm", "rmsnorm"), reach=ATTENDING)
    norm_place: str = knob(
        "pre",
        "where norms are: before each branch, after its sum with the stream (no norm at the end), before and after a branch, "
        "or after a branch alone (OLMo 2)",
        choices=("pre", "post", "both", "branch"),
        reach=ATTENDING,
    )
    norm_epsilon: float = knob(1e-5, "added to the variance", within=(1e-20, 0.1), reach=ATTENDING)
    activation: str = knob(
        "gelu",
        "of the MLP; gelu is the tanh form of GPT-2",
        choices=("gelu", "gelu_exact", "relu", "silu"),
        reach=ATTENDING,
    )
    gated: bool = knob(False, "gated MLP (SwiGLU with silu)", reach=ATTENDING)
    bias: bool = knob(True, "biases in dense layers and in LayerNorm")
    qkv_bias: bool = knob(
        False,
        "biases of queries, keys and values, also where model.bias is off",
        reach=ATTENDING | {"model.bias": (False,)},
        idle=(True,),
    )
    qk_norm: bool = knob(False, "each head's query and key normalised", reach=ATTENDING)
    qk_norm_whole: bool = knob(
        False,
        "the queries of all heads normalised together, and the keys (OLMo 2)",
        reach=ATTENDING | {"model.qk_norm": (True,)},
    )
    logit_softcap: tuple[float, float] = knob(
        (0.0, 0.0),
        "(of attention, of the output): logits x are cap * tanh(x / cap); 0 = off; Gemma 2: (50, 30)",
        within=(0.0, 1e6),
        reach=ONE_STACK,
    )
    multipliers: tuple[float, float, float, float] = knob(
        (1.0, 1.0, 0.0, 1.0),
        "factors of the embedding, of each branch before its sum, of the products of queries and keys (0 = 1 / "
        "sqrt(head_dim)); and the divisor of the output's logits (Granite)",
        within=(0.0, 1e6),
        reach=ONE_STACK,
    )
    scale_embedding: bool = knob(False, "embedding times sqrt(model_dim)", reach=ONE_STACK)
    num_experts: int = knob(
        0, "MLPs of a layer from which each token chooses; 0 = one MLP for all", within=(0, 2**14), reach=ONE_STACK
    )
    experts_per_token: int = knob(2, "MLPs that a token chooses", within=(1, 2**14), reach={"model.num_experts": ()})
    tie_embedding: bool = knob(
        True,
        "one table for the embedding and the output",
        reach={"train.task": ("", *WRITING, "preference")},
        idle=(False,),
    )
    window: tuple[int, ...] = knob(
        (0,),
        "tokens that a layer attends to, repeated over the layers; 0 = all; GPT-3: (0, 256)",
        within=(0, 2**30),
        reach={"model.kind": ("transformer",)},
    )
    labels: tuple[str, ...] = knob(
        (),
        "the classes of a task, in the order of their ids; () = those of the records, sorted",
        reach={"train.task": ("classification", "token_classification")},
    )
    lora_rank: int = knob(
        0, "rank of adapters beside dense layers, which alone are trained then (LoRA); 0 = none", within=(0, 2**16)
    )
    lora_alpha: float = knob(
        16.0,
        "the output of an adapter is scaled by lora_alpha / lora_rank",
        within=(1e-6, 1e6),
        reach={"model.lora_rank": ()},
    )
    lora_pattern: str = knob(
        "attention/(query|value)",
        "a regular expression: dense layers in whose path it is found get an adapter",
        reach={"model.lora_rank": ()},
    )
    head: str = knob(
        "", 'what predicts: "" = the vocabulary, else what train.task asks for, which sets it', choices=HEADS
    )
    dropout: float = knob(0.0, "dropout rate of the embedding and of the output of each branch", within=(0.0, 0.9))
    init_scale: float = knob(
        0.02, "standard deviation of initial weights; residual outputs / sqrt(2 layers)", within=(1e-6, 10.0)
    )
    attention: str = knob(
        "auto",
        "backend; auto = the best that the platform has",
        choices=("auto", "xla", "chunked", "cudnn", "flash", "splash"),
        fixed=False,
        reach=ATTENDING,
        machine=True,
    )
    remat: str = knob(
        "auto",
        "what layers compute again in the backward pass: nothing, all but products, all but attention, all; auto = the least "
        "with which a microbatch fits",
        choices=("auto", "none", "dots", "names", "full"),
        fixed=False,
        machine=True,
    )
    unroll: bool | str = knob(
        "auto",
        "layers as straight code (fast) or one scanned body (compile time flat); auto = straight on CPUs or the GPUs of one "
        f"host, up to {MOST_UNROLLED} layers",
        choices=("auto",),
        fixed=False,
        machine=True,
    )
    compute_dtype: str = knob(
        "auto",
        "of activations and matrix products; auto = bfloat16, on GPUs without it float16 (with a loss_scale), on CPUs float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )


def plain(model: Model) -> Model:
    """A model's settings with no "auto" in what it computes: where one is left, its value in PLAIN."""
    decided: dict[str, Any] = {name: value for name, value in PLAIN.items() if getattr(model, name) == "auto"}
    return dataclasses.replace(model, **decided)
