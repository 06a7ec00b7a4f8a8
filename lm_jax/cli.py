"""What every command shares: flags, the config they name, and how errors reach the terminal."""

import argparse
import contextlib
import importlib.util
import inspect
import os
import re
import shlex
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import ml_collections

from lm_jax import fault_points, faults, stop
from lm_jax.config import (
    Config,
    PeerError,
    UserError,
    check_key,
    default_config,
    flatten,
    nearest,
    parse_value,
    plain_lines,
    resolve,
    shown,
    shrink,
    unflatten,
    without_unread,
)
from lm_jax.faults import EXIT_MACHINE, EXIT_USER
from lm_jax.stop import EXIT_FAULT, Stop, end_process, listening, replace_process, work_is_done

LARGEST_EXPERIMENT = 2**20  # bytes
# Of glibc: huge pages; blocks below 1 GiB come from one heap that keeps up to 4 GiB of what it was given back.
KEPT_MEMORY = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"hugetlb": 1, "mmap_threshold": 2**30, "trim_threshold": 2**32, "arena_max": 1}.items()
)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one plain line with the nearest flag, and which takes every flag once."""

    def __init__(self, name: str, doc: str | None):
        super().__init__(
            f"python {name}" if name.endswith(".py") else f"python -m {name}",
            description=doc,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.register("action", None, Once)
        self.register("action", "store", Once)
        self._reach: dict[str, dict[str, tuple]] = {}

    def error(self, message: str) -> NoReturn:
        raise UserError(message if len(message) <= 400 else f"{message[:200]} ... {message[-100:]}")

    def parse_args(self, arguments=None, namespace=None):
        check_text(arguments or ())
        known, rest = self.parse_known_args(arguments, namespace)
        if rest:
            flag = rest[0].split("=")[0]
            raise UserError(f"unknown argument {rest[0][:100]}{nearest(flag[:100], self._option_string_actions)}")
        for name, reach in self._reach.items():
            self._check_reach(known, name, reach)
        return known

    def reads(self, reach: dict[str, tuple], *names: str) -> None:
        """These flags are read only where others have one of these values, () = any but the default."""
        self._reach |= dict.fromkeys(names, reach)

    def _check_reach(self, known: argparse.Namespace, name: str, reach: dict[str, tuple]) -> None:
        action = self._option_string_actions.get(f"--{name}")
        given = getattr(action, "stood", False) or getattr(known, name) != self.get_default(name)
        for other, values in reach.items() if given else ():
            found = getattr(known, other)
            if found not in values if values else found == self.get_default(other):
                flag = other if other in {action.dest for action in self._get_positional_actions()} else f"--{other}"
                told = f"{flag} is {' or '.join(map(str, values))}" if values else f"{flag} is given"
                raise UserError(
                    f"--{name} {shown(getattr(known, name))} is read only where {told}: leave one of them out"
                )


def check_text(arguments) -> None:
    """Raises UserError for an argument whose bytes are no text: it would reach tokenizers and files that are written."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"the argument {argument!r} is not UTF-8; give a file that is named so another name"
            ) from None


class Once(argparse.Action):
    """A flag that may stand once."""

    stood = False

    def __call__(self, parser, namespace, values, option_string=None):
        if self.stood and option_string:
            raise UserError(f"{option_string} stands twice")
        self.stood = True  # the parser is made anew for every command line
        setattr(namespace, self.dest, values)


def door(main: Callable[[list[str]], int | None], arguments: list[str] | None = None) -> NoReturn:
    """Runs a command and leaves with its code: 0 done, 2 user error, 74 a fault of the machine, 75 preempted and saved, 70 a
    fault of ours; 130 and 143 where SIGINT or SIGTERM ended it and nothing was to be saved."""
    with Stop():
        speak = quiet_threads()
        code = outcome(main, sys.argv[1:] if arguments is None else arguments)
    if code != EXIT_MACHINE:  # else threads that are not over yet may still find out
        speak()
    in_a_job = stop.others is not stop.ALONE  # ends so: JAX would wait for the others
    if (in_a_job or code in (EXIT_FAULT, EXIT_MACHINE)) and listening:  # this command is all that the process is for
        with contextlib.suppress(OSError):  # which may be what was refused
            sys.stdout.flush()
        end_process(code)
    work_is_done()
    sys.exit(code)


def outcome(main: Callable[[list[str]], int | None], arguments: list[str]) -> int:
    """The exit code of a command; what went wrong is said."""
    from lm_jax import distributed

    try:
        fault_points.arm(os.environ.get("LM_JAX_FAULT", ""))
        distributed.configure()
        code = main(arguments) or 0
        if unbroken := fault_points.unreached():
            print(unbroken, file=sys.stderr)
        sys.stdout.flush()
        stop.others.part(code)
        return code
    except UserError as error:
        print(f"lm_jax: {error}", file=sys.stderr)
        distributed.join_for_last_words()
        stop.others.end(EXIT_USER, str(error))
        return EXIT_USER
    except PeerError as error:
        print(f"lm_jax: {plain_lines(str(error))}", file=sys.stderr)
        return EXIT_FAULT
    except Exception as error:
        if refused := faults.described(error):
            code, lines = refused
            stop.others.end(code, lines)
            print(f"lm_jax: {plain_lines(lines)}", file=sys.stderr)
            return code
        stop.others.end(EXIT_FAULT, f"{type(error).__name__}: {faults.first_line(error)}")
        traceback.print_exc()
        print("lm_jax: a fault of ours, not of yours; the same command resumes the run", file=sys.stderr)
        return EXIT_FAULT


def quiet_threads() -> Callable[[], None]:
    """What the system refuses a thread comes up again where that is waited for, and is said there; Orbax's and TensorStore's
    threads would print it as well, and all that it led to. Returns what makes them speak again."""
    before = threading.excepthook, sys.unraisablehook

    def of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is None or not faults.described(args.exc_value):
            before[0](args)

    def of_callback(args: "sys.UnraisableHookArgs") -> None:
        if threading.current_thread() is threading.main_thread():
            before[1](args)

    def speak() -> None:
        threading.excepthook, sys.unraisablehook = before

    threading.excepthook, sys.unraisablehook = of_thread, of_callback
    return speak


def with_kept_memory() -> None:
    """Starts this process once more, with a glibc that keeps memory and has it in huge pages; elsewhere than on Linux, nothing.

    XLA takes a step's memory anew for every step on a CPU, glibc would give it back to the kernel each time: clearing it anew
    is a quarter of a step's wall time (docs/notebook.md). The tunables of glibc can only be set before a process starts.
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "glibc.malloc.hugetlb" not in given:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (given, KEPT_MEMORY)))
        replace_process(sys.executable, sys.orig_argv)


def ask(prompt: str) -> str:
    """A line from the person, "" at the end of the input."""
    try:
        return input(prompt)
    except EOFError:
        return ""


def split_overrides(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """`--config.x.y=v` and `--config.x.y v` as {x.y: v}, and the other arguments. Raises UserError for a repeated one."""
    check_text(arguments)
    overrides: dict[str, str] = {}
    rest, waiting = [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        path, equals, value = argument.removeprefix("--config.").partition("=")
        check_key(path)
        if not equals and not waiting:
            raise UserError(f"--config.{path} needs a value, such as --config.{path}=1")
        if path in overrides:
            values = shown(overrides[path]), shown(value or waiting[0])
            raise UserError(f"--config.{path} stands twice: {' and '.join(values)}")
        overrides[path] = value if equals else waiting.pop(0)
    return overrides, rest


def find_experiment(place: str) -> tuple[str, str]:
    """(file, variant) of `x.py:variant`; a relative path that is not here may stand in the clone. Raises UserError."""
    path, _, variant = place.partition(":")
    clone = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for candidate in (path, os.path.join(clone, path)):
        if os.path.isfile(candidate):
            return os.path.abspath(candidate), variant
    folder = os.path.dirname(path) or "."
    folder = folder if os.path.isdir(folder) else os.path.join(clone, "experiments")
    near = (
        [os.path.join(os.path.relpath(folder), name) for name in sorted(os.listdir(folder)) if name.endswith(".py")]
        if os.path.isdir(folder)
        else []
    )
    missing = (
        "" if os.path.isdir(os.path.join(clone, "experiments")) else "; experiments come with a clone of the repository"
    )
    raise UserError(f"--config {place}: no such file{nearest(path, near)}{missing}")


def experiment_config(place: str) -> ml_collections.ConfigDict:
    """What an experiment file says, `:smoke` shrunk. The file is code and is executed. Raises UserError."""
    path, variant = find_experiment(place)
    folder = os.path.dirname(path)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(f"experiment_{os.path.basename(path)[:-3]}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config {place}: not a Python file")
    if os.path.getsize(path) > LARGEST_EXPERIMENT:
        raise UserError(f"--config {place}: a file of {os.path.getsize(path):,} bytes is no experiment")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config {place}: the file has no get_config()")
        variants = (*getattr(module, "VARIANTS", ()), "smoke")
        if variant and variant not in variants:
            near = nearest(variant, variants)
            raise UserError(f"--config {place}: no variant {variant!r}; there is {', '.join(variants)}{near}")
        takes_variant = inspect.signature(module.get_config).parameters
        config = module.get_config(variant) if takes_variant and variant != "smoke" else module.get_config()
        if not isinstance(config, ml_collections.ConfigDict):
            raise UserError(
                f"--config {place}: get_config() returned {type(config).__name__}, not a ConfigDict; return config"
            )
        if variant == "smoke":
            resolve(config)  # a wrong value is answered by its name before it is shrunk
    except UserError:
        raise
    except Exception as error:  # whatever a user's file may raise: its place and its first line
        line = traceback.extract_tb(error.__traceback__)[-1]
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        number = frames[-1].lineno if frames else getattr(error, "lineno", line.lineno)
        while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps a KeyError
            error = error.args[0]
        message = str(error.args[0] if error.args else error)
        message = re.sub(r"\s+", " ", re.sub(r'Other fields present: "\{.*\}"', "", message, flags=re.DOTALL))
        place = os.path.relpath(path) if not os.path.relpath(path).startswith("..") else path
        raise UserError(f"{place} line {number}: {type(error).__name__}: {message[:200]}") from error
    return shrink(config) if variant == "smoke" else config


def load_config(place: str, overrides: dict[str, str]) -> tuple[Config, dict[str, dict[str, Any]]]:
    """The resolved config, and for every leaf that is not its default where it came from: {path: {from, default}}."""
    defaults = flatten(default_config().to_dict())
    from_file = experiment_config(place)
    flat = flatten(from_file.to_dict())
    given = {path: parse_value(path, text) for path, text in overrides.items()}
    origins = {
        path: {"from": "file", "default": defaults.get(path)}
        for path in flat
        if path in defaults and flat[path] != defaults[path]
    }
    for path in given:
        origins[path] = {"from": "command line", "default": defaults[path], "file": flat[path]}
    flat |= given
    return resolve(unflatten(without_unread(flat, given) if place.endswith(":smoke") else flat)), origins


def as_typed(*words: str) -> str:
    """A command of this interpreter as it was called, to paste into a shell."""
    return shlex.join([sys.orig_argv[0], *words])


def as_given(place: str, config: Config, origins: dict[str, dict[str, Any]]) -> str:
    """The command that trains this, to paste; without its workdir and number of steps."""
    values = flatten(config)
    given = [path for path, origin in origins.items() if origin["from"] == "command line" and path != "train.num_steps"]
    return as_typed("-m", "lm_jax.main", "--config", place, *[f"--config.{path}={values[path]}" for path in given])


def run_name(place: str) -> str:
    """`gpt_125m` or `gpt_125m-smoke`: the experiment and its variant."""
    path, _, variant = place.partition(":")
    return os.path.basename(path).removesuffix(".py") + (f"-{variant}" if variant else "")


def check_tokenizer(found, mixed) -> None:
    """Raises UserError where the corpus was tokenised by another tokenizer than the model's."""
    if found.tokenizer.fingerprint != mixed.tokenizer.fingerprint:
        raise UserError(
            f"the corpus {', '.join(mixed.places)} was tokenised by another tokenizer than {found.workdir}'s"
        )
