"""Every setting of a run once: name, type, default, meaning, unit and range. Experiments state differences from here.

`default_config()` gives experiments an `ml_collections.ConfigDict`; `lm_jax.config_check.resolve` turns it into the
frozen, hashable dataclasses that everything below `main` takes. "Off" is 0, "" or a named choice, never None.
"""

import dataclasses
import json
from typing import Any

import ml_collections

from lm_jax.knob import Length, Section, Sources, axis, knob, length
from lm_jax.model_config import DECODERS, TASKS, WRITING, Model

ONE_LESS = 0.999999  # float32 tells it from 1
LARGEST_LOSS_SCALE = 2**24  # a larger one would overflow before it helps
FIRST_LOSS_SCALE = 1024  # of float16 where none is given
PREDICTING = {"model.kind": DECODERS, "train.task": ("", *WRITING, "preference")}
FALLING = {"optimizer.schedule": ("cosine", "linear", "warmup_stable_decay")}


@dataclasses.dataclass(frozen=True)
class Data:
    """What is trained on, and how it becomes rows and batches."""

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
    sequence_length: int = knob(256, "tokens in a row", within=(2, 2**24))
    global_batch_size: int = knob(16, "rows in a step, over all devices", within=(1, 2**24), fixed=False)
    batch_ramp: tuple[int, Length] = length(
        (0, 0), "(rows at the start, length over which they grow to the full batch); (0, 0) = off"
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
    seed: int = knob(0, "seed of the order of documents, and of what the objective masks", within=(0, 2**32 - 1))
    columns: tuple[str, ...] = knob(
        (),
        "names of the columns that a task reads, in the order of the task's own names; () = those names",
        fixed=False,
        reach={"train.task": ()},
    )
    prompt: str = knob(
        "",
        'template of the text that a model reads of a record, with columns in {braces}; "" = {source}, and in a causal model a '
        "blank line after it",
        reach={"train.task": ("text_to_text",)},
    )
    num_workers: int = knob(0, "processes that load rows; 0 = a thread", within=(0, 128), fixed=False, machine=True)
    validation_fraction: float = knob(0.02, "share of the documents, by content hash", within=(0.0, 0.5))
    test_fraction: float = knob(0.02, "share of the documents, by content hash", within=(0.0, 0.5))


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How parameters change: update rule, learning rate, decay."""

    name: str = knob(
        "adamw",
        "update rule; adam: no decay; adafactor: rate times the parameter's size; muon: adamw but for the blocks' matrices; "
        "sgd: momentum beta1",
        choices=("adamw", "adam", "adafactor", "lion", "muon", "sgd"),
    )
    learning_rate: float = knob(1e-3, "peak", within=(0.0, 1000.0), fixed=False)
    schedule: str = knob(
        "cosine",
        "after the warm-up; inverse_square_root falls without end, warmup_stable_decay in the last fifth of decay_over",
        choices=("cosine", "constant", "linear", "inverse_square_root", "warmup_stable_decay"),
        fixed=False,
    )
    warmup: Length = length(100, "linear from 0 to the peak")
    decay_over: Length = length(0, "length from step 0 to the end of the decay; 0 = train.num_steps", reach=FALLING)
    decay_to: float = knob(0.1, "final rate as a share of the peak", within=(0.0, 1.0), fixed=False, reach=FALLING)
    beta1: float = knob(
        0.9,
        "decay of the first moment, or momentum",
        within=(0.0, ONE_LESS),
        fixed=False,
        reach={"optimizer.name": ("adamw", "adam", "lion", "muon", "sgd")},
    )
    beta2: float = knob(
        0.95,
        "decay of the second moment",
        within=(0.0, ONE_LESS),
        fixed=False,
        reach={"optimizer.name": ("adamw", "adam", "lion", "muon")},
    )
    epsilon: float = knob(
        1e-8,
        "added to the root of the second moment",
        within=(1e-20, 1.0),
        fixed=False,
        reach={"optimizer.name": ("adamw", "adam", "muon")},
    )
    moment_dtype: str = knob(
        "float32",
        "what moments and momentum are stored in between steps; bfloat16 halves them, with betas up to 0.99",
        choices=("float32", "bfloat16"),
        reach={"optimizer.name": ("adamw", "adam", "lion", "muon", "sgd")},
    )
    weight_decay: float = knob(
        0.1,
        "decoupled; only of matrices and tables",
        within=(0.0, 100.0),
        fixed=False,
        reach={"optimizer.name": ("adamw", "adafactor", "lion", "muon", "sgd")},
        idle=(0.0,),
    )
    clip_norm: float = knob(1.0, "largest global gradient norm; 0 = no clipping", within=(0.0, 1e9), fixed=False)
    ema: float = knob(
        0.0, "decay of an average of the parameters, which is then the model; 0 = off", within=(0.0, ONE_LESS)
    )
    trainable: str = knob(
        "",
        'a regular expression, found in the paths of the parameters that are trained, such as "^labels/|attention/query"; the '
        'others keep every bit; "" = all, or with model.lora_rank the adapters and the heads of a task',
    )
    layer_decay: float = knob(
        1.0,
        "rate of a layer as a share of that of the layer above; heads have the whole rate, embeddings the least; 1 = off",
        within=(1e-3, 1.0),
        fixed=False,
    )
    loss_scale: int = knob(
        0,
        "initial factor of the loss, a power of two; halves on overflow, doubles after 2,000 good steps; 0 = off",
        within=(0, LARGEST_LOSS_SCALE),
    )


@dataclasses.dataclass(frozen=True)
class Train:
    """What is learnt, for how long, and from where."""

    task: str = knob("", 'what is learnt from records; "" = a text, by data.objective', choices=("", *TASKS))
    num_steps: Length = length(1000, 'steps, or tokens, epochs or time with their unit: "5 min"', low=1)
    microbatch_rows: int | str = knob(
        "auto",
        "rows in one pass of the model, over all devices; auto = what fits",
        within=(1, 2**24),
        choices=("auto",),
        fixed=False,
        machine=True,
    )
    z_loss: float = knob(
        0.0,
        "weight of log(softmax's denominator)^2 a token, which keeps logits near 0; PaLM: 1e-4",
        within=(0.0, 1.0),
        fixed=False,
        reach={"train.task": ("", *WRITING)},
    )
    balance_loss: float = knob(
        0.01,
        "weight of the experts' load-balancing loss, a token and layer; Mixtral: 0.02",
        within=(0.0, 1000.0),
        fixed=False,
        reach={"model.num_experts": ()},
        idle=(0.0,),
    )
    router_z_loss: float = knob(
        0.0,
        "weight of log(router's denominator)^2, a token and layer; ST-MoE: 1e-3",
        within=(0.0, 1000.0),
        fixed=False,
        reach={"model.num_experts": ()},
    )
    dpo_beta: float = knob(
        0.1,
        "of the task preference: the weight of staying near the first parameters",
        within=(1e-6, 1000.0),
        reach={"train.task": ("preference",)},
    )
    seed: int = knob(0, "seed of initialisation and dropout", within=(0, 2**32 - 1))
    init_from: str = knob(
        "", "what a new run starts from: MODEL, which brings its settings, or word vectors", fixed=False
    )
    export_to: str = knob("", 'Hugging Face folder that a finished run is written to; "" = none', fixed=False)
    on_spike: str = knob(
        "log",
        "what a spike of loss and gradient norm leads to: nothing, a line in the log, or the run goes back to a saved step "
        "before it and leaves out the rows around it",
        choices=("off", "log", "rewind"),
        fixed=False,
    )


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How many devices split what; one of them may be -1."""

    data: int = axis(-1, "devices that hold copies of the parameters and split the batch; -1 = the rest")
    fsdp: int | str = axis(
        "auto",
        "devices that split parameters and batch; -1 = the rest; auto = 1 where the state fits on a device, else those of a "
        "slice or host, or all",
        choices=("auto",),
    )
    tensor: int = axis(1, "devices that split heads, MLP and vocabulary; -1 = the rest")
    slices: int = axis(
        -1, "slices of the machine, joined by a slower network, which split data; -1 = as many as the devices say"
    )
    expert: int = axis(1, "devices that split experts and batch; -1 = the rest")
    context: int = axis(1, "devices that split the tokens of a row, and the stored parameters; -1 = the rest")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When a run is saved, and which saved steps are kept."""

    every: Length = length(1000, 'between saves; also in time: "30 min"', low=1)
    keep_last: int = length(2, "newest checkpoints kept", low=1)
    keep_every: int = length(0, "steps whose multiples are kept for ever; 0 = none")
    keep_best: str = knob("", 'a number such as "eval/loss", whose best step is saved and kept; "" = none', fixed=False)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """When a run is evaluated, on how many rows, and what it writes."""

    every: Length = length(500, "between evaluations, also one at the end; 0 = only at the end")
    num_rows: int = length(64, "validation rows each time (at the end: all); 0 = all")
    patience: int = length(0, "evaluations after the best (checkpoint.keep_best or eval/loss) that end a run; 0 = off")
    tasks: tuple[str, ...] = knob((), 'of lm-eval, such as ("arc_easy", "my.yaml")', fixed=False, reach=PREDICTING)
    tasks_every: int = length(1, "evaluations between, also at the end; 0 = only there", reach={"evaluate.tasks": ()})
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
    """What is written of the steps."""

    every: Length = length(10, "between lines of metrics", low=1)
    profile: int = length(0, "step from which three are traced for XProf; 0 = none")
    trackers: tuple[str, ...] = knob(
        ("tensorboard",),
        'what shows the metrics, such as ("tensorboard", "wandb"); histograms: of updates, in TensorBoard, per evaluation',
        choices=("tensorboard", "histograms", "trackio", "wandb", "mlflow"),
        fixed=False,
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run."""

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
    config = ml_collections.ConfigDict(type_safe=False)
    for name, settings in dataclasses.asdict(Config()).items():
        config[name] = Section.of(settings)
    return config.lock()


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
    """The nested dict of a flat one."""
    nested: dict[str, dict[str, Any]] = {}
    for path, value in flat.items():
        section, name = path.split(".")
        nested.setdefault(section, {})[name] = value
    return nested


def difference(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{path: (old, new)} of the leaves that differ between two flat configs, compared as JSON would keep them."""
    same = lambda a, b: json.dumps(a) == json.dumps(b)  # tuples and lists are the same on disk
    return {p: (old.get(p), new.get(p)) for p in sorted({*old, *new}) if not same(old.get(p), new.get(p))}
