"""The texts that a model writes for held-out records of a task."""

import jax

from lm_jax.data.mixture import Mixture
from lm_jax.generate.beam_search import search
from lm_jax.generate.decoding import complete
from lm_jax.generate.request_batches import Watch, request_batches
from lm_jax.mesh import batch_shards
from lm_jax.model.build import ModelDef
from lm_jax.tasks.records import TaskData
from lm_jax.tasks.results import Result

TOGETHER = 16  # records of a device that are answered at the same time


def written(
    graph: ModelDef,
    parameters: dict,
    mixed: Mixture,
    split: str,
    num: int = 0,
    beams: int = 1,
    watch: Watch = lambda done, of: None,
) -> tuple[Result, ...]:
    """Generates answers to the first `num` records of a split (0: all); returns a result for each, in their order.

    Greedy, or the best of `beams`. An answer may be as long as the longest that was trained on, at most half a row
    where the question has the other half. Equally long questions are answered together, so that few programs serve all.
    `watch(done, of)` is called after every group of records.
    """
    assert isinstance(mixed, TaskData)
    task, tokenizer, records = mixed.task, mixed.tokenizer, mixed.records[split]
    values, sees = records.values[: num or None], graph.sequence_length
    reads = graph.config.kind == "encoder_decoder"
    limit = min(mixed.longest_answer, sees if reads else sees // 2)
    questions = [task.question(value, tokenizer, sees if reads else sees - limit) for value in values]
    marks = mixed.special_ids
    found = [""] * len(values)
    order = sorted(range(len(values)), key=lambda k: len(questions[k]))
    size = min(len(order), TOGETHER * batch_shards(dict(jax.sharding.get_mesh().shape)))
    for batch in request_batches(order, size, watch=watch):
        asked = [questions[k] for k in batch.padded]
        if beams > 1:
            completions = search(graph, parameters, tokenizer, asked, limit, beams, marks=marks)
        else:
            completions = complete(graph, parameters, tokenizer, asked, limit, marks=marks)
        for k, completion in zip(batch.requests, completions, strict=False):
            found[k] = completion.text
    pairs = zip(records.where, values, found, strict=False)
    return tuple(task.written(where, value, text) for where, value, text in pairs)
