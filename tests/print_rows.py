"""In a process of its own: prints the hash of every row that this process holds, by its place in the global batches.

python tests/print_rows.py '[[["place", 0.5], ...], "split", [1, 8, 1], num_workers, first, num_batches]'
"""

import hashlib
import json
import sys

import numpy as np

from lm_jax import distributed
from lm_jax.config import Mesh, default_config
from lm_jax.config_check import resolve
from lm_jax.data import loader, mixture
from lm_jax.experiment import shrink
from lm_jax.mesh import make_mesh


def main(sources, packing: str, mesh, num_workers: int, first: int, num: int) -> None:
    config = shrink(default_config())
    config.data.sources, config.data.packing = sources, packing
    data = resolve(config).data
    here = make_mesh(Mesh(*mesh), distributed.devices())
    stream, size, rows = mixture.open_mixture(data).stream(data), data.global_batch_size, {}
    for j, batch in enumerate(loader.batches(stream, here, first, num, size, num_workers)):
        held: dict[int, dict[str, bytes]] = {}
        for name, x in batch.items():
            for shard in x.addressable_shards:
                for row, value in zip(range(size)[shard.index[0]], np.asarray(shard.data), strict=True):
                    held.setdefault(row, {})[name] = value.tobytes()
        for row, values in held.items():
            content = b"".join(values[name] for name in sorted(values))
            rows[first + j * size + row] = hashlib.sha256(content).hexdigest()
    print("ROWS " + json.dumps(rows), flush=True)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
