"""Each task, killed and gone on with, is the run that nobody interrupted: metrics and arrays to the bit."""

import pytest
from helpers import assert_same_run, kill_once_saved
from task_runs import CASES, line_of

from lm_jax import main

QUICK = ("question_answering",)  # the others are proofs; adapters and preferences have their own tests
SMALL = ["--config.model.num_layers=1", "--config.mesh.data=1", "--config.optimizer.name=lion"]
SMALL += ["--config.optimizer.moment_dtype=bfloat16"]  # kept in every checkpoint


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.proof) for c in CASES])
def test_a_killed_run_goes_on_to_the_bit(case, tmp_path):
    line = line_of(tmp_path, case) + (SMALL if case in QUICK else [])
    assert main.main([*line, "--workdir", str(tmp_path / "whole")]) == 0
    line += ["--workdir", str(tmp_path / "killed")]
    kill_once_saved(line)
    assert main.main(line) == 0 and "resumed at step" in (tmp_path / "killed" / "log.txt").read_text()
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
