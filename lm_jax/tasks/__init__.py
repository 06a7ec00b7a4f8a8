"""The tasks by their names in `train.task`."""

from lm_jax.tasks.classification import Classification
from lm_jax.tasks.instruction import Instruction
from lm_jax.tasks.preference import Preference
from lm_jax.tasks.questions import QuestionAnswering
from lm_jax.tasks.regression import Regression
from lm_jax.tasks.tags import TokenClassification
from lm_jax.tasks.texts import TextToText

TASKS = {
    "classification": Classification,
    "regression": Regression,
    "token_classification": TokenClassification,
    "question_answering": QuestionAnswering,
    "text_to_text": TextToText,
    "instruction": Instruction,
    "preference": Preference,
}
