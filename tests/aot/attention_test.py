"""Splash attention compiles for a TPU, in a layer stack's training step, and is what attends there."""

import re

import pytest

from peftax import machines
from tests.aot.programs import Program

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(machines.missing("tpu") is not None, reason=str(machines.missing("tpu"))),
]


def test_one_long_row():
    """Llama-3.2-1B's layers, 8192 tokens: forward, forward again, and the two kernels of the backward pass."""
    step, args = Program(machines.tpu("v5e:1x1"), batch=1, length=8192, attention="splash").train()
    compiled = machines.compile(step, *args)
    assert machines.memory(compiled)["bytes"] < 2.0 * 2**30  # docs/planning.md says what it is beside XLA's
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 4
    names = re.findall(r"splash_mha_(fwd|dq|dkv)_segmented", text)
    assert set(names) == {"fwd", "dq", "dkv"}
    assert not re.search(r"\[(\d+,)*(32|8),8192,8192\]", text)  # no scores of all queries and keys
