"""A start is a state: step 0 is a step like any other, wherever "none" could be mistaken for it."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from helpers import tiny

from lm_jax import checkpoint, initial_state, load_model, metrics, metrics_file
from lm_jax.config import Mesh
from lm_jax.convert import run
from lm_jax.mesh import make_mesh
from lm_jax.train_state import fresh, make_program


@pytest.mark.parametrize("step", [0, 1, 7])
def test_a_run_goes_on_from_any_step_that_was_saved(step, corpus, tmp_path):
    """Also from step 0: the parameters are those that were saved, not random ones."""
    program, said = make_program(tiny(model__num_layers=1), corpus.tokenizer.vocab_size), []
    facts = dict.fromkeys(checkpoint.FACTS, "made up")
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        state = jax.jit(lambda: fresh(program))()
        other = state._replace(parameters=jax.tree.map(lambda x: x + 1, state.parameters))
        saver = checkpoint.Saver(epath.Path(tmp_path), program.config, facts)
        saver.save(other, checkpoint.DataState(step, 8 * step))
        saver.close()
        assert saver.stop.saved == step
        found, data = initial_state.starting_point(program, epath.Path(tmp_path), None, said.append, "made up")
    assert data == checkpoint.DataState(step, 8 * step) and said == [f"resumed at step {step}, row {8 * step}"]
    for a, b in zip(jax.tree.leaves(found.parameters), jax.tree.leaves(other.parameters), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("step", "kept"), [(0, [0]), (1, [0, 1]), (3, [0, 1, 2])])
def test_the_lines_up_to_any_step_are_kept(step, kept, tmp_path):
    lines = [{"step": number, "train/loss": 1.0} for number in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics.Writer(epath.Path(tmp_path), step).close()
    assert [line["step"] for line in metrics_file.read(epath.Path(tmp_path))] == kept


def test_a_model_at_step_0_is_found_by_that_name(finished, tmp_path):
    """What was taken from elsewhere lies at step 0: `MODEL` and `MODEL@0` are it."""
    found = load_model.locate(str(finished))
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        _, parameters = load_model.load_parameters(found)
        run.write(epath.Path(tmp_path / "taken"), found, parameters, {})
    assert load_model.locate(str(tmp_path / "taken")).step == load_model.locate(f"{tmp_path}/taken@0").step == 0
