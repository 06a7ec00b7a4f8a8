"""OpenAI's API on one MODEL. The command is `python -m lm_jax.serve` (`command.py`); `generate/continuous_batching.py` writes.

protocol.py           the body of a request -> what it asks for, and the bodies of answers
answers.py            prompts are encoded, texts are written and given on as they come
log_probabilities.py  those of tokens, in both dialects
app.py                the HTTP application: limits, routes, errors
metrics.py            for Prometheus
"""
