"""Exact evaluation of a held-out split: every token once, whatever the batch; `python -m lm_jax.evaluate --model MODEL`."""

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax import checkpoint, cli, distributed
from lm_jax.config import OBJECTIVES, Config, Mesh
from lm_jax.data import loader, mixture, packing
from lm_jax.data.tokenizer import Tokenizer, tell_losses
from lm_jax.distributed import settle
from lm_jax.loss import loss_sum, preferences
from lm_jax.model.build import Graph
from lm_jax.model.task_heads import losses
from lm_jax.multihost import peers
from lm_jax.sharding import batch_shards, make_mesh
from lm_jax.terminal import Terminal


def open_data(config: Config, say: Callable[[str], None] = lambda line: None) -> mixture.Mixture:
    """The corpora of a config, or the records of its task. The one place where the core looks up `tasks`."""
    if not config.train.task:
        return mixture.open_mixture(config.data, say)
    from lm_jax.tasks.records import open_records

    return open_records(config, say)


class Totals(NamedTuple):
    """Sums over tokens: loss in nats, tokens, and the bytes of text that these tokens stand for (0: not all of a text, or not
    known); and what a task's head made of each record."""

    loss: float
    tokens: float
    num_bytes: float
    results: tuple = ()

    def metrics(self, prefix: str) -> dict[str, float]:
        mean = self.loss / max(self.tokens, 1)
        if self.results:
            return {f"{prefix}/loss": mean}
        found = {f"{prefix}/loss": mean, f"{prefix}/perplexity": math.exp(min(mean, 700))}
        if self.num_bytes:  # else not every byte of the text was to be predicted
            found[f"{prefix}/bits_per_byte"] = self.loss / math.log(2) / self.num_bytes
        return found


def by_source(totals: dict[str, Totals], prefix: str, task: mixture.Task | None = None) -> dict[str, float]:
    """Metrics of the whole, and where there are several sources of each: `eval/loss`, `eval/<source>/loss`, ...

    `task` scores the results, where there is one.
    """
    whole = added(list(totals.values()))
    if any(part.tokens and not part.num_bytes for part in totals.values()):  # bytes of a part are not known
        whole = whole._replace(num_bytes=0.0)
    found = whole.metrics(prefix)
    found |= {f"{prefix}/{name}": value for name, value in task.scores(whole.results).items()} if task else {}
    for source, part in totals.items() if len(totals) > 1 else ():
        found |= part.metrics(f"{prefix}/{source}")
    return found


def added(parts: Sequence[tuple]) -> Totals:
    loss, tokens, num_bytes = (math.fsum(float(part[i]) for part in parts) for i in range(3))
    return Totals(loss, tokens, num_bytes, tuple(itertools.chain.from_iterable(part[3] for part in parts)))


class Evaluator:
    """One compiled program that adds up a batch; a batch that is not full is padded with rows that count nothing.

    Bytes are those of the text itself: of a whole corpus as they were read, of some rows by their pieces, if these add up.
    """

    def __init__(self, graph: Graph, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, size: int):
        self.mesh, self.size = mesh, size
        self._reads_all = graph.config.kind not in OBJECTIVES and not graph.config.head
        sizes = tokenizer.bytes_per_piece * tokenizer.adds_up
        self._sums = jax.jit(functools.partial(batch_sums, graph, sizes))

    def __call__(
        self,
        parameters: dict,
        rows: packing.HeldOutRows | mixture.RecordRows,
        num_rows: int = 0,
        watch: Callable = lambda done, of: None,
    ) -> Totals:
        """Totals over the first `num_rows` rows (0: all). `watch(done, of)` is called after every batch."""
        wanted = min(num_rows or rows.num_rows, rows.num_rows)
        limited = rows.first(wanted)
        parts: list[tuple] = []
        for batch in loader.batches(limited, self.mesh, 0, -(-wanted // self.size), self.size):
            *sums, logits = settle(self._sums(parameters, batch))
            results: list = []
            if logits is not None:
                assert not isinstance(limited, packing.HeldOutRows)
                results = results_of(limited, len(parts) * self.size, np.asarray(logits))
            parts.append((*sums, results))
            watch(min(wanted, len(parts) * self.size), wanted)
        totals = added(parts)
        if self._reads_all and isinstance(rows, packing.HeldOutRows) and wanted == rows.num_rows:
            totals = totals._replace(num_bytes=rows.split.num_bytes)
        if isinstance(limited, packing.HeldOutRows):
            return totals
        return totals._replace(results=limited.joined(totals.results))


def results_of(rows: mixture.RecordRows, first: int, logits_BTC: np.ndarray) -> list:
    """What the logits of rows [first, first + B) say of the records in them, in their order."""
    return [result for i, logits_TC in enumerate(logits_BTC) for result in rows.results(first + i, logits_TC)]


def batch_sums(graph: Graph, bytes_per_piece: np.ndarray, parameters: dict, batch: dict) -> tuple:
    """(loss, tokens, bytes) of a batch, float32 [] each, and the logits [B, T, C] of a task's head, or margins of pairs
    [B, T, 1], on every process."""
    if graph.config.head:
        labels_BTC, mask_BT = graph.module(parameters).read(batch).labels_BTC, batch["loss_mask"]
        assert labels_BTC is not None
        loss = (losses(graph.config.head, labels_BTC, batch) * mask_BT).sum()
        everywhere = jax.sharding.reshard(labels_BTC, jax.sharding.PartitionSpec())
        return loss, mask_BT.sum(), jnp.zeros(()), everywhere
    if "reference" in batch:
        model, mask_BT = graph.module(parameters), batch["loss_mask"]
        hidden_BTD = model.read(batch).hidden_BTD
        assert hidden_BTD is not None
        margins_BT = preferences(model, hidden_BTD, batch)
        everywhere = jax.sharding.reshard(margins_BT[:, :, None], jax.sharding.PartitionSpec())
        return (jax.nn.softplus(-margins_BT) * mask_BT).sum(), mask_BT.sum(), jnp.zeros(()), everywhere
    loss = loss_sum(graph, parameters, batch)
    if graph.config.kind in OBJECTIVES:
        return (loss, batch["loss_mask"].sum(), jnp.zeros(()), None)
    sizes_BT = (
        jnp.asarray(bytes_per_piece, jnp.float32)
        .at[batch["targets"]]
        .get(out_sharding=jax.typeof(batch["targets"]).sharding)
    )
    return (loss, batch["loss_mask"].sum(), (sizes_BT * batch["loss_mask"]).sum(), None)


def main(arguments: list[str]) -> int:
    parser = cli.Parser("lm_jax.evaluate", __doc__)
    parser.add_argument(
        "--model", required=True, help="a run (runs/x), a step of it (runs/x@12000), or a Hugging Face folder"
    )
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    parser.add_argument("--beams", type=int, default=1, help="texts that beam search follows at once; 1 = greedy")
    parser.add_argument("--records", type=int, default=0, help="of written texts, the first of the split; 0 = all")
    parser.add_argument(
        "--batch_size", type=int, default=8, help="rows at a time on a device; the result does not depend on it"
    )
    flags = parser.parse_args(arguments)
    if flags.batch_size < 1:
        parser.error(f"--batch_size {flags.batch_size}: at least 1")
    if not 1 <= flags.beams <= 64 or flags.records < 0:
        parser.error("--beams is from 1 to 64, --records at least 0")
    say = Terminal()
    devices = distributed.devices()  # of several processes each verifies its share of the model
    found = checkpoint.locate(flags.model, say)
    tell_losses(found.tokenizer, say)
    mesh = make_mesh(Mesh(slices=-1), devices)
    if found.config.evaluate.metrics:
        from lm_jax.tasks import scores

        scores.check(found.config.evaluate.metrics)
    elif flags.beams > 1 or flags.records:
        parser.error(
            "--beams and --records are of the texts that a model writes, and config.evaluate.metrics says none here"
        )
    mixed = open_data(found.config, say)
    cli.check_tokenizer(found, mixed)
    peers.compare(vars(flags) | {"step": found.step} | checkpoint.outside() | peers.own_code() | mixed.alike)
    if mixed.task and mixed.task.compares:
        from lm_jax.tasks import dpo_reference

        dpo_reference.resume(mixed, found.config, found.workdir)
    rows = mixed.held(found.config.data, flags.split)
    with jax.set_mesh(mesh):
        graph, parameters = checkpoint.load_parameters(found)
        size = flags.batch_size * batch_shards(dict(mesh.shape))
        evaluator = Evaluator(graph, mesh, mixed.tokenizer, size)
        watch = lambda done, of: say.progress(f"row {done} of {of}")
        totals = {name: evaluator(parameters, held, watch=watch) for name, held in rows.items()}
        kind, kept = mixed.task.kept(added(list(totals.values())).results) if mixed.task else ("", ())
        if found.config.evaluate.metrics:
            from lm_jax.tasks import generate_answers

            watch = lambda done, of: say.progress(f"writing: record {done} of {of}")
            kept = generate_answers.written(graph, parameters, mixed, flags.split, flags.records, flags.beams, watch)
    documents = sum(len(totals[name].results) or held.split.num_documents for name, held in rows.items())
    result = {"model": flags.model, "step": found.step, "split": flags.split, "documents": documents}
    if not found.config.train.task:
        result["tokens"] = sum(int(part.tokens) for part in totals.values())
        result["bytes"] = sum(int(part.num_bytes) for part in totals.values())
    result |= by_source(totals, "eval", mixed.task)
    kind = found.config.evaluate.metrics or kind
    if kind and kept:
        from lm_jax.tasks import results

        about = {"model": flags.model, "step": found.step}
        scored = results.write(found.workdir, flags.split, kind, kept, about)
        result |= {"records": len(kept)} | {f"eval/{name}": value for name, value in scored.items()}
    say(json.dumps(result))
    return 0


if __name__ == "__main__":
    cli.door(main)
