"""lm_jax: train language models with JAX. Start reading at `main.py`, then `train.py`."""

import contextlib
from typing import TYPE_CHECKING, Any

from lm_jax import stop

if TYPE_CHECKING:
    from lm_jax.from_python import LoadedModel, RunResult, load, run

__all__ = ["LoadedModel", "RunResult", "load", "run"]
__version__ = "0.1.0"

if stop.is_command():  # before anything heavy is imported: Ctrl-C is answered from here on
    with contextlib.suppress(OSError, RuntimeError):  # no file or thread is left: `cli.run_command` says it
        stop.StopSignal().__enter__()


def __getattr__(name: str) -> Any:
    """`lm_jax.load` and `lm_jax.run`, imported when they are asked for: JAX takes seconds to wake up."""
    if name not in __all__:
        raise AttributeError(f"module 'lm_jax' has no attribute {name!r}")
    from lm_jax import from_python

    return getattr(from_python, name)
