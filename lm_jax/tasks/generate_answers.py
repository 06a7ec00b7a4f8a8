"""The texts that a model writes for held-out records of a task, and their scores."""

from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from lm_jax.generate.beam_search import search
from lm_jax.generate.decoding import complete
from lm_jax.generate.request_batches import Watch, request_batches
from lm_jax.model.build import Graph
from lm_jax.sharding import batch_shards

TOGETHER = 16  # records of a device that are answered at the same time


def written(
    graph: Graph,
    parameters: dict,
    mixed: Any,
    split: str,
    num: int = 0,
    beams: int = 1,
    watch: Watch = lambda done, of: None,
) -> tuple:
    """Results of the first `num` records of a split (0: all), in their order: the record's answer and the model's.

    Greedy, or the best of `beams`. An answer may be as long as the longest that was trained on, at most half a row where the
    question has the other half. Equally long questions are answered together, so that few programs serve all.
    """
    task, by, records = mixed.task, mixed.tokenizer, mixed.records[split]
    values, sees = records.values[: num or None], graph.sequence_length
    reads = graph.config.kind == "encoder_decoder"
    limit = min(mixed.longest_answer, sees if reads else sees // 2)
    questions = [task.question(value, by, sees if reads else sees - limit) for value in values]
    marks = mixed.special_ids
    found = [""] * len(values)
    order = sorted(range(len(values)), key=lambda k: len(questions[k]))
    size = min(len(order), TOGETHER * batch_shards(dict(jax.sharding.get_mesh().shape)))
    for batch in request_batches(order, size, watch=watch):
        asked = [questions[k] for k in batch.padded]
        if beams > 1:
            completions = search(graph, parameters, by, asked, limit, beams, marks=marks)
        else:
            completions = complete(graph, parameters, by, asked, limit, marks=marks)
        for k, completion in zip(batch.requests, completions, strict=False):
            found[k] = completion.text
    pairs = zip(records.where, values, found, strict=False)
    return tuple(task.written(where, value, text) for where, value, text in pairs)


def check(kind: str) -> None:
    """Raises UserError where the package is missing that counts the scores of a kind."""
    from lm_jax.tasks.scores import check

    check(kind)


def scores(kind: str, results: Sequence) -> dict[str, float]:
    """The scores of a kind (config.evaluate.metrics). Raises UserError where the package that counts them is missing."""
    from lm_jax.tasks.results import measures_of
    from lm_jax.tasks.scores import values

    return values(measures_of(kind, results), len(results))


def keep(workdir: epath.Path, split: str, kind: str, results: Sequence, about: dict[str, Any]) -> dict[str, float]:
    """`scores`, and beside the run every answer and the scores with their intervals (lm_jax/tasks/results.py)."""
    from lm_jax.tasks.results import Result, write

    sure = lambda result: result.confidence if kind == "labels" and result.confidence else None
    plain = [Result(result.record, result.truth, result.prediction, sure(result)) for result in results]
    return write(workdir, split, kind, plain, about)
