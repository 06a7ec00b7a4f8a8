"""Word vectors start the embedding table; what is no such file is refused by name and line."""

import jax
import numpy as np
import pytest
from helpers import tiny

from lm_jax import initial_state
from lm_jax.config import Mesh
from lm_jax.convert import word_vectors
from lm_jax.errors import UserError
from lm_jax.mesh import make_mesh
from lm_jax.train_state import fresh, make_program

WORDS = {"self": 1.5, "return": -2.0, "the": 0.25, "notawordofours": 9.0}


def lines(dim: int) -> list[str]:
    return [f"{word} {' '.join([str(x)] * dim)}" for word, x in WORDS.items()]


@pytest.mark.parametrize("first", [[], ["4 64"]], ids=["glove", "word2vec"])
def test_pieces_that_are_words_take_their_vectors(first, corpus, eight, tmp_path):
    """With and without a space before them; the rest stays as initialised, also where the table is split."""
    path, said = tmp_path / "vectors.txt", []
    path.write_text("\n".join([*first, *lines(64)]) + "\n")
    given = word_vectors.read(str(path), corpus.tokenizer, 64)
    program = make_program(tiny(), corpus.tokenizer.vocab_size)
    with jax.set_mesh(make_mesh(Mesh(2, 2, 2), eight)):
        plain = np.asarray(jax.jit(lambda: fresh(program))().parameters["embedding"]["table"])
        state, _ = initial_state.starting_point(program, tmp_path / "run", given, said.append)
        table = state.parameters["embedding"]["table"]
        assert table.sharding.spec == jax.P("tensor", "fsdp")
    texts = [corpus.tokenizer.decode([i]).strip() for i in range(corpus.tokenizer.vocab_size)]
    rows = [i for i, text in enumerate(texts) if text in WORDS]
    assert len(rows) > len({texts[i] for i in rows}) == 3
    for i, row in enumerate(np.asarray(table)):
        np.testing.assert_array_equal(row, np.full(64, WORDS[texts[i]]) if i in rows else plain[i])
    assert said == [f"{len(rows)} of 512 pieces from the words of {path}; the other {512 - len(rows)} are initialised"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"self 1 2 3\n", "line 1: 3 numbers, config.model.model_dim = 64\n.*--config.model.model_dim=3"),
        (b"1000 300\nself 1\n", "line 1: 300 numbers.*\n.*model_dim=300"),
        ("\n".join([*lines(64), "for 1 2"]).encode(), "line 5: 2 numbers"),
        ("\n".join(lines(64)).replace("1.5", "x").encode(), "line 1: not all are finite numbers"),
        ("\n".join(lines(64)).replace("1.5", "nan").encode(), "line 1: not all are finite numbers"),
        (lines(64)[3].encode(), "none of its words is a piece"),
        (b"\x80\x04\x95binary\x00", "line 1: no word with its numbers"),
        (b"", "none of its words is a piece"),
        (b"\n\n", "line 1: no word with its numbers"),
        (b"x" * 2**21, "line 1: no word with its numbers"),
    ],
)
def test_what_is_no_file_of_vectors(content, words, corpus, tmp_path):
    path = tmp_path / "vectors.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        word_vectors.read(str(path), corpus.tokenizer, 64)
