"""EleutherAI's lm-eval on any MODEL that writes from left to right; `tools/run_lm_eval.py` is the command.

What a request is (context and continuation encoded together, windows over long texts, what ends a generation) is lm-eval's own;
here are the tokens' log-probabilities and the generations.
"""

import contextlib
import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lm_jax import load_model
from lm_jax.config import Mesh
from lm_jax.data.hugging_face_tokenizer import HuggingFace
from lm_jax.errors import UserError, nearest, needs
from lm_jax.generate import chat_template as chat
from lm_jax.generate import chat_tokens, render_template
from lm_jax.generate.decoding import complete
from lm_jax.generate.likelihood import likelihoods
from lm_jax.generate.request_batches import request_batches
from lm_jax.generate.sampling import Sampling
from lm_jax.mesh import make_mesh
from lm_jax.model.build import ModelDef
from lm_jax.model_config import OBJECTIVES

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise needs("tools/run_lm_eval.py", "lm_eval", "lm-eval") from None


class HarnessModel(TemplateLM):
    """A model as lm-eval calls it, on the mesh that is set: `rows` requests at a time on a device.

    A request has at most `max_length` tokens (0: what the model sees). `progress` is told how far it is.
    """

    max_gen_toks = 256  # where a task does not say, as lm-eval's own backends have it

    def __init__(
        self,
        found: load_model.ModelRef,
        graph: ModelDef,
        parameters: dict,
        rows: int = 8,
        max_length: int = 0,
        progress: Callable[[str], None] = lambda text: None,
    ):
        super().__init__()
        self.found, self.rows, self.progress, self.marks = found, rows, progress, found.special_ids
        self.graph, self.parameters, self.mesh = graph, parameters, jax.sharding.get_mesh()
        self.max_length = max_length or graph.sequence_length
        if self.max_length > graph.sequence_length:
            raise UserError(f"--max_length {max_length}: the model sees {graph.sequence_length} tokens")

    @classmethod
    def load(
        cls, found: load_model.ModelRef, rows: int = 8, max_length: int = 0, devices=None, progress=lambda text: None
    ) -> "HarnessModel":
        """A MODEL over these devices (None: all). Raises UserError."""
        if found.config.model.kind in OBJECTIVES:
            raise UserError(
                f"--model {found.workdir}: lm-eval needs a model that writes from left to right, this one is of kind "
                f"{found.config.model.kind}"
            )
        with jax.set_mesh(make_mesh(Mesh(slices=-1), devices)):
            graph, parameters = load_model.load_parameters(found)
            return cls(found, graph, graph.unstacked(parameters), rows, max_length, progress)

    def in_chat(self) -> None:
        """Makes texts end at the end of the assistant's turn in the chat template, too."""
        template = chat.read_template(self.found.workdir)
        self.marks = self.marks.also(*chat_tokens.ends_of_turn(template, self.found.tokenizer))

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.marks.ends[0] if self.marks.ends else self.found.tokenizer.document_id

    @property
    def prefix_token_id(self) -> int:
        """The id before a text without context: the tokenizer's first token, else `bos_token_id`, else the end."""
        known = [*self.marks.first, self.marks.start]
        return known[0] if known[0] >= 0 else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, after the mark of a document unless it starts with that or `add_special_tokens` is False.

        Names of control tokens mean these tokens, as lm-eval's own backends read them: a filled-in chat template is a text here.
        """
        tokenizer = self.found.tokenizer
        encode = tokenizer.encode_control if isinstance(tokenizer, HuggingFace) else tokenizer.encode
        ids, before = encode(string).tolist(), list(self.marks.first)
        return ids if add_special_tokens is False or (before and ids[: len(before)] == before) else before + ids

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """lm-eval's own, which makes tokens of the requests; `progress` is enough of a bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, **_: Any) -> list[tuple[float, bool]]:
        """(log-likelihood, is it greedy) of lm-eval's (strings, context ids, continuation ids)."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        watch = lambda done, of: self.progress(f"log-likelihood {done:,} of {of:,}")
        with jax.set_mesh(self.mesh):
            scored = likelihoods(self.graph, self.parameters, pairs, self.rows, self.max_length, watch)
        answers = [(answer.log_probability, answer.greedy) for answer in scored]
        for (strings, *_), answer in zip(requests, answers, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows as long as the model sees; the first is after `prefix_token_id`."""

        def windows(text: str):
            ids = self.tok_encode(text, add_special_tokens=False)
            found = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            return [(None, *make_disjoint_window(pair)) for pair in found]

        of_text = [windows(request.args[0]) for request in requests]
        scored = iter(self._loglikelihood_tokens([window for found in of_text for window in found]))
        totals = [math.fsum(value for value, _ in itertools.islice(scored, len(found))) for found in of_text]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the task's stop strings; the longest contexts first."""
        encoded = [np.array(self.tok_encode(request.args[0]), np.int32) for request in requests]
        settings = [json.dumps(request.args[1], sort_keys=True) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (settings[i], -len(encoded[i])))
        found: dict[int, str] = {}
        watch = lambda done, of: self.progress(f"generated {done:,} of {of:,}")
        for batch in request_batches(order, self.rows * self.mesh.size, lambda i: settings[i], watch):
            contexts = [encoded[i] for i in batch.padded]
            texts = self.write(contexts, requests[batch.requests[0]].args[1], len(found))
            for i, text in zip(batch.requests, texts, strict=False):
                found[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return [found[i] for i in range(len(requests))]

    def write(self, contexts: Sequence[np.ndarray], settings: dict[str, Any], first: int) -> list[str]:
        """Generates texts after contexts, whose first tokens are cut where they leave no room.

        Request k draws with seed + `first` + k. Raises UserError for a setting unknown here.
        """
        stop, limit, sampling = self.understood(settings)
        sampling = sampling._replace(seed=np.uint32((sampling.seed + first) % 2**32))
        room = self.max_length - limit
        with jax.set_mesh(self.mesh):
            model = self.graph, self.parameters, self.found.tokenizer
            texts = complete(*model, [ids[-room:] for ids in contexts], limit, sampling, stop, marks=self.marks)
        return [text.text for text in texts]

    def understood(self, settings: dict[str, Any]) -> tuple[tuple[str, ...], int, Sampling]:
        """(stop strings, most new tokens, sampling) of a task's `generation_kwargs`. Raises UserError."""
        named = normalize_gen_kwargs(settings, self.max_gen_toks)
        stop, limit = tuple(filter(None, named.pop("until"))), named.pop("max_gen_toks")
        draws = named.pop("do_sample")
        temperature = named.pop("temperature", 1.0)
        sampling = Sampling(temperature if draws else 0.0, named.pop("top_k", 0), named.pop("top_p", 1.0))
        sampling = sampling._replace(**{name: named.pop(name) for name in Sampling._fields if name in named})
        if named:
            raise UserError(
                f"a task's generation_kwargs say {', '.join(named)}; known are {', '.join(Sampling._fields)}"
            )
        if limit >= self.max_length:
            raise UserError(
                f"a task asks for {limit} new tokens, the model sees {self.max_length}; its max_gen_toks may be less"
            )
        return stop, limit, sampling

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache names the tokenizer by: its fingerprint."""
        return self.found.tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The source of the model's chat template, "" where none is asked for."""
        return chat.read_template(self.found.workdir).source if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, up to where the assistant speaks. Raises UserError."""
        if not add_generation_prompt:
            raise UserError("a task that begins the assistant's answer cannot be asked with --apply_chat_template")
        template = chat.read_template(self.found.workdir)
        return render_template.render(
            chat.shown(template, self.found.tokenizer), [render_template.Job(chat_history, True)]
        )[0]


def manager_of(tasks: Sequence[str], include_path: str = "", said: str = "--tasks ") -> Any:
    """lm-eval's `TaskManager`, which knows these tasks: names, also of YAML files below `include_path`, or a YAML file each.

    `said` is what stands before a name in a message. Raises UserError where a task is unknown.
    """
    manager = _known(include_path)
    for task in tasks:
        if task not in manager.all_tasks and not os.path.isfile(task):
            raise UserError(f"{said}{task}: lm-eval knows no such task{nearest(task, manager.all_tasks)}")
    return manager


@functools.cache
def _known(include_path: str) -> Any:
    """A `TaskManager`, which takes seconds to read thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path or None)


@contextlib.contextmanager
def data_of(tasks: Sequence[str], said: str = "--tasks ") -> Iterator[None]:
    """Inside, what `datasets` raises (no such file, or no network) becomes a UserError."""
    try:
        yield
    except OSError as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{said}{','.join(tasks)}: the data cannot be read: {reason}") from error


def run(model: HarnessModel, tasks: list[str], include_path: str = "", **settings: Any) -> dict[str, Any]:
    """lm-eval's results of tasks by name, also of YAML files below `include_path`. Raises UserError."""
    from lm_eval import simple_evaluate

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork a process that has JAX's threads
    manager = manager_of(tasks, include_path)
    with data_of(tasks):
        return simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=1000, **settings)


def table(results: dict[str, Any]) -> str:
    """lm-eval's own Markdown table."""
    from lm_eval.utils import make_table

    return make_table(results)
