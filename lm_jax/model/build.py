"""Builds the model of a config: a Flax NNX module, whose parameters are kept in a nested dict of arrays beside it."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from flax import nnx

from lm_jax.config import Model
from lm_jax.model.encoder import Encoder
from lm_jax.model.encoder_decoder import EncoderDecoder
from lm_jax.model.for_generation import unstacked
from lm_jax.model.language_model import Caches, LanguageModel
from lm_jax.model.layers import Declaration, make, merge
from lm_jax.model.lora import adapt
from lm_jax.model.recurrent import Recurrent
from lm_jax.model.transformer import Block, Transformer
from lm_jax.model.unstacked import is_unstacked
from lm_jax.model_config import plain

KINDS: dict[str, type[LanguageModel]] = {
    "transformer": Transformer,
    "encoder": Encoder,
    "encoder_decoder": EncoderDecoder,
    "rnn": Recurrent,
    "gru": Recurrent,
    "lstm": Recurrent,
}


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: a static argument of compiled functions
class ModelDef:
    """A model without its arrays: `declarations` describes the parameters, `init` makes them, `module` computes with them."""

    config: Model
    sequence_length: int
    graph_and_state: tuple  # the module as `layers.split` returns it
    declarations: dict[tuple[str, ...], Declaration]  # by the path of the parameter

    def init(self, root: jax.Array, sharded: bool = False) -> dict:
        """Fresh parameters from a root key, as a nested dict. With `sharded` (under jit) each device makes only its shards."""
        flat = {path: make(declared, path, root, sharded) for path, declared in self.declarations.items()}
        return nnx.traversals.unflatten_mapping(flat)

    def module(self, parameters: dict) -> LanguageModel:
        """The module with these parameters in place. Call it inside a traced function."""
        module = merge(self.graph_and_state, parameters)
        assert isinstance(module, LanguageModel)
        return module

    def unstacked(self, parameters: dict) -> dict:
        """The parameters as generation reads them: with `config.unroll` a copy of every stack [L, ...] as L arrays (`Unstacked`).

        Parameters whose layers are unstacked already come back as they are.
        """
        return _unstacked(self, parameters) if self.config.unroll and not is_unstacked(parameters) else parameters

    def empty_caches(self, batch: int, slots: int) -> Caches:
        """The caches of generation (keys and values, or recurrent states) before the first token of `batch` texts."""
        return KINDS[self.config.kind].empty_caches(self.config, batch, slots)

    def tree(self, of_declaration: Callable[[Declaration], object]) -> dict:
        """A nested dict like the parameters, with `of_declaration(declaration)` at each leaf."""
        flat = {path: of_declaration(declared) for path, declared in self.declarations.items()}
        return nnx.traversals.unflatten_mapping(flat)


@functools.partial(jax.jit, static_argnames=("graph",))
def _unstacked(graph: ModelDef, parameters: dict) -> dict:
    return unstacked(graph.declarations, parameters)


def build(config: Model, vocab_size: int, sequence_length: int, block: type[Block] = Block) -> ModelDef:
    """The model of a config, for a tokenizer of `vocab_size` and rows of `sequence_length` tokens; "auto" is `plain`."""
    config, replaced = plain(config), {} if block is Block else {"block": block}
    model = KINDS[config.kind](config, vocab_size, sequence_length, **replaced)
    if config.lora_rank:
        adapt(model, config)
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    declarations = {tuple(map(str, path)): variable.get_metadata("declared") for path, variable in flat}
    return ModelDef(config, sequence_length, (graph, state), declarations)
