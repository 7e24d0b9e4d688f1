"""LoRA on MiniLM-L6 with a learning rate of A and a ratio of B's to it: every ratio over one grid, two seeds."""

import ml_collections

from experiments.sentence_sentiment import config as sentiment

RATE, RATIO = "optimizer.learning_rate", "optimizer.factors"
RATES = (1e-5, 4e-5, 1.6e-4, 6.4e-4, 2.56e-3, 1.024e-2)  # of A
RATIOS = (0.25, 1.0, 4.0, 16.0, 64.0)  # B's to A's; 1 is LoRA
SEEDS = (0, 1)
MORE = (2, 3)  # of what is chosen


def get_config() -> ml_collections.ConfigDict:
    config = sentiment.get_config()
    config.method = {"name": "lora", "rank": 8, "alpha": 8.0}  # of the paper's RoBERTa; all linear layers
    config.optimizer.b2 = 0.99
    config.optimizer.schedule = "linear"
    config.train.steps = 100
    config.train.save_every = 100
    return config


def factors(ratio: float) -> tuple[tuple[str, float], ...]:
    return (("/lora/.*/b$", ratio),)


def sweep(add):
    for ratio in RATIOS:
        for rate in RATES:
            for seed in SEEDS:
                add({RATIO: factors(ratio), RATE: rate, "seed": seed})
