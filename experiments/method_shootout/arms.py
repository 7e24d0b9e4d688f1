"""Every method at the sizes that it reaches, each over learning rates of its own that hold the one that all share."""

import ml_collections
from peftax.configs import smollm2_lora

RATE = "optimizer.learning_rate"
FIXED = 1e-3  # in every grid
GRIDS = {  # around the rates that the methods' files advise
    "full": (1e-5, 1e-4, 3e-4, FIXED),
    "c3a": (FIXED, 1e-1, 3e-1, 1.0),
    **dict.fromkeys(("ia3", "ln_tuning", "vera", "vblora", "prompt", "prefix", "fourierft"), (FIXED, 1e-2, 3e-2, 1e-1)),
}
GRID = (3e-4, FIXED, 3e-3, 1e-2)  # of the others
FEW = {"targets": ["q_proj", "v_proj"]}
SIZES = {  # numbers that train: {method: settings}; native: of methods that reach no other
    "native": {
        "prompt": {"length": 20},
        "ln_tuning": {},
        "ia3": {},
        "lokr": {"decompose_factor": 8},
        "vera": {"rank": 256},
        "vblora": {"length": 192},
        "randlora": {"rank": 32},
        "full": {},
    },
    "100k": {
        "lora": {"rank": 2, **FEW},
        "dora": {"rank": 1, **FEW},
        "adalora": {"rank": 2, "target_rank": 1, **FEW},
        "hira": {"rank": 2, **FEW},
        "loha": {"rank": 1, **FEW},
        "shira": {"rank": 2, **FEW},
        "fourierft": {"frequencies": 500},
        "adapter": {"size": 1},
        "compacter": {},
        "prefix": {"length": 9},
    },
    "1M": {
        "lora": {"rank": 3},
        "dora": {"rank": 3},
        "adalora": {"rank": 3, "target_rank": 2},
        "hira": {"rank": 3},
        "loha": {"rank": 2},
        "shira": {"rank": 3},
        "miss": {"rank": 6},
        "hra": {"rank": 6},
        "oft": {"block_size": 16},
        "boft": {"block_size": 4},
        "fourierft": {"frequencies": 4800},
        "c3a": {"block": 96},
        "adapter": {"size": 14},
        "prefix": {"length": 87},
        "p_tuning": {"length": 20},
    },
    "5M": {
        "lora": {"rank": 16},
        "dora": {"rank": 16},
        "adalora": {"rank": 16, "target_rank": 10},
        "hira": {"rank": 16},
        "loha": {"rank": 8},
        "shira": {"rank": 16},
        "miss": {"rank": 32},
        "hra": {"rank": 32},
        "oft": {"block_size": 64},
        "boft": {"block_size": 32},
        "fourierft": {"frequencies": 24000},
        "adapter": {"size": 72},
    },
}


def get_config() -> ml_collections.ConfigDict:
    config = smollm2_lora.get_config()
    config.data.train_length = 256
    config.data.valid_limit = 24
    config.data.test_limit = 50
    config.optimizer.warmup_steps = 4
    config.train.batch_size = 1
    config.train.steps = config.train.eval_every = config.train.save_every = 24
    config.train.tensorboard = False
    return config


def settings(size: str, method: str) -> dict:
    """A method's overrides at a size."""
    return {"method.name": method, **{f"method.{key}": value for key, value in SIZES[size][method].items()}}


def add_all(add, size: str) -> None:
    for method in SIZES[size]:
        for rate in GRIDS.get(method, GRID):
            add({**settings(size, method), RATE: rate})
