"""Finetuning on records: what the core calls when `train.task` names a task. `TASKS` has the tasks by these names.

task.py       what a task is; segments.py: its records as tokens with targets and masks; words.py: words and their tokens
classification.py  regression.py  tags.py  questions.py  texts.py  instruction.py  preference.py    a task each
conversations.py  chats and pairs as people publish them -> messages
tables.py     files of records; records.py: records -> packed rows, and held-out rows with their results
scores.py     scores with bootstrap intervals; results.py: kept record by record, two runs compared
baselines.py  text_baselines.py       what a finetuned model has to beat
dpo_reference.py  the first model's opinion of every pair; generate_answers.py: texts that a model writes for records
"""

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
