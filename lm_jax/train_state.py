"""The state of training: parameters, optimizer state and step number, described without arrays or made on the mesh."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from lm_jax.batch_ramp import UPDATES, Clocks
from lm_jax.config import Config
from lm_jax.loss_scale import Guarded
from lm_jax.model import build as graphs
from lm_jax.optimizer import make_optimizer
from lm_jax.parts import ORDINARY, Parts
from lm_jax.sharding import laid_out, on_mesh
from lm_jax.trainable import partition_params, rates, trained_paths


class TrainState(NamedTuple):
    """What a step changes."""

    step: jax.Array  # int32 []: updates done
    parameters: dict
    optimizer_state: Guarded


class TrainSetup(NamedTuple):
    """What does not change in a run: config, model, update rule, and the root key of all random numbers."""

    config: Config
    graph: graphs.ModelDef
    optimizer: optax.GradientTransformation
    trained: frozenset[tuple[str, ...]]  # paths of the parameters that the optimizer updates
    clocks: Clocks = UPDATES  # of the schedule
    parts: Parts = ORDINARY

    def split(self, parameters: dict) -> tuple[dict, dict]:
        """(parameters that are trained, parameters that are frozen)."""
        return partition_params(parameters, self.trained)

    def at(self, ticks: ArrayLike) -> "TrainSetup":
        """The setup with which a step is made that ends at `ticks` of a run whose length is a time."""
        return program_of(self.config, self.graph, self.clocks._replace(ticks=ticks), self.parts)

    @property
    def root(self) -> jax.Array:
        """The key from which every random number of a run is derived."""
        return jax.random.key(self.config.train.seed)


def make_program(config: Config, vocab_size: int, clocks: Clocks = UPDATES, parts: Parts = ORDINARY) -> TrainSetup:
    """The setup of a config whose lengths are in steps, for a tokenizer of `vocab_size`."""
    graph = graphs.build(config.model, vocab_size, config.data.sequence_length, parts.block)
    return program_of(config, graph, clocks, parts)


def program_of(config: Config, graph: graphs.ModelDef, clocks: Clocks, parts: Parts = ORDINARY) -> TrainSetup:
    """The setup that trains a model."""
    trained = trained_paths(config, graph.declarations)
    declared, _ = partition_params(graph.tree(lambda declared: declared), trained)
    factors = rates(config, {path: graph.declarations[path] for path in trained})
    optimizer = make_optimizer(config.optimizer, declared, factors, clocks, parts.optimizer)
    return TrainSetup(config, graph, optimizer, trained, clocks, parts)


def fresh(program: TrainSetup) -> TrainState:
    """The state before the first step. Under `jax.set_mesh` and jit every device makes its own shards."""
    parameters = program.graph.init(program.root, sharded=on_mesh())
    return TrainState(jnp.zeros((), jnp.int32), parameters, program.optimizer.init(program.split(parameters)[0]))


def abstract(program: TrainSetup) -> TrainState:
    """Shapes, dtypes and shardings of the state on the mesh that is set, without any array."""
    shapes: TrainState = jax.eval_shape(lambda: fresh(program))
    return laid_out(shapes)
