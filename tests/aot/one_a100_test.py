"""Llama-3-70B on one A100: what of its training fits in how much memory."""

import re

import jax
import pytest

from peftax import machines
from tests.aot.programs import LLAMA_70B, NF4, Program

pytestmark = pytest.mark.aot
INT8 = (*NF4, ("embed_tokens|lm_head", {"fmt": "int8"}))
ALL, QV = {"rank": 16}, {"rank": 10, "targets": ("q_proj", "v_proj")}
ROW = {"batch": 1, "length": 2048}
BARS = {  # of one A100: LoRA, how, trainable, GiB
    "all": (ALL, {}, 207_093_760, 44.0),
    "all-four-rows": (ALL, {"batch": 4}, 207_093_760, 54.0),
    "all-offload": (ALL, {"remat": "offload"}, 207_093_760, 42.0),
    "q,v": (QV, {}, 20_480_000, 41.0),
    "q,v-offload": (QV, {"remat": "offload"}, 20_480_000, 40.0),
    "q,v-offload-int8": (QV, {"remat": "offload", "rules": INT8}, 20_480_000, 38.0),
}


@pytest.mark.parametrize("name", BARS)
def test_70b_on_one_a100(name):
    """Llama-3-70B in NF4 with double quantization, rows of 2048 tokens, every layer made again."""
    if why := machines.missing("cuda"):
        pytest.skip(why)
    lora, how, trainable, bar = BARS[name]
    program = Program(machines.gpu("a100_80gb", 1), config=LLAMA_70B, **{"rules": NF4, "lora": lora, **ROW, **how})
    assert sum(x.size for x in jax.tree.leaves(program.halves.trainable)) == trainable
    step, args = program.train()
    compiled = machines.compile(step, *args)
    memory = machines.memory(compiled)
    assert memory["bytes"] <= bar * 2**30, {k: f"{v / 2**30:.2f} GiB" for k, v in memory.items()}
    if "rules" in how:  # of a table only the rows that are looked up
        table = "128256,8192"
        assert f"s8[{table}]" in (text := compiled.as_text())
        assert not re.search(rf"(f32|bf16)\[{table}\]", text)
    jax.clear_caches()
