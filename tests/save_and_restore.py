"""One process of several: restores the newest whole step of a run, or makes a state of its own, and saves it in another.

python tests/save_and_restore.py '{"mesh": [2, 4, 1], "restore": "place", "save": "place", "steps": [3, 5]}'

Prints the hash of what it holds, and which files it hashed meanwhile: those that it wrote, and those that it verified.
"""

import hashlib
import json
import sys
import zlib

import jax
import numpy as np
from etils import epath
from helpers import tiny
from jax.experimental import multihost_utils

from lm_jax import checkpoint, distributed, files, step_folders
from lm_jax.batch_ramp import DataState
from lm_jax.config import Mesh
from lm_jax.data.objectives import specials
from lm_jax.data.tokenizer import Bytes
from lm_jax.mesh import make_mesh
from lm_jax.train_state import abstract, make_program

FACTS = {"run": "a run", "pipeline": 0, "tokenizer": "none", "data": "none"}
hashed: list[str] = []


def counting(path, *kind, file_hash=files.file_hash):
    hashed.append(str(path))
    return file_hash(path, *kind)


def told_hashes() -> list[str]:
    """Files by step and name that were hashed since this was asked last."""
    found = sorted(path.split("/checkpoints/")[1] for path in hashed)
    hashed.clear()
    return found


def made_up(program) -> checkpoint.TrainState:
    """A state with other numbers in every place, laid out on the mesh."""

    def array(path, like):
        chance = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
        whole = (chance.random(like.shape) * 100).astype(like.dtype)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: whole[index])

    return jax.tree_util.tree_map_with_path(array, abstract(program))


def digest(state) -> str:
    """sha256 over every bit of the state, wherever it lies."""
    found = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path((state.parameters, state.optimizer_state)):
        whole = np.asarray(multihost_utils.process_allgather(x, tiled=True))
        found.update(f"{jax.tree_util.keystr(path)} {whole.dtype} {whole.shape}".encode() + whole.tobytes())
    return found.hexdigest()


def run_program():
    config = tiny(optimizer__ema=0.9, data__tokenizer="bytes")
    return make_program(config, specials(Bytes(), config.data.objective).vocab_size)


def main(mesh, restore: str = "", save: str = "", steps=(3,)) -> None:
    files.file_hash = counting
    distributed.configure()
    devices = distributed.devices()
    program, said, told = run_program(), [], {}
    with jax.set_mesh(make_mesh(Mesh(*mesh), devices)):
        if restore:
            found = step_folders.newest_valid(epath.Path(restore), said.append, quarantine=True)
            told |= {"verified": told_hashes(), "step": found, "said": said}
            state, data = checkpoint.restore(epath.Path(restore), found, program)
        else:
            state, data = made_up(program), DataState(0, 7, ((3, 5),))
        told |= {"state": digest(state), "data": [data.cursor, data.skipped]}
        if save:
            saver = checkpoint.Saver(epath.Path(save), program.config, FACTS)
            for step in steps:
                saver.save(state, data._replace(step=step))
            saver.close()
            told["written"] = told_hashes()
    print("TOLD " + json.dumps(told), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
