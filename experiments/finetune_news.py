"""20 Newsgroups: which of twenty groups a post is from."""

from finetune_reviews import get_config as reviews

GROUPS = (
    "alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware",
    "comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey",
    "sci.crypt", "sci.electronics", "sci.med", "sci.space", "soc.religion.christian", "talk.politics.guns",
    "talk.politics.mideast", "talk.politics.misc", "talk.religion.misc",
)  # fmt: skip


def get_config():
    config = reviews()
    config.model.labels, config.data.sources = GROUPS, "news"
    config.data.test_fraction = 0.0
    config.optimizer.learning_rate = 2e-4
    config.evaluate.every = 110
    return config
