"""lm_jax: train language models with JAX. Start reading at `main.py`, then `train.py`."""

from lm_jax import stop

__version__ = "0.1.0"

if stop.is_command():  # before anything heavy is imported: Ctrl-C is answered from here on
    stop.StopSignal().__enter__()
