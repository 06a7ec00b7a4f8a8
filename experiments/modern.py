"""GPT-3 Small in the quickstart's recipe: what has been learnt since the paper, at 125M parameters.

    python -m lm_jax.main --config experiments/modern.py --config.data.sources=/path/to/folder/of/text

All three changes are known to help at larger sizes too. Muon halves the FLOPs to a loss of AdamW's, up to 16B parameters
(arXiv:2502.16982); its updates have the size of AdamW's, so that the paper's rate stays. Normalised queries and keys keep
attention's logits small and let the rate be larger, tried to 22B (arXiv:2302.05442). A rate that falls linearly to nothing beats
cosine to a tenth, more so the longer one trains, up to 1.7B (arXiv:2502.15938). What helped at the quickstart's size, and what
did not, is in docs/notebook.md.
Expected: not trained to its end here; in the quickstart's size 1.91 bits per byte in place of 2.22.
"""

import gpt_125m
import quickstart


def get_config():
    config, recipe = gpt_125m.get_config(), quickstart.get_config()
    config.model.qk_norm = recipe.model.qk_norm
    for name in ("name", "schedule", "decay_to"):
        config.optimizer[name] = recipe.optimizer[name]
    return config
