"""Exact evaluation of a held-out split: every token once, whatever the batch; `python -m lm_jax.evaluate --model MODEL`."""

import argparse
import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax import cli, distributed, load_model, run_folder
from lm_jax.config import Config, Mesh
from lm_jax.data import loader, mixture, packing
from lm_jax.data.tokenizer import Tokenizer, tell_losses
from lm_jax.distributed import block_on_cpu
from lm_jax.errors import UserError
from lm_jax.loss import batch_loss
from lm_jax.mesh import batch_shards, make_mesh
from lm_jax.model.build import ModelDef
from lm_jax.model_config import OBJECTIVES
from lm_jax.multihost import peers
from lm_jax.terminal import Terminal


def open_data(config: Config, log: Callable[[str], None] = lambda line: None) -> mixture.Mixture:
    """The corpora of a config, or the records of its task. Where a run of a task begins to need `tasks`."""
    if not config.train.task:
        return mixture.open_mixture(config.data, log)
    from lm_jax.tasks.records import open_records

    return open_records(config, log)


def check_scores(config: Config) -> None:
    """Raises UserError where the package is missing that counts the scores of written texts."""
    if config.evaluate.metrics:
        from lm_jax.tasks import scores

        scores.check(config.evaluate.metrics)


def check_tokenizer(found: load_model.ModelRef, mixed: mixture.Mixture) -> None:
    """Raises UserError where the corpus was tokenised by another tokenizer than the model's."""
    if found.tokenizer.fingerprint != mixed.tokenizer.fingerprint:
        raise UserError(
            f"the corpus {', '.join(mixed.sources)} was tokenised by another tokenizer than {found.workdir}'s"
        )


class Totals(NamedTuple):
    """Sums over the tokens of some rows, and the results of a task."""

    loss: float  # nats
    tokens: float
    num_bytes: float  # of the text of these tokens; 0: not known, or only a part of the text is predicted
    results: tuple = ()  # one for each record

    def metrics(self, prefix: str) -> dict[str, float]:
        mean = self.loss / max(self.tokens, 1)
        if self.results:
            return {f"{prefix}/loss": mean}
        found = {f"{prefix}/loss": mean, f"{prefix}/perplexity": math.exp(min(mean, 700))}
        if self.num_bytes:
            found[f"{prefix}/bits_per_byte"] = self.loss / math.log(2) / self.num_bytes
        return found


def by_source(totals: dict[str, Totals], prefix: str, task: mixture.Task | None = None) -> dict[str, float]:
    """Metrics of the whole, and where there are several sources of each: `eval/loss`, `eval/<source>/loss`, ...

    `task` scores the results, where there is one.
    """
    whole = added(list(totals.values()))
    if any(part.tokens and not part.num_bytes for part in totals.values()):
        whole = whole._replace(num_bytes=0.0)
    found = whole.metrics(prefix)
    found |= {f"{prefix}/{name}": value for name, value in task.scores(whole.results).items()} if task else {}
    for source, part in totals.items() if len(totals) > 1 else ():
        found |= part.metrics(f"{prefix}/{source}")
    return found


def added(parts: Sequence[tuple]) -> Totals:
    """The totals of parts (loss, tokens, bytes, results), added in float64 without rounding errors between."""
    loss, tokens, num_bytes = (math.fsum(float(part[i]) for part in parts) for i in range(3))
    return Totals(loss, tokens, num_bytes, tuple(itertools.chain.from_iterable(part[3] for part in parts)))


class Evaluator:
    """Adds up rows in batches of `size`, by one compiled program; the last batch is filled with rows whose mask is 0.

    Bytes are those of the original text: of all rows as they were counted when it was read, of some rows the bytes of their
    tokens, where the tokenizer's add up to the text.
    """

    def __init__(self, graph: ModelDef, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, size: int):
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
            *sums, answers_BTC = block_on_cpu(self._sums(parameters, batch))
            results: list = []
            if answers_BTC is not None:
                assert not isinstance(limited, packing.HeldOutRows)
                of_rows = enumerate(np.asarray(answers_BTC), len(parts) * self.size)
                results = [result for row, answers_TC in of_rows for result in limited.results(row, answers_TC)]
            parts.append((*sums, results))
            watch(min(wanted, len(parts) * self.size), wanted)
        totals = added(parts)
        if self._reads_all and isinstance(rows, packing.HeldOutRows) and wanted == rows.num_rows:
            totals = totals._replace(num_bytes=rows.split.num_bytes)
        if isinstance(limited, packing.HeldOutRows):
            return totals
        return totals._replace(results=limited.joined(totals.results))


# Shape suffixes: B batch, T length, C outputs of a task's head.
def batch_sums(graph: ModelDef, bytes_per_piece: np.ndarray, parameters: dict, batch: dict) -> tuple:
    """(loss, tokens, bytes) of a batch, float32 [] each, and what a task's head answered, [B, T, C] on every process, or None."""
    found, mask_BT = batch_loss(graph, parameters, batch), batch["loss_mask"]
    if found.answers_BTC is not None:
        everywhere = jax.sharding.reshard(found.answers_BTC, jax.sharding.PartitionSpec())
        return found.loss, mask_BT.sum(), jnp.zeros(()), everywhere
    if graph.config.kind in OBJECTIVES:
        return found.loss, mask_BT.sum(), jnp.zeros(()), None
    sizes, layout = jnp.asarray(bytes_per_piece, jnp.float32), jax.typeof(batch["targets"]).sharding
    sizes_BT = sizes.at[batch["targets"]].get(out_sharding=layout)
    return found.loss, mask_BT.sum(), (sizes_BT * mask_BT).sum(), None


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags. Raises UserError."""
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
    return flags


def main(arguments: list[str]) -> int:
    flags, log = parse(arguments), Terminal()
    devices = distributed.devices()  # of several processes each verifies its share of the model
    found = load_model.locate(flags.model, log)
    tell_losses(found.tokenizer, log)
    mesh = make_mesh(Mesh(slices=-1), devices)
    check_scores(found.config)
    if not found.config.evaluate.metrics and (flags.beams > 1 or flags.records):
        raise UserError(
            "--beams and --records are of the texts that a model writes, and config.evaluate.metrics says none here"
        )
    mixed = open_data(found.config, log)
    check_tokenizer(found, mixed)
    peers.compare(vars(flags) | {"step": found.step} | run_folder.outside() | peers.own_code() | mixed.alike)
    if mixed.task and mixed.task.compares:
        from lm_jax.tasks import dpo_reference

        dpo_reference.resume(mixed, found.config, found.workdir)
    rows = mixed.held(found.config.data, flags.split)
    with jax.set_mesh(mesh):
        graph, parameters = load_model.load_parameters(found)
        size = flags.batch_size * batch_shards(dict(mesh.shape))
        evaluator = Evaluator(graph, mesh, mixed.tokenizer, size)
        watch = lambda done, of: log.progress(f"row {done} of {of}")
        totals = {name: evaluator(parameters, held, watch=watch) for name, held in rows.items()}
        kind, kept = mixed.task.kept(added(list(totals.values())).results) if mixed.task else ("", ())
        if found.config.evaluate.metrics:
            from lm_jax.tasks import generate_answers

            watch = lambda done, of: log.progress(f"writing: record {done} of {of}")
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
    log(json.dumps(result))
    return 0


if __name__ == "__main__":
    cli.run_command(main)
