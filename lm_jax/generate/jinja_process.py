"""Fills in chat templates, in a process of its own with limits of memory and time: a template is a stranger's program.

lm_jax/generate/render_template.py starts it and writes it a line of JSON:
{"source", "variables", "now", "jobs": [{"messages", "add_generation_prompt", "around": two characters or ""}, ...]}; it answers
with a line {"texts": [a text for each job]}, {"refusal": the template's own words} or {"fault": what went wrong}. A template
that takes too long ends this process. The environment is that of `transformers`, filter for filter; no module of ours is read.
"""

import datetime
import functools
import json
import resource
import signal
import sys

import jinja2
import jinja2.ext
import jinja2.sandbox

MEMORY = 1 << 30  # bytes of addresses
SECONDS = 3  # of a processor, for a text
LONGEST = 1 << 24  # characters of a text


class Refusal(jinja2.TemplateError):
    """Raised by a template that calls `raise_exception`."""


class Generation(jinja2.ext.Extension):
    """The block {% generation %} ... {% endgeneration %}, which marks what an assistant writes with `around`."""

    tags = {"generation"}
    around = ("", "")

    def parse(self, parser):
        """Parses the block into a call of `_write` on its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller) -> str:
        return self.around[0] + caller() + self.around[1]


class Dict:
    """`dict` of a template: a value that can be called, not a class."""

    def __call__(self, *args, **kwargs):
        """The builtin `dict`."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args):
        """The builtin `dict.fromkeys`."""
        return dict.fromkeys(*args)


class Namespace(jinja2.utils.Namespace):
    """`namespace` of a template, without names that Python keeps for itself."""

    def __init__(*args, **kwargs):  # a template may have a name "self" in it
        self, *given = args
        content = dict(*given, **kwargs)
        for name in content:
            Namespace.check(name)
        jinja2.utils.Namespace.__init__(self, content)

    def __setitem__(self, name, value):
        Namespace.check(name)
        super().__setitem__(name, value)

    @staticmethod
    def check(name):
        """Raises SecurityError for a name that starts with an underscore."""
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no name that starts with _, such as {name!r}")


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(words):
    raise Refusal(words)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "dict": Dict(), "namespace": Namespace}
    return environment.from_string(source)


def fill(source: str, variables: dict, now: datetime.datetime, job: dict) -> str:
    """The text of one job. Raises what the template raises, and ValueError where it is too long."""
    template = _compiled(source)
    Generation.around = tuple(job["around"]) or ("", "")
    template.globals["strftime_now"] = now.strftime
    given = {"tools": None, "documents": None} | variables
    given |= {"messages": job["messages"], "add_generation_prompt": job["add_generation_prompt"]}
    parts, size = [], 0
    for part in template.generate(given):
        parts.append(part)
        size += len(part)
        if size > LONGEST:
            raise ValueError(f"it writes more than {LONGEST:,} characters")
    return "".join(parts)


def wind_up() -> None:
    """Limits this process to SECONDS more of processor time; then the system ends it."""
    used, most = resource.getrusage(resource.RUSAGE_SELF), resource.getrlimit(resource.RLIMIT_CPU)[1]
    until = int(used.ru_utime + used.ru_stime) + SECONDS + 1
    resource.setrlimit(resource.RLIMIT_CPU, (until if most == resource.RLIM_INFINITY else min(until, most), most))


def answer(line: bytes) -> dict:
    """The reply to one line: {"texts"}, {"refusal"} or {"fault"}."""
    try:
        asked, texts = json.loads(line), []
        now = datetime.datetime.fromisoformat(asked["now"])
        for job in asked["jobs"]:
            wind_up()
            texts.append(fill(asked["source"], asked["variables"], now, job))
        return {"texts": texts}
    except Refusal as error:
        return {"refusal": str(error)}
    except MemoryError:
        return {"fault": f"it needs more than {MEMORY >> 20:,} MiB of memory"}
    except RecursionError:
        return {"fault": "it calls itself without an end, or is nested too deeply"}
    except Exception as error:  # a template may raise anything; all of it is said
        return {"fault": f"{type(error).__name__}: {error}"[:1000]}


def main() -> None:
    """Answers line by line until standard input ends."""
    for name in (signal.SIGINT, signal.SIGTERM):  # it ends with the process that asks
        signal.signal(name, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "darwin":  # which limits no addresses
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        memory = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for line in sys.stdin.buffer:
        sys.stdout.write(json.dumps(answer(line)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
