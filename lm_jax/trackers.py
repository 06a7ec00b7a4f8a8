"""Where the numbers of a run are shown beside `metrics.jsonl`: TensorBoard, and trackers of experiments.

Each works without a network: wandb keeps an offline run where nobody is logged in, mlflow a database where no
`MLFLOW_TRACKING_URI` is set, trackio another. They get scalars, samples and the config, no environment, no output, no code.
"""

import contextlib
import functools
import html
import importlib.util
import json
import math
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from etils import epath
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lm_jax.errors import needs
from lm_jax.files import write_whole

FILE = "trackers.json"  # {"id": of the run, "sent": {tracker: {scalar: last step}}, "runs": {tracker: the id that it gave}}
PROJECT = "lm_jax"
ONE_CHART = {
    "loss": ("train/loss", "eval/loss"),
    "bits per byte": ("eval/bits_per_byte",),
    "speed": ("perf/tokens_per_second",),
}


class Tracker(Protocol):
    """What takes the numbers of a run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after so many steps."""

    def text(self, step: int, name: str, text: str) -> None:
        """A text, such as a sample."""

    def close(self) -> None:
        """The process is done with the run, or stops."""


def check(names: tuple[str, ...]) -> None:
    """Raises UserError where the package of a tracker is not installed."""
    for name in names:
        if name in KINDS and importlib.util.find_spec(name) is None:
            raise needs(f"config.log.trackers = {name!r}", name, name)


class TensorBoard:
    """Event files in `<folder>/tensorboard`; a resumed run replaces what earlier files have of later steps."""

    def __init__(self, folder: epath.Path, step: int, title: str):
        self._events, self._title = EventFileWriter(str(folder / "tensorboard")), title
        # From this step on readers drop what earlier files have.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._events.add_event(event_pb2.Event(step=step + 1 if step else 0, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A point of each curve."""
        summary = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step, summary_pb2.Summary(value=summary))

    def text(self, step: int, name: str, text: str) -> None:
        """A text, which TensorBoard shows as Markdown under Text."""
        self._tensor(
            step, name, text.encode(), text_metadata.create_summary_metadata(display_name=name, description="")
        )

    def histograms(self, step: int, found: Mapping[str, Any]) -> None:
        """Histograms by name (`update_histograms.Histogram`)."""
        values = [
            summary_pb2.Summary.Value(
                tag=name,
                histo=summary_pb2.HistogramProto(
                    min=one.low, max=one.high, num=one.counts_E.sum(), sum=one.total, sum_squares=one.squares,
                    bucket_limit=one.limits_E, bucket=one.counts_E,
                ),
            )
            for name, one in found.items()
        ]  # fmt: skip
        self._add(step, summary_pb2.Summary(value=values))

    def hyper_parameters(self, flat: Mapping[str, Any]) -> None:
        """The HParams tab, in which the run has its name, and which curves are drawn in one chart (Custom Scalars)."""
        plain = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in flat.items()
        }
        self._add(0, hparams.hparams_pb(plain, trial_id=self._title or None))
        charts = [
            layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=tags))
            for title, tags in ONE_CHART.items()
        ]
        layout = layout_pb2.Layout(category=[layout_pb2.Category(title="run", chart=charts)])
        self._tensor(
            0, layout_metadata.CONFIG_SUMMARY_TAG, layout.SerializeToString(), layout_metadata.create_summary_metadata()
        )

    def _tensor(self, step: int, tag: str, content: bytes, metadata: Any) -> None:
        tensor = tensor_pb2.TensorProto(
            dtype=types_pb2.DT_STRING, string_val=[content], tensor_shape={"dim": [{"size": 1}]}
        )
        self._add(step, summary_pb2.Summary(value=[{"tag": tag, "metadata": metadata, "tensor": tensor}]))

    def _add(self, step: int, summary: Any) -> None:
        self._events.add_event(event_pb2.Event(step=step, summary=summary))

    def flush(self) -> None:
        """Returns once all that was added is on the disk."""
        self._events.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._events.close()


class Wandb:
    """A run of Weights & Biases. A resumed run is the same one; `wandb sync --append` sends what was written offline."""

    def __init__(self, folder: epath.Path, title: str, kept: dict[str, Any], flat: dict[str, Any]):
        import wandb

        mode: Any = "online" if wandb.login(prompt=False) else "offline"
        quiet = wandb.Settings(console="off", silent=True, save_code=False, disable_git=True, x_disable_stats=True)
        self._run = wandb.init(
            project=PROJECT,
            id=kept["id"],
            name=title,
            dir=str(folder),
            config=flat,
            resume="allow",
            mode=os.environ.get("WANDB_MODE", mode),
            settings=quiet,
        )
        self._html = wandb.Html

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after so many steps."""
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """A sample, as it was written."""
        self._run.log({name: self._html(f"<pre>{html.escape(text)}</pre>", inject=False)}, step=step)

    def close(self) -> None:
        """Ends the run for this process."""
        self._run.finish()


class Trackio:
    """A run of trackio: a database on this machine, or a Space. It writes from a thread: what a kill finds there is lost."""

    def __init__(self, folder: epath.Path, title: str, kept: dict[str, Any], flat: dict[str, Any]):
        import trackio

        plain = {name: str(value) for name, value in flat.items()}
        quiet: Any = {"resume": "allow", "auto_log_gpu": False, "auto_log_cpu": False}
        with contextlib.redirect_stdout(sys.stderr):  # of a run, stdout is the log's
            self._run = trackio.init(PROJECT, name=f"{title}-{kept['id']}", config=plain, **quiet)
        self._text = trackio.Markdown

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after so many steps."""
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """A sample; its lines come indented, as code is in Markdown."""
        self._run.log({name: self._text(text)}, step=step)

    def close(self) -> None:
        """Ends the run for this process."""
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


class Mlflow:
    """A run of MLflow, by default in `<folder>/mlflow.db`, with what it has of samples beside."""

    def __init__(self, folder: epath.Path, title: str, kept: dict[str, Any], flat: dict[str, Any]):
        from mlflow.tracking import MlflowClient

        where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        self._client = MlflowClient(where)
        if "mlflow" not in kept["runs"]:
            known = self._client.get_experiment_by_name(PROJECT)
            experiment = (
                known.experiment_id if known else self._client.create_experiment(PROJECT, str(folder / "mlflow"))
            )
            kept["runs"]["mlflow"] = self._client.create_run(experiment, run_name=title).info.run_id
            for name, value in flat.items():
                self._client.log_param(kept["runs"]["mlflow"], name, str(value)[:5000])
        self._id = kept["runs"]["mlflow"]
        self._client.update_run(self._id, status="RUNNING")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after so many steps."""
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """A sample, a file among the artifacts."""
        self._client.log_text(self._id, text, f"{name}/{step}.txt")

    def close(self) -> None:
        """Ends the run for this process."""
        self._client.set_terminated(self._id)


KINDS: dict[str, type] = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}


class Trackers:
    """The trackers of experiments of a run. None of them gets a number or a sample twice, however often the run is killed.

    They cannot take back what they have, so what a resumed run computes again, the same to the bit, is not sent again; what has
    been sent stands in `<folder>/trackers.json`. One that fails is left, with a line in the log, and the run goes on.
    """

    def __init__(
        self, names: tuple[str, ...], folder: epath.Path, title: str, flat: dict[str, Any], log: Callable[[str], None]
    ):
        self._path, self._log, self._trackers = folder / FILE, log, dict[str, Tracker]()
        names = tuple(name for name in names if name in KINDS)
        kept = json.loads(self._path.read_text()) if names and self._path.exists() else {}
        self._kept = {"id": secrets.token_hex(4), "sent": {}, "runs": {}} | kept
        for name in names:
            self._guarded(name, functools.partial(self._open, name, folder, title, flat))
        if names:
            self._keep()

    def _open(self, name: str, *given: Any) -> None:
        self._trackers[name] = KINDS[name](*given[:2], self._kept, *given[2:])

    def _keep(self) -> None:
        write_whole(self._path, json.dumps(self._kept).encode())

    def _guarded(self, name: str, call: Callable[[], Any]) -> None:
        """A tracker's package and its server may raise anything; a run does not end for that."""
        try:
            call()
        except Exception as error:
            self._trackers.pop(name, None)
            self._log(
                f"{name} takes no more numbers of this run, metrics.jsonl has them all: {type(error).__name__}: {error}"
            )

    def _new(self, name: str, step: int, keys: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the keys that the tracker does not have of this step or a later one; it has them from now on."""
        sent = self._kept["sent"].setdefault(name, {})
        found = {key: value for key, value in keys.items() if step > sent.get(key, -1)}
        sent.update(dict.fromkeys(found, step))
        return found

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after so many steps; those that are not finite are left out."""
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        new = {name: self._new(name, step, finite) for name in self._trackers}
        if any(new.values()):
            self._keep()  # first: after a kill in between one line is missing, none is there twice
        for name, found in new.items():
            if found:
                self._guarded(name, functools.partial(self._trackers[name].scalars, step, found))

    def text(self, step: int, name: str, text: str) -> None:
        """A text, such as a sample."""
        new = [tracker for tracker in self._trackers if self._new(tracker, step, {name: text})]
        if new:
            self._keep()
        for tracker in new:
            self._guarded(tracker, functools.partial(self._trackers[tracker].text, step, name, text))

    def close(self) -> None:
        """The process is done with the run, or stops."""
        for name in list(self._trackers):
            self._guarded(name, self._trackers[name].close)
