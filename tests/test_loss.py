"""The loss in chunks is the plain one in value and gradient, on every mesh, and holds far less."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny

from lm_jax import chunked_cross_entropy, loss
from lm_jax.config import Mesh
from lm_jax.mesh import make_mesh
from lm_jax.sharding import computed, stored
from lm_jax.train_state import abstract, fresh, make_program
from lm_jax.train_step import accumulate

MESHES = {"1": (1, 1, 1), "8 fsdp": (1, 8, 1), "2x4": (2, 1, 4), "2x2x2": (2, 2, 2)}
PIECES, PADDED = 500, 512


def mesh_of(name: str, devices) -> jax.sharding.Mesh:
    return make_mesh(Mesh(*MESHES[name]), devices[: int(np.prod(MESHES[name]))])


def arrays() -> tuple[np.ndarray, ...]:
    """Hidden states [8, 60, 32], table [512, 32], bias [512], targets, a mask with holes."""
    random = np.random.default_rng(0)
    hidden, table = random.normal(size=(8, 60, 32)), random.normal(size=(PADDED, 32)) / 32**0.5  # logits of order 1
    mask = random.random((8, 60)) < 0.7
    return (
        *(x.astype(np.float32) for x in (hidden, table, random.normal(size=PADDED))),
        random.integers(0, PIECES, (8, 60)),
        mask.astype(np.float32),
    )


def plainly(hidden_BTD, table_VD, bias_V, targets_BT, mask_BT, z_loss: float, softcap: float) -> jax.Array:
    logits = hidden_BTD @ table_VD[:PIECES].T + (0 if bias_V is None else bias_V[None, None, :PIECES])
    logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
    log_total = jax.nn.logsumexp(logits, axis=-1)
    entropy = log_total - jnp.take_along_axis(logits, targets_BT[..., None], -1)[..., 0]
    return ((entropy + z_loss * log_total**2) * mask_BT).sum()


@pytest.mark.parametrize(
    ("mesh", "z_loss", "biased", "softcap"),
    [("1", 0.0, False, 0.0), ("2x2x2", 0.1, True, 2.0), *((mesh, 0.1, False, 0.0) for mesh in MESHES)],
)
def test_chunks_equal_the_whole(mesh, z_loss, biased, softcap, eight, monkeypatch):
    """To 1e-5, the vocabulary padded and split, 60 tokens a row in chunks of 7; twice the cotangent, twice the gradient."""
    monkeypatch.setattr(chunked_cross_entropy, "CHUNK", 7)
    hidden, table, bias, *tokens = arrays()
    given = (hidden, table, bias if biased else None, *tokens)
    expected = jax.value_and_grad(plainly, (0, 1, 2))(*given, z_loss, softcap)

    def in_chunks(*arrays):
        objective, entropy = chunked_cross_entropy.in_chunks(PIECES, z_loss, *arrays, softcap)
        return 2 * objective, entropy

    with jax.set_mesh(mesh_of(mesh, eight)):
        layouts = (
            computed(("batch", "length", None)),
            stored(("vocab", "model")),
            stored(("vocab",)) if biased else None,
        )
        layouts += (computed(("batch", "length")),) * 2
        placed = [jax.device_put(x, layout) for x, layout in zip(given, layouts, strict=True)]
        (found, entropy), gradients = jax.jit(jax.value_and_grad(in_chunks, (0, 1, 2), has_aux=True))(*placed)
        only_value = jax.jit(lambda *placed: chunked_cross_entropy.in_chunks(PIECES, z_loss, *placed, softcap))(*placed)
    np.testing.assert_allclose([found / 2, entropy], only_value, rtol=1e-6)
    np.testing.assert_allclose([found / 2, entropy], [expected[0], plainly(*given, 0.0, softcap)], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a / 2, b, rtol=1e-5, atol=1e-5), gradients, expected[1])
    assert not np.asarray(gradients[1])[PIECES:].any(), "padding learns nothing"


def a_batch(rows: int, length: int) -> dict:
    """Shapes of a batch on the mesh that is set."""
    layout = jax.NamedSharding(jax.sharding.get_mesh(), computed(("batch", "length")))
    of = lambda dtype: jax.ShapeDtypeStruct((rows, length), dtype, sharding=layout)
    integers = {name: of(jnp.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    return integers | {"loss_mask": of(jnp.float32)}


@pytest.mark.parametrize(
    "changes",
    [
        dict(model__logit_softcap=(0.0, 0.5), model__multipliers=(9.0, 1.0, 0.0, 0.2)),
        pytest.param({}, marks=pytest.mark.proof),
    ],
)
def test_the_step_takes_the_loss_that_fits(changes, eight, monkeypatch):
    """Through the whole model: both forms give one gradient; the reported loss is the entropy without the z-loss."""
    config = tiny(**changes, train__z_loss=0.1, model__unroll=False)
    with jax.set_mesh(mesh_of("2x2x2", eight)):
        program = make_program(config, PIECES)
        state = jax.jit(lambda: fresh(program))()
        random, shapes = np.random.default_rng(0), a_batch(8, 64)
        batch = {
            n: jax.device_put(random.integers(0, 2, x.shape).astype(x.dtype), x.sharding) for n, x in shapes.items()
        }
        found = []
        for small in (0, 10**9):
            monkeypatch.setattr(loss, "SMALL", small)
            found.append(jax.jit(lambda state, batch: accumulate(program, state, None, batch))(state, batch))
    assert 4 < float(found[0].loss.sum() / found[0].tokens.sum()) < np.log(PIECES) + 0.1  # the z-loss would add 3.9
    for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_chunks_hold_less(eight, monkeypatch):
    """Temporaries of the compiled gradient, 4,096 tokens of 8,192 pieces: whole logits are 128 MiB, a chunk's 32."""
    config = tiny(data__sequence_length=512, model__num_layers=1)
    temporaries = {}
    with jax.set_mesh(mesh_of("1", eight)):
        program = make_program(config, 8192)
        state, batch = abstract(program), a_batch(8, 512)
        for small in (0, 10**9):
            monkeypatch.setattr(loss, "SMALL", small)
            step = jax.jit(lambda state, batch: accumulate(program, state, None, batch)).lower(state, batch).compile()
            temporaries[small] = step.memory_analysis().temp_size_in_bytes / 2**20
    assert temporaries[0] < 0.5 * temporaries[10**9], temporaries
    print(temporaries)


@pytest.mark.parametrize(
    ("platform", "vocab", "expected"),
    [("cpu", 50304, 32), ("tpu", 50304, 32), ("gpu", 50304, 8), ("gpu", 128 * 1024, 16), ("gpu", 2**20, 32)],
)
def test_a_gpu_has_fewer_and_larger_chunks_while_the_logits_of_one_are_few(platform, vocab, expected):
    """Of 32,768 tokens; asked as a plan asks it, of a device that is not here."""
    device = jax.sharding.AbstractDevice("a device", None, platform)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert chunked_cross_entropy.num_chunks(2**15, vocab) == expected
