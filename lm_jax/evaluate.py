"""Exact evaluation of a held-out split: every token once, whatever the batch; `python -m lm_jax.evaluate --model MODEL`."""

import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax import checkpoint, command, distributed
from lm_jax.config import OBJECTIVES, Config, Mesh
from lm_jax.data import mixture, packing, pipeline
from lm_jax.distributed import settle
from lm_jax.loss import label_losses, loss_sum
from lm_jax.model.graph import Graph
from lm_jax.sharding import batch_shards, make_mesh
from lm_jax.terminal import Terminal


def open_data(config: Config, say: Callable[[str], None] = lambda line: None) -> mixture.Mixture:
    """The corpora of a config, or the records of its task. The one place where the core looks up `tasks`."""
    if not config.train.task:
        return mixture.open_mixture(config.data, say)
    from lm_jax.tasks import classification

    return classification.open_records(config, say)


class Totals(NamedTuple):
    """Sums over tokens: loss in nats, tokens, and the bytes of text that these tokens stand for (0: not all of a text).

    Where a task's labels are predicted, a token is a record, and `confusion` [label, prediction] counts them.
    """

    loss: float
    tokens: float
    num_bytes: float
    confusion: np.ndarray = np.zeros((0, 0))

    def metrics(self, prefix: str) -> dict[str, float]:
        mean = self.loss / max(self.tokens, 1)
        if self.confusion.size:
            return {f"{prefix}/loss": mean} | {f"{prefix}/{k}": v for k, v in label_scores(self.confusion).items()}
        found = {f"{prefix}/loss": mean, f"{prefix}/perplexity": math.exp(min(mean, 700))}
        if self.num_bytes:  # else not every byte of the text was to be predicted
            found[f"{prefix}/bits_per_byte"] = self.loss / math.log(2) / self.num_bytes
        return found


def label_scores(confusion_CC: np.ndarray) -> dict[str, float]:
    """Accuracy, macro-F1 and Matthews correlation of counts [label, prediction].

    F1 = 2 TP / (2 TP + FP + FN) of each label that stands or is predicted, then their mean. Matthews for any number of labels
    (Gorodkin, doi:10.1016/j.compbiolchem.2004.09.006): the covariance of truth and prediction over the roots of their
    variances; 0 where one of them never changes.
    """
    counts = np.asarray(confusion_CC, np.float64)
    of_label, of_prediction, total, right = counts.sum(1), counts.sum(0), counts.sum(), np.trace(counts)
    seen = (of_label + of_prediction) > 0
    f1 = 2 * np.diag(counts)[seen] / (of_label + of_prediction)[seen]
    spread = (total**2 - (of_label**2).sum()) * (total**2 - (of_prediction**2).sum())
    together = right * total - of_label @ of_prediction
    return {
        "accuracy": float(right / max(total, 1)),
        "macro_f1": float(f1.mean()) if seen.any() else 0.0,
        "matthews": float(together / math.sqrt(spread)) if spread else 0.0,
    }


def by_source(totals: dict[str, Totals], prefix: str) -> dict[str, float]:
    """Metrics of the whole, and where there are several sources of each: `eval/loss`, `eval/<source>/loss`, ..."""
    whole = added(list(totals.values()))
    found = whole.metrics(prefix)
    for source, part in totals.items() if len(totals) > 1 else ():
        found |= part.metrics(f"{prefix}/{source}")
    return found


def added(parts: Sequence[tuple]) -> Totals:
    loss, tokens, num_bytes = (math.fsum(float(part[i]) for part in parts) for i in range(3))
    return Totals(loss, tokens, num_bytes, np.sum([np.asarray(part[3], np.float64) for part in parts], axis=0))


class Evaluator:
    """One compiled program that adds up a batch; a batch that is not full is padded with rows that count nothing."""

    def __init__(self, graph: Graph, mesh: jax.sharding.Mesh, bytes_per_piece: np.ndarray, size: int):
        self.mesh, self.size = mesh, size
        self._sums = jax.jit(functools.partial(batch_sums, graph, bytes_per_piece))

    def __call__(
        self, parameters: dict, rows: packing.Held, num_rows: int = 0, watch: Callable = lambda done, of: None
    ):
        """Totals over the first `num_rows` rows (0: all). `watch(done, of)` is called after every batch."""
        wanted = min(num_rows or rows.num_rows, rows.num_rows)
        limited = rows.first(wanted)
        parts = []
        for batch in pipeline.batches(limited, self.mesh, 0, -(-wanted // self.size), self.size):
            parts.append(settle(self._sums(parameters, batch)))
            watch(min(wanted, len(parts) * self.size), wanted)
        return added(parts)


def batch_sums(graph: Graph, bytes_per_piece: np.ndarray, parameters: dict, batch: dict) -> tuple[jax.Array, ...]:
    """What `Totals` holds, of a batch."""
    if graph.config.labels:
        labels_BTC, mask_BT = graph.module(parameters).read(batch).labels_BTC, batch["loss_mask"]
        assert labels_BTC is not None
        loss = (label_losses(labels_BTC, batch["targets"]) * mask_BT).sum()
        one_hot = lambda x_BT: (x_BT[..., None] == jnp.arange(len(graph.config.labels))[None, None]).astype(jnp.float32)
        truth_BTC, predicted_BTC = one_hot(batch["targets"]) * mask_BT[..., None], one_hot(labels_BTC.argmax(-1))
        confusion = (truth_BTC[..., :, None] * predicted_BTC[..., None, :]).sum((0, 1))
        return (loss, mask_BT.sum(), jnp.zeros(()), confusion)
    loss, nothing = loss_sum(graph, parameters, batch), jnp.zeros((0, 0))
    if graph.config.kind in OBJECTIVES:
        return (loss, batch["loss_mask"].sum(), jnp.zeros(()), nothing)
    sizes_BT = (
        jnp.asarray(bytes_per_piece, jnp.float32)
        .at[batch["targets"]]
        .get(out_sharding=jax.typeof(batch["targets"]).sharding)
    )
    return (loss, batch["loss_mask"].sum(), (sizes_BT * batch["loss_mask"]).sum(), nothing)


def main(arguments: list[str]) -> int:
    parser = command.Parser("lm_jax.evaluate", __doc__)
    parser.add_argument(
        "--model", required=True, help="a run (runs/x), a step of it (runs/x@12000), or a Hugging Face folder"
    )
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    parser.add_argument(
        "--batch_size", type=int, default=8, help="rows at a time on a device; the result does not depend on it"
    )
    flags = parser.parse_args(arguments)
    if flags.batch_size < 1:
        parser.error(f"--batch_size {flags.batch_size}: at least 1")
    say = Terminal()
    found = checkpoint.locate(flags.model, say)
    devices = distributed.devices()
    mesh = make_mesh(Mesh(), devices)
    mixed = open_data(found.config, say)
    command.check_tokenizer(found, mixed)
    rows = mixed.held(found.config.data, flags.split)
    with jax.set_mesh(mesh):
        graph, parameters = checkpoint.load_parameters(found)
        size = flags.batch_size * batch_shards(dict(mesh.shape))
        evaluator = Evaluator(graph, mesh, mixed.tokenizer.bytes_per_piece, size)
        watch = lambda done, of: say.progress(f"row {done} of {of}")
        totals = {name: evaluator(parameters, held, watch=watch) for name, held in rows.items()}
    documents = sum(held.split.num_documents for held in rows.values())
    result = {"model": flags.model, "step": found.step, "split": flags.split, "documents": documents}
    if not found.config.train.task:
        result["tokens"] = sum(int(part.tokens) for part in totals.values())
        result["bytes"] = sum(int(part.num_bytes) for part in totals.values())
    result |= by_source(totals, "eval")
    say(json.dumps(result))
    return 0


if __name__ == "__main__":
    command.door(main)
