"""MiniLM-L6 on sentences of movie reviews."""

import ml_collections

from experiments.lora_without_regret import arms
from experiments.sentence_sentiment import config as sentiment

STEPS, ROWS = 64, 4  # rows of about five sentences
ATTENTION = r".*attention\..*(query|key|value|dense)"  # 3,072 numbers a rank and layer
MLP = r".*(intermediate|layer\.\d+\.output)\.dense"  # 3,840

TOGETHER = 16  # members in one program


def get_config() -> ml_collections.ConfigDict:
    return arms.without_schedule(sentiment.get_config(), steps=STEPS, rows=ROWS)


def sweep(add):
    rates = {"lora": (1e-4, 4e-4, 1.6e-3, 6.4e-3), "full": (1e-5, 4e-5, 1.6e-4, 6.4e-4)}
    arms.add_methods(add, ranks=(1, 16, 64), places={ATTENTION: 20, MLP: 16}, **rates)
    arms.add_batches(add, steps=STEPS, rows=ROWS, **rates)
