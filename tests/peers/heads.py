"""Heads of tasks in lm_jax and in `transformers`, from random weights: the same logits, read from there and written for there.

pip install -e '.[peers]'
python tests/peers/heads.py              compares every class live, both ways
python tests/peers/heads.py --record     writes tests/fixtures/heads.npz, which tests/test_heads.py is held to
"""

import argparse
import json
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
from peers import families

from lm_jax.convert import description, hugging_face, proof, safetensors

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures" / "heads.npz"
LIMIT = 1e-4  # of every logit, absolute
PIECES, LENGTH = 31, 20
LABELS = ("calm", "Wut", "été", "O")
NAMED = dict(id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)})
VALUE = dict(num_labels=1, problem_type="regression")
BERT = dict(
    hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20, max_position_embeddings=24,
    initializer_range=0.3,
)  # fmt: skip
ROBERTA = BERT | dict(max_position_embeddings=26, type_vocab_size=1, pad_token_id=1)
DISTILBERT = dict(dim=12, n_layers=2, n_heads=3, hidden_dim=20, max_position_embeddings=24, initializer_range=0.3)
# name: (class, model_type, settings); our head follows from the class and from the number of labels.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert_labels": ("BertForSequenceClassification", "bert", BERT | NAMED),
    "bert_value": ("BertForSequenceClassification", "bert", BERT | VALUE),
    "bert_tags": ("BertForTokenClassification", "bert", BERT | NAMED),
    "bert_spans": ("BertForQuestionAnswering", "bert", BERT),
    "bert_masked": ("BertForMaskedLM", "bert", BERT),
    "roberta_labels": ("RobertaForSequenceClassification", "roberta", ROBERTA | NAMED),
    "roberta_tags": ("RobertaForTokenClassification", "roberta", ROBERTA | NAMED),
    "roberta_masked": ("RobertaForMaskedLM", "roberta", ROBERTA),
    "distilbert_spans": ("DistilBertForQuestionAnswering", "distilbert", DISTILBERT),
    "distilbert_masked": ("DistilBertForMaskedLM", "distilbert", DISTILBERT),
}
DECODERS = {
    "gpt2": "GPT2", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2",
    "gemma3": "Gemma3Text", "mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe", "phi3": "Phi3", "olmo2": "Olmo2",
    "smollm3": "SmolLM3",
}  # fmt: skip
for _name, _class in DECODERS.items():
    _head = VALUE if _name == "llama" else NAMED
    CASES[f"{_name}_{'value' if _head is VALUE else 'labels'}"] = (f"{_class}ForSequenceClassification", _name, _head)
RECORDED = (
    "bert_labels",
    "bert_value",
    "bert_tags",
    "bert_spans",
    "bert_masked",
    "roberta_labels",
    "distilbert_masked",
)


def batch() -> dict[str, np.ndarray]:
    """One text of random tokens, the second half of them of the second type."""
    tokens = np.random.RandomState(0).randint(3, PIECES, (1, LENGTH)).astype(np.int32)
    positions = np.arange(LENGTH, dtype=np.int32)[None]
    types = (positions >= LENGTH // 2).astype(np.int32)
    return {"tokens": tokens, "positions": positions, "segment_ids": np.ones_like(tokens), "token_type_ids": types}


def reference(name: str):
    """The model of a case in PyTorch, its weights random and no scale or bias left at one or nought."""
    import torch
    import transformers

    architecture, kind, settings = CASES[name]
    if kind in DECODERS:
        known = families.reference(kind).config.to_dict()
        kind, settings = known["model_type"], known | dict(id2label=None, label2id=None) | settings
        settings = {key: value for key, value in settings.items() if value is not None or key == "sliding_window"}
    else:
        settings = settings | dict(vocab_size=PIECES)
    torch.manual_seed(7)
    settings = {key: x for key, x in settings.items() if key not in ("model_type", "architectures")}
    config = transformers.AutoConfig.for_model(kind, **settings)
    config.pad_token_id = None if kind not in ("bert", "roberta", "distilbert") else config.pad_token_id
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.3 if parameter.ndim == 1 else 0.1) * torch.randn_like(parameter))
            parameter.copy_(parameter.half().float())  # weights that two bytes hold
    return model


def logits_there(model) -> np.ndarray:
    """What a class says of the text: [1, C], or [1, T, C]; of an answer its starts and ends side by side."""
    import torch

    given, kind = batch(), model.config.model_type
    types = {"token_type_ids": torch.tensor(given["token_type_ids"]).long()} if kind == "bert" else {}
    with torch.no_grad():
        found = model(torch.tensor(given["tokens"]).long(), **types)
    if "start_logits" in found:
        return np.stack([found["start_logits"].numpy(), found["end_logits"].numpy()], -1)
    return found["logits"].numpy()


def logits_here(content: dict[str, Any], tensors: dict[str, Any]) -> tuple[description.Description, dict, np.ndarray]:
    """(description, parameters, the same logits here) of a config.json and its tensors."""
    from lm_jax.convert import tensor_map

    described = description.describe(content, "config.json", "bytes")
    ours = tensor_map.parameters(described, tensors, "there")
    given = batch() if described.config.model.kind == "encoder" else {
        key: x for key, x in batch().items() if key != "token_type_ids"
    }  # fmt: skip
    logits = np.asarray(proof.heads(description.graph_of(described), ours, given)[0])
    return described, ours, logits if described.config.model.head else logits[..., : described.vocab_size]


def compare(name: str, folder: str) -> dict[str, float]:
    """How far lm_jax is from PyTorch: as it was saved there, and as it is written here and loaded there."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = reference(name)
    model.save_pretrained(f"{folder}/there")
    expected = logits_there(model)
    tensors = {key: x.read() for key, x in safetensors.folder_tensors(f"{folder}/there").items()}
    content = json.loads(pathlib.Path(folder, "there", "config.json").read_text())
    described, ours, logits = logits_here(content, tensors)
    found = {"read": float(np.abs(logits - expected).max())}
    if not description.FAMILIES[described.family].is_written:
        return found
    again = as_written(described, ours)
    hugging_face.write(f"{folder}/here", again, ours, {})
    back, told = getattr(transformers, CASES[name][0]).from_pretrained(f"{folder}/here", output_loading_info=True)
    assert not any(told.values()), told
    assert back.config.id2label == model.config.id2label or name.endswith("value"), back.config.id2label
    return found | {"written": float(np.abs(logits_there(back.eval()) - expected).max())}


def as_written(described: description.Description, ours: dict) -> description.Description:
    """The description with which a model leaves."""
    from lm_jax.convert import heads

    again = description.description_of(described.config, described.vocab_size)
    family = description.FAMILIES[again.family]
    return again._replace(content=heads.without_unused(family, again.content, ours))


def record() -> None:
    arrays: dict[str, np.ndarray] = {}
    for name in RECORDED:
        with tempfile.TemporaryDirectory() as folder:
            model = reference(name)
            model.save_pretrained(folder)
            found = safetensors.folder_tensors(folder)
            arrays |= {f"{name}|{key}": tensor.read().astype(np.float16) for key, tensor in found.items()}
            arrays[f"{name}|config.json"] = np.array(pathlib.Path(folder, "config.json").read_text())
            arrays[f"{name}|logits"] = logits_there(model)
    np.savez_compressed(FIXTURE, allow_pickle=False, **arrays)
    print(f"{FIXTURE.name}: {FIXTURE.stat().st_size:,} bytes")


def recorded(name: str) -> tuple[dict, dict[str, np.ndarray], np.ndarray]:
    """(config.json, tensors in float32, logits) of a class."""
    return families.recorded(name, FIXTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    if parser.parse_args().record:
        record()
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder, jax.default_matmul_precision("highest"):
            print(name, {key: f"{value:.1e}" for key, value in compare(name, folder).items()}, flush=True)


if __name__ == "__main__":
    main()
