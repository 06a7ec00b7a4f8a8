"""What leaves is compared before it is kept: a mistake in any part of a folder is refused and far outside of what is right."""

import functools
import os
import pathlib

import jax
import numpy as np
import pytest
from exported import (
    Here,
    built,
    in_file,
    leaving,
    met,
    on_one,
    rope,
    setting,
    swapped,
    tensor,
    without_first,
)

from lm_jax.convert import (
    export,
    proof,
)

MUTANTS = {
    # family, mistake, what is said of it
    "a transposed matrix": ("llama", tensor("0.self_attn.o_proj.weight", np.transpose), "logits are"),
    "another rotary base": ("llama", rope(20_000.0), "logits are"),
    "a rotary base one percent off": ("llama", rope(10_100.0), "logits are"),
    "gate and up swapped": ("llama", swapped, "logits are"),
    "another epsilon": ("llama", setting(rms_norm_eps=1e-4), "logits are"),
    "queries a thousandth smaller": ("llama", tensor("1.self_attn.q_proj.weight", lambda x: x * 0.999), "logits are"),
    "one weight": ("llama", tensor("1.mlp.down_proj.weight", lambda x: x + (np.arange(x.size) == 77).reshape(x.shape)), "logits"),
    "half precision": ("llama", tensor("embed_tokens.weight", lambda x: np.float32(np.float16(x))), "logits are"),
    "a bias dropped": ("qwen2", tensor("q_proj.bias", np.zeros_like), "logits are"),
    "a norm of heads dropped": ("qwen3", tensor("1.self_attn.k_norm.weight", lambda x: x * 2), "logits are"),
    "a window one wider": ("mistral", setting(sliding_window=17), "logits are"),
    "another activation": ("gpt2", setting(activation_function="gelu"), "logits are"),
    "another expert": ("mixtral", tensor("0.block_sparse_moe.gate.weight", lambda x: x[::-1]), "logits are"),
    "no first token": ("llama", in_file("tokenizer.json", without_first), "is read as"),
    "an end too few": ("llama", in_file("generation_config.json", lambda x: b'{"eos_token_id": [1]}'), "texts end at"),
    "another template": ("llama", in_file("chat_template.jinja", lambda x: x.replace(b"m.role }}", b"m.role }} ")), "is read as"),
}  # fmt: skip
NUDGED = ("qwen2", "qwen3")  # biases of nought and scales of one would hide a mistake


@functools.cache
@on_one
def small_files(family: str, kind: str, folder: str, **settings):
    """(the folder, the arrays, the model as it is here) that a proof sees."""
    seen: list = []
    os.makedirs(folder)
    one = leaving(family, kind, **settings)
    if family in NUDGED:
        draw = np.random.RandomState(0)
        nudge = lambda path, x: x + (0.5 * draw.standard_normal(x.shape)).astype(x.dtype) if x.ndim <= 3 else x
        one = one._replace(parameters=jax.tree_util.tree_map_with_path(nudge, one.parameters))

    def keep(small, tensors, ours):
        for path in pathlib.Path(small).iterdir():
            pathlib.Path(folder, path.name).write_bytes(path.read_bytes())
        graph = built(ours.described.config, ours.described.vocab_size)
        seen.extend([folder, tensors, ours._replace(graph=graph)])

    export.write_folder(f"{folder}-whole", one, keep, print)
    return seen


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("small")


QUICK = [name for name, (family, *_) in MUTANTS.items() if family in ("llama", "qwen2")]


@pytest.mark.parametrize("mutant", [pytest.param(x, marks=[] if x in QUICK else pytest.mark.proof) for x in MUTANTS])
@on_one
def test_a_planted_mistake_is_refused_and_far_outside(mutant, place):
    family, mistake, said = MUTANTS[mutant]
    folder, tensors, ours = small_files(family, "chat", str(place / family))
    peer = Here(folder, tensors, mistake)
    if said.startswith("logits"):
        assert proof.distance(ours, peer) > 4 * proof.LIMIT
        return
    assert proof.distance(ours, peer) <= proof.LIMIT / 10
    assert said in proof.compared_texts(ours, peer)[0].problem


@pytest.mark.proof
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@on_one
def test_what_is_not_mistaken_passes_and_its_ends_are_seen(family, place):
    folder, tensors, ours = small_files(family, "chat", str(place / f"{family}-right"), ends=met(family))
    said = proof.prove(ours, Here(folder, tensors))
    assert ", 0 of them up to their end" not in said
    assert "proven: in a mutant logits are within" in said and "6 greedy texts are the same" in said
