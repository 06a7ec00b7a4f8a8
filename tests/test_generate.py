"""Sampling cuts where it says, decoding is the model's own greedy path, and a seed gives the same text."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import command, tiny
from peers import families as parity_families

from lm_jax.config import Mesh
from lm_jax.convert import hugging_face
from lm_jax.data.special_ids import SpecialIds, of_documents
from lm_jax.data.tokenizer import Bytes
from lm_jax.errors import UserError
from lm_jax.generate import beam_search
from lm_jax.generate import command as generate_command
from lm_jax.generate.decoding import State, complete, decode, on_mesh, prefill, stream
from lm_jax.generate.sampling import GREEDY, Sampling, cut, keys, sample
from lm_jax.mesh import make_mesh
from lm_jax.model.attention import Context
from lm_jax.model.build import build


def generate(*arguments) -> list[str]:
    """The continuation of each prompt as text."""
    return [completion.text for completion in complete(*arguments)]


LOGITS = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.07, 0.03]))


def draw(num=4000, seen=None, **settings):
    """Shares of `num` draws."""
    wanted = Sampling(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings).of_each(np.arange(num))
    seen = None if seen is None else jnp.broadcast_to(jnp.array(seen)[None], (num, 5))
    drawn = sample(jnp.broadcast_to(LOGITS[None], (num, 5)), keys(wanted.seed, jnp.int32(0)), wanted, seen)
    return np.bincount(np.asarray(drawn), minlength=5) / num


def test_the_cuts_keep_what_sorting_would_keep():
    """Of vocabularies with equal logits, forbidden ones and every mixture of the cuts; 1 and 0 cut nothing."""
    numbers = np.random.RandomState(0)
    logits = (numbers.randn(64, 300) * numbers.choice([0.3, 2, 8], (64, 1))).round(1).astype(np.float32)
    logits[numbers.rand(64, 300) < 0.1] = -np.inf
    settings = (
        numbers.choice([0, 1, 3, 50], 64),
        numbers.choice([0.01, 0.5, 0.9, 1], 64),
        numbers.choice([0, 0.1, 1], 64),
    )
    found = np.isfinite(cut(jnp.array(logits), Sampling(1.0, *map(jnp.array, settings))))
    for row, top_k, top_p, min_p, kept in zip(logits.astype(np.float64), *settings, found, strict=True):
        value = np.sort(row)[::-1]
        value = value[value >= value[top_k - 1]] if top_k else value  # those that are equal stay together
        weight = np.exp(value - value[0]) / np.exp(value - value[0]).sum()
        before = np.array([weight[value > one].sum() for one in value])
        stay = ((before < top_p) | (top_p == 1)) & (weight >= min_p * weight[0] * (1 - 1e-6))
        expected = (row >= value[stay].min()) & np.isfinite(row)
        assert (kept == expected).all(), (top_k, top_p, min_p)


def chi_square(found, expected, num=4000) -> float:
    """Pearson's statistic over the pieces that may come; a piece that may not must not."""
    expected, may = np.asarray(expected), np.asarray(expected) > 0
    assert (found[~may] == 0).all()
    return float(num * (np.square(found - expected)[may] / expected[may]).sum())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.5, 0.25, 0.15, 0.07, 0.03]),
        ({"temperature": 0.5}, np.square([0.5, 0.25, 0.15, 0.07, 0.03])),
        ({"top_k": 2}, [2, 1, 0, 0, 0]),
        ({"top_p": 0.76}, [0.5, 0.25, 0.15, 0, 0]),  # the piece that crosses stays
        ({"top_p": 0.01}, [1, 0, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0.5, 0.25, 0, 0, 0]),  # the nucleus of what top_k left: 0.5 / 0.9, 0.25 / 0.9
        ({"min_p": 0.25}, [0.5, 0.25, 0.15, 0, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0, 0]),
        ({"temperature": 0.0}, [1, 0, 0, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0, 0]),
        ({"repetition_penalty": 2.0, "seen": [1, 0, 0, 0, 0]}, [0.25, 0.25, 0.15, 0.07, 0.03]),
        ({"repetition_penalty": 2.0, "temperature": 0.0, "seen": [1, 1, 0, 0, 0]}, [1, 0, 0, 0, 0]),
        ({"repetition_penalty": 3.0, "temperature": 0.0, "seen": [1, 1, 0, 0, 0]}, [0, 0, 1, 0, 0]),
    ],
)
def test_samples_have_the_frequencies_of_the_cut_softmax(settings, expected):
    """Chi-square with up to 4 degrees of freedom: 18.5 is exceeded once in a thousand, and the seed is fixed."""
    assert chi_square(draw(**settings), np.asarray(expected) / np.sum(expected)) < 18.5


def test_each_request_has_its_own_settings():
    settings = Sampling(jnp.array([0.0, 1.0, 1.0]), jnp.array([0, 1, 0]), jnp.array([1.0, 1.0, 0.01])).of_each(
        np.zeros(3)
    )
    drawn = sample(jnp.broadcast_to(LOGITS[None], (3, 5)), keys(settings.seed, jnp.int32(0)), settings)
    np.testing.assert_array_equal(drawn, [0, 0, 0])


@pytest.fixture(scope="module")
def model(corpus):
    config = tiny(model__positions="rotary", model__init_scale=0.2)
    graph = build(config.model, corpus.tokenizer.vocab_size, 64)
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield graph, jax.jit(lambda: graph.init(jax.random.key(0), sharded=True))(), corpus.tokenizer


PROMPTS = ["def ", "import os\n\nclass A:\n", "x"]


def test_greedy_decoding_is_the_path_of_the_full_model(model):
    graph, parameters, tokenizer = model
    limit, ids = 20, [tokenizer.document_id, *tokenizer.encode(PROMPTS[1])]
    expected = list(ids)

    @jax.jit
    def next_token(tokens, length):
        context = Context(jnp.arange(64)[None], (jnp.arange(64) < length)[None].astype(jnp.int32))
        module = graph.module(parameters)
        return jnp.argmax(module.logits(module(tokens, context)[0])[0, length - 1])

    for _ in range(limit):
        padded = np.pad(expected, (0, 64 - len(expected)))[None].astype(np.int32)
        expected.append(int(next_token(padded, len(expected))))
        if expected[-1] == tokenizer.document_id:
            break
    out = generate(graph, parameters, tokenizer, [PROMPTS[1]], limit, GREEDY)[0]
    assert out == tokenizer.decode([t for t in expected[len(ids) :] if t != tokenizer.document_id])


def test_a_prompt_s_text_does_not_depend_on_its_neighbours(model):
    graph, parameters, tokenizer = model
    together = generate(graph, parameters, tokenizer, PROMPTS, 16, GREEDY)
    apart = [generate(graph, parameters, tokenizer, [prompt], 16, GREEDY)[0] for prompt in PROMPTS]
    assert together == apart


def test_a_seed_gives_the_same_text_on_any_mesh(model, eight):
    graph, parameters, tokenizer = model
    run = lambda seed, prompts: generate(graph, parameters, tokenizer, prompts, 16, Sampling(seed=seed))
    first = run(0, PROMPTS[:1] * 2)
    assert run(0, PROMPTS[:1] * 2) == first and first[0] != first[1]
    assert run(1, PROMPTS[:1]) == first[1:], "a request's seed is its own, whatever its place"


def test_a_text_ends_before_a_stop_string(model):
    graph, parameters, tokenizer = model
    [whole] = complete(graph, parameters, tokenizer, PROMPTS[:1], 40, Sampling(seed=5))
    stop = whole.text[4:6]
    found = complete(graph, parameters, tokenizer, PROMPTS[:2], 40, Sampling(seed=5), stop=(stop, "never written"))
    assert found[0].text == whole.text[: whole.text.find(stop)]
    assert stop not in found[1].text


def test_what_streams_is_what_comes_at_once(model):
    graph, parameters, tokenizer = model
    whole = complete(graph, parameters, tokenizer, PROMPTS, 40, Sampling(seed=5))
    parts = list(stream(graph, parameters, tokenizer, PROMPTS, 40, Sampling(seed=5), tokens_at_once=8))
    assert parts[-1] == whole and len(parts) > 2
    assert all(late.tokens[: len(early.tokens)] == early.tokens for early, late in zip(parts[0], whole, strict=True))


def test_log_probabilities_are_the_full_model_s(model):
    graph, parameters, tokenizer = model
    [found] = complete(graph, parameters, tokenizer, PROMPTS[:1], 12, Sampling(seed=3, temperature=1.5))
    ids = [tokenizer.document_id, *tokenizer.encode(PROMPTS[0]), *found.tokens]
    row = jnp.array([ids])
    context = Context(jnp.arange(len(ids))[None], jnp.ones_like(row))

    @jax.jit
    def log_softmax(parameters):
        module = graph.module(parameters)
        return jax.nn.log_softmax(module.logits(module(row, context)[0])[0].astype(jnp.float32))

    sure = log_softmax(parameters)
    first = len(ids) - len(found.tokens)
    expected = [float(sure[first - 1 + k, token]) for k, token in enumerate(found.tokens)]
    np.testing.assert_allclose(found.log_probabilities, expected, atol=1e-4)


def test_a_repeated_piece_costs(model):
    graph, parameters, tokenizer = model
    [plain] = complete(graph, parameters, tokenizer, PROMPTS[:1], 30, GREEDY)
    [other] = complete(graph, parameters, tokenizer, PROMPTS[:1], 30, GREEDY._replace(repetition_penalty=1e6))
    read = [tokenizer.document_id, *tokenizer.encode(PROMPTS[0])]
    assert len({*other.tokens, *read}) == len(other.tokens) + len({*read}), "with such a price no piece comes twice"
    assert len({*plain.tokens}) < len(plain.tokens)


def test_one_program_serves_all_lengths_of_a_bucket(model):
    graph, parameters, tokenizer = model
    run = lambda prompt, limit: generate(graph, parameters, tokenizer, [prompt], limit, Sampling())
    run("x", 8)
    before = decode._cache_size(), prefill._cache_size()
    for prompt, limit in (("def ", 8), ("import os", 20), ("a b c d e", 3)):
        run(prompt, limit)
    assert (decode._cache_size() - before[0], prefill._cache_size() - before[1]) == (0, 0)


def test_no_weight_is_copied_for_a_token(model):
    """The memory of the whole decode beside its arguments is less than one layer's largest matrix; out of stacks it is not."""
    graph, stacked, _ = model
    sampling = jax.tree.map(on_mesh, GREEDY.of_each(np.zeros(1)))

    def temporary(parameters) -> int:
        state = prefill(graph, parameters, on_mesh(np.ones((1, 8), np.int32)), on_mesh(np.array([8])), 16)
        compiled = decode.lower(graph, parameters, state, sampling, 8, 8, (0,)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    largest = max(x[0].nbytes for x in jax.tree.leaves(stacked["block_0"]))
    assert temporary(graph.unstacked(stacked)) < largest < temporary(stacked)


def plain_beams(graph, parameters, tokenizer, prompt, limit, beams, penalty, ends):
    """(tokens, log-probability) by the same rules in plain Python over the full model: no cache, no batch."""
    start = [tokenizer.document_id, *tokenizer.encode(prompt)]

    @jax.jit
    def sure(row, length):
        context = Context(jnp.arange(64)[None], (jnp.arange(64) < length)[None].astype(jnp.int32))
        module = graph.module(parameters)
        return jax.nn.log_softmax(module.logits(module(row, context)[0])[0, length - 1].astype(jnp.float32))

    of = lambda ids: np.asarray(sure(np.pad(ids, (0, 64 - len(ids)))[None].astype(np.int32), len(ids)), np.float64)
    running, finished = [(0.0, [])], []
    for n in range(limit):
        step = [(score + p, [*ids, k]) for score, ids in running for k, p in enumerate(of(start + ids))]
        best = sorted(step, key=lambda x: -x[0])[: (1 + len(ends)) * beams]
        ended = [ids[-1] in ends or n + 1 == limit for _, ids in best]
        finished += [
            (score / (n + 1) ** penalty, ids)
            for (score, ids), end in list(zip(best, ended, strict=True))[:beams]
            if end
        ]
        finished = sorted(finished, key=lambda x: -x[0])[:beams]
        running = [x for x, end in zip(best, ended, strict=True) if not end][:beams]
        if not running or (len(finished) == beams and running[0][0] / (n + 1) ** penalty <= finished[-1][0]):
            break
    score, ids = finished[0]
    return [k for k in ids if k not in ends], score * len(ids) ** penalty


@pytest.mark.parametrize("several", [False, True], ids=["one end", "two ends"])
@pytest.mark.parametrize("penalty", [1.0, 0.0, -0.5])
def test_beams_are_those_of_plain_python(model, penalty, several):
    """Penalties below 1 prefer short texts, so that some end at once. A second end is what would be written first."""
    graph, parameters, tokenizer = model
    table = parameters["embedding"]["table"]
    likelier = jnp.where(jnp.arange(len(table)) == tokenizer.document_id, 1.5, 1)[:, None]  # so that texts end
    parameters = parameters | {"embedding": {"table": table * likelier}}
    marks = of_documents(tokenizer)
    if several:
        first = complete(graph, parameters, tokenizer, PROMPTS[:1], 1, GREEDY)[0].tokens
        marks = marks._replace(ends=(*marks.ends, *first))
    found = beam_search.search(graph, parameters, tokenizer, PROMPTS, 6, 3, penalty, marks)
    for prompt, one in zip(PROMPTS, found, strict=True):
        tokens, total = plain_beams(graph, parameters, tokenizer, prompt, 6, 3, penalty, marks.ends)
        assert one.tokens == tokens and one.log_probabilities == [pytest.approx(total, rel=1e-4)]
    best = beam_search.search(graph, parameters, tokenizer, PROMPTS, 6, 1, penalty)
    if penalty == 0 and not several:
        greedy = complete(graph, parameters, tokenizer, PROMPTS, 6, GREEDY)
        assert [one.tokens for one in best] == [one.tokens for one in greedy], "one beam is greedy"


def test_several_ends_at_once_crowd_out_no_text_that_goes_on(monkeypatch):
    """Of two beams' best continuations three are ends; the fifth goes on, and ends best."""
    chances = np.full((8, 8), 1 / 8)  # of the next token, after each
    chances[3] = [0.3, 0.2, 0.15, 0, 0.25, 0.1, 0, 0]  # ends are 0, 1, 2
    chances[5] = [1, 0, 0, 0, 0, 0, 0, 0]
    rows = np.log(np.maximum(chances, 1e-9)).astype(np.float32)[:, None]
    logits = lambda token_B: sum(jnp.where(token_B[:, None] == k, row, 0) for k, row in enumerate(rows))
    monkeypatch.setattr(
        beam_search, "next_logits", lambda graph, parameters, state: (logits(state.token_B), state.caches)
    )
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        zeros = on_mesh(np.zeros(2, np.int32))
        state = State({}, zeros + 3, zeros, zeros > 0, jnp.int32(0))
        found = beam_search.decode("a table", {}, state, 2, 4, (0, 1, 2), np.float32(1))
    assert np.asarray(found.finished_BKN)[0, 0, :2].tolist() == [5, 0]
    assert float(found.finished_scores_BK[0, 0]) == pytest.approx(np.log(0.1) / 2, rel=1e-5)


@pytest.mark.proof
def test_an_encoder_decoder_writes_what_its_full_forward_says():
    config = tiny(
        model__kind="encoder_decoder",
        data__objective="span_corruption",
        model__positions="relative",
        model__init_scale=0.2,
    )
    graph = build(config.model, 500, 64)
    prompts = np.random.default_rng(0).integers(1, 500, (2, 20)).astype(np.int32)
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        sharded = jax.jit(lambda: graph.init(jax.random.key(0), sharded=True))()
        apart = graph.unstacked(sharded)
        state = prefill(graph, apart, on_mesh(prompts), on_mesh(np.array([20, 13])), 32, start=1)
        written, _, _ = decode(graph, apart, state, jax.tree.map(on_mesh, GREEDY.of_each(np.zeros(2))), 10, 16, (1,))
    parameters, source = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), sharded), jnp.asarray(prompts)
    lengths, module = jnp.array([20, 13]), graph.module(parameters)
    places = jnp.broadcast_to(jnp.arange(20)[None], (2, 20))
    seen = Context(places, (places < lengths[:, None]).astype(jnp.int32))
    encoded = jax.jit(module.encode)(source, seen)

    @jax.jit
    def next_token(tokens, length, one):
        context = Context(jnp.arange(16)[None], (jnp.arange(16) < length)[None].astype(jnp.int32))
        return jnp.argmax(module.logits(module.decode(tokens, context, one)[0])[0, length - 1])

    for row in range(2):
        tokens, one = [1], jax.tree.map(lambda x, row=row: x[row : row + 1], (encoded, seen))
        while len(tokens) < 11 and (len(tokens) == 1 or tokens[-1] != 1):
            tokens.append(int(next_token(np.pad(tokens, (0, 16 - len(tokens)))[None], len(tokens), one)))
        np.testing.assert_array_equal(np.asarray(written)[row, : len(tokens) - 1], tokens[1:])


@pytest.mark.proof
def test_other_mesh_same_text(model, eight):
    graph, parameters, tokenizer = model
    first = generate(graph, parameters, tokenizer, PROMPTS, 16, GREEDY)
    with jax.set_mesh(make_mesh(Mesh(2, 1, 4), eight)):
        sharded = jax.jit(lambda: graph.init(jax.random.key(0), sharded=True))()
        assert generate(graph, sharded, tokenizer, PROMPTS, 16, GREEDY) == first


def test_more_than_the_model_sees_is_refused(model):
    graph, parameters, tokenizer = model
    with pytest.raises(UserError, match="at most"):
        generate(graph, parameters, tokenizer, ["def "], 64, GREEDY)
    with pytest.raises(UserError, match="shorten the prompt"):
        generate(graph, parameters, tokenizer, ["x = 1\n" * 64], 1, GREEDY)
    room = 64 - 1 - len(tokenizer.encode("def "))
    assert generate(graph, parameters, tokenizer, ["def "], room, GREEDY)


def test_the_command_prints_prompts_and_continuations(finished, capsys):
    """The same text in another process, and on other devices."""
    arguments = (
        "generate",
        "--model",
        str(finished),
        "--prompt",
        "def ",
        "--prompt",
        "class ",
        "--max_new_tokens",
        "8",
    )
    first = command(*arguments)
    assert first.returncode == 0, first.stderr
    capsys.readouterr()
    assert generate_command.main([*arguments[1:]]) == 0
    assert first.stdout == capsys.readouterr().out and first.stdout.startswith("def ") and "\n\nclass " in first.stdout


def test_a_file_of_prompts_becomes_json_lines(finished, tmp_path, capsys):
    (tmp_path / "prompts").write_text("def \nclass \n")
    line = ["--model", str(finished), "--prompts", str(tmp_path / "prompts"), "--max_new_tokens", "8"]
    capsys.readouterr()
    assert generate_command.main([*line, "--beams", "2"]) == 0
    printed = capsys.readouterr().out
    found = [json.loads(text) for text in printed.splitlines()]
    assert [x["prompt"] for x in found] == ["def ", "class "] and all(len(x["tokens"]) <= 8 for x in found)
    given = [*line[:2], "--prompt=def ", "--prompt=class ", "--json", *line[4:], "--beams", "2"]
    assert generate_command.main(given) == 0 and capsys.readouterr().out == printed


def test_without_a_prompt_it_asks(finished):
    result = command("generate", "--model", str(finished), "--max_new_tokens", "4", input="def \n\n")
    assert result.returncode == 0 and "def " in result.stdout and "a prompt a line" in result.stderr


def texts_there(model, prompts, limit: int, beams: int, ends: tuple[int, ...]) -> list[list[int]]:
    """New tokens of `transformers` for prompts in one batch, padded on the left."""
    import torch

    width = max(map(len, prompts))
    rows = torch.tensor(np.stack([np.pad(p, (width - len(p), 0)) for p in prompts])).long()
    seen = torch.tensor(np.stack([np.arange(width) >= width - len(p) for p in prompts])).long()
    settings = dict(max_new_tokens=limit, num_beams=beams, do_sample=False, pad_token_id=0, eos_token_id=list(ends))
    with torch.no_grad():
        out = model.generate(rows, attention_mask=seen, **settings)
    stop = lambda row: next((k for k, token in enumerate(row) if token in ends), len(row))
    return [row[: stop(row)] for row in out[:, width:].tolist()]


@pytest.mark.proof
@pytest.mark.parametrize("name", parity_families.FIRST)
def test_greedy_and_beam_texts_are_those_of_transformers(name, tmp_path):
    """20 prompts of 1 to 20 tokens, random weights, one end and three; all lengths together, padded on the right here."""
    pytest.importorskip("torch")
    model = parity_families.reference(name)
    model.save_pretrained(tmp_path)
    random = np.random.default_rng(1)
    prompts = [random.integers(3, parity_families.PIECES, random.integers(1, 21)).astype(np.int32) for _ in range(20)]
    endless = [token for text in texts_there(model, prompts, 16, 1, (parity_families.PIECES - 1,)) for token in text]
    frequent = sorted({*endless}, key=endless.count)[::-1]  # so that some texts end early
    described = hugging_face.read_description(str(tmp_path))
    for ends in (tuple(frequent[:1]), tuple(frequent[:3])):
        with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
            graph = build(described.config.model, described.vocab_size, described.config.data.sequence_length)
            parameters = jax.tree.map(jnp.asarray, hugging_face.read_parameters(str(tmp_path), described))
            arguments, marks = (graph, parameters, Bytes(), prompts, 16), SpecialIds((), (), 0, ends)
            greedy = [x.tokens for x in complete(*arguments, GREEDY, marks=marks)]
            best = [x.tokens for x in beam_search.search(*arguments, 3, 1.0, marks)]
        assert greedy == texts_there(model, prompts, 16, 1, ends)
        assert best == texts_there(model, prompts, 16, 3, ends)
        assert any(len(tokens) < 16 for tokens in greedy)
