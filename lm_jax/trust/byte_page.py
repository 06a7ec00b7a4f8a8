"""Where one model beats another, byte by byte, as a picture over a text: one HTML page, no script, nothing that is fetched.

A token's bits are shared out evenly over its bytes, so that models with other tokenizers can be compared.
"""

import html
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from lm_jax import from_python, load_model
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.model_config import OBJECTIVES
from lm_jax.open_data import open_data
from lm_jax.plan.page import document, table

STEPS = (0.25, 1.0, 2.5)  # bits a byte: how far apart a paler, a plain and a stronger colour are
STYLE = """<style>
body{max-width:1000px}pre.text{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7;font-size:.9rem}
.b1{background:#0072b233}.b2{background:#0072b280}.b3{background:#0072b2;color:#fff}
.a1{background:#e69f0033}.a2{background:#e69f0080}.a3{background:#e69f00;color:#000}
.end{opacity:.4}span[id]{scroll-margin:4rem}td a{font-family:monospace;white-space:pre-wrap;text-decoration:none;color:inherit}
</style>"""
KINDS = {
    "letters": str.isalpha,
    "digits": str.isdigit,
    "line breaks": lambda c: c == "\n",
    "spaces and tabs": str.isspace,
    "other characters": lambda c: True,
}
PASSAGE, SHOWN = 48, 8  # characters of a passage, and how many of them are named on either side


class Read(NamedTuple):
    """A model's bits for a text."""

    name: str
    bits: np.ndarray  # float64 [bytes]


def read(name: str, text: str) -> Read:
    """A MODEL's bits for each byte of a text. Raises UserError where it does not predict the next token."""
    from lm_jax.generate.likelihood import of_tokens

    model = from_python.load(name)
    if model.config.model.kind in OBJECTIVES or model.config.model.head:
        raise UserError(f"{name} does not predict the next token")
    ids, sees = model.ids(text).tolist(), model.model.sequence_length
    own = model.tokenizer.encode(text).tolist()
    before, new = ids[: len(ids) - len(own)], max(1, sees // 2)
    starts = [
        0,
        *range(sees, len(own), new),
    ]  # from the second part on a token sees at least half of what the model can
    pairs = [
        (before or [model.tokenizer.document_id], own[:sees]),
        *((own[max(0, start - sees + new) : start], own[start : start + new]) for start in starts[1:]),
    ]
    with jax.set_mesh(model.mesh):
        found = of_tokens(model.model, model.parameters, pairs)
    nats = np.concatenate([-sure.astype(np.float64) for sure, _ in found])
    return Read(name, over_bytes(nats / math.log(2), own, model.tokenizer, text, name))


def over_bytes(bits: np.ndarray, ids: list[int], tokenizer: Tokenizer, text: str, name: str) -> np.ndarray:
    """Bits of tokens -> bits of bytes. Raises UserError where the tokens do not spell the text."""
    sizes, size = tokenizer.bytes_per_piece[ids].astype(np.int64), len(text.encode())
    if len(sizes) and 0 < (extra := int(sizes.sum()) - size) <= sizes[0]:
        sizes[0] -= extra  # the space that some tokenizers put before a text
    if sizes.sum() != size:
        raise UserError(f"{name}: its tokens are {sizes.sum():,} bytes of these {size:,}: it loses some of the text")
    kept = sizes > 0
    per_byte = np.repeat(bits[kept] / sizes[kept], sizes[kept])
    place = np.minimum(np.cumsum(sizes) - sizes, size - 1)[~kept]  # what stands for no byte counts at the next one
    np.add.at(per_byte, place, bits[~kept])
    return per_byte


def held_out_text(name: str, num_bytes: int) -> str:
    """The first validation documents of a run, about so many bytes of them."""
    found = load_model.locate(name)
    mixed = open_data(found.config, print)
    text = ""
    for corpus in mixed.corpora.values():
        split = corpus.splits["validation"]
        for start, end in itertools.pairwise(split.offsets.tolist()):
            text += mixed.tokenizer.decode(split.tokens[start:end]) + "\n"
            if len(text.encode()) >= num_bytes:
                return text[:num_bytes]
    if not text:
        raise UserError(f"{name} has no validation text: give --text FILE")
    return text


def write(path: str, names: list[str], text_file: str, num_bytes: int) -> str:
    """Writes the page of two MODELs on a text ("": validation text of the first). Returns a line that says what came out."""
    if len(names) != 2:
        raise UserError(f"--bytes compares two runs, here are {len(names)}")
    text = epath.Path(text_file).read_text()[:num_bytes] if text_file else held_out_text(names[0], num_bytes)
    if not text:
        raise UserError(f"--text {text_file} is empty")
    a, b = (read(name, text) for name in names)
    epath.Path(path).write_text(page(text, a, b, text_file or f"validation text of {names[0]}"))
    return f"{a.bits.mean():.4f} and {b.bits.mean():.4f} bits a byte: {path}"


def page(text: str, a: Read, b: Read, source: str) -> str:
    """The page: numbers, by kind of character, the passages that differ most, and the text under its colours."""
    lengths = np.array([len(c.encode()) for c in text])
    starts = np.cumsum(lengths) - lengths
    of_a, of_b = (np.add.reduceat(one.bits, starts) for one in (a, b))  # bits of each character
    places = [(sign, passages(sign * (of_a - of_b))) for sign in (1, -1)]
    anchors = {start for _, found in places for start, _ in found}
    parts = [
        STYLE,
        f"<p>A is <b>{html.escape(a.name)}</b>, B is <b>{html.escape(b.name)}</b>; {len(a.bits):,} bytes, "
        f"{html.escape(source)}. Bits are of a byte: less is better.</p>",
        _kinds(text, lengths, of_a, of_b),
        *(_passages(text, found, "B" if sign > 0 else "A", of_a, of_b) for sign, found in places),
        "<h2>The text</h2>",
        _legend(),
        f'<pre class="text">{"".join(_spans(text, lengths, of_a, of_b, anchors))}</pre>',
    ]
    return document("Where B beats A", "".join(parts))


def _kinds(text: str, lengths: np.ndarray, of_a: np.ndarray, of_b: np.ndarray) -> str:
    kind_of = np.array([next(i for i, holds in enumerate(KINDS.values()) if holds(c)) for c in text])
    rows = []
    for name, chosen in [("all", kind_of >= 0), *((name, kind_of == i) for i, name in enumerate(KINDS))]:
        if size := int(lengths[chosen].sum()):
            bits_a, bits_b = of_a[chosen].sum() / size, of_b[chosen].sum() / size
            share = lengths[chosen & (of_b < of_a)].sum() / size
            rows.append(
                [name, f"{size:,}", f"{bits_a:.3f}", f"{bits_b:.3f}", f"{bits_a - bits_b:+.3f}", f"{share:.0%}"]
            )
    return table(["characters", "bytes", "A", "B", "A - B", "B is better on"], rows, 5)


def passages(gain: np.ndarray) -> list[tuple[int, float]]:
    """(first character, bits won) of the passages in which most is won, the best first; none overlaps another."""
    size = min(PASSAGE, len(gain))
    sums = np.convolve(gain, np.ones(size), "valid")
    found: list[tuple[int, float]] = []
    for start in np.argsort(-sums, kind="stable").tolist():
        if len(found) == SHOWN or sums[start] <= 0:
            break
        if all(abs(start - other) >= size for other, _ in found):
            found.append((start, float(sums[start])))
    return found


def _passages(text: str, found: list[tuple[int, float]], who: str, of_a: np.ndarray, of_b: np.ndarray) -> str:
    if not found:
        return f"<h2>Nowhere is {who} better</h2>"
    rows = []
    for start, won in found:
        part = slice(start, start + PASSAGE)
        shown = html.escape(text[part]).replace("\n", "⏎")
        rows.append(
            [f'<a href="#c{start}">{shown}</a>', f"{of_a[part].sum():.1f}", f"{of_b[part].sum():.1f}", f"{won:.1f}"]
        )
    return f"<h2>Where {who} wins most</h2>" + table(["passage", "bits of A", "of B", f"{who} saves"], rows, 3)


def _legend() -> str:
    words = [f"by {low:g}" for low in STEPS]
    marks = [
        f'<span class="{side}{i}">&nbsp;{side.upper()} {words[i - 1]}&nbsp;</span>' for side in "ab" for i in (1, 2, 3)
    ]
    return f'<p class="soft">Better, in bits a byte, by at least: {" ".join(marks)}</p>'


def _spans(text: str, lengths: np.ndarray, of_a: np.ndarray, of_b: np.ndarray, anchors: set[int]) -> Iterator[str]:
    """The text as HTML: neighbours that have the same bits, which are those of one token, under one colour."""
    per_byte = np.round(np.stack([of_a, of_b]) / lengths, 3)
    begins = np.flatnonzero(np.any(np.diff(per_byte, axis=1, prepend=np.inf) != 0, axis=0))
    begins = np.array(sorted({*begins.tolist(), *anchors}))
    for start, end in itertools.pairwise([*begins.tolist(), len(text)]):
        mine, its = per_byte[:, start].tolist()
        level = sum(abs(mine - its) >= step for step in STEPS)
        kind = f' class="{"b" if its < mine else "a"}{level}"' * bool(level)
        anchor = f' id="c{start}"' * (start in anchors)
        shown = html.escape("".join(c if c.isprintable() or c in "\n\t" else "·" for c in text[start:end]))
        shown = shown.replace("\n", '<span class="end">⏎</span>\n')
        yield f'<span{kind}{anchor} title="A {mine:.2f}, B {its:.2f} bits a byte">{shown}</span>'
