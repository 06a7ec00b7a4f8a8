"""Every setting of a run once: name, type, default, meaning, unit and range. Experiments state differences from here.

`default_config()` gives experiments an `ml_collections.ConfigDict`; `lm_jax.config_check.resolve` turns it into the
frozen, hashable dataclasses that everything below `main` takes. "Off" is 0, "" or a named choice, never None.
"""

import dataclasses
import json
from typing import Any

import ml_collections

from lm_jax.knob import Length, Sources, knob
from lm_jax.model_config import DECODERS, TASKS, WRITING, Model

MOST_STEPS = 2**31 - 1  # the step is an int32
ONE_LESS = 0.999999  # float32 tells it from 1
LARGEST_LOSS_SCALE = 2**24  # beyond it nothing is left to rescue


@dataclasses.dataclass(frozen=True)
class Data:
    sources: Sources = knob(
        (("python", 1.0),),
        '((path, weight), ...): "python" = the interpreter\'s library and manual, a folder of text, or a prepared folder; '
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
    num_workers: int = knob(0, "processes that load rows; 0 = a thread", low=0, fixed=False, high=128, machine=True)
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
        machine=True,
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
        machine=True,
    )
    fsdp: int = knob(
        1, "devices that split parameters and batch; -1 = the rest", fixed=False, low=-1, high=2**20, machine=True
    )
    tensor: int = knob(
        1, "devices that split heads, MLP and vocabulary; -1 = the rest", fixed=False, low=-1, high=2**20, machine=True
    )
    slices: int = knob(
        1,
        "parts of the machine that a slower network joins, which split data; -1 = as many as the devices say",
        fixed=False,
        low=-1,
        high=2**20,
        machine=True,
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


def flatten(config: Any) -> dict[str, Any]:
    """{"section.name": value} of a ConfigDict, a nested dict or a Config."""
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    nested = dataclasses.asdict(config) if isinstance(config, Config) else config
    return {f"{section}.{name}": value for section in nested for name, value in nested[section].items()}


def unflatten(flat: dict[str, Any]) -> dict[str, dict[str, Any]]:
    nested: dict[str, dict[str, Any]] = {}
    for path, value in flat.items():
        section, name = path.split(".")
        nested.setdefault(section, {})[name] = value
    return nested


def difference(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{path: (old, new)} of the leaves that differ between two flat configs, compared as JSON would keep them."""
    same = lambda a, b: json.dumps(a) == json.dumps(b)  # tuples and lists are the same on disk
    return {p: (old.get(p), new.get(p)) for p in sorted({*old, *new}) if not same(old.get(p), new.get(p))}
