"""lm-eval's tasks while a model is trained: opened once, then asked of the parameters at hand, again and again.

All processes ask the same requests, each device a share of every batch (`likelihood.py`), and all have all answers. Beside
lm-eval's own numbers: bits per byte of the right answers, which tell small models apart, and accuracy above chance
(`centred_accuracy`: 0 is guessing, 1 is all; CORE of DataComp-LM, arXiv 2406.11794).
"""

import contextlib
import functools
import hashlib
import io
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from lm_jax import load_model
from lm_jax.data import special_ids
from lm_jax.data.special_ids import SpecialIds
from lm_jax.errors import UserError
from lm_jax.generate.lm_eval import HarnessModel, data_of, manager_of
from lm_jax.mesh import batch_shards
from lm_jax.model.build import ModelDef

SAID = "config.evaluate.tasks: "
SEED = 1234  # of examples before a question, as lm-eval's commands have it
ACCURACIES = ("acc_norm", "acc", "exact_match")  # the first that a task has is compared with chance


class Asked(NamedTuple):
    """What is known of a task before any answer."""

    num_questions: int
    chance: float  # accuracy of a guess
    right: list[Any]  # lm-eval's requests for right answers; none where there is not one for each question


class Benchmarks:
    """Tasks by name, or YAML files, of the model `found`; all requests are made, and as tokens, before anything compiles.

    Raises UserError where a task is unknown, has no data here, runs code that it calls unsafe, or does not fit the model.
    """

    def __init__(self, names: Sequence[str], found: load_model.ModelRef, graph: ModelDef, marks: SpecialIds):
        """`marks` are of the model's texts; which ends they have is read beside the run once it is there."""
        self.model = HarnessModel(found, graph, {})
        self.model.marks = marks
        self.model.tok_encode = functools.cache(self.model.tok_encode)  # type: ignore[method-assign]
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every metric that has its usual aggregation
        manager = manager_of(names, said=SAID)
        with data_of(names, SAID), contextlib.redirect_stderr(io.StringIO()):  # bars
            try:
                self.loaded = manager.load(list(names))
            except (KeyError, ValueError) as error:  # a YAML file that is no task; a task twice
                raise UserError(f"{SAID}{str(error.args[0])[:200]}") from error
            self.asked = {name: self._opened(task) for name, task in self.loaded["tasks"].items()}
        whole = [group for group in self.loaded["groups"].values() if group.has_aggregation]
        inside = {task.task_name for group in whole for task in group.get_all_tasks()}
        inside |= {sub.name for group in whole for sub in group.get_all_groups()}
        # {name: its tasks} of what has numbers of its own: a group that adds them up stands for what is in it.
        self.shown = {name: [name] for name in self.asked if name not in inside}
        self.shown |= {g.name: [t.task_name for t in g.get_all_tasks()] for g in whole if g.name not in inside}

    def _opened(self, task: Any) -> Asked:
        """Makes the requests of a task, and checks that the model can be asked."""
        name = task.task_name
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"{SAID}{name} runs what a model writes; ask it with lm-eval's own command, in a sandbox")
        if task.OUTPUT_TYPE == "generate_until" and jax.process_count() > 1:
            raise UserError(
                f"{SAID}{name} is about texts that a model writes, which several processes do not write together\n"
                "leave it out, and take tools/run_lm_eval.py after the run"
            )
        task.set_config("num_fewshot", task.config.num_fewshot or 0)
        task.set_fewshot_seed(seed=SEED)
        task.build_all_requests()

        def again(**_: Any) -> None:
            for request in task.instances:
                request.resps, request.filtered_resps = [], {}

        task.build_all_requests = again
        for request in task.instances:
            self._check(name, request)
        docs = [(doc, right_answer(task, doc)) for _, doc in task.doc_iterator()]
        by_doc: dict[tuple[int, int], Any] = {(request.doc_id, request.idx): request for request in task.instances}
        right = [by_doc[number, index] for number, (_, index) in enumerate(docs) if index is not None]
        is_choice = task.OUTPUT_TYPE == "multiple_choice"
        chance = math.fsum(1 / len(task.doc_to_choice(doc)) for doc, _ in docs) / len(docs) if is_choice else 0.0
        return Asked(len(docs), chance, right if len(right) == len(docs) else [])

    def _check(self, name: str, request: Any) -> None:
        """Raises UserError for a request that the model cannot answer."""
        model = self.model
        if request.request_type == "generate_until":
            try:
                model.understood(request.args[1])
            except UserError as error:
                raise UserError(f"{SAID}{name}: {error}") from None
        if request.request_type != "loglikelihood":
            return
        before, answer = request.args
        ids = model._encode_pair(before, answer)[1] if before else model.tok_encode(answer, add_special_tokens=False)
        if not 0 < len(ids) < model.max_length:
            raise UserError(
                f"{SAID}{name}: the answer {answer[:60]!r} has {len(ids)} tokens, and the model sees {model.max_length}"
            )

    @property
    def measures(self) -> list[str]:
        """Names of the numbers of a call, those of filters left out."""
        bits = lambda tasks: ["bits_per_byte"] * all(self.asked[task].right for task in tasks)
        of = lambda tasks: [*self.loaded["tasks"][tasks[0]].aggregation(), *bits(tasks), "centred_accuracy"]
        found = [f"tasks/{name}/{metric}" for name, tasks in self.shown.items() for metric in dict.fromkeys(of(tasks))]
        return [*found, "tasks/centred_accuracy"]

    @property
    def fingerprint(self) -> str:
        """The hash of all that is asked."""
        requests = [request.args for task in self.loaded["tasks"].values() for request in task.instances]
        return hashlib.sha256(repr(requests).encode()).hexdigest()

    def __call__(
        self, graph: ModelDef, parameters: dict, rows: int, progress: Callable[[str], None]
    ) -> dict[str, float]:
        """{"tasks/<task>/acc": ...} on the mesh that is set, `rows` requests at a time over all devices.

        The numbers do not depend on how they are split. `progress` may raise.
        """
        from lm_eval.evaluator import evaluate

        model, mesh = self.model, jax.sharding.get_mesh()
        model.marks = special_ids.read(model.found.workdir, model.found.tokenizer)
        model.graph, model.parameters, model.mesh, model.progress = graph, parameters, mesh, progress
        model.rows = max(1, rows // batch_shards(dict(mesh.shape)))
        try:
            results = evaluate(model, self.loaded, bootstrap_iters=0, log_samples=False)["results"]
        finally:
            model.parameters = {}  # the next step gives them back
        found: dict[str, float] = {}
        for name, tasks in self.shown.items():
            values = numbers(results[name]) | self._bits(tasks)
            centred = [above_chance(numbers(results[task]), self.asked[task].chance) for task in tasks]
            if None not in centred:
                values["centred_accuracy"] = math.fsum(filter(None, centred)) / len(centred)
            found |= {f"tasks/{name}/{metric}": value for metric, value in values.items()}
        if centred := [value for name, value in found.items() if name.endswith("/centred_accuracy")]:
            found["tasks/centred_accuracy"] = math.fsum(centred) / len(centred)
        return found

    def _bits(self, tasks: list[str]) -> dict[str, float]:
        """Bits per byte of the right answers of tasks; of texts as a whole lm-eval has its own."""
        right = [request for task in tasks for request in self.asked[task].right]
        if not right or not all(self.asked[task].right for task in tasks):
            return {}
        nats = math.fsum(request.resps[0][0] for request in right)
        return {"bits_per_byte": -nats / math.log(2) / sum(len(request.args[1].encode()) for request in right)}

    def table(self, found: dict[str, float]) -> str:
        """The numbers of a call as a table, one line a task; behind an accuracy its standard error."""
        metrics = list(dict.fromkeys(name.split("/")[2] for name in found if name.count("/") == 2))
        rows = [["task", "questions", *metrics, "chance"]]
        for name, tasks in self.shown.items():
            asked = [self.asked[task] for task in tasks]
            num = sum(one.num_questions for one in asked)
            cells = [cell(metric, found.get(f"tasks/{name}/{metric}"), num) for metric in metrics]
            chance = math.fsum(one.chance for one in asked) / len(asked)
            is_compared = f"tasks/{name}/centred_accuracy" in found
            rows.append([name, f"{num:,}", *cells, f"{chance:.4f}" if is_compared else "-"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
        if "tasks/centred_accuracy" in found:
            lines.append(f"mean accuracy above chance (0: guessing, 1: all): {found['tasks/centred_accuracy']:.4f}")
        return "\n".join(lines)


def right_answer(task: Any, doc: Any) -> int | None:
    """Which request of a question is that for the right answer, None where none is or several are."""
    if task.OUTPUT_TYPE == "loglikelihood":
        return 0
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    gold = choices.index(gold) if isinstance(gold, str) and gold in choices else gold
    return gold if isinstance(gold, int) and 0 <= gold < len(choices) else None


def numbers(result: dict[str, Any]) -> dict[str, float]:
    """lm-eval's numbers of a task by name; with the name of the filter, where there is one."""
    named = {key.removesuffix(",none"): value for key, value in result.items() if "," in key and "_stderr," not in key}
    return {name: float(value) for name, value in named.items() if isinstance(value, (int, float))}


def above_chance(values: dict[str, float], chance: float) -> float | None:
    """The accuracy among `values` so that a guess has 0, None where there is none."""
    found = [value for wanted in ACCURACIES for name, value in values.items() if name.split(",")[0] == wanted]
    return (found[0] - chance) / (1 - chance) if found and chance < 1 else None


def cell(metric: str, value: float | None, num: int) -> str:
    """A number in the table."""
    if value is None:
        return "-"
    if metric.split(",")[0] not in ACCURACIES or num < 2:
        return f"{value:.4f}"
    return f"{value:.4f} ± {math.sqrt(value * (1 - value) / (num - 1)):.4f}"
