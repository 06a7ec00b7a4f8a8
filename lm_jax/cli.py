"""What every command shares: its flags, its exit code, and how an error reaches the terminal."""

import argparse
import contextlib
import os
import shlex
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

from lm_jax import fault_points, faults, stop
from lm_jax.errors import PeerError, UserError, nearest, plain_lines, shown
from lm_jax.faults import EXIT_MACHINE, EXIT_USER
from lm_jax.other_words import answer
from lm_jax.stop import EXIT_FAULT, StopSignal, end_process, listening, replace_process, work_is_done

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
        """Raises UserError instead of ending the process."""
        raise UserError(message if len(message) <= 400 else f"{message[:200]} ... {message[-100:]}")

    def parse_args(self, arguments=None, namespace=None):
        """The flags. Raises UserError for unknown ones, and for those that nothing reads."""
        check_text(arguments or ())
        known, rest = self.parse_known_args(arguments, namespace)
        if rest:
            flag, _, value = rest[0].partition("=")
            value = value or next((word for word in rest[1:2] if not word.startswith("--")), "")
            if "--config" in self._option_string_actions and (words := answer(flag.lstrip("-"), value, {}, typed=True)):
                raise UserError(f"{flag[:100]}={value[:100]}".rstrip("=") + words)
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
        """Sets the flag. Raises UserError where it has stood before."""
        if self.stood and option_string:
            raise UserError(f"{option_string} stands twice")
        self.stood = True  # the parser is made anew for every command line
        setattr(namespace, self.dest, values)


def run_command(main: Callable[[list[str]], int | None], arguments: list[str] | None = None) -> NoReturn:
    """Runs `main` of a command and ends the process with its exit code.

    0 done, 2 user error, 70 an error of this program, 74 an error of the machine (disk, rights, memory), 75 preempted
    and saved; 130 and 143 where SIGINT or SIGTERM ended it and nothing was to be saved.
    """
    with contextlib.ExitStack() as listens:
        speak = quiet_threads()
        code = exit_code(main, sys.argv[1:] if arguments is None else arguments, listens)
    if code != EXIT_MACHINE:  # else threads that are not over yet may still find out
        speak()
    in_a_job = stop.others is not stop.ALONE  # ends so: JAX would wait for the others
    if (in_a_job or code in (EXIT_FAULT, EXIT_MACHINE)) and listening:  # this command is all that the process is for
        with contextlib.suppress(OSError):  # which may be what was refused
            sys.stdout.flush()
        end_process(code)
    work_is_done()
    sys.exit(code)


def exit_code(main: Callable[[list[str]], int | None], arguments: list[str], listens: contextlib.ExitStack) -> int:
    """Runs `main` of a command; its exit code. An error is written to stderr and told to the job's other processes.

    Signals are listened to until `listens` is closed.
    """
    from lm_jax import distributed, job

    try:
        listens.enter_context(StopSignal())
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
        job.join_for_last_words()
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
    """Keeps threads from printing an error of the machine, such as a full disk; returns the function that undoes it.

    Whoever waits for the thread gets the error and reports it; threads of Orbax and TensorStore would print it a second
    time, with all that followed from it.
    """
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
    """Starts this process again with a glibc that keeps freed memory and uses huge pages. Does nothing but on Linux.

    On a CPU, XLA allocates the memory of a step anew in every step, and glibc would return it to the kernel each time:
    clearing it again is a quarter of a step's wall time (docs/notebook.md). glibc reads these settings only when a
    process starts.
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


def as_typed(*words: str) -> str:
    """A command of this interpreter as it was called, to paste into a shell."""
    return shlex.join([sys.orig_argv[0], *words])
