"""What only the place of training needed binds no reader: every command reads a run that was trained elsewhere, otherwise."""

import dataclasses
import runpy

import jax
import pytest
from helpers import ROOT

from lm_jax import checkpoint, evaluate, load_model, main
from lm_jax.config import Mesh, flatten, leaves
from lm_jax.config_check import OF_MACHINE
from lm_jax.convert import run
from lm_jax.errors import UserError
from lm_jax.generate import command as generate
from lm_jax.mesh import make_mesh

# Each of them is another place: a TPU pod, scanned and recomputed layers, a mesh that is not here, workers.
PLACES = {
    "model.attention": "splash",
    "model.remat": "names",
    "model.unroll": False,
    "data.num_workers": 100,
    "train.microbatch_rows": 8,
    "mesh.data": 3,
    "mesh.fsdp": 64,
    "mesh.tensor": 256,
    "mesh.slices": 3,
    "mesh.expert": 2,
    "mesh.context": 4,
}


def tool(name: str):
    return lambda arguments: runpy.run_path(str(ROOT / "tools" / f"{name}.py"))["main"](arguments)


@pytest.fixture(scope="module")
def elsewhere(finished, tmp_path_factory) -> str:
    """The finished run as if each of these settings had been another's."""
    found = load_model.locate(str(finished), lambda line: None)
    config = found.config
    for path, value in PLACES.items():
        section, name = path.split(".")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
        )
    workdir = checkpoint.epath.Path(tmp_path_factory.mktemp("elsewhere") / "run")
    with jax.set_mesh(make_mesh(Mesh(data=1), jax.devices()[:1])):
        run.write(workdir, found._replace(config=config), load_model.load_parameters(found)[1], {})
    return str(workdir)


def test_the_settings_are_all_that_are_of_the_place():
    assert PLACES.keys() == OF_MACHINE.keys() == {path for path, field in leaves().items() if field.metadata["machine"]}
    assert not any(leaves()[path].metadata["fixed"] for path in OF_MACHINE)


COMMANDS = {
    "generate": (generate.main, ["--model", "{run}", "--prompt", "class", "--max_new_tokens", "4"]),
    "beams": (generate.main, ["--model", "{run}", "--prompt", "class", "--max_new_tokens", "4", "--beams", "2"]),
    "evaluate": (evaluate.main, ["--model", "{run}"]),
    "look_inside": (tool("look_inside"), ["embedding", "--model", "{run}", "--text", "class"]),
    "model_card": (tool("model_card"), ["--model", "{run}"]),
    "init_from": (
        main.main,
        [
            "--config=experiments/quickstart.py:smoke",
            "--workdir={tmp}/next",
            "--config.train.init_from={run}",
            "--dry_run",
        ],
    ),
}


def test_what_cannot_be_converted_is_so_for_what_the_model_is(elsewhere, tmp_path):
    """It is read, and then there is no family that the quickstart's model is of."""
    with pytest.raises(UserError, match="no Hugging Face family has this model") as error:
        tool("convert_checkpoint")([elsewhere, f"{tmp_path}/out", "--unproven"])
    assert not [path for path in PLACES if path.split(".")[1] in str(error.value)]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_reads_a_run_from_elsewhere(name, elsewhere, tmp_path):
    command, arguments = COMMANDS[name]
    assert not command([argument.format(run=elsewhere, tmp=tmp_path) for argument in arguments])


def test_what_is_read_is_right_here(elsewhere):
    """One function reads a MODEL: what it gives has nothing of the other place in it."""
    config = load_model.locate(elsewhere, lambda line: None).config
    assert {path: flatten(config)[path] for path in OF_MACHINE} == OF_MACHINE


@pytest.mark.proof
def test_lm_eval_reads_a_run_from_elsewhere(elsewhere):
    from lm_jax.generate.lm_eval import HarnessModel

    model = HarnessModel(load_model.locate(elsewhere, lambda line: None))
    assert model.loglikelihood_rolling([type("Request", (), {"args": ("class a:",)})()])[0] < 0
