"""The tasks by their names in `train.task`."""

from lm_jax.tasks.classification import Classification
from lm_jax.tasks.instruction import Instruction
from lm_jax.tasks.preference import Preference
from lm_jax.tasks.regression import Regression
from lm_jax.tasks.texts import TextToText

TASKS = {
    "classification": Classification,
    "regression": Regression,
    "text_to_text": TextToText,
    "instruction": Instruction,
    "preference": Preference,
}
