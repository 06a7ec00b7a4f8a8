"""Sharded equals unsharded, accumulated equals whole; where every parameter lives is pinned."""

import dataclasses
import itertools
import math
import re

import jax
import numpy as np
import pytest
from helpers import FAMILIES, ROOT, tiny

from lm_jax import verify
from lm_jax.config import Mesh
from lm_jax.data import loader
from lm_jax.errors import UserError
from lm_jax.mesh import legal_meshes, make_mesh, mesh_shape, parameter_table, preflight
from lm_jax.model import layers
from lm_jax.model.build import build
from lm_jax.run_plan import make_plan
from lm_jax.sharding import AXES, names_of, stored
from lm_jax.train_state import abstract, make_program
from lm_jax.train_step import compile_step

MESHES = {"1": (1, 1, 1), "8 fsdp": (1, 8, 1), "2x4": (2, 1, 4), "2x2x2": (2, 2, 2), "two slices": (4, 2, 1, 2)}
SMOKE = ["--config", "experiments/quickstart.py:smoke"]
CONFIG = dict(
    model__dropout=0.1, model__positions="rotary", model__num_kv_heads=4, data__global_batch_size=32,
    optimizer__learning_rate=0.05, optimizer__name="sgd", model__unroll=False,
)  # fmt: skip


class Uneven(loader.Stream):
    """Rows with very different numbers of targets: a mean of means would not agree."""

    def row(self, i):
        row = super().row(i)
        return row | {"loss_mask": row["loss_mask"] * (np.arange(64) < 1 + (i * 37) % 64)}


def mesh_of(sizes, devices):
    return make_mesh(Mesh(*sizes), devices[: int(np.prod(sizes[:3]))])


@pytest.fixture(scope="module")
def traces(corpus, eight):
    made = {}

    def get(mesh: str, accumulation: int, **changes) -> verify.Trace:
        key = mesh, accumulation, *changes.items()
        if key not in made:
            config = tiny(**CONFIG | changes, train__microbatch_rows=32 // accumulation)
            stream = Uneven(corpus.splits["train"], 64, 0)
            config = dataclasses.replace(config, mesh=Mesh(*MESHES[mesh]))
            devices = eight[: int(np.prod(MESHES[mesh][:3]))]
            made[key] = verify.trace(make_plan(config, corpus.tokenizer.vocab_size, devices), stream, 2)
        return made[key]

    return get


# Each axis, and microbatches with and without a mesh; the other pairs are proofs.
PAIRS = {("1", 4), ("2x2x2", 2)}


@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    [
        pytest.param(*pair, marks=[] if pair in PAIRS else pytest.mark.proof)
        for pair in itertools.product(MESHES, (1, 2, 4))
    ],
)
def test_sharded_and_accumulated_agree(traces, mesh, accumulation):
    expected, found = traces("1", 1), traces(mesh, accumulation)
    assert found.digest == expected.digest, "initial parameters are not bitwise equal"
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found.parameters), jax.tree.leaves(expected.parameters), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", pytest.param("mixtral", marks=pytest.mark.proof)])
def test_products_as_accelerators_do_them_agree_too(traces, corpus, eight, monkeypatch, family):
    """With the dims as they are, their sums over `tensor` scattered by tokens, activations written once."""
    config = tiny(**CONFIG | FAMILIES[family], train__microbatch_rows=32)
    expected = traces("1", 1, **FAMILIES[family])
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    plan = make_plan(dataclasses.replace(config, mesh=Mesh(*MESHES["2x2x2"])), corpus.tokenizer.vocab_size, eight)
    found = verify.trace(plan, Uneven(corpus.splits["train"], 64, 0), 2)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found.parameters), jax.tree.leaves(expected.parameters), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.proof
def test_adamw_agrees_too(traces):
    expected = traces("1", 1, optimizer__name="adamw", optimizer__learning_rate=1e-3)
    found = traces("2x2x2", 2, optimizer__name="adamw", optimizer__learning_rate=1e-3, model__unroll=True)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name == "mixtral" else pytest.mark.proof) for name in FAMILIES],
)
def test_families_agree_too(traces, family):
    """The losses of the router among them, whatever devices and microbatches the rows go to."""
    router = dict(train__balance_loss=0.5, train__router_z_loss=0.5)
    changes = FAMILIES[family] | (router if "model__num_experts" in FAMILIES[family] else {})
    expected, found = traces("1", 1, **changes), traces("2x2x2", 2, **changes)
    assert found.digest == expected.digest, "initial parameters are not bitwise equal"
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found.parameters), jax.tree.leaves(expected.parameters), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.proof
def test_recomputed_layers_agree_too(traces):
    """What is kept between layers is split over `tensor` and gathered: one loss and one gradient."""
    expected, found = traces("1", 1), traces("2x2x2", 1, model__remat="full")
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found.parameters), jax.tree.leaves(expected.parameters), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.proof
def test_dropout_was_on(traces):
    assert traces("1", 1).losses != traces("1", 1, model__dropout=0.0).losses


SPECIFICATIONS = """
block_0/attention/key/bias layers,kv_heads,head_dim -,tensor,-
block_0/attention/key/kernel layers,model,kv_heads,head_dim -,fsdp+expert+context,tensor,-
block_0/attention/output/bias layers,model -,fsdp+expert+context
block_0/attention/output/kernel layers,heads,head_dim,model -,tensor,-,fsdp+expert+context
block_0/attention/query/bias layers,heads,head_dim -,tensor,-
block_0/attention/query/kernel layers,model,heads,head_dim -,fsdp+expert+context,tensor,-
block_0/attention/value/bias layers,kv_heads,head_dim -,tensor,-
block_0/attention/value/kernel layers,model,kv_heads,head_dim -,fsdp+expert+context,tensor,-
block_0/attention_norm/bias layers,model -,fsdp+expert+context
block_0/attention_norm/scale layers,model -,fsdp+expert+context
block_0/mlp/down/bias layers,model -,fsdp+expert+context
block_0/mlp/down/kernel layers,mlp,model -,tensor,fsdp+expert+context
block_0/mlp/gate/bias layers,mlp -,tensor
block_0/mlp/gate/kernel layers,model,mlp -,fsdp+expert+context,tensor
block_0/mlp/up/bias layers,mlp -,tensor
block_0/mlp/up/kernel layers,model,mlp -,fsdp+expert+context,tensor
block_0/mlp_norm/bias layers,model -,fsdp+expert+context
block_0/mlp_norm/scale layers,model -,fsdp+expert+context
embedding/table vocab,model tensor,fsdp+expert+context
norm/bias model fsdp+expert+context
norm/scale model fsdp+expert+context
positions/table positions,model -,fsdp+expert+context
unembedding/table vocab,model tensor,fsdp+expert+context
"""


def test_where_every_parameter_lives_is_pinned():
    config = tiny(model__gated=True, model__tie_embedding=False)
    declarations = build(config.model, 500, 64).declarations
    split = lambda axes: ",".join("+".join(names_of(part)) or "-" for part in stored(axes))
    found = [
        f"{'/'.join(path)} {','.join(declared.axes)} {split(declared.axes)}" for path, declared in declarations.items()
    ]
    assert sorted(found) == SPECIFICATIONS.split("\n")[1:-1]


def test_state_is_made_where_it_lives(corpus, eight):
    """Every array of the fresh state has the layout of the table; the devices hold an eighth of what fsdp splits."""
    from lm_jax.train_state import fresh, make_program

    program = make_program(tiny(), corpus.tokenizer.vocab_size)
    with jax.set_mesh(mesh_of((1, 8, 1), eight)):
        state = jax.jit(lambda: fresh(program))()
    kernel = state.parameters["block_0"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    moments = [x for x in jax.tree.leaves(state.optimizer_state) if x.shape == kernel.shape]
    assert moments and all(x.addressable_shards[0].data.size * 8 == x.size for x in moments)


COLLECTIVE = re.compile(r" (all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)(?:-start)?\(")


def test_copies_meet_once_a_step_and_share_the_optimizer(corpus, eight):
    """Over `data` alone a microbatch needs no other device; a device has an eighth of the moments, and updates that."""
    program = make_program(tiny(optimizer__name="sgd", data__global_batch_size=16), corpus.tokenizer.vocab_size)
    with jax.set_mesh(mesh := mesh_of((8, 1, 1), eight)):
        step = compile_step(program, mesh, one_microbatch=False)
        state = abstract(program)
    assert not COLLECTIVE.findall(step.accumulate.as_text()) and not COLLECTIVE.findall(step.zeros.as_text())
    assert {"all-gather"} < set(COLLECTIVE.findall(step.update.as_text()))
    moments = [x for x in jax.tree.leaves(state.optimizer_state) if x.ndim]
    assert moments and all(x.sharding.shard_shape(x.shape) != x.shape for x in moments)
    assert sum(math.prod(x.sharding.shard_shape(x.shape)) for x in moments) * 8 == sum(x.size for x in moments)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state.parameters))
    of = lambda tree: sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    known = step.accumulate.memory_analysis().argument_size_in_bytes
    assert known > of(state) + of(state.parameters), "of the moments that lie beside a microbatch"


@pytest.mark.parametrize(
    ("changes", "mesh", "words"),
    [
        (
            dict(model__num_heads=6, model__num_kv_heads=6, model__head_dim=16),
            Mesh(1, 1, 4),
            ["num_heads = 6", "nearest size that does is 8"],
        ),
        (dict(model__num_kv_heads=2), Mesh(1, 1, 4), ["num_kv_heads = 2", "tensor that does is 2"]),
        (dict(model__model_dim=60), Mesh(1, 8, 1), ["model_dim = 60", "64"]),
        (dict(data__global_batch_size=12, train__microbatch_rows=4), Mesh(8, 1, 1), ["global_batch_size = 12", "16"]),
        (dict(train__microbatch_rows=4), Mesh(8, 1, 1), ["microbatch_rows = 4", "8"]),
    ],
)
def test_preflight_names_what_does_not_divide(changes, mesh, words):
    config = dataclasses.replace(tiny(**changes), mesh=mesh)
    with pytest.raises(UserError) as error:
        preflight(config, 512, mesh_shape(mesh, 8))
    assert all(word in str(error.value) for word in words), error.value


def test_mesh_sizes_multiply_to_the_devices():
    assert mesh_shape(Mesh(-1, 2, 2), 8) == {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    for mesh, words in ((Mesh(3, -1, 1), "no whole rest of 8"), (Mesh(4, 4, 1), "is 16 devices, here are 8")):
        with pytest.raises(UserError, match=words):
            mesh_shape(mesh, 8)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks a device; of a slice of a TPU pod it says which one that is."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "made up"
    process_index: int = 0


def test_slices_split_data_whatever_order_the_devices_come_in():
    """The slow part of `data` is the number of the slice; within a slice all are of that one."""
    chips = [Chip(id, id // 8) for id in np.random.RandomState(0).permutation(16)]
    for sizes in ((4, 2, 2), (2, 8, 1), (-1, 1, 1), (2, -1, 4), (16, 1, 1), (2, 2, 2)):
        for asked in (2, -1):
            found = make_mesh(Mesh(*sizes, slices=asked), chips).devices
            index = np.vectorize(lambda chip: chip.slice_index)(found)
            half = len(found) // 2
            assert (index[:half] == 0).all() and (index[half:] == 1).all(), sizes
            assert len({chip.id for chip in found.flat}) == found.size


@dataclasses.dataclass(frozen=True)
class TorusChip(Chip):
    """A chip with its place in a cube of 4 x 4 x 4."""

    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, ...]:
        return self.id // 16, self.id // 4 % 4, self.id % 4


def test_two_mesh_axes_may_share_a_side_of_a_torus():
    found = make_mesh(Mesh(1, 8, 8), [TorusChip(id, 0) for id in range(64)]).devices
    assert found.shape == (1, 8, 1, 1, 8) and len({chip.id for chip in found.flat}) == 64


def test_devices_that_say_no_slice_are_parted_in_order(eight):
    found = make_mesh(Mesh(4, 2, 1, slices=2), eight).devices
    assert set(found[:2].flat) == set(eight[:4]) and set(found[2:].flat) == set(eight[4:])
    assert make_mesh(Mesh(slices=-1), eight) == make_mesh(Mesh(), eight)


UNFIT = {
    "no data": (Mesh(1, -1, 1, slices=2), 8, "data = 1", "nearest data that does is 2", "slices that do are 1"),
    "data left": (Mesh(-1, 2, 4, slices=2), 8, "data = 1", "nearest data that does is 2"),
    "three": (Mesh(8, 1, 1, slices=3), 8, "data = 8", "nearest data that does is 9", "slices that do are 2"),
    "more than data": (Mesh(4, 2, 1, slices=8), 8, "data = 4", "data that does is 8", "slices that do are 4"),
    "of all that are there": (Mesh(1, -1, 1, slices=-1), [4, 4], "slices = 2 does not", "nearest data that does is 2"),
    "not as said": (Mesh(slices=1), [4, 4], "slices = 1", "these 8 devices are 2 slices", "--config.mesh.slices=2"),
    "one there": (Mesh(slices=2), [8], "slices = 2", "are 1 slice\n", "--config.mesh.slices=1"),
    "four there": (Mesh(slices=2), [2, 2, 2, 2], "these 8 devices are 4 slices", "--config.mesh.slices=4"),
    "uneven": (Mesh(slices=2), [5, 3], "4 devices of each slice", "have 5, 3"),
    "too small a slice": (Mesh(2, 3, 1, slices=2), [6, 2], "3 devices of each slice", "have 6, 2"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_slices_that_cannot_be_are_refused(case, eight):
    mesh, there, *words = UNFIT[case]
    slices = [] if isinstance(there, int) else [index for index, num in enumerate(there) for _ in range(num)]
    devices = [Chip(id, index) for id, index in enumerate(slices)] or eight[:there]
    with pytest.raises(UserError) as error:
        make_mesh(mesh, devices)
    assert all(word in str(error.value) for word in words), error.value
    if isinstance(there, int):
        with pytest.raises(UserError):
            mesh_shape(mesh, there)  # before data are opened


def test_verify_goes_over_slices_too(capsys, eight, monkeypatch):
    """A mesh whose data two slices can split: once as one slice, once as two."""
    monkeypatch.setattr(verify.distributed, "devices", lambda: eight[:2])
    monkeypatch.setattr(verify, "trace", lambda *arguments: verify.Trace("bits", [1.0], {}))
    assert verify.main([*SMOKE, "--config.mesh.slices=2", "--num_steps=1"]) == 0
    lines = [line.partition("   initial")[0] for line in capsys.readouterr().out.split("\n") if "initial" in line]
    assert lines == [
        "data 2 fsdp 1 tensor 1 slices 1 expert 1 context 1",
        "data 1 fsdp 2 tensor 1 slices 1 expert 1 context 1",
        "data 1 fsdp 1 tensor 1 slices 1 expert 1 context 2",
        "data 1 fsdp 1 tensor 2 slices 1 expert 1 context 1",
        "data 2 fsdp 1 tensor 1 slices 2 expert 1 context 1",
    ]


def test_legal_meshes_are_all_that_preflight_accepts():
    found = [tuple(sizes.values()) for sizes in legal_meshes(tiny(), 512, 8)]
    assert (1, 8, 1, 1, 1) in found and (2, 2, 1, 1, 2) in found and (1, 2, 1, 1, 4) in found
    assert (1, 1, 1, 1, 8) not in found  # four heads
    assert len(found) == len(set(found)) == 19


def test_the_table_prints_itself(eight):
    table = parameter_table(build(tiny().model, 500, 64).declarations, mesh_of((1, 4, 2), eight))
    line = next(line for line in table.split("\n") if line.startswith("block_0/mlp/up/kernel"))
    assert line.split() == "block_0/mlp/up/kernel 2 x 64 x 128 layers, model, mlp -, fsdp, tensor 8.0".split()


def test_model_files_name_no_mesh_axis():
    for path in (ROOT / "lm_jax" / "model").glob("*.py"):
        text = path.read_text()
        assert not any(f'"{axis}"' in text for axis in AXES), path
