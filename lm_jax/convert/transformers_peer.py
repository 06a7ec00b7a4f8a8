"""A Hugging Face folder as `transformers` reads it: what lm_jax/convert/proof.py compares an exported model with."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm_jax.convert import description, export, proof, text_files
from lm_jax.errors import UserError
from lm_jax.generate import chat_template
from lm_jax.terminal import Terminal

THEIR_NAMES = {
    "transformer": {"input_ids": "tokens"},
    "encoder": {"input_ids": "tokens", "token_type_ids": "token_type_ids"},
    "encoder_decoder": {"input_ids": "encoder_tokens", "decoder_input_ids": "tokens"},
}


class Transformers:
    """A folder's model in `transformers`: its small files, and arrays from memory. Raises UserError where it has to guess."""

    def __init__(self, folder: str, described: description.Description, tensors: dict[str, np.ndarray]):
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.name, self.torch = f"transformers {transformers.__version__}", torch
        architecture = getattr(transformers, described.content["architectures"][0])
        config = transformers.AutoConfig.from_pretrained(folder)
        arrays = {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}
        self.model, told = architecture.from_pretrained(
            None, config=config, state_dict=arrays, output_loading_info=True, dtype="float32"
        )
        if any(told.values()):
            raise UserError(f"{self.name} misses arrays, or has no place for them: {told}")
        self.model.eval()
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        self.remark = ""
        named = json.loads(pathlib.Path(folder, text_files.CONFIG).read_text())["tokenizer_class"]
        plain = transformers.PreTrainedTokenizerFast
        if named == text_files.CLASS and type(self.tokenizer) is not plain:
            # For a few kinds of models AutoTokenizer cuts a text as the first of this kind did, whatever a folder says.
            self.tokenizer = plain.from_pretrained(folder)
            self.remark = f"there load its tokenizer with {named}: for {config.model_type} AutoTokenizer takes another"
        kind = described.config.model.kind
        self.reads, self.names = kind == "encoder_decoder", THEIR_NAMES[kind]
        self.ends: set[int] = set()
        if self.model.can_generate():
            self.model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
            ends = self.model.generation_config.eos_token_id
            self.ends = set(ends if isinstance(ends, list) else [ends])

    def logits(self, batch: dict[str, np.ndarray]) -> list[np.ndarray]:
        """As `proof.Peer` has it."""
        given = {its: self.torch.tensor(batch[own]).long() for its, own in self.names.items()}
        with self.torch.no_grad():
            found = self.model(**given, return_dict=True)
        if "start_logits" in found:
            return [np.stack([found[f"{end}_logits"].numpy() for end in ("start", "end")], -1)]
        heads = ("logits", "prediction_logits", "seq_relationship_logits")
        return [found[name].numpy() for name in heads if name in found]

    def encode(self, text: str) -> list[int]:
        """As `proof.Peer` has it."""
        return self.tokenizer(text)["input_ids"]

    def encode_chat(self, messages: Sequence[chat_template.Message]) -> list[int]:
        """As `proof.Peer` has it."""
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    def write(self, ids: list[int], limit: int) -> list[int]:
        """As `proof.Peer` has it."""
        given = self.torch.tensor([ids])
        found = self.model.generate(
            given, attention_mask=self.torch.ones_like(given), max_new_tokens=limit, do_sample=False
        )
        return found[0, 1 if self.reads else len(ids) :].tolist()

    def decode(self, ids: list[int]) -> str:
        """As `proof.Peer` has it."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def prover(unproven: bool, again: str, log: Terminal) -> export.Prove:
    """What compares a folder with the model as it is here, where it can and shall; `again` is the command that does not."""

    def prove(folder: str, tensors: dict[str, np.ndarray], ours: proof.Exported) -> None:
        if unproven:
            return log("unproven, as asked for")
        try:
            import torch  # noqa: F401
            import transformers  # noqa: F401
        except ImportError:
            return log("unproven: transformers and torch are not installed (pip install -e '.[peers]')")
        try:
            log(proof.prove(ours, Transformers(folder, ours.described, tensors)))
        except UserError as error:
            raise UserError(f"not written: {error}\nto write it all the same: {again}") from None

    return prove
