"""The tasks by their names in `train.task`."""

from lm_jax.tasks.classification import Classification
from lm_jax.tasks.questions import QuestionAnswering
from lm_jax.tasks.regression import Regression
from lm_jax.tasks.tags import TokenClassification

TASKS = {
    "classification": Classification,
    "regression": Regression,
    "token_classification": TokenClassification,
    "question_answering": QuestionAnswering,
}
