"""Where one model beats another in a text: bits land on the right bytes, and the page says who wins where."""

import math
import re

import compare_runs
import numpy as np
import pytest

from lm_jax import from_python
from lm_jax.data.tokenizer import Bytes
from lm_jax.errors import UserError
from lm_jax.trust import byte_page
from lm_jax.trust.byte_page import Read

TEXT = "def f(x):\n    return 'éa'\n"


def test_bits_of_a_text_are_the_model_s_loss(finished):
    """A text longer than the model sees is read in parts, of which only the first has nothing before it."""
    model, short = from_python.load(finished), TEXT
    found = byte_page.read(str(finished), short)
    ids = model.ids(short)
    assert len(ids) < model.model.sequence_length and len(found.bits) == len(short.encode())
    assert found.bits.sum() == pytest.approx(model.loss(short) * (len(ids) - 1) / math.log(2), rel=1e-4)
    long = byte_page.read(str(finished), TEXT * 12)
    own = model.tokenizer.encode(TEXT * 12)
    assert len(own) > 2 * model.model.sequence_length and len(long.bits) == len((TEXT * 12).encode())
    assert np.isfinite(long.bits).all() and long.bits.min() > 0
    sees = model.model.sequence_length
    first = model.loss([*model.ids("")[:1], *own[:sees]]) * sees / math.log(2)
    size = int(model.tokenizer.bytes_per_piece[own[:sees]].sum())
    assert long.bits[:size].sum() == pytest.approx(first, rel=1e-4)


class Spelled(Bytes):
    """Pieces of 1, 3 and 2 bytes, and one that stands for nothing."""

    def __init__(self):
        super().__init__()
        self.bytes_per_piece = np.array([1, 3, 2, 0], np.int32)


def test_a_token_s_bits_are_shared_out_over_its_bytes():
    bits = np.array([1.0, 6.0, 5.0, 3.0])
    found = byte_page.over_bytes(bits, [0, 1, 3, 2], Spelled(), "abcdef", "x")
    assert found.tolist() == [1.0, 2.0, 2.0, 2.0, 6.5, 1.5], "what stands for no byte counts at the next one"
    assert byte_page.over_bytes(bits[:2], [1, 0], Spelled(), "abc", "x").tolist() == [0.5, 0.5, 6.0], "a space before"
    with pytest.raises(UserError, match="x: its tokens are 3 bytes of these 6"):
        byte_page.over_bytes(bits[:2], [0, 2], Spelled(), "abcdef", "x")


def test_the_page_says_who_wins_where():
    text = "good <b>ad</b>\n" + "x" * 200 + "123"
    flat = np.full(len(text.encode()), 2.0)
    better, worse = flat.copy(), flat.copy()
    better[:4] -= 1.5  # B wins on "good"
    better[-3:] += 3.0  # A wins on the digits
    page = byte_page.page(text, Read("runs/a", worse), Read("runs/<b>", better), "a text")
    assert '<span class="b2" id="c0" title="A 2.00, B 0.50 bits a byte">good</span>' in page
    assert re.search(r'<span class="a3"[^>]* title="A 2.00, B 5.00 bits a byte">123</span>', page)
    assert "<script" not in page and "runs/&lt;b&gt;" in page and "&lt;b&gt;ad" in page and "http" not in page
    [digits] = re.findall(r"<tr><td>digits</td>(.*?)</tr>", page)
    assert re.findall(r">([^<]+)</td>", digits) == ["3", "2.000", "5.000", "-3.000", "0%"]
    wins, losses = page.split("Where B wins most")[1].split("Where A wins most")
    assert re.findall(r'href="#c(\d+)"', wins) == ["0"] and ">6.0</td>" in wins
    assert re.findall(r'href="#c(\d+)"', losses)[0] == str(len(text) - byte_page.PASSAGE) and ">9.0</td>" in losses
    assert {*re.findall(r'href="#(c\d+)"', page)} <= {*re.findall(r' id="(c\d+)"', page)}


def test_the_command_writes_one_page(finished, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert compare_runs.main([str(finished), str(finished), "--bytes", str(page), "--num_bytes", "300"]) == 0
    a, b = re.search(r"([\d.]+) and ([\d.]+) bits a byte", capsys.readouterr().out).groups()
    assert a == b and "Nowhere is B better" in page.read_text() and "validation text of" in page.read_text()
    with pytest.raises(UserError, match="--bytes compares two runs, here are 1"):
        compare_runs.main([str(finished), "--bytes", str(page)])
    with pytest.raises(UserError, match="--num_bytes 5 is read only where --bytes is given"):
        compare_runs.main([str(finished), str(finished), "--num_bytes", "5"])
