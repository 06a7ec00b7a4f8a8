"""Texts that a model writes, and what it says of given ones. The command is `python -m lm_jax.generate` (`command.py`).

sampling.py         which token comes next: pure functions of logits
decoding.py         prefill, then the whole decode as one device program; streams, stop strings, log-probabilities
beam_search.py      beam search as one device program
chat_template.py    a model's own chat template, as its folder keeps it
render_template.py  fills one in, by jinja_process.py, a process with limits of memory and time
chat_words.py       whose words are whose in the text
chat_tokens.py      the tokens of a conversation, and which of them are learnt
request_batches.py  many requests in batches of one size
slots.py            the programs of continuous batching
continuous_batching.py  requests that join and leave between two tokens
growing_text.py     the text of tokens that come one by one
spelling.py         the bytes and the name of a single token
grammar.py          texts that fit a JSON schema
likelihood.py       log-probabilities of given continuations, in batches of few shapes
lm_eval.py          a model as EleutherAI's lm-eval asks it
benchmarks.py       its tasks while a model is trained
"""
