"""The tasks by their names in `train.task`."""

from lm_jax.tasks.classification import Classification
from lm_jax.tasks.regression import Regression

TASKS = {"classification": Classification, "regression": Regression}
