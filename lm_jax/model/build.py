"""The seam between NNX modules and plain nested dicts of arrays: `init / apply / declarations`, for every kind of model."""

import dataclasses
import functools

import jax
from flax import nnx

from lm_jax.config import Model
from lm_jax.model.encoder import Encoder
from lm_jax.model.encoder_decoder import EncoderDecoder
from lm_jax.model.language_model import LanguageModel
from lm_jax.model.layers import Apart, Declaration, is_apart, make, merge
from lm_jax.model.lora import adapt
from lm_jax.model.recurrent import Recurrent
from lm_jax.model.transformer import Transformer

KINDS: dict[str, type[LanguageModel]] = {
    "transformer": Transformer,
    "encoder": Encoder,
    "encoder_decoder": EncoderDecoder,
    "rnn": Recurrent,
    "gru": Recurrent,
    "lstm": Recurrent,
}


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: a static argument of compiled functions
class Graph:
    """The seam: what a model is (`apply`) and what its parameters are (`declarations`), without any array."""

    config: Model
    sequence_length: int
    graph_and_state: tuple
    declarations: dict[tuple[str, ...], Declaration]

    def init(self, root: jax.Array, sharded: bool = False) -> dict:
        """Fresh parameters as a nested dict; under jit with `sharded`, each device makes only its shards."""
        parameters: dict = {}
        for path, declared in self.declarations.items():
            node = parameters
            for name in path[:-1]:
                node = node.setdefault(name, {})
            node[path[-1]] = make(declared, path, root, sharded)
        return parameters

    def module(self, parameters: dict) -> LanguageModel:
        """The module with these parameters in place, to be called inside a traced function."""
        module = merge(self.graph_and_state, parameters)
        assert isinstance(module, LanguageModel)
        return module

    def apart(self, parameters: dict) -> dict:
        """The same parameters, every stack of layers an `Apart`, where the program of `config` unrolls its layers.

        What generates reads them so. It is a copy; nothing is done to what is apart already.
        """
        return take_apart(self, parameters) if self.config.unroll and not is_apart(parameters) else parameters

    def empty_caches(self, batch: int, slots: int):
        """What generation keeps of `batch` texts, before their first token."""
        return KINDS[self.config.kind].empty_caches(self.config, batch, slots)

    def tree(self, of_declaration) -> dict:
        """A nested dict like the parameters, with `of_declaration(declared)` at each leaf."""
        flat = {path: of_declaration(declared) for path, declared in self.declarations.items()}
        return nnx.traversals.unflatten_mapping(flat)


@functools.partial(jax.jit, static_argnames=("graph",))
def take_apart(graph: Graph, parameters: dict) -> dict:
    """The jitted half of `Graph.apart`."""
    layers = lambda declared, x: Apart.of(x) if "layers" in declared.axes else x
    return jax.tree.map(layers, graph.tree(lambda declared: declared), parameters)


def build(config: Model, num_pieces: int, sequence_length: int) -> Graph:
    """The model of a config, for a tokenizer of `num_pieces` and rows of `sequence_length` tokens."""
    model = KINDS[config.kind](config, num_pieces, sequence_length)
    if config.lora_rank:
        adapt(model, config)
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    declarations = {tuple(map(str, path)): variable.get_metadata("declared") for path, variable in flat}
    return Graph(config, sequence_length, (graph, state), declarations)
