"""Documents that are few and long give a validation split too: stretches that train nowhere."""

import dataclasses

import pytest
from helpers import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_jax.data import stretches
from lm_jax.data.corpus import open_corpus
from lm_jax.data.sources import share_of
from lm_jax.errors import UserError


def text(num: int, seed: int = 0) -> str:
    """About `num` characters in paragraphs, none like another."""
    lines = (f"paragraph {seed} {k}: the {k * k % 97}th of its kind\n" + "\n" * (k % 3 == 0) for k in range(num // 40))
    return "".join(lines)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=4), st.floats(0.01, 0.3), st.floats(0.0, 0.3))
def test_every_part_stands_in_one_split_and_the_parts_are_the_documents(sizes, validation, test):
    documents = [text(size, seed) for seed, size in enumerate(sizes) if size >= 40]
    if not documents:
        return
    found = stretches.cut({"train": documents, "validation": [], "test": []}, validation, test)
    if found is None:
        assert sum(map(len, documents)) < stretches.FEWEST * 2 * stretches.SHORTEST
        return
    assert found["train"] and found["validation"] and bool(found["test"]) == (test > 0)
    whole = "".join(documents)
    pieces = [(whole.index(piece), piece, split) for split, some in found.items() for piece in some]
    assert "".join(piece for _, piece, _ in sorted(pieces)) == whole, "nothing is lost, nothing stands twice"
    assert len(found["train"]) <= len(found["validation"]) + len(found["test"]) + len(documents), (
        "what is between two is one"
    )
    share = sum(map(len, found["validation"])) / len(whole)
    assert share < 3 * validation + 2 * stretches.SHORTEST / len(whole) + 0.1
    again = stretches.cut({"train": documents[::-1], "validation": [], "test": []}, validation, test)
    assert again == found, "the order of the documents does not enter"


def test_equal_parts_are_never_on_both_sides():
    """A document that goes on after all of another one: what is held out of one trains in neither."""
    document = text(100_000)
    found = stretches.cut({"train": [document, document + text(60_000, 1)], "validation": [], "test": []}, 0.1, 0.1)
    assert found
    sides = [found["train"], found["validation"], found["test"]]
    for side in sides[1:]:
        others = "".join(piece for other in sides if other is not side for piece in other)
        assert side and not [piece for piece in side if piece[:500] in others]


def test_what_is_enough_is_left_alone():
    shares = [share_of(f"document {k}")[0] for k in range(200)]
    assert not stretches.is_needed(shares, 0.1, 0.1) and not stretches.is_needed(shares, 0.0, 0.1)
    assert stretches.is_needed([0.5], 0.02, 0.02) and stretches.is_needed([0.03], 0.02, 0.02)
    assert stretches.cut({"train": [text(20_000)], "validation": [], "test": []}, 0.02, 0.02) is None
    kept = stretches.cut({"train": [text(100_000)], "validation": [], "test": ["a test document"]}, 0.02, 0.02)
    assert kept and kept["test"] == ["a test document"] and kept["validation"]


@pytest.mark.parametrize("name", ["trains", "is held out"])
def test_a_folder_with_one_long_file_has_all_splits(name, tmp_path):
    """Also where the hash of the whole file would hold it out."""
    seed = next(k for k in range(1000) if (share_of(text(120_000, k))[0] < 0.04) == (name == "is held out"))
    (tmp_path / "book.txt").write_text(text(120_000, seed))
    said: list[str] = []
    data = tiny(data__sources=str(tmp_path), data__tokenizer="bytes").data
    corpus = open_corpus(data, said.append)
    assert any("stretches of them are held out" in line for line in said)
    train, validation = (corpus.tokenizer.decode(corpus.splits[split].tokens[:]) for split in ("train", "validation"))
    assert len(validation) > 1500 and len(train) > 100_000 and corpus.splits["test"].num_documents
    assert validation[:500] not in train
    none = dataclasses.replace(data, validation_fraction=0.0, test_fraction=0.0)
    assert open_corpus(none, said.append).splits["train"].num_documents == 1


def test_too_little_text_says_what_to_do(tmp_path):
    seed = next(k for k in range(1000) if share_of(text(400, k))[0] < 0.04)
    (tmp_path / "note.txt").write_text(text(400, seed))
    with pytest.raises(
        UserError, match="too little text for stretches\\)\ngive more text, or --config.data.validation_fr"
    ):
        open_corpus(tiny(data__sources=str(tmp_path), data__tokenizer="bytes").data)
