"""The settings of a model, and which kinds of model there are for which objectives and tasks."""

import dataclasses

from lm_jax.knob import knob

RECURRENT = ("rnn", "gru", "lstm")
# What each kind of model can be trained on; the others write from left to right: causal.
OBJECTIVES = {"encoder": ("masked", "masked_words"), "encoder_decoder": ("span_corruption",)}
# Every task: the head that it gives its model (lm_jax/model/task_heads.py), and the kinds of model that can have it.
ONE_TEXT = ("encoder", "transformer", *RECURRENT)
DECODERS = ("transformer", *RECURRENT)
HEADS = ("", "labels", "value", "tags", "spans")
TASKS = {
    "classification": ("labels", ONE_TEXT),
    "regression": ("value", ONE_TEXT),
    "token_classification": ("tags", ONE_TEXT),
    "question_answering": ("spans", ("encoder",)),  # where an answer starts is seen by what follows
    "text_to_text": ("", ("encoder_decoder", *DECODERS)),
    "instruction": ("", DECODERS),
    "preference": ("", DECODERS),
}
WRITING = ("text_to_text", "instruction")  # the tasks whose answers are texts
NUM_SENTINELS = 100  # marks of hidden spans, as T5 has

ATTENDING = {"model.kind": ("transformer", "encoder", "encoder_decoder")}
ONE_STACK = {"model.kind": ("transformer", "encoder")}
ROTARY = {"model.positions": ("rotary",)}
LARGEST_HEAD = 1024  # what every backend of attention takes


@dataclasses.dataclass(frozen=True)
class Model:
    kind: str = knob(
        "transformer",
        "decoder-only Transformer; BERT's encoder; T5's encoder_decoder, num_layers each; or recurrent cells, the old baselines",
        choices=("transformer", "encoder", "encoder_decoder", *RECURRENT),
    )
    num_layers: int = knob(4, "Transformer blocks", low=1, high=1000)
    model_dim: int = knob(256, "width of the residual stream", low=1, high=2**20)
    num_heads: int = knob(4, "query heads", low=1, high=2**16, reach=ATTENDING)
    num_kv_heads: int = knob(
        0, "key and value heads, shared by groups of query heads; 0 = num_heads", low=0, high=2**16, reach=ATTENDING
    )
    head_dim: int = knob(0, "width of one head; 0 = model_dim / num_heads", low=0, high=LARGEST_HEAD, reach=ATTENDING)
    mlp_dim: int = knob(0, "width of the MLP's hidden layer; 0 = 4 * model_dim", low=0, high=2**22, reach=ATTENDING)
    positions: str = knob(
        "learned",
        "how a token knows its place; relative = T5's, of an encoder_decoder",
        choices=("learned", "rotary", "sinusoidal", "relative", "none"),
        reach=ATTENDING,
        idle=("none",),
    )
    rotary_base: float = knob(
        10_000.0, "longest wavelength of rotary positions, in tokens / 2 pi", low=1.0, high=1e12, reach=ROTARY
    )
    rotary_local_base: float = knob(
        0.0,
        "the same in layers with a window; 0 = rotary_base, and its scaling",
        low=0.0,
        high=1e12,
        reach=ROTARY | {"model.window": ()},
    )
    rotary_scaling: tuple[float, float, float, float] = knob(
        (1.0, 1.0, 4.0, 8192.0),
        "(factor, low, high, length) of Llama 3: wavelengths over length / low are factor times as long, those under "
        "length / high stay; length 0: all are longer; factor 1 = off",
        low=0.0,
        high=1e9,
        reach=ROTARY | ONE_STACK,
    )
    rotary_scaling_kind: str = knob(
        "llama3",
        "where wavelengths between the two ends pass from one to the other: by what turns in length tokens (Llama 3), or by "
        "place in the head (YaRN, which also makes queries and keys larger)",
        choices=("llama3", "yarn"),
        reach=ROTARY | ONE_STACK | {"model.rotary_scaling": ()},
    )
    rotary_share: tuple[float, ...] = knob(
        (1.0,),
        "of a head's width that rotary positions turn, from its start; of all layers, or one a value of window: (1, 1, 1, 0) "
        "with window (0, 0, 0, 0) leaves every fourth layer without positions",
        low=0.0,
        high=1.0,
        reach=ROTARY | ONE_STACK,
    )
    norm: str = knob("layernorm", "normalisation", choices=("layernorm", "rmsnorm"), reach=ATTENDING)
    norm_place: str = knob(
        "pre",
        "of the norms: before each branch, after its sum with the stream (no norm at the end), before and after a branch, or "
        "after a branch alone (OLMo 2)",
        choices=("pre", "post", "both", "branch"),
        reach=ATTENDING,
    )
    norm_epsilon: float = knob(1e-5, "added to the variance", low=1e-20, high=0.1, reach=ATTENDING)
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
        low=0.0,
        high=1e6,
        reach=ONE_STACK,
    )
    multipliers: tuple[float, float, float, float] = knob(
        (1.0, 1.0, 0.0, 1.0),
        "what is multiplied by a constant: the embedding, each branch before its sum, products of queries and keys (0 = by "
        "1 / sqrt(head_dim)); and by what the output's logits are divided (Granite)",
        low=0.0,
        high=1e6,
        reach=ONE_STACK,
    )
    scale_embedding: bool = knob(False, "embedding times sqrt(model_dim)", reach=ONE_STACK)
    num_experts: int = knob(
        0, "MLPs of a layer from which each token chooses; 0 = one MLP for all", low=0, high=2**14, reach=ONE_STACK
    )
    experts_per_token: int = knob(2, "MLPs that a token chooses", low=1, high=2**14, reach={"model.num_experts": ()})
    tie_embedding: bool = knob(
        True,
        "one table for the embedding and the output",
        reach={"train.task": ("", *WRITING, "preference")},
        idle=(False,),
    )
    window: tuple[int, ...] = knob(
        (0,),
        "tokens each layer sees, repeated over the layers; 0 = all; GPT-3: (0, 256)",
        low=0,
        high=2**30,
        reach={"model.kind": ("transformer",)},
    )
    labels: tuple[str, ...] = knob(
        (),
        "what a task tells apart, in the order of their ids",
        reach={"train.task": ("classification", "token_classification")},
    )
    lora_rank: int = knob(
        0, "of adapters beside dense layers, which are then what is trained (LoRA); 0 = none", low=0, high=2**16
    )
    lora_alpha: float = knob(
        16.0, "adapters count lora_alpha / lora_rank times", low=1e-6, high=1e6, reach={"model.lora_rank": ()}
    )
    lora_pattern: str = knob(
        "attention/(query|value)",
        "a regular expression, found in the paths of the dense layers that get an adapter",
        reach={"model.lora_rank": ()},
    )
    head: str = knob(
        "", 'what predicts: "" = the vocabulary, else what train.task asks for, which sets it', choices=HEADS
    )
    dropout: float = knob(0.0, "dropped share of the embedding's and of each branch's output", low=0.0, high=0.9)
    init_scale: float = knob(
        0.02, "standard deviation of initial weights; residual outputs / sqrt(2 layers)", low=1e-6, high=10.0
    )
    attention: str = knob(
        "auto",
        "backend; auto = the best that the platform has",
        choices=("auto", "xla", "chunked", "cudnn", "splash"),
        fixed=False,
        reach=ATTENDING,
        machine=True,
    )
    remat: str = knob(
        "none",
        "what layers compute again in the backward pass: nothing, all but products, all but attention, all",
        choices=("none", "dots", "names", "full"),
        fixed=False,
        machine=True,
    )
    unroll: bool = knob(
        True, "layers as straight code (fast) or one scanned body (compile time flat)", fixed=False, machine=True
    )
    compute_dtype: str = knob(
        "float32", "of activations and matrix products", choices=("float32", "bfloat16", "float16")
    )
