"""What `transformers` wrote is what is written here. `python tests/test_export_recorded.py` records it in tests/fixtures."""

import json
import pathlib

import numpy as np
import pytest
from exported import GREEDY, on_one, tokenizer_of
from helpers import ROOT
from peers import families as parity

from lm_jax.convert import (
    description,
    hugging_face,
    proof,
    safetensors,
    tensor_map,
)
from lm_jax.data.special_ids import SpecialIds
from lm_jax.errors import UserError
from lm_jax.generate.decoding import complete

FIXTURE = ROOT / "tests" / "fixtures" / "export.npz"
NEW = 24  # tokens


def prompts_of(name: str) -> np.ndarray:
    return np.random.RandomState(len(name)).randint(3, parity.PIECES, (3, 6)).astype(np.int32)


def recorded(name: str):
    """(the model, prompts, what transformers wrote, its ends, how far each text goes before its end) of a family."""
    content, tensors, _ = parity.recorded(name)
    described = description.describe(content, name, "bytes")
    ours, graph = tensor_map.parameters(described, tensors, name), description.graph_of(described)
    with np.load(FIXTURE) as arrays:
        written, ends = arrays[f"{name}|written"], tuple(arrays[f"{name}|ends"].tolist())
    stops = [next((k for k, token in enumerate(row) if token in ends), NEW) for row in written.tolist()]
    assert min(stops) < NEW, "an end is met"
    one = proof.Exported(described, graph, ours, tokenizer_of("bytes"), SpecialIds((), (), -1, ends))
    return one, prompts_of(name), written, stops


@pytest.mark.parametrize("name", parity.FIRST)
@on_one
def test_greedy_texts_and_their_ends_are_those_that_transformers_wrote(name):
    """The seven families of tests/fixtures/families.npz: after every prefix its next token is the likeliest here, the end too."""
    one, prompts, written, stops = recorded(name)
    whole = np.concatenate([prompts, written], axis=1)
    positions = np.broadcast_to(np.arange(whole.shape[1], dtype=np.int32), whole.shape)
    batch = {"tokens": whole, "positions": positions, "segment_ids": np.ones_like(whole)}
    logits = np.asarray(proof.heads(one.graph, one.parameters, batch)[0])[..., : one.described.vocab_size]
    likeliest = logits[:, prompts.shape[1] - 1 : -1].argmax(-1)
    for mine, row, stop in zip(likeliest, written, stops, strict=True):
        np.testing.assert_array_equal(mine[: stop + 1], row[: stop + 1])


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x == "llama" else pytest.mark.proof) for x in parity.FIRST]
)
@on_one
def test_what_is_written_here_ends_where_transformers_ends_it(name):
    one, prompts, written, stops = recorded(name)
    found = complete(one.graph, one.parameters, one.tokenizer, list(prompts), NEW, GREEDY, marks=one.ids)
    for mine, row, stop in zip(found, written.tolist(), stops, strict=True):
        assert list(mine.tokens) == row[:stop]


T5 = ("one_table", "two_tables")  # a T5 1.1 that transformers 5 made, and one that was published and saved again


@pytest.mark.parametrize("name", T5)
def test_a_t5_as_transformers_5_saves_it_is_read(name):
    """Its config.json says `tie_word_embeddings` of either; the table stands once where it is one."""
    with np.load(FIXTURE) as arrays:
        mine = {key.split("|")[1]: arrays[key] for key in arrays.files if key.startswith(f"{name}|")}
    content, logits = json.loads(str(mine.pop("config.json"))), mine.pop("logits")
    assert content["tie_word_embeddings"] is True and content["scale_decoder_outputs"] is False
    assert ("lm_head.weight" in mine) == (name == "two_tables")
    tensors = {key: x.astype(np.float32) for key, x in mine.items()}
    described = description.describe(content, name, "bytes")
    ours = tensor_map.parameters(described, tensors, name)
    found = proof.heads(description.graph_of(described), ours, proof.random_row(described))[0]
    assert proof.relative(np.asarray(found)[..., : described.vocab_size], logits) <= proof.LIMIT / 10
    published = {key: value for key, value in content.items() if key != "scale_decoder_outputs"}
    assert description.describe(published | {"tie_word_embeddings": False}, name, "bytes").family == "t5"
    with pytest.raises(UserError, match="this is the first T5"):
        description.describe(published, name, "bytes")
    if name == "one_table":  # a folder that says that it has two
        with pytest.raises(UserError, match="missing: lm_head.weight"):
            untied = description.describe(content | {"tie_word_embeddings": False}, name, "bytes")
            tensor_map.parameters(untied, tensors, name)


def record() -> None:
    """What `transformers` writes from the weights of families.npz, and two T5 1.1 as it saves them. Needs torch."""
    import tempfile

    import torch
    import transformers

    arrays: dict[str, np.ndarray] = {}
    for name in parity.FIRST:
        content, tensors, _ = parity.recorded(name)
        kind = getattr(transformers, content["architectures"][0])
        config = transformers.AutoConfig.for_model(**content)
        state = {key: torch.from_numpy(x) for key, x in tensors.items()}
        model = kind.from_pretrained(None, config=config, state_dict=state, dtype="float32").eval()
        given = torch.tensor(prompts_of(name)).long()
        settings = dict(attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        whole = model.generate(given, eos_token_id=None, **settings)[:, given.shape[1] :]
        ends = [int(whole[0, 7]), int(whole[1, 11])]
        written = model.generate(given, eos_token_id=ends, **settings)[:, given.shape[1] :].numpy()
        arrays[f"{name}|written"] = np.pad(written, ((0, 0), (0, NEW - written.shape[1]))).astype(np.int32)
        arrays[f"{name}|ends"] = np.array(ends, np.int32)
    small = dict(vocab_size=40, d_model=16, d_kv=6, d_ff=20, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu")
    for name in T5:
        torch.manual_seed(3)
        config = transformers.T5Config(
            **small, tie_word_embeddings=False, decoder_start_token_id=0, initializer_factor=0.5
        )
        model = transformers.T5ForConditionalGeneration(config).eval()
        if name == "two_tables":
            model.lm_head.weight = torch.nn.Parameter(torch.randn(40, 16))
        for parameter in model.parameters():
            parameter.data = parameter.data.half().float()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            found = safetensors.folder_tensors(folder)
            arrays |= {f"{name}|{key}": tensor.read().astype(np.float16) for key, tensor in found.items()}
            arrays[f"{name}|config.json"] = np.array(pathlib.Path(folder, "config.json").read_text())
            batch = proof.random_row(hugging_face.read_description(folder))
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor(batch["encoder_tokens"]).long(),
                decoder_input_ids=torch.tensor(batch["tokens"]).long(),
            ).logits
        arrays[f"{name}|logits"] = logits.numpy()
    np.savez_compressed(FIXTURE, allow_pickle=False, **arrays)
    print(f"{FIXTURE.name}: {FIXTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    record()
