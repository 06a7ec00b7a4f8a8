"""GPT-3 175B: the row of `gpt3.py`, where the recipe and its choices stand.

    python -m lm_jax.main --config experiments/gpt_175b.py --config.data.sources=/path/to/folder/of/text

Expected: about 1.73 nats a token on the paper's corpus after 300B tokens.
"""

import gpt3


def get_config():
    return gpt3.get_config("175b")
