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
from lm_jax.meanwhile import elapsed
from lm_jax.train_state import TrainSetup, TrainState, fresh

FIRST_ROWS = (("positions", "table"), ("embedding", "table"), ("unembedding", "table"), ("output_bias",))
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
        given, own = program.config.data.tokenizer, found.workdir / found.tokenizer.file_name
        raise UserError(
            f"config.train.init_from = {path!r} has another tokenizer than config.data.tokenizer = {given!r}, or than a\n"
            f"prepared source has; take the model's: --config.data.tokenizer={own}, which is so where none is given"
        )
    mine, theirs = program.graph.declarations, load_model.graph_of(found).declarations
    new = {path for path in mine if path[-1] in ("lora_a", "lora_b")}
    own_head = set() if has_the_head(program, found) else {path for path in theirs if path[0] == "labels"}
    shared = mine.keys() & theirs.keys() - own_head
    differing = [path for path in shared if not fits(path, mine[path].shape, theirs[path].shape)]
    if program.config.train.task:  # other heads
        differing += [path for path in mine.keys() - theirs.keys() - new if path[0] not in ("labels", "pooler")]
    else:
        differing += list((mine.keys() - new) ^ theirs.keys())
    if differing:
        names = ", ".join(sorted("/".join(path) for path in differing)[:3])
        raise UserError(f"config.train.init_from = {path!r}: {len(differing)} parameters differ: {names}")
    return found


def has_the_head(program: TrainSetup, found: load_model.ModelRef) -> bool:
    """Whether the head of a MODEL says what the task of a config asks: the same labels, in the same order."""
    mine, theirs = program.config.model, found.config.model
    return (mine.head, mine.labels) == (theirs.head, theirs.labels)


def fits(path: tuple[str, ...], mine: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    """Whether a parameter can be taken: the first of the learned positions, the first tokens of a vocabulary.

    Tables of others often have more tokens than their tokenizer: nothing here says them.
    """
    fewer = path in FIRST_ROWS and mine[0] <= theirs[0]
    return mine[1:] == theirs[1:] if fewer else mine == theirs


def starting_point(
    program: TrainSetup, workdir: epath.Path, source: Source | None, log: terminal.Terminal, run: str = ""
) -> tuple[TrainState, DataState]:
    """The state on the mesh that is set, and the data state.

    `source` is what `find_init` found, `run` the identity that the steps of the workdir must have.
    """
    step = step_folders.newest_valid(workdir, log, quarantine=True, run=run)
    if step is not None:
        fault_points.reach("restore")
        with elapsed(f"restoring step {step:,}"):
            state, data = checkpoint.restore(workdir, step, program)
        data = DataState.of_lists(agree(data, "data state"))
        log(f"resumed at step {step:,}, row {data.cursor:,}")
        return state, data
    if source is None:
        return jax.jit(lambda: fresh(program))(), START
    if isinstance(source, load_model.ModelRef):
        with elapsed(f"reading {source.workdir}"):
            _, given = load_model.load_parameters(source)
        log(f"parameters from {source.workdir} step {source.step:,}")
        parameters = with_the_rest(program, given, unusable(given, has_the_head(program, source)), log)
    else:
        num, of = int(source.found.sum()), len(source.found)
        log(f"{num:,} of {of:,} pieces from the words of {source.path}; the other {of - num:,} are initialised")
        parameters = with_rows(jax.jit(lambda: fresh(program))().parameters, source)
    optimizer_state = jax.jit(program.optimizer.init)(program.split(parameters)[0])
    return TrainState(jnp.zeros((), jnp.int32), parameters, optimizer_state), START


def unusable(given: dict, same: bool) -> set[str]:
    """Which parameters of a model a run does not take: a head that answers another question, a pooler that is nought.

    Nought is what a folder did not have.
    """
    is_empty = "pooler" in given and not bool(jnp.any(given["pooler"]["kernel"]))
    return {name for name, is_left in (("labels", not same), ("pooler", is_empty)) if is_left}


def with_the_rest(program: TrainSetup, given: dict, left: set[str], log: terminal.Terminal) -> dict:
    """The parameters of the model: the given ones but those `left`, and initial values for the missing; the log lists both."""
    whole, mine = nnx.traversals.flatten_mapping(given), program.graph.declarations
    flat = {path: x for path, x in whole.items() if path[0] not in left}
    if all(path in mine and x.shape == mine[path].shape for path, x in flat.items()) and len(flat) == len(mine):
        return given
    names = lambda paths: ", ".join("/".join(path) for path in sorted(paths)) or "nothing"
    other = whole.keys() - mine.keys() | {path for path in whole.keys() - flat.keys() if path[0] == "labels"}
    log(f"left behind: {names(other)}; initialised: {names(mine.keys() - flat.keys())}")
    for path in sorted(flat.keys() & mine.keys()):
        if (rows := mine[path].shape[0]) < len(flat[path]):
            log(f"{'/'.join(path)}: the first {rows:,} of {len(flat[path]):,} rows")
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
