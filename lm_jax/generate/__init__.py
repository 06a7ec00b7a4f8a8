"""Texts that a model writes, and what it says of given ones. The command is `python -m lm_jax.generate` (`command.py`).

sampling.py       which token comes next: pure functions of logits
decoding.py       prefill, then the whole decode as one device program; streams, stop strings, log-probabilities
beam_search.py    beam search as one device program
chat_template.py  conversations in a model's own template; jinja_process.py fills one in, within limits of memory and time
likelihood.py     log-probabilities of given continuations, in batches of few shapes
lm_eval.py        a model as EleutherAI's lm-eval asks it
"""
