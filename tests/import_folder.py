"""One process of several: reads a Hugging Face folder onto the mesh, and says how much memory that took beside the arrays.

python tests/import_folder.py '{"folder": "place", "mesh": [1, 8, 1]}'
"""

import json
import re
import sys

import jax

from lm_jax import distributed
from lm_jax.config import Mesh
from lm_jax.convert import hugging_face
from lm_jax.mesh import make_mesh
from lm_jax.train_state import abstract, make_program


def memory(what: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most since it was reset."""
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(rf"{what}:\s+(\d+) kB", file.read())[1])


def main(folder: str, mesh) -> None:
    devices = distributed.devices()
    described = hugging_face.read_description(folder)
    program = make_program(described.config, described.vocab_size)
    with jax.set_mesh(make_mesh(Mesh(*mesh), devices[: mesh[0] * mesh[1] * mesh[2]])):
        like = abstract(program).parameters
        jax.block_until_ready(jax.jit(lambda x: x + 1)(1))  # the compiler's own memory is not that of an import
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # VmHWM starts again
        before = memory("VmRSS")
        found = jax.block_until_ready(hugging_face.read_on_mesh(folder, described, like))
        peak = memory("VmHWM") - before
    held = sum(shard.data.nbytes for x in jax.tree.leaves(found) for shard in x.addressable_shards)
    whole = sum(x.nbytes for x in jax.tree.leaves(found))
    print("TOLD " + json.dumps({"peak": peak, "held": held, "whole": whole}), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
