"""Every knob once: name, type, default, meaning, unit and range. Experiments state differences from here.

`default_config()` gives experiments an `ml_collections.ConfigDict`; `resolve()` turns it into the frozen, hashable
dataclasses that everything below `main` takes. "Off" is 0, "" or a named choice, never None.
"""

import ast
import dataclasses
import difflib
import json
import math
import re
import reprlib
import shlex
from typing import Any, get_args

import ml_collections

Length = int | str  # a number of steps, or a string with its unit: "375M tokens", "2 epochs", "30 min" (checkpoints)
Weight = float | tuple[tuple[int, float], ...]  # of a source in the mixture; or ((first row, weight), ...), rising rows
Sources = tuple[tuple[str, Weight], ...]

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
WITH_LORA = "/lora_|^(labels|pooler)/"  # what is trained beside a frozen base; a pooler belongs to the head
LARGEST_LOSS_SCALE = 2**24  # beyond it nothing is left to rescue


class UserError(ValueError):
    """What a user can mend: reaches the terminal as one to five plain lines, exit code 2.

    Names of files stand in these lines and may hold anything: control characters are shown as escapes, and what is very long
    loses its middle.
    """

    def __str__(self) -> str:
        return plain_lines(super().__str__())


def plain_lines(text: str) -> str:
    """At most five lines of printable characters, none longer than 1,000."""
    plain = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    lines = [line if len(line) <= 1000 else f"{line[:600]} ... {line[-300:]}" for line in plain.split("\n")]
    return "\n".join(lines if len(lines) <= 5 else [*lines[:4], f"... ({len(lines) - 4} more lines)"])


class PeerError(Exception):
    """Another process of the job is not there, or no more: one to five plain lines, exit code 70. Starting again may help."""


def needs(what: str, package: str, extra: str) -> UserError:
    """The mistake of a missing package, with the command that installs it: always from the clone, under no name of an index."""
    return UserError(f"{what} needs the package {package}: in the clone, pip install -e '.[{extra}]'")


Reach = dict[
    str, tuple
]  # {path of another leaf: the values with which it is read; () = any but its default, which is off}


def knob(
    default,
    meaning: str,
    *,
    choices=(),
    low=None,
    high=None,
    fixed=True,
    reach: Reach | None = None,
    idle=(),
    place=False,
):
    """A field: its default, meaning and range; whether a run that resumes must keep it (`fixed`).

    `reach` is where it is read at all: all of its conditions hold. Elsewhere it must have its default, or a value in `idle`,
    which says what holds there anyway. `place`: what only the place of training needs; it binds no reader of the model.
    """
    metadata = {"meaning": meaning, "choices": choices, "low": low, "high": high, "fixed": fixed}
    metadata |= {"reach": reach or {}, "idle": idle, "place": place}
    return dataclasses.field(default=default, metadata=metadata)


ATTENDING = {"model.kind": ("transformer", "encoder", "encoder_decoder")}
ONE_STACK = {"model.kind": ("transformer", "encoder")}
ROTARY = {"model.positions": ("rotary",)}
LARGEST_HEAD = 1024  # what every backend of attention takes
MOST_STEPS = 2**31 - 1  # the step is an int32
ONE_LESS = 0.999999  # float32 tells it from 1
SMALLEST, LARGEST = 1e-30, 1e30  # of a number that is not 0, which float32 is to hold, and its square root or square
LONGEST_TEXT, LONGEST_TUPLE = 10_000, 1_000
LONGEST = 1e18  # tokens, epochs or minutes


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
        place=True,
    )
    remat: str = knob(
        "none",
        "what layers compute again in the backward pass: nothing, all but products, all but attention, all",
        choices=("none", "dots", "names", "full"),
        fixed=False,
        place=True,
    )
    unroll: bool = knob(
        True, "layers as straight code (fast) or one scanned body (compile time flat)", fixed=False, place=True
    )
    compute_dtype: str = knob(
        "float32", "of activations and matrix products", choices=("float32", "bfloat16", "float16")
    )


@dataclasses.dataclass(frozen=True)
class Data:
    sources: Sources = knob(
        (("python", 1.0),),
        '((place, weight), ...): "python" = the interpreter\'s library and manual, a folder of text, or a prepared folder; '
        "a weight is a share of the rows, or ((first row, weight), ...)",
    )
    tokenizer: str = knob(
        "sentencepiece:2048",
        "sentencepiece:PIECES or unigram:PIECES (trained on the first source at first use), bytes, a tokenizer's file or "
        "folder; a prepared source brings its own",
    )
    sequence_length: int = knob(256, "tokens in a row", low=2, high=2**24)
    global_batch_size: int = knob(16, "rows in a step, over all devices", low=1, fixed=False, high=2**24)
    batch_ramp: tuple[int, Length] = knob(
        (0, 0),
        "(rows at the start, length over which they grow to the full batch); (0, 0) = off",
        low=0,
        fixed=False,
        high=MOST_STEPS,
    )
    packing: str = knob(
        "split",
        "documents concatenated and split, or whole by best fit, those longer than a row cut or (best_fit_whole) refused",
        choices=("split", "best_fit", "best_fit_whole"),
    )
    objective: str = knob(
        "causal",
        "what is predicted: the next token, masked tokens (BERT; or whole words), or spans (T5)",
        choices=("causal", "masked", "masked_words", "span_corruption"),
    )
    seed: int = knob(0, "order of the documents, and what the objective hides", low=0, high=2**32 - 1)
    columns: tuple[str, ...] = knob(
        (),
        "names of the columns that a task reads, in the order in which it names its own; () = its own",
        fixed=False,
        reach={"train.task": ()},
    )
    prompt: str = knob(
        "",
        'what a model reads of a record before it writes, the columns in {braces} filled in; "" = {source}, and where one text '
        "is both read and written a blank line after it",
        reach={"train.task": ("text_to_text",)},
    )
    num_workers: int = knob(0, "processes that load rows; 0 = a thread", low=0, fixed=False, high=128, place=True)
    validation_fraction: float = knob(0.02, "share of the documents, by content hash", low=0.0, high=0.5)
    test_fraction: float = knob(0.02, "share of the documents, by content hash", low=0.0, high=0.5)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    name: str = knob(
        "adamw",
        "update rule; adam: no decay; adafactor: rate times the parameter's size; muon: adamw but for the blocks' matrices; "
        "sgd: momentum beta1",
        choices=("adamw", "adam", "adafactor", "lion", "muon", "sgd"),
    )
    learning_rate: float = knob(1e-3, "peak", low=0.0, fixed=False, high=1000.0)
    schedule: str = knob(
        "cosine",
        "after the warm-up; inverse_square_root falls without end, warmup_stable_decay in the last fifth of decay_over",
        choices=("cosine", "constant", "linear", "inverse_square_root", "warmup_stable_decay"),
        fixed=False,
    )
    warmup: Length = knob(100, "linear from 0 to the peak", low=0, fixed=False, high=MOST_STEPS)
    decay_over: Length = knob(
        0,
        "length from step 0 to the end of the decay; 0 = train.num_steps",
        low=0,
        fixed=False,
        high=MOST_STEPS,
        reach={"optimizer.schedule": ("cosine", "linear", "warmup_stable_decay")},
    )
    decay_to: float = knob(
        0.1,
        "final rate as a share of the peak",
        low=0.0,
        high=1.0,
        fixed=False,
        reach={"optimizer.schedule": ("cosine", "linear", "warmup_stable_decay")},
    )
    beta1: float = knob(
        0.9,
        "decay of the first moment, or momentum",
        low=0.0,
        high=ONE_LESS,
        fixed=False,
        reach={"optimizer.name": ("adamw", "adam", "lion", "muon", "sgd")},
    )
    beta2: float = knob(
        0.95,
        "decay of the second moment",
        low=0.0,
        high=ONE_LESS,
        fixed=False,
        reach={"optimizer.name": ("adamw", "adam", "lion", "muon")},
    )
    epsilon: float = knob(
        1e-8,
        "added to the root of the second moment",
        low=1e-20,
        fixed=False,
        high=1.0,
        reach={"optimizer.name": ("adamw", "adam", "muon")},
    )
    weight_decay: float = knob(
        0.1,
        "decoupled; only on parameters that are inside a product",
        low=0.0,
        fixed=False,
        high=100.0,
        reach={"optimizer.name": ("adamw", "adafactor", "lion", "muon", "sgd")},
        idle=(0.0,),
    )
    clip_norm: float = knob(1.0, "largest global gradient norm; 0 = no clipping", low=0.0, fixed=False, high=1e9)
    ema: float = knob(
        0.0, "decay of an average of the parameters, which is then the model; 0 = off", low=0.0, high=ONE_LESS
    )
    trainable: str = knob(
        "",
        'a regular expression, found in the paths of the parameters that are trained, such as "^labels/|attention/query"; the '
        'others keep every bit; "" = all, or with model.lora_rank the adapters and the heads of a task',
    )
    layer_decay: float = knob(
        1.0,
        "rate of a layer as a share of that of the layer above; heads have the whole rate, embeddings the least; 1 = off",
        low=1e-3,
        high=1.0,
        fixed=False,
    )
    loss_scale: int = knob(
        0,
        "first factor of the loss, a power of two; halves on overflow, doubles after 2,000 good steps; 0 = off",
        low=0,
        high=LARGEST_LOSS_SCALE,
    )


@dataclasses.dataclass(frozen=True)
class Train:
    task: str = knob(
        "",
        'what is learnt from records; "" = a text, by data.objective',
        choices=("", *TASKS),
    )
    num_steps: Length = knob(1000, "steps, or tokens or epochs with their unit", low=1, fixed=False, high=MOST_STEPS)
    microbatch_rows: int | str = knob(
        "auto",
        "rows in one pass of the model, over all devices; auto = what fits",
        choices=("auto",),
        low=1,
        fixed=False,
        high=2**24,
        place=True,
    )
    z_loss: float = knob(
        0.0,
        "weight of log(softmax's denominator)^2 a token, which keeps logits near 0; PaLM: 1e-4",
        low=0.0,
        fixed=False,
        high=1.0,
        reach={"train.task": ("", *WRITING)},
    )
    balance_loss: float = knob(
        0.01,
        "weight of how unevenly experts are chosen, a token and layer; Mixtral: 0.02",
        low=0.0,
        fixed=False,
        high=1000.0,
        reach={"model.num_experts": ()},
        idle=(0.0,),
    )
    router_z_loss: float = knob(
        0.0,
        "weight of log(router's denominator)^2, a token and layer; ST-MoE: 1e-3",
        low=0.0,
        fixed=False,
        high=1000.0,
        reach={"model.num_experts": ()},
    )
    dpo_beta: float = knob(
        0.1,
        "of the task preference: how much a preference costs the distance from the first parameters",
        low=1e-6,
        high=1000.0,
        reach={"train.task": ("preference",)},
    )
    seed: int = knob(0, "of initialisation and dropout", low=0, high=2**32 - 1)
    init_from: str = knob("", "what a fresh run starts from: MODEL, or a text file of word vectors", fixed=False)
    on_spike: str = knob(
        "log",
        "what is done where loss and gradient norm jump: nothing, it is said, or the run goes back to a saved step before and "
        "leaves out the rows around it",
        choices=("off", "log", "rewind"),
        fixed=False,
    )


@dataclasses.dataclass(frozen=True)
class Mesh:
    data: int = knob(
        -1,
        "devices that hold copies of the parameters and split the batch; -1 = the rest",
        fixed=False,
        low=-1,
        high=2**20,
        place=True,
    )
    fsdp: int = knob(
        1, "devices that split parameters and batch; -1 = the rest", fixed=False, low=-1, high=2**20, place=True
    )
    tensor: int = knob(
        1, "devices that split heads, MLP and vocabulary; -1 = the rest", fixed=False, low=-1, high=2**20, place=True
    )
    slices: int = knob(
        1,
        "parts of the machine that a slower network joins, which split data; -1 = as many as the devices say",
        fixed=False,
        low=-1,
        high=2**20,
        place=True,
    )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: Length = knob(1000, 'between saves; also in time: "30 min"', low=1, fixed=False, high=MOST_STEPS)
    keep_last: int = knob(2, "newest checkpoints kept", low=1, fixed=False, high=MOST_STEPS)
    keep_every: int = knob(0, "steps whose multiples are kept for ever; 0 = none", low=0, fixed=False, high=MOST_STEPS)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    every: Length = knob(
        500, "between evaluations, also one at the end; 0 = only at the end", low=0, fixed=False, high=MOST_STEPS
    )
    num_rows: int = knob(
        64, "validation rows each time (at the end: all); 0 = all", low=0, fixed=False, high=MOST_STEPS
    )
    metrics: str = knob(
        "",
        "how texts that the model writes for held-out records are scored at the end: answers (exact match, F1), summaries "
        '(ROUGE), translations (chrF, BLEU); "" = none are written',
        choices=("", "answers", "summaries", "translations"),
        fixed=False,
        reach={"train.task": WRITING},
    )
    prompt: str = knob(
        "class",
        'start of the text samples; "" = none',
        fixed=False,
        reach={"model.kind": DECODERS, "train.task": ("",)},
        idle=("",),
    )


@dataclasses.dataclass(frozen=True)
class Log:
    every: Length = knob(10, "between lines of metrics", low=1, fixed=False, high=MOST_STEPS)
    profile: int = knob(0, "step from which three are traced for XProf; 0 = none", low=0, fixed=False, high=MOST_STEPS)


@dataclasses.dataclass(frozen=True)
class Config:
    model: Model = Model()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    mesh: Mesh = Mesh()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    log: Log = Log()


SECTIONS: dict[str, Any] = {field.name: type(field.default) for field in dataclasses.fields(Config)}


def default_config() -> ml_collections.ConfigDict:
    """All defaults, locked: a new key is an error, an existing one can be set. Types are checked by `resolve`."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config()), type_safe=False).lock()


def leaves() -> dict[str, dataclasses.Field]:
    """Every leaf as {"section.name": its field}."""
    return {f"{name}.{field.name}": field for name, kind in SECTIONS.items() for field in dataclasses.fields(kind)}


PLACE = {path: field.default for path, field in leaves().items() if field.metadata["place"]}


def flatten(config: Any) -> dict[str, Any]:
    """{"section.name": value} of a ConfigDict, a nested dict or a Config."""
    nested = dataclasses.asdict(config) if isinstance(config, Config) else config
    return {f"{section}.{name}": value for section in nested for name, value in nested[section].items()}


def unflatten(flat: dict[str, Any]) -> dict[str, dict[str, Any]]:
    nested: dict[str, dict[str, Any]] = {}
    for path, value in flat.items():
        section, name = path.split(".")
        nested.setdefault(section, {})[name] = value
    return nested


def nearest(word: str, words) -> str:
    """`; did you mean X?` for the most similar of `words`, or "" where none is near."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def check_key(path: str) -> None:
    """Raises UserError for a path that names no leaf, with the nearest one that does."""
    if path in leaves():
        return
    section, _, name = path.partition(".")
    if section not in SECTIONS:
        raise UserError(f"config.{path}: no section {section!r}{nearest(path, leaves())}")
    near = (
        nearest(path, leaves())
        or f"; {section} has: {', '.join(f.name for f in dataclasses.fields(SECTIONS[section]))}"
    )
    raise UserError(f"config.{path}: {section} has no {name!r}{near}" if name else f"config.{path} is a section{near}")


def parse_value(path: str, text: str) -> Any:
    """The value that `--config.path=text` means, by the type of the leaf. Raises UserError."""
    kind = leaves()[path].type
    if kind is str:
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text  # `_check` says what was expected


def shown(value: Any) -> str:
    """A value in a message: a few words of it, however long, deep or large it is."""
    if type(value) is int and value.bit_length() > 64:
        return f"a number of {value.bit_length():,} bits"
    if isinstance(value, (str, float, int)):
        text = repr(value if not isinstance(value, str) else value[:100])
        return text if len(text) <= 100 else f"{text[:60]}..."
    if value is not None and not isinstance(value, (tuple, list, dict)):
        return f"({type(value).__name__})"
    short = reprlib.Repr()
    short.maxtuple = short.maxlist = short.maxdict = 12
    short.maxlevel, short.maxstring, short.maxother = 4, 100, 100
    short.repr_int = lambda x, level: shown(x)  # type: ignore[method-assign]
    return short.repr(value)


def _fault_of_text(value: str) -> str:
    """What no name, path or prompt can have, "" where it has nothing of it."""
    if len(value) > LONGEST_TEXT:
        return f"expected at most {LONGEST_TEXT:,} characters, got {len(value):,}"
    if "\0" in value:
        return "expected no NUL character"
    return "" if value.encode(errors="ignore").decode() == value else "expected Unicode text"


def _check(path: str, value: Any, kind: Any, metadata) -> Any:
    """`value` as `kind`, or a UserError that names the leaf, what it got and what it takes."""

    def refuse(expected: str) -> UserError:
        return UserError(f"config.{path} = {shown(value)}: {expected} ({metadata['meaning']})")

    if kind == Sources:
        return _check_sources(path, value)
    number_or_name = kind == int | str
    if get_args(kind) and not number_or_name:  # a tuple
        kinds = get_args(kind)
        if not isinstance(value, (tuple, list)):
            raise refuse("expected a tuple, such as (1, 2) or (1,)")
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        if len(value) != len(kinds) or (not value and leaves()[path].default):
            raise refuse(f"expected {len(kinds) or 'at least 1'} values, got {len(value)}")
        if len(value) > LONGEST_TUPLE:
            raise refuse(f"expected at most {LONGEST_TUPLE:,} values, got {len(value):,}")
        return tuple(_check(path, item, item_kind, metadata) for item, item_kind in zip(value, kinds, strict=True))
    if number_or_name and isinstance(value, str) and not metadata["choices"]:
        units = ("tokens", "epochs", "steps", "min") if path == "checkpoint.every" else ("tokens", "epochs", "steps")
        match = _LENGTH.fullmatch(value)
        if not match or match["unit"] not in units:
            raise refuse(f'expected steps as an integer, or a string such as "375M tokens" (units: {", ".join(units)})')
        number, unit = parse_length(value)
        most = metadata["high"] if unit == "steps" else LONGEST
        if not 0 < number <= most:
            raise refuse("expected more than nothing" if not number else f"at most {most:.10g} {unit}")
        if unit == "steps" and number != int(number):
            raise refuse("expected whole steps")
        return value
    if number_or_name:
        kind = str if isinstance(value, str) else int
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if value.bit_length() < 1000 else math.inf
    if type(value) is not kind:
        whole = isinstance(value, float) and kind is int and value.is_integer()
        hint = f"; did you mean {int(value)}?" if whole else ""
        raise refuse(f"expected {'an' if kind is int else 'a'} {kind.__name__}, got {type(value).__name__}{hint}")
    if kind is float and not math.isfinite(value):
        raise refuse("expected a finite number")
    if kind is float and value and not SMALLEST <= abs(value) <= LARGEST:
        raise refuse(f"expected 0, or a number between {SMALLEST:g} and {LARGEST:g}")
    if kind is str and (problem := _fault_of_text(value)):
        raise refuse(problem)
    if metadata["choices"] and kind is str and value not in metadata["choices"]:
        known = ", ".join(choice or "''" for choice in metadata["choices"])
        raise refuse(f"choose one of {known}{nearest(value[:100], metadata['choices'])}")
    for bound, wrong in (("low", lambda v, b: v < b), ("high", lambda v, b: v > b)):
        limit = metadata[bound]
        if limit is not None and not isinstance(value, (str, bool)) and wrong(value, limit):
            raise refuse(f"must be at {'least' if bound == 'low' else 'most'} {limit}")
    return value


def _check_sources(path: str, value: Any) -> Sources:
    """Canonical ((place, weight), ...); a bare string is one source with weight 1. Raises UserError."""
    example = '(("books", 0.7), ("code", 0.3))'
    found: list[tuple[str, Weight]] = []
    for source in ((value, 1.0),) if isinstance(value, str) else value if isinstance(value, (tuple, list)) else ():
        if not isinstance(source, (tuple, list)) or len(source) != 2 or not isinstance(source[0], str):
            raise UserError(
                f"config.{path} = {shown(value)}: expected a place, or (place, weight) pairs such as {example}"
            )
        place, weight = source
        if problem := _fault_of_text(place):
            raise UserError(f"config.{path} = {shown(place)}: {problem}; expected a place, or pairs such as {example}")
        stages = weight if isinstance(weight, (tuple, list)) else ((0, weight),)
        for stage in stages:
            number = lambda x, *kinds: type(x) in kinds and 0 <= x <= LONGEST  # NaN is not
            if not (isinstance(stage, (tuple, list)) and len(stage) == 2 and number(stage[0], int)) or not number(
                stage[1], int, float
            ):
                raise UserError(
                    f"config.{path}: weight {shown(weight)} of {shown(place)}: expected a number from 0 on, "
                    "or ((first row, weight), ...)"
                )
        firsts = [first for first, _ in stages]
        if not firsts or firsts != sorted(set(firsts)):
            raise UserError(
                f"config.{path}: weight {shown(weight)} of {shown(place)}: the first rows of its stages must rise"
            )
        table = tuple((first, float(share)) for first, share in stages)
        found.append((place, table if isinstance(weight, (tuple, list)) else table[0][1]))
    places = [place for place, _ in found]
    if not found or len(set(places)) < len(places):
        problem = "a place stands twice" if found else "no source"
        raise UserError(f"config.{path} = {shown(value)}: {problem}; expected a place, or pairs such as {example}")
    tables = [weight if isinstance(weight, tuple) else ((0, weight),) for _, weight in found]
    for row in sorted({0} | {first for table in tables for first, _ in table}):
        if not any(next((share for first, share in reversed(table) if first <= row), 0) for table in tables):
            raise UserError(f"config.{path} = {shown(value)}: no source has a weight from row {row:,} on")
    return tuple(found)


def is_read(flat: dict[str, Any], path: str) -> bool:
    """Whether what `flat` says makes anything read this leaf: every condition of its reach holds."""
    return all(_holds(flat, other, values) for other, values in leaves()[path].metadata["reach"].items())


def _holds(flat: dict[str, Any], path: str, values: tuple) -> bool:
    """Whether a leaf has one of these values, () = any that asks for something; what nothing reads has its default."""
    value = flat[path] if is_read(flat, path) else leaves()[path].default
    if values:
        return value in values
    return value != leaves()[path].default and (any(value) if isinstance(value, tuple) else bool(value))


def unread(flat: dict[str, Any]) -> list[str]:
    """The leaves that ask for what nothing would do."""
    asks = lambda path, field: flat[path] not in (field.default, *field.metadata["idle"])
    return [path for path, field in leaves().items() if asks(path, field) and not is_read(flat, path)]


def _check_reach(flat: dict[str, Any]) -> None:
    """Raises UserError that names each leaf that nothing reads, where it would be read, and how to leave it out."""
    paths = unread(flat)
    if not paths:
        return

    def missing(path: str) -> tuple[str, tuple]:
        """The first condition of its reach that does not hold."""
        reach = leaves()[path].metadata["reach"]
        return next((other, values) for other, values in reach.items() if not _holds(flat, other, values))

    def line(path: str) -> str:
        other, values = missing(path)
        names = [str(value) or "''" for value in values] or [f"not {shown(leaves()[other].default)}"]
        return f"config.{path} = {shown(flat[path])} is read only where config.{other} is {' or '.join(names)}"

    flag = lambda path, value: f"--config.{path}={shlex.quote(str(value))}"
    mend = f"leave it out, or: {' '.join(flag(path, leaves()[path].default) for path in paths)}"
    other, values = missing(paths[0])
    if named := [value for value in values if value]:
        mend += f"\nto have it read: {flag(other, named[0])}"
    more = f" (and {len(paths) - 3} more: {', '.join(paths[3:8])})" if len(paths) > 3 else ""
    raise UserError("\n".join(map(line, paths[:3])) + f"{more}\n{mend}")


def resolve(config) -> Config:
    """A ConfigDict or nested dict -> frozen dataclasses: leaf by leaf, then whether each is read, then together.

    Raises UserError.
    """
    checked = _checked(flatten(config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config))
    _check_reach(checked)
    return _resolved(checked)


def resolve_found(config) -> Config:
    """The same of what a saved run or another's folder says of a model, for whoever reads it here.

    What only the place of its training needed (attention's backend, mesh, recomputation, workers) is as it is by default, so is
    what nothing reads: nobody typed it here. Raises UserError.
    """
    flat = flatten(config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config)
    checked = _checked(flat | PLACE)
    return _resolved(checked | {path: leaves()[path].default for path in unread(checked)})


def of_place(path: str) -> bool:
    """Whether a leaf is only of the place of training."""
    return leaves()[path].metadata["place"]


def _checked(flat: dict[str, Any]) -> dict[str, Any]:
    """Every leaf by itself. Raises UserError."""
    for path in flat:
        check_key(path)
    for path in leaves():
        if path not in flat:
            raise UserError(f"config.{path} is missing")
    return {path: _check(path, flat[path], field.type, field.metadata) for path, field in leaves().items()}


def _resolved(checked: dict[str, Any]) -> Config:
    """With what is derived filled in where it is read. Raises UserError for what does not go together."""
    nested = unflatten(checked)
    model = nested["model"]
    if is_read(checked, "model.num_heads"):
        model |= _sizes(model)
    model["head"] = TASKS[nested["train"]["task"]][0] if nested["train"]["task"] else model["head"]
    if model["lora_rank"]:
        nested["optimizer"]["trainable"] = nested["optimizer"]["trainable"] or WITH_LORA
    resolved = Config(**{name: kind(**nested[name]) for name, kind in SECTIONS.items()})
    _check_together(resolved)
    return resolved


def _sizes(model: dict[str, Any]) -> dict[str, int]:
    """Heads and MLP, as given or derived. Raises UserError where the width does not divide into heads that can be."""
    dim, heads, head_dim = model["model_dim"], model["num_heads"], model["head_dim"]
    if not head_dim and dim % heads:
        wider = math.ceil(dim / heads) * heads
        raise UserError(
            f"config.model.model_dim = {dim} does not divide into num_heads = {heads} heads; "
            f"the next that does is {wider} (or set config.model.head_dim)"
        )
    head_dim = head_dim or dim // heads
    if head_dim > LARGEST_HEAD:
        raise UserError(
            f"config.model.num_heads = {heads} of model_dim = {dim} are {head_dim} wide each, and attention takes up to "
            f"{LARGEST_HEAD}: at least {math.ceil(dim / LARGEST_HEAD)} heads"
        )
    derived = {"num_kv_heads": model["num_kv_heads"] or heads, "head_dim": head_dim}
    return derived | {"mlp_dim": model["mlp_dim"] or 4 * dim}


def _check_together(config: Config) -> None:
    model, data = config.model, config.data

    def divides(small_name, small, large_name, large):
        if large % small:
            below = (n for n in range(1, math.isqrt(large) + 1) if large % n == 0)
            near = min((n for low in below for n in (low, large // low)), key=lambda n: abs(n - small))
            raise UserError(
                f"config.{small_name} = {small} does not divide {large_name} = {large}; the nearest is {near}"
            )

    if model.num_kv_heads:
        divides("model.num_kv_heads", model.num_kv_heads, "num_heads", model.num_heads)
    if model.num_layers % len(model.window):
        raise UserError(
            f"config.model.window = {model.window}: {len(model.window)} windows do not repeat evenly over "
            f"num_layers = {model.num_layers}"
        )
    if model.num_experts and model.experts_per_token > model.num_experts:
        raise UserError(
            f"config.model.experts_per_token = {model.experts_per_token}: there are num_experts = {model.num_experts}"
        )
    if model.num_experts and (model.bias or not model.gated):
        raise UserError(
            "config.model.num_experts: experts are gated and have no biases\n"
            "add --config.model.gated=true --config.model.bias=false"
        )
    if model.rotary_scaling[0] < 1 or not model.rotary_scaling[1] < model.rotary_scaling[2]:
        raise UserError(
            f"config.model.rotary_scaling = {model.rotary_scaling}: expected a factor from 1 on, and low < high"
        )
    _check_rotary(model)
    _check_constants(model)
    if model.positions in ("rotary", "sinusoidal") and model.head_dim % 2:
        raise UserError(f"config.model.head_dim = {model.head_dim} must be even for {model.positions} positions")
    if model.positions == "sinusoidal" and model.model_dim % 2:
        raise UserError(f"config.model.model_dim = {model.model_dim} must be even for sinusoidal positions")
    fitting = OBJECTIVES.get(model.kind, ("causal",))
    if data.objective not in fitting:
        kinds = [kind for kind, objectives in OBJECTIVES.items() if data.objective in objectives] or ["transformer"]
        raise UserError(
            f"config.data.objective = {data.objective} needs {'an' if kinds[0][0] == 'e' else 'a'} {kinds[0]}: add "
            f"--config.model.kind={kinds[0]}; a model of kind {model.kind} takes {' or '.join(fitting)}"
        )
    longest = round(3.0 * (NUM_SENTINELS - 1) / 0.15)  # spans of three tokens, 15% of all
    if data.objective == "span_corruption" and data.sequence_length > longest:
        raise UserError(
            f"config.data.sequence_length = {data.sequence_length}: its spans need more than {NUM_SENTINELS} sentinels; "
            f"at most {longest}"
        )
    if model.positions == "relative" and model.kind != "encoder_decoder":
        raise UserError(
            f"config.model.positions = relative is of kind encoder_decoder; a model of kind {model.kind} takes rotary"
        )
    if model.kind == "encoder_decoder" and model.norm_place in ("both", "branch"):
        raise UserError(
            f"config.model.norm_place = {model.norm_place} is not of an encoder_decoder, which takes pre or post"
        )
    _check_task(config)
    scale = config.optimizer.loss_scale
    if scale & (scale - 1) or scale > LARGEST_LOSS_SCALE:
        near = min(2 ** round(math.log2(scale)), LARGEST_LOSS_SCALE)
        raise UserError(f"config.optimizer.loss_scale = {scale} is no power of two up to 2^24; the nearest is {near}")
    if model.compute_dtype == "float16" and not scale:
        raise UserError(
            "config.model.compute_dtype = float16 without a loss scale: most gradients are too small for float16\n"
            "add --config.optimizer.loss_scale=1024, or compute in bfloat16"
        )
    if data.validation_fraction + data.test_fraction >= 0.9:
        raise UserError("config.data: validation_fraction + test_fraction leave less than a tenth for training")
    if data.batch_ramp[1] and not data.batch_ramp[0]:
        raise UserError(
            f"config.data.batch_ramp = {data.batch_ramp} has no rows at the start: (0, 0) is off, "
            f"(8, {data.batch_ramp[1]!r}) starts with 8"
        )
    if data.batch_ramp[0]:
        divides("data.batch_ramp[0]", data.batch_ramp[0], "global_batch_size", data.global_batch_size)
    if isinstance(config.train.microbatch_rows, int):
        smallest = data.batch_ramp[0] or data.global_batch_size
        divides("train.microbatch_rows", config.train.microbatch_rows, "the (smallest) batch of rows", smallest)
    axes = dataclasses.asdict(config.mesh)
    for name, size in axes.items():
        if size < 1 and size != -1:
            what = "slices, or -1 for all that there are" if name == "slices" else "devices, or -1 for the rest"
            raise UserError(f"config.mesh.{name} = {size}: expected a number of {what}")
    del axes["slices"]
    if list(axes.values()).count(-1) > 1:
        raise UserError(f"config.mesh: only one axis can be -1 (the rest), got {axes}")


def _check_rotary(model: Model) -> None:
    share, window = model.rotary_share, model.window
    if model.kind not in ONE_STACK["model.kind"]:
        return
    if len(share) not in (1, len(window)):
        raise UserError(f"config.model.rotary_share = {share}: one value, or one for each of window = {window}")
    for one in share if model.positions == "rotary" else ():
        width = int(model.head_dim * one)
        if width % 2 or (one and not width):
            near = 2 * max(1, round(model.head_dim * one / 2)) / model.head_dim
            raise UserError(
                f"config.model.rotary_share = {share}: {one} of head_dim = {model.head_dim} is no even number; the nearest "
                f"that is one is {near}"
            )
    yarn = model.rotary_scaling_kind == "yarn" and model.rotary_scaling[0] > 1
    if yarn and (not model.rotary_scaling[1] or not model.rotary_scaling[3] or model.rotary_base <= 1):
        raise UserError(
            f"config.model.rotary_scaling = {model.rotary_scaling} of kind yarn: expected low and length above 0, such as "
            f"(4.0, 1.0, 32.0, 4096.0), and rotary_base = {model.rotary_base} above 1"
        )


def _check_constants(model: Model) -> None:
    if any(0 < cap < 0.1 for cap in model.logit_softcap):
        raise UserError(f"config.model.logit_softcap = {model.logit_softcap}: expected 0, or at least 0.1")
    embedding, branch, attention, output = model.multipliers
    if min(embedding, branch, output) < 1e-6 or 0 < attention < 1e-6:
        raise UserError(
            f"config.model.multipliers = {model.multipliers}: expected at least 1e-6, or 0 for products of queries and keys"
        )


def _check_task(config: Config) -> None:
    labels, task, kind = config.model.labels, config.train.task, config.model.kind
    fitting = [name for name, (head, _) in TASKS.items() if head == (config.model.head or "labels")]
    if not task:
        if config.model.head:
            raise UserError(
                f"config.model.head = {config.model.head} without a task: add --config.train.task={fitting[0]}"
            )
        return
    head, kinds = TASKS[task]
    if kind not in kinds:
        objective = OBJECTIVES.get(kinds[0], ("causal",))[0]
        raise UserError(
            f"config.train.task = {task} needs a model of kind {' or '.join(kinds)}, not {kind}: add\n"
            f"--config.model.kind={kinds[0]} --config.data.objective={objective}"
        )
    if head in ("labels", "tags") and (len(set(labels)) < 2 or len(set(labels)) < len(labels)):
        raise UserError(
            f"config.model.labels = {labels}: {task} tells at least two labels apart, each named once, such as "
            '("negative", "positive")'
        )
    if config.data.packing == "split":
        raise UserError(
            "config.data.packing = split would part records: take best_fit (too long ones are cut, and counted) or "
            "best_fit_whole (they are refused)"
        )


_LENGTH = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?)(?P<prefix>[kKMBT]?) ?(?P<unit>tokens|epochs|steps|min)")


def parse_length(length: Length) -> tuple[float, str]:
    """`"375M tokens"` -> (375e6, "tokens"); 100 -> (100, "steps")."""
    if isinstance(length, int):
        return length, "steps"
    match = _LENGTH.fullmatch(length)
    assert match, length  # `resolve` has checked it
    scale = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match["prefix"]]
    return float(match["number"]) * scale, match["unit"]


def shrink(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """`:smoke` of every experiment: the same program in miniature, two steps on anything that computes."""
    model, data = config.model, config.data
    group = max(1, model.num_heads // (model.num_kv_heads or model.num_heads))
    shares = tuple(model.rotary_share) * (len(model.window) // len(model.rotary_share))
    kinds = tuple(dict.fromkeys(zip(model.window, shares, strict=True)))  # each kind of layer once
    model.window, shares = zip(*kinds, strict=True)
    model.rotary_share = shares if len(set(shares)) > 1 else shares[:1]
    model.num_layers = 2 * len(model.window) if len(model.window) > 1 else 2
    model.model_dim, model.mlp_dim, model.head_dim = 64, 128, 16
    model.num_heads, model.num_kv_heads = 4, 4 // min(group, 4)
    model.num_experts, model.experts_per_token = min(model.num_experts, 4), min(model.experts_per_token, 2)
    model.window = tuple(min(window, 16) for window in model.window)
    data.tokenizer = "sentencepiece:512" if data.tokenizer.startswith("sentencepiece:") else data.tokenizer
    data.sequence_length, data.global_batch_size, data.batch_ramp = 64, 8, (0, 0)
    config.optimizer.warmup, config.optimizer.decay_over = 1, 0
    config.train.num_steps, config.train.microbatch_rows, config.train.init_from = 2, 8, ""
    config.checkpoint.every, config.evaluate.every, config.evaluate.num_rows, config.log.every = 2, 2, 8, 1
    for path, value in without_unread(flatten(config.to_dict())).items():
        if path in SHRUNK:
            section, name = path.split(".")
            config[section][name] = value
    return config


SHRUNK = ("model.num_heads", "model.num_kv_heads", "model.head_dim", "model.mlp_dim")  # of those that `shrink` sets


def without_unread(flat: dict[str, Any], given=()) -> dict[str, Any]:
    """A shrunk config in which sizes that a model of this kind has not are as by default, but those `given` by name."""
    return flat | {path: leaves()[path].default for path in unread(flat) if path in SHRUNK and path not in given}


def difference(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{path: (old, new)} of the leaves that differ between two flat configs, compared as JSON would keep them."""
    same = lambda a, b: json.dumps(a) == json.dumps(b)  # tuples and lists are the same on disk
    return {p: (old.get(p), new.get(p)) for p in sorted({*old, *new}) if not same(old.get(p), new.get(p))}
