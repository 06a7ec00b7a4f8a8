"""The step: gradients of a batch, added up over microbatches, one update. Pure functions, compiled by `compile_step`.

The microbatches of a step are separate calls of one compiled program: the batch may grow without another compile, a step
of many minutes shows how far it is, and Ctrl-C waits for a microbatch, not for a step.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm_jax.data.loader import abstract_batch
from lm_jax.distributed import block_on_cpu
from lm_jax.loss import batch_loss
from lm_jax.model.dropout import Dropout
from lm_jax.schedule import schedule
from lm_jax.sharding import by_copy, laid_out, over_copies
from lm_jax.train_state import TrainSetup, TrainState, abstract
from lm_jax.trainable import merge_params

Stepped = tuple[TrainState, dict[str, jax.Array]]  # a state, and the metrics of the step to it


class Sums(NamedTuple):
    """Sums over the microbatches of a step so far; loss and gradients are multiplied by the loss scale.

    Each copy of the parameters has its own, the first dim of all (`sharding.by_copy`): they meet once a step, in `update`.
    """

    gradients: dict  # like the trained parameters
    loss: jax.Array  # nats
    tokens: jax.Array  # float32: exact up to 16.7M tokens a step


def zeros(program: TrainSetup, parameters: dict) -> Sums:
    """The sums before the first microbatch."""

    def of_copy(trained: dict, _: None) -> Sums:
        return Sums(jax.tree.map(jnp.zeros_like, trained), jnp.zeros(()), jnp.zeros(()))

    return by_copy(of_copy, program.split(parameters)[0], None)


def accumulate(program: TrainSetup, state: TrainState, sums: Sums | None, batch: dict) -> Sums:
    """`sums` (None: zeros) with one more microbatch."""
    read = state.parameters, state.step, state.optimizer_state.scale
    new = by_copy(functools.partial(_sums_of, program), read, batch)
    return new if sums is None else jax.tree.map(jnp.add, sums, new)


def _sums_of(program: TrainSetup, read: tuple[dict, jax.Array, jax.Array], batch: dict) -> Sums:
    """The sums of a microbatch, or of a copy's part of it; `read` are parameters, step and loss scale."""
    parameters, step, scale = read
    dropout = Dropout(program.root, step, batch["row"]) if program.config.model.dropout else None
    scaled = batch | {"loss_mask": batch["loss_mask"] * scale}
    trained, frozen = program.split(parameters)
    weights = program.config.train
    routing = weights.balance_loss, weights.router_z_loss

    def loss_of(trained: dict) -> tuple[jax.Array, jax.Array]:
        whole = merge_params(frozen, trained)
        return batch_loss(program.graph, whole, scaled, dropout, weights.z_loss, routing, program.parts.loss)[:2]

    (_, loss), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained)
    return Sums(gradients, loss, batch["loss_mask"].sum())


def update(program: TrainSetup, state: TrainState, sums: Sums, *ticks: jax.Array) -> Stepped:
    """One optimizer update on the mean gradient over the step's tokens -> the next state and float32 metrics.

    Where the update would not be finite it is skipped: only the step and the counts of the guard change. `ticks`, int32 [], is
    given where the schedule goes by time.
    """
    program = program.at(*ticks) if ticks else program
    sums, before = jax.tree.map(over_copies, sums), state.optimizer_state
    num_tokens = jnp.maximum(sums.tokens, 1)
    gradients = jax.tree.map(lambda g: g / num_tokens, sums.gradients)
    trained, frozen = program.split(state.parameters)
    changes, optimizer_state = program.optimizer.update(gradients, state.optimizer_state, trained)
    parameters = merge_params(frozen, optax.apply_updates(trained, changes))
    rate = schedule(program.config.optimizer, program.clocks)(state.step - before.skipped)
    metrics = {
        "train/loss": sums.loss / before.scale / num_tokens,
        "train/grad_norm": optax.tree.norm(gradients) / before.scale,
        "train/learning_rate": jnp.asarray(rate, jnp.float32),
        "train/skipped": optimizer_state.skipped.astype(jnp.float32),
        "train/skipped_in_a_row": optimizer_state.in_a_row.astype(jnp.float32),
    }
    if program.config.optimizer.loss_scale:
        metrics["train/loss_scale"] = before.scale
    return TrainState(state.step + 1, parameters, optimizer_state), metrics


def train_step(program: TrainSetup, state: TrainState, batch: dict, *ticks: jax.Array) -> Stepped:
    """(state, batch) -> (state, metrics): the whole step where the batch is one microbatch."""
    return update(program, state, accumulate(program, state, None, batch), *ticks)


class CompiledStep(NamedTuple):
    """The compiled programs of a run: `whole` where every step is one microbatch, else the other three."""

    whole: Callable[..., Stepped] | None
    zeros: Callable[[dict], Sums] | None
    accumulate: Callable[[TrainState, Sums, dict], Sums] | None
    update: Callable[..., Stepped] | None
    ticks: jax.sharding.Sharding | None = None  # where the ticks of a schedule by time are expected

    def __call__(
        self, state: TrainState, num_microbatches: int, batches: Iterator[dict], watch: Callable, ticks: int = 0
    ) -> Stepped | None:
        """(state, metrics) after one step over the next microbatches. Donates `state`.

        `watch(done) -> bool` is called after each microbatch but the last. Where it returns True the step is given up: None is
        returned, and `state` has not changed.
        """
        given = [jax.device_put(np.int32(ticks), self.ticks)] if self.ticks else []
        if self.whole:
            return block_on_cpu(self.whole(state, next(batches), *given))
        assert self.zeros and self.accumulate and self.update
        sums = self.zeros(state.parameters)
        for done in range(1, num_microbatches + 1):
            sums = block_on_cpu(self.accumulate(state, sums, next(batches)))
            if done < num_microbatches and watch(done):
                return None
        return block_on_cpu(self.update(state, sums, *given))


def compile_step(program: TrainSetup, mesh: jax.sharding.Mesh, one_microbatch: bool) -> CompiledStep:
    """Compiles the step for the microbatches of the config on this mesh. Arguments that come back changed are donated."""
    config, state = program.config, abstract(program)
    batch = abstract_batch(mesh, int(config.train.microbatch_rows), config)

    def compiled(
        function: Callable, *arguments: object, donate: int | tuple[int, ...], keep: bool = False
    ) -> jax.stages.Compiled:
        return jax.jit(function, donate_argnums=donate, keep_unused=keep).lower(*arguments).compile()

    layout = state.step.sharding if program.clocks.ticks is not None else None
    ticks = [jax.ShapeDtypeStruct((), jnp.int32, sharding=layout)] if layout else []
    if one_microbatch:
        whole = compiled(functools.partial(train_step, program), state, batch, *ticks, donate=0)
        return CompiledStep(whole, None, None, None, layout)
    start = functools.partial(zeros, program)
    sums = laid_out(jax.eval_shape(start, state.parameters))
    # The moments lie in memory beside a microbatch, which does not read them: so its compiler knows of them.
    add = compiled(functools.partial(accumulate, program), state, sums, batch, donate=1, keep=True)
    finish = compiled(functools.partial(update, program), state, sums, *ticks, donate=0)
    return CompiledStep(None, compiled(start, state.parameters, donate=()), add, finish, layout)
