"""Contamination: what of an evaluation set stands in the text, found by runs of 13 words and told for each set."""

from collections import defaultdict
from collections.abc import Iterator

from lm_jax.data import lines
from lm_jax.data.source_kinds import kind_of
from lm_jax.errors import UserError
from lm_jax.prepare import clean, readers
from lm_jax.prepare.readers import Bad, Document
from lm_jax.prepare.report import Tally


class Overlap:
    """Counts documents that share runs of NGRAM words with evaluation sets, and drops them where `remove`."""

    def __init__(self, tally: Tally, paths: tuple[str, ...], text_key: str, remove: bool):
        self.tally, self.paths, self.text_key, self.remove = tally, paths, text_key, remove
        self.index: dict[str, list[tuple[str, int]]] = {}

    def __call__(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Documents; what they share with evaluation sets is counted."""
        self.index = self.index or evaluation_index(self.paths, self.text_key)[0]
        for document in data:
            items = {item for ngram in clean.ngrams(document.text) for item in self.index.get(ngram, ())}
            for source in sorted({source for source, _ in items}):
                self.tally.find(source, 1, (number for at, number in items if at == source))
            if items and self.remove:
                self.tally.drop(f"contaminated: {min(source for source, _ in items)}", document.id, document.text)
            else:
                yield document


def evaluation_index(paths: tuple[str, ...], text_key: str) -> tuple[dict, dict[str, dict[str, int]]]:
    """({n-gram: [(set, item)]}, {set: items and how many of them are too short}). All strings of a JSON record count."""
    index: dict[str, list[tuple[str, int]]] = defaultdict(list)
    sizes = {}
    for file in readers.find(paths):
        short = number = 0
        for number, text in enumerate(evaluation_items(file.path, text_key), 1):
            found = clean.ngrams(text)
            short += not found
            for ngram in set(found):
                index[ngram].append((file.path, number))
        sizes[file.path] = {"items": number, "too_short": short}
    return dict(index), sizes


def evaluation_items(path: str, text_key: str) -> Iterator[str]:
    """The text of each item; of a record in a table all its strings, so that question and answer are one item."""
    if kind_of(path) not in lines.KINDS:
        for record in readers.records(path, text_key):
            if isinstance(record, Bad):
                raise UserError(f"--decontaminate {record.id}: {record.reason}")
            yield record.text
        return
    try:
        with readers.opened(path) as file:
            for row in lines.rows(file, kind_of(path)):
                if isinstance(row, lines.Wrong):
                    raise UserError(f"--decontaminate {path}:{row.number}: {row.reason}")
                yield "\n".join(lines.strings(row.content))
    except (*readers.DAMAGE, OSError) as error:
        raise UserError(f"--decontaminate {path} cannot be read: {error}") from None


def summary(paths: tuple[str, ...], text_key: str, tally: Tally) -> dict[str, dict[str, int]]:
    """For each evaluation set: items, those too short to tell, those found in the text, documents that hold one."""
    if not paths:
        return {}
    _, sizes = evaluation_index(paths, text_key)
    found = {name: tally.found.get(name, {"documents": 0, "items": []}) for name in sizes}
    return {
        name: {**size, "found": len(found[name]["items"]), "documents": found[name]["documents"]}
        for name, size in sizes.items()
    }
