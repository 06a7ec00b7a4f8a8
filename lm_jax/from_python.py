"""lm_jax from Python: `lm_jax.load(MODEL)` is a model to ask, `lm_jax.run(config)` trains; in a notebook or a script.

    model = lm_jax.load("runs/quickstart")
    model.generate("class"), model.loss("import os"), model.logits("import os")
    result = lm_jax.run("experiments/quickstart.py", {"train.num_steps": 100})

Shape suffixes: B rows, T length, V vocabulary, C outputs of a task's head.
"""

import contextlib
import functools
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import AxisType, PartitionSpec

from lm_jax import decide, distributed, experiment, load_model, metrics_file, train
from lm_jax.config import Config
from lm_jax.config import Mesh as MeshConfig
from lm_jax.config_check import check_key
from lm_jax.data.objectives import specials
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.mesh import batch_shards, make_mesh, preflight, with_whole_rows
from lm_jax.model.build import ModelDef
from lm_jax.model.language_model import padded
from lm_jax.model_config import OBJECTIVES
from lm_jax.sharding import AXES
from lm_jax.stop import StopSignal, tell

BUCKET = 64  # rows are padded to its multiples, so that few programs serve all lengths


class LoadedModel:
    """A MODEL with its parameters on devices. Methods take a text, or the ids of all tokens that are read."""

    def __init__(self, found: load_model.ModelRef, mesh: jax.sharding.Mesh):
        self.workdir, self.step = str(found.workdir), found.step
        self.config: Config = found.config
        self.tokenizer: Tokenizer = found.tokenizer
        self.mesh = mesh
        self._found = found
        self.model: ModelDef
        self.parameters: dict  # nested, of arrays on the mesh; those of a stack of layers are [L, ...]
        with jax.set_mesh(mesh):
            self.model, self.parameters = load_model.load_parameters(found)

    def ids(self, text: str | Sequence[int] | np.ndarray) -> np.ndarray:
        """int32 [T]: the tokens of a text as the model reads it, with what stands before and after it (a head: as its task)."""
        if not isinstance(text, str):
            return np.asarray(text, np.int32)
        marks = self._found.special_ids
        first, last = marks.first, tuple[int, ...]()
        if self.config.model.kind == "encoder":
            own = specials(self.tokenizer, self.config.data.objective)
            first, last = (own.classifier,), (own.document,)
        elif self.config.model.head:  # of a decoder: the end of the text is asked
            first, last = (), (specials(self.tokenizer, self.config.data.objective).document,)
        return np.concatenate([first, self.tokenizer.encode(text), last]).astype(np.int32)

    def logits(self, text: str | Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [T, V] after each token of `ids(text)`, of the next one (an encoder: of its own place), or [T, C] of a head.

        Raises UserError where the text is longer than the model sees, or the model reads one text and writes another.
        """
        from lm_jax.generate.decoding import on_mesh

        ids, sees = self.ids(text), self.model.sequence_length
        if self.config.model.kind == "encoder_decoder":
            raise UserError(f"{self.workdir} reads a text and writes another one: ask for generate(text)")
        if not 0 < len(ids) <= sees:
            raise UserError(f"{len(ids)} tokens, and {self.workdir} sees from 1 to {sees}")
        shape = batch_shards(dict(self.mesh.shape)), min(-(-len(ids) // BUCKET) * BUCKET, sees)
        row = lambda x: np.broadcast_to(np.pad(x, (0, shape[1] - len(ids))), shape).astype(np.int32)
        batch = {"tokens": row(ids), "positions": row(np.arange(len(ids))), "segment_ids": row(np.ones(len(ids)))}
        with jax.set_mesh(self.mesh):
            return np.asarray(_logits(self.model, self.parameters, jax.tree.map(on_mesh, batch)))[: len(ids)]

    def predict(self, text: str | Sequence[int] | np.ndarray) -> dict[str, float]:
        """{label: its probability} of a text, for a model that tells texts apart. Raises UserError where it does not."""
        if self.config.model.head != "labels":
            raise UserError(f"{self.workdir} tells no labels of texts apart: ask for logits(text)")
        logits_C = self.logits(text)[0 if self.config.model.kind == "encoder" else -1].astype(np.float64)
        weights_C = np.exp(logits_C - logits_C.max())
        return dict(zip(self.config.model.labels, (weights_C / weights_C.sum()).tolist(), strict=True))

    def loss(self, text: str | Sequence[int] | np.ndarray) -> float:
        """Mean cross entropy of the tokens after the first one of `ids(text)`, in nats, which training calls the loss.

        A text that is longer than the model sees is read in parts, each after the last token of the one before. Raises UserError
        where the model does not predict the next token.
        """
        from lm_jax.generate.likelihood import likelihoods

        ids, sees = self.ids(text).tolist(), self.model.sequence_length
        if self.config.model.kind in OBJECTIVES or self.config.model.head:
            raise UserError(f"{self.workdir} does not predict the next token: python -m lm_jax.evaluate measures it")
        if len(ids) < 2:
            raise UserError(f"a loss needs two tokens, here are {len(ids)}")
        parts = [(ids[i - 1 : i], ids[i : i + sees]) for i in range(1, len(ids), sees)]
        with jax.set_mesh(self.mesh):
            found = likelihoods(self.model, self.parameters, parts)
        return -math.fsum(part.log_probability for part in found) / (len(ids) - 1)

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.8,
        top_k: int = 50,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Any:
        """What the model writes after a prompt, a str, or after each of several, a list; settings as `lm_jax.generate` has them.

        Raises UserError where the prompt and `max_new_tokens` are more than the model sees, or the model writes no text.
        """
        from lm_jax.generate.decoding import complete, writes
        from lm_jax.generate.sampling import Sampling

        if not writes(self.config.model):
            asked = ", or predict(text)" if self.config.model.head == "labels" else ""
            raise UserError(
                f"{self.workdir}, of kind {self.config.model.kind}, writes no text: ask for logits(text){asked}"
            )
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, np.uint32(seed))
        prompts, settings = [prompt] if isinstance(prompt, str) else list(prompt), (sampling, tuple(stop), 0)
        with jax.set_mesh(self.mesh):
            given = self.model, self._unstacked, self.tokenizer, prompts, max_new_tokens
            found = complete(*given, *settings, self._found.special_ids)
        texts = [one.text for one in found]
        return texts[0] if isinstance(prompt, str) else texts

    @functools.cached_property
    def _unstacked(self) -> dict:
        return self.model.unstacked(self.parameters)

    def __repr__(self) -> str:
        num = sum(x.size for x in jax.tree.leaves(self.parameters))
        return f"LoadedModel({self.workdir!r}, step {self.step:,}, {num:,} parameters, {self.mesh.size} devices)"


@functools.partial(jax.jit, static_argnames=("graph",))
def _logits(graph: ModelDef, parameters: dict, batch: dict) -> jax.Array:
    """float32 [T, V or C] of the first row, on every device; without the padding of the vocabulary."""
    model = graph.module(parameters)
    types = {"token_type_ids": jnp.zeros_like(batch["tokens"])} if graph.config.kind == "encoder" else {}
    outputs = model.read(batch | types)
    if outputs.hidden_BTD is None:
        return jax.sharding.reshard(outputs.labels_BTC, PartitionSpec())[0]
    return jax.sharding.reshard(model.logits(outputs.hidden_BTD), PartitionSpec())[0, :, : model.vocab_size]


def load(model: str | os.PathLike, *, mesh: jax.sharding.Mesh | None = None, parts: str = "") -> LoadedModel:
    """A MODEL: a run (`runs/x`), a step of it (`runs/x@12000`), or a Hugging Face folder.

    It lies on `mesh`, else on the mesh that is set (`jax.set_mesh`), else on one device. A mesh has axes of the names in
    `lm_jax.sharding.AXES`. `parts` is the file of the parts that a run was trained with, as for `--parts`. Raises UserError.
    """
    distributed.configure(strict=False)
    found = load_model.locate_with(os.fspath(model), parts, print)
    mesh = with_whole_rows(_whole(mesh or jax.sharding.get_mesh()))
    alone = {"data.global_batch_size": batch_shards(dict(mesh.shape)), "data.batch_ramp": (0, 0)}
    preflight(decide.replaced(found.config, alone), padded(found.vocab_size), dict(mesh.shape))
    return LoadedModel(found, mesh)


def _whole(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The devices of a mesh with all axes that the table of layouts has, Explicit ones; of no mesh, one device."""
    if mesh.empty:
        return make_mesh(MeshConfig(data=1), [distributed.own(distributed.devices())])
    if unknown := [axis for axis in mesh.axis_names if axis not in AXES]:
        raise UserError(f"the mesh has an axis {unknown[0]!r}; lm_jax knows {', '.join(AXES)}")
    order = sorted(range(mesh.devices.ndim), key=lambda i: AXES.index(mesh.axis_names[i]))
    sizes = [mesh.shape.get(axis, 1) for axis in AXES]
    return jax.sharding.Mesh(mesh.devices.transpose(order).reshape(sizes), AXES, (AxisType.Explicit,) * len(AXES))


class RunResult(NamedTuple):
    """How a run ended, and where it is: `lm_jax.load(result.workdir)`."""

    workdir: str
    finished: bool  # False: stopped and saved, or given up, as was printed
    metrics: dict[str, float]  # the last value of each: final/loss, train/loss, perf/tokens_per_second ...

    def series(self, name: str) -> list[tuple[int, float]]:
        """[(step, value)] of a metric, for a plot."""
        return metrics_file.series(metrics_file.read(epath.Path(self.workdir)), name)


def run(
    config: str | os.PathLike | ml_collections.ConfigDict,
    overrides: Mapping[str, Any] | None = None,
    *,
    workdir: str | os.PathLike = "",
) -> RunResult:
    """Trains as `python -m lm_jax.main` does, to the end or on from the newest step in the workdir.

    `config` is an experiment file (`file.py:variant`, which is executed) or the ConfigDict that such a file returns;
    `overrides` are {"train.num_steps": 100}; `workdir` "": runs/<experiment>, of a ConfigDict runs/notebook. The first Ctrl-C, or
    interrupt of a notebook's kernel, saves and returns. Raises UserError.
    """
    distributed.configure(strict=False)
    named = "" if isinstance(config, ml_collections.ConfigDict) else os.fspath(config)
    given = dict(overrides or {})
    for path in given:
        check_key(path)
    folder = os.fspath(workdir) or f"runs/{experiment.run_name(named)}"
    resolved, origins = experiment.load_config(named, given, folder, None if named else config)
    code = train.run(resolved, named, folder, origins, listen=_interruptible)
    lines = metrics_file.read(epath.Path(folder))
    return RunResult(folder, code == 0, {name: value for line in lines for name, value in line.items()})


@contextlib.contextmanager
def _interruptible() -> Iterator[StopSignal]:
    """A first SIGINT asks the run to stop, the second is a KeyboardInterrupt: neither ends the process, which is not ours."""
    stop = StopSignal()

    def interrupted(number: int, frame: Any) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        tell("stopping: this pass is finished and the run is saved; once more to leave at once")

    if threading.current_thread() is not threading.main_thread():  # where Python handles no signals
        yield stop
        return
    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
