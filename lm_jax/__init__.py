"""lm_jax: train language models with JAX. Start reading at `main.py`, then `train.py`."""

__version__ = "0.1.0"
