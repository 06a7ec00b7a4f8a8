"""A picture of a run's loss, from its metrics.jsonl: `python tools/plot_curve.py runs/quickstart docs/quickstart.png`."""

import gzip
import lzma
import sys

import matplotlib
import numpy as np
from etils import epath

from lm_jax import load_model, metrics_file
from lm_jax.data.corpus import open_corpus

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


def main(workdir: str, picture: str) -> None:
    lines = metrics_file.read(epath.Path(workdir))
    training, held_out = (metrics_file.series(lines, name) for name in ("train/loss", "eval/bits_per_byte"))
    split = open_corpus(load_model.locate(workdir).config.data)
    text = split.tokenizer.decode(np.asarray(split.splits["validation"].tokens)).encode()
    _, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(*zip(*training, strict=True), color="tab:blue")
    left.set(xlabel="step", ylabel="training loss, nats per token")
    right.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="lm_jax")
    for name, size in (("gzip -9", len(gzip.compress(text, 9))), ("xz -9", len(lzma.compress(text, preset=9)))):
        right.axhline(8 * size / len(text), color="gray", linestyle=":" if name.startswith("xz") else "--", label=name)
    right.set(xlabel="step", ylabel="validation text, bits per byte")
    right.legend()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    pyplot.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
