"""lm_jax learns what PyTorch learns: its recorded losses are reproduced, and every planted mistake is seen."""

import jax.numpy as jnp
import numpy as np
import pytest
from peers import training as parity

from lm_jax import optimizer

FEW = 60  # steps that show a mistake


def here(dtype: str, num_steps: int) -> float:
    """How far the losses of lm_jax are from those recorded, relative."""
    rows, recorded = parity.fixture()
    losses, _ = parity.train_here(parity.recipe(dtype), rows, num_steps)
    assert recorded["losses"][dtype][0] > recorded["losses"][dtype][-1] + 3, "it learnt little: a poor comparison"
    return parity.apart(losses, recorded["losses"][dtype][:num_steps])


@pytest.mark.parametrize(
    ("dtype", "num_steps"),
    [("float32", parity.STEPS), pytest.param("bfloat16", FEW, marks=pytest.mark.proof)],
)
def test_every_loss_is_that_of_pytorch(dtype, num_steps):
    assert here(dtype, num_steps) < parity.LIMITS[dtype]


def decay_on_norms(monkeypatch):
    monkeypatch.setattr(optimizer, "is_matrix", lambda declared: True)


def clip_after_scaling(monkeypatch):
    chain = optimizer.optax.chain
    monkeypatch.setattr(optimizer.optax, "chain", lambda clip, *rest: chain(*rest, clip))


def schedule_off_by_one(monkeypatch):
    right = optimizer.schedule
    monkeypatch.setattr(optimizer, "schedule", lambda *given: lambda count: right(*given)(jnp.maximum(count - 1, 0)))


# test_optimizer.py holds the schedule to its formula; what follows clipping is a proof.
@pytest.mark.parametrize(
    "mistake",
    [decay_on_norms, *(pytest.param(x, marks=pytest.mark.proof) for x in (clip_after_scaling, schedule_off_by_one))],
)
def test_a_planted_mistake_is_seen(mistake, monkeypatch):
    mistake(monkeypatch)
    assert here("float32", FEW) > 2 * parity.LIMITS["float32"]


@pytest.mark.proof
@pytest.mark.parametrize("dtype", parity.LIMITS)
def test_live(dtype):
    """PyTorch beside lm_jax, now: losses, and in float32 the final parameters."""
    config, (rows, _) = parity.recipe(dtype), parity.fixture()
    losses, mine = parity.train_here(config, rows, parity.STEPS)
    expected, theirs = parity.train_there(config, rows, parity.STEPS, parity.initial(config))
    assert parity.apart(losses, expected) < parity.LIMITS[dtype]
    assert all(np.isfinite(x).all() for x in theirs.values())
    if dtype == "float32":
        assert parity.parameters_apart(mine, theirs) < parity.PARAMETERS_LIMIT
