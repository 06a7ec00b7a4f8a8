"""Every attention backend: equal where it runs, blind to other documents, refused by name where it cannot do the call."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny

from lm_jax.config import Mesh
from lm_jax.errors import UserError
from lm_jax.mesh import make_mesh
from lm_jax.model import attention, flash_attention
from lm_jax.model.attention import Call, Context
from lm_jax.model.splash import splash_attention
from lm_jax.sharding import attention_layouts


def flash(q, k, v, keys, window, causal=True, interpret=False):
    rule = flash_attention.Rule(window, causal, interpret)
    return flash_attention.on_each_gpu(q, k, v, keys.segment_ids, rule, *attention_layouts())


# As they are called, but for what only the accelerator has: cuDNN's arguments go to XLA, the Pallas kernels are interpreted.
HERE = {
    "chunked": attention._chunked,
    "cudnn": functools.partial(attention._cudnn, implementation="xla"),
    "splash": lambda given: splash_attention(*given[:3], given.keys.segment_ids, *given[5:], interpret=True),
    "flash": lambda given: flash(*given[:3], given.keys, *given[5:7], interpret=True),
}
LENGTH, FIRST = 384, 150  # tokens in a row, and in its first document; 20 tokens of padding at its end


def arrays(heads: int = 4, kv_heads: int = 2) -> tuple[jax.Array, ...]:
    random = np.random.default_rng(1)
    return tuple(jnp.asarray(random.normal(size=(2, LENGTH, n, 64)), jnp.float32) for n in (heads, kv_heads, kv_heads))


def two_documents() -> Context:
    lengths = [FIRST, LENGTH - FIRST - 20, 20]
    positions = np.concatenate([np.arange(n) for n in lengths])
    rows = lambda x: jnp.asarray(np.broadcast_to(x, (2, LENGTH)), jnp.int32)
    return Context(rows(positions), rows(np.repeat([1, 2, 0], lengths)))


def inputs(q, k, v, window: int = 0, causal: bool = True, softcap: float = 0.0) -> attention.Inputs:
    return attention.Inputs(q, k, v, two_documents(), two_documents(), window, causal, softcap)


def run(backend, q, k, v, *rule):
    """Value, and gradients of queries, keys and values."""
    weigh = lambda q, k, v: (backend(inputs(q, k, v, *rule)) * jnp.cos(q)).sum()
    return jax.jit(jax.value_and_grad(weigh, (0, 1, 2)))(q, k, v)


@pytest.mark.parametrize(("window", "causal"), [(0, True), (40, True), (0, False)])
@pytest.mark.parametrize("name", HERE)
def test_backends_agree(name, window, causal, monkeypatch):
    """With the plain square: heads in groups, two documents and padding in a row, windows that leave whole chunks out, and
    both sides of every token."""
    monkeypatch.setattr(attention, "CHUNK", 128)
    expected, found = (run(backend, *arrays(), window, causal) for backend in (attention._xla, HERE[name]))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in HERE if attention.ABILITIES[name].softcap])
def test_a_soft_cap_is_the_same_everywhere(name, monkeypatch):
    """Logits of about 8 under a cap of 3: values and gradients of a backend that says it honours one are the square's."""
    monkeypatch.setattr(attention, "CHUNK", 128)
    q, k, v = arrays()
    expected, found = (run(backend, 8 * q, k, v, 40, True, 3.0) for backend in (attention._xla, HERE[name]))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    without = run(attention._xla, 8 * q, k, v, 40)
    assert abs(float(without[0] - expected[0])) > 1, "the cap changes something"


@pytest.mark.parametrize("name", ["xla", *HERE])
def test_no_document_sees_another(name):
    """Other keys and values in the first document change no bit of the second's output."""
    q, k, v = arrays()
    backend = jax.jit(lambda *arrays: HERE.get(name, attention._xla)(inputs(*arrays)))
    out = backend(q, k, v)
    other = backend(q, k.at[:, :FIRST].add(1.0), v.at[:, :FIRST].multiply(-3.0))
    np.testing.assert_array_equal(out[:, FIRST:], other[:, FIRST:])
    assert not np.array_equal(out[:, :FIRST], other[:, :FIRST])


@pytest.mark.parametrize("name", ["cudnn", "flash", "splash"])
def test_a_kernel_runs_on_every_device_alone(name, eight):
    """Rows and heads split over 2 x 2 devices, one group of heads each."""
    with jax.set_mesh(make_mesh(Mesh(2, 1, 2), eight[:4])):
        layouts, tokens = attention_layouts()
        placed = [jax.device_put(x, layout) for x, layout in zip(arrays(), layouts, strict=True)]
        context = Context(*(jax.device_put(x, tokens) for x in two_documents()))
        placed_inputs = lambda q, k, v: attention.Inputs(q, k, v, context, context, 0, True, 0.0)
        found = jax.jit(lambda *arrays: HERE[name](placed_inputs(*arrays)))(*placed)
        assert jax.typeof(found).sharding.spec == layouts[0]
    alone = HERE[name](inputs(*arrays()))
    np.testing.assert_allclose(found, alone, atol=1e-5)


CALL = Call("cpu", "float32", 64, 1024, 1024)
TPU, GPU = CALL._replace(platform="tpu", dtype="bfloat16"), CALL._replace(platform="gpu", dtype="bfloat16")
TURING = GPU._replace(dtype="float16", bfloat16=False)


@pytest.mark.parametrize(
    ("backend", "call", "problem", "nearest"),
    [
        ("splash", CALL, "runs on a tpu, this is a cpu", "chunked"),
        ("cudnn", CALL, "runs on a gpu, this is a cpu", "chunked"),
        ("cudnn", TPU, "runs on a gpu, this is a tpu", "splash"),
        ("cudnn", TURING, "compute capability 8.0), this is an older one", "chunked"),
        ("cudnn", GPU._replace(dtype="float32"), "float16 or bfloat16, model.compute_dtype is float32", "chunked"),
        ("cudnn", GPU._replace(head_dim=60), "a multiple of 8 up to 128, model.head_dim is 60", "chunked"),
        ("cudnn", GPU._replace(head_dim=256), "up to 128, model.head_dim is 256", "chunked"),
        ("flash", TPU, "runs on a gpu, this is a tpu", "splash"),
        ("flash", TURING, "compute capability 8.0), this is an older one", "chunked"),
        ("flash", GPU._replace(dtype="float32"), "model.compute_dtype is float32", "chunked"),
        ("flash", GPU._replace(head_dim=32), "a multiple of 64 up to 128, model.head_dim is 32", "cudnn"),
        ("flash", GPU._replace(head_dim=192), "up to 128, model.head_dim is 192", "chunked"),
        ("flash", GPU._replace(num_queries=1000, num_keys=1000), "of 128, this one is 1000", "cudnn"),
        ("flash", GPU._replace(softcap=True), "does not bound the logits", "chunked"),
        ("flash", GPU._replace(bias=True), "adds nothing to the logits", "xla"),
        ("splash", TPU._replace(head_dim=80), "a multiple of 64 up to 1024, model.head_dim is 80", "chunked"),
        ("splash", TPU._replace(num_queries=1000, num_keys=1000), "multiple of 128, this one is 1000", "chunked"),
        ("splash", TPU._replace(dtype="float16"), "computes in float32 or bfloat16", "chunked"),
        (
            "cudnn",
            GPU._replace(softcap=True),
            "does not bound the logits, which model.logit_softcap asks for",
            "chunked",
        ),
        ("chunked", CALL._replace(num_queries=1), "has no cache: 1 queries, 1024 keys", "xla"),
    ],
)
def test_what_a_backend_cannot_honour_is_refused_by_name(backend, call, problem, nearest):
    with pytest.raises(UserError) as error:
        attention.choose(backend, call)
    assert backend in str(error.value) and problem in str(error.value), error.value
    assert str(error.value).endswith(f"--config.model.attention={nearest}")
    assert attention.choose(nearest, call) == nearest


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (TPU, "splash"), (GPU, "flash"), (CALL, "chunked"), (CALL._replace(num_queries=256, num_keys=256), "xla"),
        (TPU._replace(num_queries=1), "xla"), (GPU._replace(dtype="float32"), "chunked"),
        (GPU._replace(softcap=True), "chunked"), (TPU._replace(softcap=True), "splash"),
        (GPU._replace(head_dim=96), "cudnn"), (GPU._replace(num_queries=1), "xla"),
        (TPU._replace(head_dim=80), "chunked"), (TPU._replace(num_queries=64, num_keys=64), "xla"),
        (GPU._replace(dtype="float16"), "flash"), (TURING, "chunked"),
    ],
)  # fmt: skip
def test_auto_is_the_best_of_the_platform(call, expected):
    assert attention.choose("auto", call) == expected


def test_a_jax_without_the_compiler_of_flash_takes_the_next(monkeypatch):
    monkeypatch.setattr(attention, "find_spec", {"jax.experimental.pallas.triton": None}.__getitem__)
    assert attention.choose("auto", GPU) == "cudnn"
    with pytest.raises(UserError, match="needs Pallas's compiler for Triton.*\n.*--config.model.attention=cudnn"):
        attention.choose("flash", GPU)


def test_preflight_asks_before_anything_compiles():
    with pytest.raises(UserError, match="does not bound the logits"):
        capped = tiny(model__attention="cudnn", model__compute_dtype="bfloat16", model__logit_softcap=(50.0, 0.0))
        attention.preflight(capped.model, 64, "gpu")
    with pytest.raises(UserError, match="multiple of 128, this one is 64"):
        attention.preflight(tiny(model__attention="splash", model__head_dim=64).model, 64, "tpu")


def test_flash_attention_has_no_square_and_keeps_its_sums():
    """In neither pass an array with the length in two dims, also inside the kernels. Where layers are computed again, result
    and sums are kept by their name: the backward pass makes none of the two again."""
    policy = jax.checkpoint_policies.save_only_these_names("attended")
    call = lambda backend: lambda *arrays: backend(inputs(*arrays)).sum()
    again, square = jax.checkpoint(call(HERE["flash"]), policy=policy), call(attention._xla)
    flash, square = (str(jax.make_jaxpr(jax.grad(one, (0, 1, 2)))(*arrays())) for one in (again, square))
    assert flash.count("name=attended") == 2
    squares = re.compile(rf"\[(\d+,)*{LENGTH},{LENGTH}\b")
    assert squares.search(square) and not squares.search(flash)


def test_flash_attention_skips_blocks_that_do_not_meet():
    """Documents of 1 1/2, 2 1/2 and 2 blocks, one of padding; ids that do not ascend are right too."""
    lengths = np.asarray([3, 5, 4, 2]) * flash_attention.BLOCK // 2
    ids = jnp.repeat(jnp.asarray([1, 2, 3, 0]), lengths, total_repeat_length=sum(lengths))[None]
    of_blocks = jax.jit(flash_attention.meeting_blocks, static_argnums=1)

    bounds = lambda ids, *rule: np.asarray(of_blocks(ids, flash_attention.Rule(*rule)))[:, :, 0]
    np.testing.assert_array_equal(
        bounds(ids, 0, True),
        [[[0, 0, 1, 1, 4, 4, 6], [1, 2, 3, 4, 5, 6, 7]], [[0, 1, 2, 3, 4, 5, 6], [2, 4, 4, 4, 6, 6, 7]]],
    )
    np.testing.assert_array_equal(bounds(ids, 0, False)[0], [[0, 0, 1, 1, 4, 4, 6], [2, 4, 4, 4, 6, 6, 7]])
    np.testing.assert_array_equal(bounds(ids, 1, True), 2 * [[range(7), range(1, 8)]])
    np.testing.assert_array_equal(bounds(ids, 2, True)[0], [[0, 0, 1, 2, 4, 4, 6], range(1, 8)])
    np.testing.assert_array_equal(bounds(ids[:, ::-1], 0, False)[0][0], [0, 1, 1, 3, 3, 3, 5])
    mixed = jnp.tile(jnp.asarray([2, 1]), 2 * flash_attention.BLOCK)[None]
    np.testing.assert_array_equal(bounds(mixed, 0, False), 2 * [[[0] * 4, [4] * 4]])


def test_flash_attention_in_bfloat16():
    q, k, v = (x.astype(jnp.bfloat16) for x in arrays(2, 1))
    found, expected = (run(backend, q, k, v, 40)[1] for backend in (HERE["flash"], attention._xla))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.05, rtol=0.05)


@pytest.mark.device
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("backend", [attention._cudnn, lambda given: flash(*given[:3], given.keys, *given[5:7])])
def test_a_kernel_on_a_gpu(backend):
    q, k, v = (x.astype(jnp.bfloat16) for x in arrays())
    for window in (0, 40):
        found, expected = (run(backend, q, k, v, window)[1] for backend in (backend, attention._xla))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.05, rtol=0.05)
