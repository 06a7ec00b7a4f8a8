"""Where a run starts from: (1) the newest valid step of its workdir; (2) `train.init_from`; (3) fresh parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from lm_jax import checkpoint, fault_points, load_model, step_folders, terminal
from lm_jax.batch_ramp import START, DataState
from lm_jax.data import mixture
from lm_jax.distributed import agree
from lm_jax.errors import UserError
from lm_jax.train_state import TrainSetup, TrainState, fresh

Source = load_model.ModelRef | Any  # a MODEL, or the `WordVectors` of a file (lm_jax/convert/word_vectors.py)


def find_init(program: TrainSetup, mixed: mixture.Mixture, log: terminal.Terminal) -> Source | None:
    """The model that `train.init_from` names, or the word vectors where it is a file; None where it names nothing.

    The one place where training looks up `convert`. Raises UserError where nothing is there, or that lists what has
    another shape.
    """
    path = program.config.train.init_from
    if not path:
        return None
    if epath.Path(path).is_file():
        from lm_jax.convert import word_vectors

        return word_vectors.read(path, mixed.tokenizer, program.config.model.model_dim)
    try:
        found = load_model.locate(path, log, program.parts)
    except UserError as error:
        raise UserError(str(error).replace("--model", "config.train.init_from")) from None
    if found.tokenizer.fingerprint != mixed.tokenizer.fingerprint:
        mend = f"--config.data.tokenizer={found.workdir / found.tokenizer.file_name}"
        raise UserError(
            f"config.train.init_from = {path!r} has another tokenizer than this corpus; take it too: {mend}"
        )
    mine, theirs = program.graph.declarations, load_model.graph_of(found).declarations
    differing = [path for path in mine.keys() & theirs.keys() if not fits(path, mine[path].shape, theirs[path].shape)]
    new = {path for path in mine if path[-1] in ("lora_a", "lora_b")}
    if program.config.train.task:  # other heads
        differing += [path for path in mine.keys() - theirs.keys() - new if path[0] not in ("labels", "pooler")]
    else:
        differing += list((mine.keys() - new) ^ theirs.keys())
    if differing:
        names = ", ".join(sorted("/".join(path) for path in differing)[:3])
        raise UserError(f"config.train.init_from = {path!r}: {len(differing)} parameters differ: {names}")
    return found


def fits(path: tuple[str, ...], mine: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    """Whether a parameter can be taken; shorter rows take the first of the learned positions."""
    shorter = path == ("positions", "table") and mine[0] <= theirs[0]
    return mine[1:] == theirs[1:] if shorter else mine == theirs


def starting_point(
    program: TrainSetup, workdir: epath.Path, source: Source | None, log: terminal.Terminal, run: str = ""
) -> tuple[TrainState, DataState]:
    """The state on the mesh that is set, and the data state.

    `source` is what `find_init` found, `run` the identity that the steps of the workdir must have.
    """
    step = step_folders.newest_valid(workdir, log, quarantine=True, run=run)
    if step is not None:
        fault_points.reach("restore")
        state, data = checkpoint.restore(workdir, step, program)
        data = DataState.of_lists(agree(data, "data state"))
        log(f"resumed at step {step:,}, row {data.cursor:,}")
        return state, data
    if source is None:
        return jax.jit(lambda: fresh(program))(), START
    if isinstance(source, load_model.ModelRef):
        _, given = load_model.load_parameters(source)
        log(f"parameters from {source.workdir} step {source.step:,}")
        parameters = with_the_rest(program, given, log)
    else:
        num, of = int(source.found.sum()), len(source.found)
        log(f"{num:,} of {of:,} pieces from the words of {source.path}; the other {of - num:,} are initialised")
        parameters = with_rows(jax.jit(lambda: fresh(program))().parameters, source)
    optimizer_state = jax.jit(program.optimizer.init)(program.split(parameters)[0])
    return TrainState(jnp.zeros((), jnp.int32), parameters, optimizer_state), START


def with_the_rest(program: TrainSetup, given: dict, log: terminal.Terminal) -> dict:
    """The parameters of the model: the given ones, and initial values for those that are missing; the log lists both."""
    flat, mine = nnx.traversals.flatten_mapping(given), program.graph.declarations
    if all(path in mine and x.shape == mine[path].shape for path, x in flat.items()) and len(flat) == len(mine):
        return given
    names = lambda paths: ", ".join("/".join(path) for path in sorted(paths)) or "nothing"
    log(f"left behind: {names(flat.keys() - mine.keys())}; initialised: {names(mine.keys() - flat.keys())}")
    start = nnx.traversals.flatten_mapping(jax.jit(lambda: fresh(program))().parameters)
    placed = {path: jax.device_put(flat.get(path, x)[: len(x)], x.sharding) for path, x in start.items()}
    return nnx.traversals.unflatten_mapping(placed)


def with_rows(parameters: dict, given: Any) -> dict:
    """The parameters with the rows of the embedding table that some `WordVectors` have."""
    table = parameters["embedding"]["table"]
    padding = len(table) - len(given.table)
    rows = jax.device_put(np.pad(given.table, ((0, padding), (0, 0))), table.sharding)
    is_given = np.pad(given.found, (0, padding))[:, None]
    replaced = jax.jit(lambda table, rows: jnp.where(jnp.asarray(is_given), rows, table))(table, rows)
    return parameters | {"embedding": {"table": replaced}}
