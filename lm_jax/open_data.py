"""What a config is trained and evaluated on: the corpora of its sources, or the records of its task."""

from collections.abc import Callable

from lm_jax.config import Config
from lm_jax.data import mixture


def open_data(config: Config, log: Callable[[str], None] = lambda line: None) -> mixture.Mixture:
    """The corpora of a config, or the records of its task; here a run of a task begins to need `tasks`."""
    if not config.train.task:
        return mixture.open_mixture(config.data, log)
    from lm_jax.tasks.records import open_records

    return open_records(config, log)


def check_scores(config: Config) -> None:
    """Raises UserError where the package that scores written texts is missing."""
    if config.evaluate.metrics:
        from lm_jax.tasks import scores

        scores.check(config.evaluate.metrics)
