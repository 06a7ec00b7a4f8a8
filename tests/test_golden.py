"""The golden step: three steps of a small model give the numbers they gave when this file was last meant to change."""

import jax
import numpy as np
from helpers import batch, tiny

from lm_jax.config import Mesh
from lm_jax.mesh import make_mesh
from lm_jax.train_state import fresh, make_program
from lm_jax.train_step import compile_step

GOLDEN = {
    "losses": [6.211582660675049, 6.215760707855225, 6.232057571411133],
    "grad_norm": 1.779700517654419,
    "learning_rate": 0.0009657457703724504,
    "sum_of_parameters": 2469.0900266237204,
}

MESSAGE = """
A training step no longer computes what it did. A refactor must be bit-identical: find what changed the numbers.
If they were meant to change (another initialisation, key, formula), say so in the commit, with why, and write these:
GOLDEN = {found}
"""


def test_golden_step():
    config = tiny(
        model__dropout=0.1, model__num_layers=4, model__window=(0, 8), model__num_kv_heads=2, data__global_batch_size=4,
        train__microbatch_rows=2, train__num_steps=10, optimizer__decay_over=10, optimizer__warmup=2, model__unroll=False,
    )  # fmt: skip
    mesh, losses = make_mesh(Mesh(), jax.devices()[:1]), []
    with jax.set_mesh(mesh):
        program = make_program(config, vocab_size=500)
        state, one_step = jax.jit(lambda: fresh(program))(), compile_step(program, mesh, one_microbatch=False)
        for step in range(3):
            whole = batch(step)
            parts = iter([{name: jax.numpy.asarray(x[i : i + 2]) for name, x in whole.items()} for i in (0, 2)])
            state, metrics = one_step(state, 2, parts, lambda done: False)
            losses.append(float(metrics["train/loss"]))
        leaves = jax.tree.leaves(state.parameters)
        found = {
            "losses": losses,
            "grad_norm": float(metrics["train/grad_norm"]),
            "learning_rate": float(metrics["train/learning_rate"]),
            "sum_of_parameters": sum(float(np.abs(x).sum(dtype=np.float64)) for x in leaves),
        }
    assert set(found) == set(GOLDEN), MESSAGE.format(found=found)
    for name, value in found.items():
        np.testing.assert_allclose(value, GOLDEN[name], rtol=2e-6, err_msg=MESSAGE.format(found=found))
