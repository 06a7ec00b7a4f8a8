"""Rows whose tokens are split over devices (`mesh.context`): one loss, one gradient, one mask, and rows in their order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FAMILIES, LLAMA, batch, tiny

from lm_jax import chunked_cross_entropy, collectives, loss
from lm_jax.config import Mesh
from lm_jax.data import loader
from lm_jax.errors import UserError
from lm_jax.mesh import legal_meshes, make_mesh, mesh_shape, preflight, with_whole_rows
from lm_jax.model import attention
from lm_jax.model.attention import Context
from lm_jax.model.build import build
from lm_jax.model.row_order import balanced, in_row_order, order_of_columns
from lm_jax.model.splash import splash_attention
from lm_jax.sharding import computed, stored
from lm_jax.train_state import fresh, make_program
from lm_jax.train_step import accumulate

MESHES = {
    "1": Mesh(1, 1),
    "context 2": Mesh(1, 1, context=2),
    "context 4": Mesh(1, 1, context=4),
    "context 8": Mesh(1, 1, context=8),
    "fsdp 2 x context 4": Mesh(1, 2, context=4),
    "context 4 x tensor 2": Mesh(1, 1, 2, context=4),
    "data 2 x context 2 x tensor 2": Mesh(2, 1, 2, context=2),
}
LENGTHS = [
    20,
    3,
    1,
    29,
    11,
]  # of documents in a row, whose borders lie inside of the devices' chunks; the last is padding
# What a row over devices must get right at once: heads in groups, rope, windows, dropout, recomputation, loss in chunks.
CONFIG = dict(
    LLAMA,
    model__dropout=0.1,
    model__window=(0, 8),
    model__attention="chunked",
    model__unroll=False,
    model__remat="names",
)
ROWS = lambda x: np.broadcast_to(x, (4, 64)).astype(np.int32)
WHERE = Context(ROWS(np.concatenate([np.arange(n) for n in LENGTHS])), ROWS(np.repeat([1, 2, 3, 4, 0], LENGTHS)))


def packed() -> dict:
    rows = batch(0) | {"positions": WHERE.positions, "segment_ids": WHERE.segment_ids}
    return rows | {"loss_mask": rows["loss_mask"] * (WHERE.segment_ids > 0)}


def mesh_of(name: str):
    mesh = MESHES[name]
    sizes = (mesh.data, mesh.fsdp, mesh.tensor, mesh.context)
    return make_mesh(mesh, jax.devices()[: int(np.prod(sizes))])


def placed(mesh, rows: dict) -> dict:
    return {name: jax.device_put(x, loader.layout(mesh, x.ndim)) for name, x in rows.items()}


def loss_and_gradient(changes: dict, name: str):
    """(loss, gradients on the host) of the first microbatch."""
    mesh = mesh_of(name)
    with jax.set_mesh(mesh):
        program = make_program(tiny(**changes), 500)
        state = jax.jit(lambda: fresh(program))()
        sums = jax.jit(lambda rows: accumulate(program, state, None, rows))(placed(mesh, packed()))
        return float(sums.loss), jax.tree.map(np.asarray, sums.gradients)


def agree(found, expected) -> bool:
    """The loss, and each leaf's gradient relative to its largest value, within 1e-5.

    The bias of keys has none where nothing turns them: what rounding leaves there is as small in both.
    """
    leaves = [*zip(*map(jax.tree.leaves, (found, expected)), strict=True)]
    nothing = 1e-8 * max(np.abs(b).max() for _, b in leaves[1:])
    near = [
        np.abs(a - b).max() <= max(1e-5 * np.abs(b).max(), nothing * (np.abs(b).max() < nothing)) for a, b in leaves
    ]
    return all(near)


@pytest.fixture(scope="module")
def alone():
    """The same on one device, once for each set of changes."""
    made = {}

    def get(changes: dict):
        key = repr(changes)
        made[key] = made.get(key) or loss_and_gradient(changes, "1")
        return made[key]

    return get


@pytest.fixture
def in_chunks(monkeypatch):
    """Attention and loss in chunks, also of rows as short as these."""
    monkeypatch.setattr(attention, "CHUNK", 8)
    monkeypatch.setattr(loss, "SMALL", 0)
    monkeypatch.setattr(chunked_cross_entropy, "CHUNK", 16)


DEFAULT = ("fsdp 2 x context 4",)


@pytest.mark.parametrize(
    "mesh", [pytest.param(name, marks=[] if name in DEFAULT else pytest.mark.proof) for name in MESHES if name != "1"]
)
def test_loss_and_gradients_are_those_of_one_device(mesh, alone, in_chunks):
    expected, found = alone(CONFIG), loss_and_gradient(CONFIG, mesh)
    assert agree(found, expected)


@pytest.mark.proof
@pytest.mark.parametrize("mesh", ["context 8", "data 2 x context 2 x tensor 2"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "lstm"])
def test_of_every_family_too(family, mesh):
    changes = FAMILIES[family]
    if "model__num_experts" in changes:
        changes = changes | dict(train__balance_loss=0.5, train__router_z_loss=0.5)
    assert agree(loss_and_gradient(changes, mesh), loss_and_gradient(changes, "1"))


def test_a_dropped_reduction_is_seen(in_chunks, monkeypatch):
    """The loss summed over the rows of a batch, not over the parts of a row; without that it is the same."""
    mesh, changes = mesh_of("context 4"), CONFIG | dict(model__dropout=0.0)
    graph = build(tiny(**changes).model, 500, 64)

    def found() -> float:
        with jax.set_mesh(mesh):
            parameters = jax.jit(lambda: graph.init(jax.random.key(0), sharded=True))()
            return float(jax.jit(lambda rows: loss.batch_loss(graph, parameters, rows).loss)(placed(mesh, packed())))

    whole = found()
    monkeypatch.setattr(chunked_cross_entropy, "sum_over", lambda x, axis: collectives.sum_over(x, "batch"))
    assert abs(found() / whole - 1) > 0.1


def visible(context: Context, window: int, causal: bool) -> np.ndarray:
    return np.asarray(attention.attention_mask(Context(*map(jnp.asarray, context)), context, window, causal))


@pytest.mark.parametrize(
    ("backend", "window", "causal"),
    [
        ("chunked", 0, True),
        ("chunked", 7, True),
        pytest.param("chunked", 0, False, marks=pytest.mark.proof),
        pytest.param("xla", 7, True, marks=pytest.mark.proof),
        pytest.param("xla", 0, False, marks=pytest.mark.proof),
        pytest.param("splash", 0, True, marks=pytest.mark.proof),
        pytest.param("splash", 150, True, marks=pytest.mark.proof),
        pytest.param("splash", 0, False, marks=pytest.mark.proof),
    ],
)
def test_a_query_hears_of_the_keys_that_it_may_see_and_of_no_other(backend, window, causal, monkeypatch):
    """The gradient of an output by the values is nonzero at visible keys alone: across devices, documents and time."""
    monkeypatch.setattr(attention, "CHUNK", 4)
    times = 16 if backend == "splash" else 1  # its blocks are of 128 tokens
    context = Context(*(np.repeat(x, times, axis=1) for x in WHERE))
    if times > 1:
        context = context._replace(positions=np.concatenate([np.arange(n * times) for n in LENGTHS])[None].repeat(4, 0))
    length, kernel = 64 * times, dict(interpret=True)
    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.normal(size=(4, length, 2, 64)), jnp.float32) for _ in range(3)]
    mesh = mesh_of("context 4")
    with jax.set_mesh(mesh):
        tokens = computed(("batch", "length"))

        def outputs(q, k, v):
            q, k, v, *where = (balanced(jax.sharding.reshard(x, tokens)) for x in (q, k, v, *map(jnp.asarray, context)))
            here = Context(*where)
            if backend == "splash":
                out = splash_attention(q, k, v, here.segment_ids, window, causal, **kernel)
            else:
                out = attention.attend(q, k, v, here, here, window, backend, causal)
            return in_row_order(out)

        @jax.jit
        def heard(row_T):
            weigh = lambda v: (outputs(*arrays[:2], v) * row_T[None, :, None, None])[:, :, 0, 0].sum()
            return jax.grad(weigh)(arrays[2])[:, :, 0, 0] != 0

        for t in (0, 19 * times, 20 * times, 23 * times, 24 * times, 40 * times, 53 * times - 1, length - 1):
            expected = visible(context, window, causal)[:, t]
            np.testing.assert_array_equal(heard(jnp.eye(length)[t]), expected)


def test_the_order_of_columns_and_back():
    """Of four devices the first has the first chunk of a row and the last one."""
    mesh, rows = mesh_of("fsdp 2 x context 4"), np.arange(2 * 16).reshape(2, 16)
    with jax.set_mesh(mesh):
        x = jax.device_put(rows, loader.layout(mesh, 2))
        there = jax.jit(balanced)(x)
        assert there.sharding.spec == x.sharding.spec
        found = np.asarray(there)
        np.testing.assert_array_equal(found[0], [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9])
        np.testing.assert_array_equal(found[1], rows[1][order_of_columns(16)])
        np.testing.assert_array_equal(jax.jit(in_row_order)(there), rows)


def test_a_device_is_given_its_columns(corpus):
    stream, mesh = loader.Stream(corpus.splits["train"], 64, seed=0), mesh_of("fsdp 2 x context 4")
    (found,) = loader.batches(stream, mesh, first=24, num=1, size=8)
    for name, x in found.items():
        assert {shard.data.shape for shard in x.addressable_shards} == {(4, 16)[: x.ndim]}
        np.testing.assert_array_equal(x, np.stack([stream.row(24 + i)[name] for i in range(8)]))


def test_a_model_that_writes_splits_no_rows_and_moves_no_parameter():
    mesh = mesh_of("fsdp 2 x context 4")
    whole = with_whole_rows(mesh)
    assert dict(whole.shape) == {"data": 1, "fsdp": 8, "expert": 1, "context": 1, "tensor": 1}
    for declared in build(tiny().model, 500, 64).declarations.values():
        before, after = (jax.NamedSharding(of, stored(declared.axes, of)) for of in (mesh, whole))
        assert before.is_equivalent_to(after, len(declared.shape))


@pytest.mark.parametrize(
    ("changes", "mesh", "words"),
    [
        (
            dict(data__sequence_length=60),
            Mesh(1, 1, context=4),
            "sequence_length = 60 does not divide over mesh axis 2 x context = 8",
        ),
        (dict(model__kind="lstm"), Mesh(1, 1, context=2), "context = 2: a model of the kind lstm needs whole rows"),
        (
            dict(model__model_dim=72, model__head_dim=16),
            Mesh(1, 2, context=8),
            "model_dim = 72 does not divide over mesh axis fsdp x context = 16",
        ),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(changes, mesh, words):
    config = dataclasses.replace(tiny(**changes), mesh=mesh)
    with pytest.raises(UserError) as error:
        preflight(config, 512, mesh_shape(mesh, mesh.fsdp * mesh.context))
    assert words in str(error.value), error.value
    with pytest.raises(UserError, match="takes whole rows, and the mesh splits each over 2 devices"):
        attention.preflight(tiny(model__attention="cudnn", model__compute_dtype="bfloat16").model, 64, "gpu", 2)


def test_verify_is_given_meshes_with_context():
    found = [{axis: n for axis, n in sizes.items() if n > 1} for sizes in legal_meshes(tiny(), 512, 8)]
    assert {"context": 8} in found and {"fsdp": 2, "context": 4} in found and {"context": 2, "tensor": 4} in found
