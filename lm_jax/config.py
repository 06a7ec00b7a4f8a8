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
from typing import Any, get_args

import ml_collections

Length = int | str  # a number of steps, or a string with its unit: "375M tokens", "2 epochs", "30 min" (checkpoints)
Weight = float | tuple[tuple[int, float], ...]  # of a source in the mixture; or ((first row, weight), ...), rising rows
Sources = tuple[tuple[str, Weight], ...]

RECURRENT = ("rnn", "gru", "lstm")
# What each kind of model can be trained on; the others write from left to right: causal.
OBJECTIVES = {"encoder": ("masked", "masked_words"), "encoder_decoder": ("span_corruption",)}
# Every task: the head that it gives its model (lm_jax/heads.py), and the kinds of model that can have it.
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
        plain = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in super().__str__())
        lines = [line if len(line) <= 1000 else f"{line[:600]} ... {line[-300:]}" for line in plain.split("\n")]
        return "\n".join(lines if len(lines) <= 5 else [*lines[:4], f"... ({len(lines) - 4} more lines)"])


def needs(what: str, package: str, extra: str) -> UserError:
    """The mistake of a missing package, with the command that installs it: always from the clone, under no name of an index."""
    return UserError(f"{what} needs the package {package}: in the clone, pip install -e '.[{extra}]'")


def knob(default, meaning: str, *, choices=(), low=None, high=None, fixed=True):
    """A field: its default, its meaning, its range, and whether a run that resumes must keep it (`fixed`)."""
    metadata = {"meaning": meaning, "choices": choices, "low": low, "high": high, "fixed": fixed}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Model:
    kind: str = knob(
        "transformer",
        "decoder-only Transformer; BERT's encoder; T5's encoder_decoder, num_layers each; or recurrent cells, the old baselines",
        choices=("transformer", "encoder", "encoder_decoder", *RECURRENT),
    )
    num_layers: int = knob(4, "Transformer blocks", low=1)
    model_dim: int = knob(256, "width of the residual stream", low=1)
    num_heads: int = knob(4, "query heads", low=1)
    num_kv_heads: int = knob(0, "key and value heads, shared by groups of query heads; 0 = num_heads", low=0)
    head_dim: int = knob(0, "width of one head; 0 = model_dim / num_heads", low=0)
    mlp_dim: int = knob(0, "width of the MLP's hidden layer; 0 = 4 * model_dim", low=0)
    positions: str = knob(
        "learned",
        "how a token knows its place; relative = T5's, of an encoder_decoder",
        choices=("learned", "rotary", "sinusoidal", "relative", "none"),
    )
    rotary_base: float = knob(10_000.0, "longest wavelength of rotary positions, in tokens / 2 pi", low=1.0)
    rotary_local_base: float = knob(0.0, "the same in layers with a window; 0 = rotary_base, and its scaling", low=0.0)
    rotary_scaling: tuple[float, float, float, float] = knob(
        (1.0, 1.0, 4.0, 8192.0),
        "(factor, low, high, length) of Llama 3: wavelengths over length / low are factor times as long, those under "
        "length / high stay; length 0: all are longer; factor 1 = off",
        low=0.0,
    )
    norm: str = knob("layernorm", "normalisation", choices=("layernorm", "rmsnorm"))
    norm_place: str = knob(
        "pre",
        "of the norms: before each branch, after its sum with the stream (no norm at the end), or before and after a branch",
        choices=("pre", "post", "both"),
    )
    norm_epsilon: float = knob(1e-5, "added to the variance", low=0.0)
    activation: str = knob(
        "gelu", "of the MLP; gelu is the tanh form of GPT-2", choices=("gelu", "gelu_exact", "relu", "silu")
    )
    gated: bool = knob(False, "gated MLP (SwiGLU with silu)")
    bias: bool = knob(True, "biases in dense layers and in LayerNorm")
    qkv_bias: bool = knob(False, "biases of queries, keys and values, also where model.bias is off")
    qk_norm: bool = knob(False, "each head's query and key normalised")
    scale_embedding: bool = knob(False, "embedding times sqrt(model_dim)")
    num_experts: int = knob(0, "MLPs of a layer from which each token chooses; 0 = one MLP for all", low=0)
    experts_per_token: int = knob(2, "MLPs that a token chooses", low=1)
    tie_embedding: bool = knob(True, "one table for the embedding and the output")
    window: tuple[int, ...] = knob(
        (0,), "tokens each layer sees, repeated over the layers; 0 = all; GPT-3: (0, 256)", low=0
    )
    labels: tuple[str, ...] = knob((), "what a task tells apart, in the order of their ids")
    lora_rank: int = knob(0, "of adapters beside dense layers, which are then what is trained (LoRA); 0 = none", low=0)
    lora_alpha: float = knob(16.0, "adapters count lora_alpha / lora_rank times", low=0.0)
    lora_pattern: str = knob(
        "attention/(query|value)", "a regular expression, found in the paths of the dense layers that get an adapter"
    )
    head: str = knob(
        "", 'what predicts: "" = the vocabulary, else what train.task asks for, which sets it', choices=HEADS
    )
    dropout: float = knob(0.0, "dropped share of the embedding's and of each branch's output", low=0.0, high=0.9)
    init_scale: float = knob(0.02, "standard deviation of initial weights; residual outputs / sqrt(2 layers)", low=0.0)
    attention: str = knob(
        "auto",
        "backend; auto = the best that the platform has",
        choices=("auto", "xla", "chunked", "cudnn", "splash"),
        fixed=False,
    )
    remat: str = knob(
        "none",
        "what layers compute again in the backward pass: nothing, all but products, all but attention, all",
        choices=("none", "dots", "names", "full"),
        fixed=False,
    )
    unroll: bool = knob(True, "layers as straight code (fast) or one scanned body (compile time flat)", fixed=False)
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
    sequence_length: int = knob(256, "tokens in a row", low=2)
    global_batch_size: int = knob(16, "rows in a step, over all devices", low=1, fixed=False)
    batch_ramp: tuple[int, Length] = knob(
        (0, 0), "(rows at the start, length over which they grow to the full batch); (0, 0) = off", low=0, fixed=False
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
    seed: int = knob(0, "order of the documents, and what the objective hides", low=0)
    columns: tuple[str, ...] = knob(
        (), "names of the columns that a task reads, in the order in which it names its own; () = its own", fixed=False
    )
    prompt: str = knob(
        "",
        'what a model reads of a record before it writes, the columns in {braces} filled in; "" = {source}, and where one text '
        "is both read and written a blank line after it",
    )
    num_workers: int = knob(0, "processes that load rows; 0 = a thread", low=0, fixed=False)
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
    learning_rate: float = knob(1e-3, "peak", low=0.0, fixed=False)
    schedule: str = knob(
        "cosine",
        "after the warm-up; inverse_square_root falls without end, warmup_stable_decay in the last fifth of decay_over",
        choices=("cosine", "constant", "linear", "inverse_square_root", "warmup_stable_decay"),
        fixed=False,
    )
    warmup: Length = knob(100, "linear from 0 to the peak", low=0, fixed=False)
    decay_over: Length = knob(0, "length from step 0 to the end of the decay; 0 = train.num_steps", low=0, fixed=False)
    decay_to: float = knob(0.1, "final rate as a share of the peak", low=0.0, high=1.0, fixed=False)
    beta1: float = knob(0.9, "decay of the first moment, or momentum", low=0.0, high=1.0, fixed=False)
    beta2: float = knob(0.95, "decay of the second moment", low=0.0, high=1.0, fixed=False)
    epsilon: float = knob(1e-8, "added to the root of the second moment", low=0.0, fixed=False)
    weight_decay: float = knob(0.1, "decoupled; only on parameters that are inside a product", low=0.0, fixed=False)
    clip_norm: float = knob(1.0, "largest global gradient norm; 0 = no clipping", low=0.0, fixed=False)
    ema: float = knob(0.0, "decay of an average of the parameters, which is then the model; 0 = off", low=0.0, high=1.0)
    trainable: str = knob(
        "",
        'a regular expression, found in the paths of the parameters that are trained, such as "^labels/|attention/query"; the '
        'others keep every bit; "" = all, or with model.lora_rank the adapters and the heads of a task',
    )
    layer_decay: float = knob(
        1.0,
        "rate of a layer as a share of that of the layer above; heads have the whole rate, embeddings the least; 1 = off",
        low=0.0,
        high=1.0,
        fixed=False,
    )
    loss_scale: int = knob(
        0,
        "first factor of the loss, a power of two; halves on overflow, doubles after 2,000 good steps; 0 = off",
        low=0,
    )


@dataclasses.dataclass(frozen=True)
class Train:
    task: str = knob(
        "",
        'what is learnt from records; "" = a text, by data.objective',
        choices=("", *TASKS),
    )
    num_steps: Length = knob(1000, "steps, or tokens or epochs with their unit", low=1, fixed=False)
    microbatch_rows: int | str = knob(
        "auto",
        "rows in one pass of the model, over all devices; auto = what fits",
        choices=("auto",),
        low=1,
        fixed=False,
    )
    z_loss: float = knob(
        0.0,
        "weight of log(softmax's denominator)^2 a token, which keeps logits near 0; PaLM: 1e-4",
        low=0.0,
        fixed=False,
    )
    balance_loss: float = knob(
        0.01, "weight of how unevenly experts are chosen, a token and layer; Mixtral: 0.02", low=0.0, fixed=False
    )
    router_z_loss: float = knob(
        0.0, "weight of log(router's denominator)^2, a token and layer; ST-MoE: 1e-3", low=0.0, fixed=False
    )
    dpo_beta: float = knob(
        0.1, "of the task preference: how much a preference costs the distance from the first parameters", low=1e-6
    )
    seed: int = knob(0, "of initialisation and dropout", low=0, high=2**32 - 1)
    init_from: str = knob("", "what a fresh run starts from: MODEL, or a text file of word vectors", fixed=False)


@dataclasses.dataclass(frozen=True)
class Mesh:
    data: int = knob(-1, "devices that hold copies of the parameters and split the batch; -1 = the rest", fixed=False)
    fsdp: int = knob(1, "devices that split parameters and batch; -1 = the rest", fixed=False)
    tensor: int = knob(1, "devices that split heads, MLP and vocabulary; -1 = the rest", fixed=False)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: Length = knob(1000, 'between saves; also in time: "30 min"', low=1, fixed=False)
    keep_last: int = knob(2, "newest checkpoints kept", low=1, fixed=False)
    keep_every: int = knob(0, "steps whose multiples are kept for ever; 0 = none", low=0, fixed=False)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    every: Length = knob(500, "between evaluations, also one at the end; 0 = only at the end", low=0, fixed=False)
    num_rows: int = knob(64, "validation rows each time (at the end: all); 0 = all", low=0, fixed=False)
    metrics: str = knob(
        "",
        "how texts that the model writes for held-out records are scored at the end: answers (exact match, F1), summaries "
        '(ROUGE), translations (chrF, BLEU); "" = none are written',
        choices=("", "answers", "summaries", "translations"),
        fixed=False,
    )
    prompt: str = knob("class", 'start of the text samples; "" = none', fixed=False)


@dataclasses.dataclass(frozen=True)
class Log:
    every: Length = knob(10, "between lines of metrics", low=1, fixed=False)
    profile: int = knob(0, "step from which three are traced for XProf; 0 = none", low=0, fixed=False)


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
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text  # `_check` says what was expected


def _check(path: str, value: Any, kind: Any, metadata) -> Any:
    """`value` as `kind`, or a UserError that names the leaf, what it got and what it takes."""

    def refuse(expected: str) -> UserError:
        return UserError(f"config.{path} = {value!r}: {expected} ({metadata['meaning']})")

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
        return tuple(_check(path, item, item_kind, metadata) for item, item_kind in zip(value, kinds, strict=True))
    if number_or_name and isinstance(value, str) and not metadata["choices"]:
        units = ("tokens", "epochs", "steps", "min") if path == "checkpoint.every" else ("tokens", "epochs", "steps")
        match = _LENGTH.fullmatch(value)
        if not match or match["unit"] not in units:
            raise refuse(f'expected steps as an integer, or a string such as "375M tokens" (units: {", ".join(units)})')
        number, unit = parse_length(value)
        if not number or (unit == "steps" and number != int(number)):
            raise refuse("expected more than nothing" if not number else "expected whole steps")
        return value
    if number_or_name:
        kind = str if isinstance(value, str) else int
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        whole = isinstance(value, float) and kind is int and value.is_integer()
        hint = f"; did you mean {int(value)}?" if whole else ""
        raise refuse(f"expected {'an' if kind is int else 'a'} {kind.__name__}, got {type(value).__name__}{hint}")
    if kind is float and not math.isfinite(value):
        raise refuse("expected a finite number")
    if metadata["choices"] and kind is str and value not in metadata["choices"]:
        known = ", ".join(choice or "''" for choice in metadata["choices"])
        raise refuse(f"choose one of {known}{nearest(value, metadata['choices'])}")
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
            raise UserError(f"config.{path} = {value!r}: expected a place, or (place, weight) pairs such as {example}")
        place, weight = source
        stages = weight if isinstance(weight, (tuple, list)) else ((0, weight),)
        for stage in stages:
            number = lambda x, *kinds: type(x) in kinds and math.isfinite(x) and x >= 0
            if not (isinstance(stage, (tuple, list)) and len(stage) == 2 and number(stage[0], int)) or not number(
                stage[1], int, float
            ):
                raise UserError(
                    f"config.{path}: weight {weight!r} of {place!r}: expected a number from 0 on, or ((first row, weight), ...)"
                )
        firsts = [first for first, _ in stages]
        if not firsts or firsts != sorted(set(firsts)):
            raise UserError(f"config.{path}: weight {weight!r} of {place!r}: the first rows of its stages must rise")
        table = tuple((first, float(share)) for first, share in stages)
        found.append((place, table if isinstance(weight, (tuple, list)) else table[0][1]))
    places = [place for place, _ in found]
    if not found or len(set(places)) < len(places):
        problem = "a place stands twice" if found else "no source"
        raise UserError(f"config.{path} = {value!r}: {problem}; expected a place, or pairs such as {example}")
    tables = [weight if isinstance(weight, tuple) else ((0, weight),) for _, weight in found]
    for row in sorted({0} | {first for table in tables for first, _ in table}):
        if not any(next((share for first, share in reversed(table) if first <= row), 0) for table in tables):
            raise UserError(f"config.{path} = {value!r}: no source has a weight from row {row:,} on")
    return tuple(found)


def resolve(config) -> Config:
    """A ConfigDict or nested dict -> frozen dataclasses, checked leaf by leaf and then together. Raises UserError."""
    flat = flatten(config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config)
    for path in flat:
        check_key(path)
    for path in leaves():
        if path not in flat:
            raise UserError(f"config.{path} is missing")
    checked = {path: _check(path, flat[path], field.type, field.metadata) for path, field in leaves().items()}
    nested = unflatten(checked)
    model = nested["model"]
    model["num_kv_heads"] = model["num_kv_heads"] or model["num_heads"]
    heads = model["kind"] not in RECURRENT
    if heads and not model["head_dim"] and model["model_dim"] % model["num_heads"]:
        wider = math.ceil(model["model_dim"] / model["num_heads"]) * model["num_heads"]
        raise UserError(
            f"config.model.model_dim = {model['model_dim']} does not divide into num_heads = {model['num_heads']} heads; "
            f"the next that does is {wider} (or set config.model.head_dim)"
        )
    model["head_dim"] = model["head_dim"] or model["model_dim"] // model["num_heads"]
    model["mlp_dim"] = model["mlp_dim"] or 4 * model["model_dim"]
    model["head"] = TASKS[nested["train"]["task"]][0] if nested["train"]["task"] else model["head"]
    if model["lora_rank"]:
        nested["optimizer"]["trainable"] = nested["optimizer"]["trainable"] or WITH_LORA
    resolved = Config(**{name: kind(**nested[name]) for name, kind in SECTIONS.items()})
    _check_together(resolved)
    return resolved


def _check_together(config: Config) -> None:
    model, data = config.model, config.data

    def divides(small_name, small, large_name, large):
        if large % small:
            fitting = [n for n in range(1, large + 1) if large % n == 0]
            near = min(fitting, key=lambda n: abs(n - small))
            raise UserError(
                f"config.{small_name} = {small} does not divide {large_name} = {large}; the nearest is {near}"
            )

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
    if model.kind == "encoder_decoder" and (model.norm_place == "both" or set(model.window) != {0}):
        raise UserError(
            f"an encoder_decoder takes config.model.norm_place = pre or post and no window, not {model.norm_place} and "
            f"{model.window}"
        )
    if model.kind == "encoder" and set(model.window) != {0}:
        raise UserError(
            f"config.model.window = {model.window}: an encoder sees both sides, windows look back; take (0,)"
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
    if data.batch_ramp[0]:
        divides("data.batch_ramp[0]", data.batch_ramp[0], "global_batch_size", data.global_batch_size)
    if isinstance(config.train.microbatch_rows, int):
        smallest = data.batch_ramp[0] or data.global_batch_size
        divides("train.microbatch_rows", config.train.microbatch_rows, "the (smallest) batch of rows", smallest)
    axes = dataclasses.asdict(config.mesh)
    for name, size in axes.items():
        if size < 1 and size != -1:
            raise UserError(f"config.mesh.{name} = {size}: expected a number of devices, or -1 for the rest")
    if list(axes.values()).count(-1) > 1:
        raise UserError(f"config.mesh: only one axis can be -1 (the rest), got {axes}")


def _check_task(config: Config) -> None:
    labels, task, kind = config.model.labels, config.train.task, config.model.kind
    if config.evaluate.metrics and task not in WRITING:
        raise UserError(
            f"config.evaluate.metrics = {config.evaluate.metrics} scores texts that a model writes: config.train.task = "
            f"{' or '.join(WRITING)}, not {task!r}"
        )
    if config.data.prompt and task != "text_to_text":
        raise UserError(f"config.data.prompt = {config.data.prompt!r} is of the task text_to_text, not of {task!r}")
    fitting = [name for name, (head, _) in TASKS.items() if head == (config.model.head or "labels")]
    if not task:
        if labels or config.model.head:
            what = f"labels = {labels}" if labels else f"head = {config.model.head}"
            raise UserError(f"config.model.{what} without a task: add --config.train.task={fitting[0]}")
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
    if head not in ("labels", "tags") and labels:
        raise UserError(f"config.model.labels = {labels}: {task} has none; take ()")
    if config.data.packing == "split":
        raise UserError(
            "config.data.packing = split would part records: take best_fit (too long ones are cut, and counted) or "
            "best_fit_whole (they are refused)"
        )


_LENGTH = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<prefix>[kKMBT]?) ?(?P<unit>tokens|epochs|steps|min)")


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
    model.window = tuple(dict.fromkeys(model.window))  # each kind of layer once
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
    return config


def difference(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{path: (old, new)} of the leaves that differ between two flat configs, compared as JSON would keep them."""
    same = lambda a, b: json.dumps(a) == json.dumps(b)  # tuples and lists are the same on disk
    return {p: (old.get(p), new.get(p)) for p in sorted({*old, *new}) if not same(old.get(p), new.get(p))}
