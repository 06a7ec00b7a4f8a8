"""Exact evaluation of held-out rows: sums over every token once, whatever the batch; loss, perplexity, bits per byte.

Shape suffixes: B batch, T length, C outputs of a task's head.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.data import loader, mixture, packing
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.distributed import block_on_cpu
from lm_jax.loss import batch_loss
from lm_jax.model.build import ModelDef
from lm_jax.model_config import OBJECTIVES


class Totals(NamedTuple):
    """Sums over the tokens of rows, and the results of a task."""

    loss: float  # nats
    tokens: float
    num_bytes: float  # of the text of these tokens; 0: not known, or only a part of the text is predicted
    results: tuple = ()  # one for each record

    def metrics(self, prefix: str) -> dict[str, float]:
        """{"<prefix>/loss": nats per token, ...}: also perplexity and bits per byte, but not of a task's results."""
        mean = self.loss / max(self.tokens, 1)
        if self.results:
            return {f"{prefix}/loss": mean}
        found = {f"{prefix}/loss": mean, f"{prefix}/perplexity": math.exp(min(mean, 700))}
        if self.num_bytes:
            found[f"{prefix}/bits_per_byte"] = self.loss / math.log(2) / self.num_bytes
        return found


def by_source(
    totals: dict[str, Totals], prefix: str, task: mixture.Task | None = None, shares: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Metrics of the whole, and where there are several sources of each: `eval/loss`, `eval/<source>/loss`, ...

    `task` scores the results, where there is one. The whole counts every token once; `eval/weighted_loss` counts the losses of
    the sources by `shares`, as they are trained.
    """
    whole = added(list(totals.values()))
    if any(part.tokens and not part.num_bytes for part in totals.values()):
        whole = whole._replace(num_bytes=0.0)
    found = whole.metrics(prefix)
    found |= {f"{prefix}/{name}": value for name, value in task.scores(whole.results).items()} if task else {}
    if shares and len(totals) > 1 and (weight := sum(shares.get(source, 0.0) for source in totals)):
        weighted = (shares.get(source, 0.0) * part.loss / max(part.tokens, 1) for source, part in totals.items())
        found[f"{prefix}/weighted_loss"] = sum(weighted) / weight
    for source, part in totals.items() if len(totals) > 1 else ():
        found |= part.metrics(f"{prefix}/{source}")
    return found


def added(parts: Sequence[tuple]) -> Totals:
    """The totals of parts (loss, tokens, bytes, results), added in float64 with one rounding."""
    loss, tokens, num_bytes = (math.fsum(float(part[i]) for part in parts) for i in range(3))
    return Totals(loss, tokens, num_bytes, tuple(itertools.chain.from_iterable(part[3] for part in parts)))


class Evaluator:
    """Adds up rows in batches of `size`, by one compiled program; the last batch is filled with rows whose mask is 0.

    Bytes are those of the original text. Those of a whole split were counted when the text was read; those of a part of it
    are the bytes of its tokens, with tokenizers whose tokens add up to the text.
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


def batch_sums(graph: ModelDef, bytes_per_piece: np.ndarray, parameters: dict, batch: dict) -> tuple:
    """(loss, tokens, bytes) of a batch, float32 [] each, and the outputs of a task's head, [B, T, C] on every device, or None."""
    found, mask_BT = batch_loss(graph, parameters, batch), batch["loss_mask"]
    if found.answers_BTC is not None:
        everywhere = jax.sharding.reshard(found.answers_BTC, jax.sharding.PartitionSpec())
        return found.loss, mask_BT.sum(), jnp.zeros(()), everywhere
    if graph.config.kind in OBJECTIVES:
        return found.loss, mask_BT.sum(), jnp.zeros(()), None
    sizes, layout = jnp.asarray(bytes_per_piece, jnp.float32), jax.typeof(batch["targets"]).sharding
    sizes_BT = sizes.at[batch["targets"]].get(out_sharding=layout)
    return found.loss, mask_BT.sum(), (sizes_BT * mask_BT).sum(), None
