"""Names of machines, and what they come to."""

import pytest

from peftax import machines


@pytest.mark.parametrize(
    "name, devices, hosts, topology",
    [
        ("a100-80gb:1", 1, 1, ""),
        ("a100-40gb:8", 8, 1, ""),
        ("h100:16", 16, 2, ""),
        ("v5e-1", 1, 1, "v5e:1x1"),
        ("v5e-16", 16, 2, "v5e:4x4"),
        ("v6e-256", 256, 32, "v6e:16x16"),
        ("v5p-8", 4, 1, "v5p:2x2x1"),  # a cloud counts its cores, two a chip
        ("v5p-64", 32, 8, "v5p:2x4x4"),
        ("v4-8", 4, 1, "v4:2x2x1"),
        ("v5p:2x2x2", 8, 2, "v5p:2x2x2"),
        ("tpu7x:2x2x1", 8, 1, "tpu7x:2x2x1"),  # a chip is two devices
        ("cpu:2", 2, 1, ""),
    ],
)
def test_a_name(name, devices, hosts, topology):
    found = machines.named(name)
    assert (found.count, found.hosts, found.topology) == (devices, hosts, topology)


@pytest.mark.parametrize(
    "name, says",
    [
        ("a100", "want a100-80gb|no machine 'a100'; known: v4"),
        ("a100-80gb", r"want a100-80gb:N"),
        ("h100:12", "1 to 8 or a multiple of 8"),
        ("v5e-5", "v5e-N with N of 1, 4, 8, 16"),
        ("v5e:2x2x1", "v5e:4x4, its topology"),
        ("tpu7x-8", "no machine 'tpu7x-8'"),
        ("tpu7x:8", "tpu7x:2x2x1, its topology"),
    ],
)
def test_a_wrong_name(name, says):
    with pytest.raises(ValueError, match=says):
        machines.named(name)


@pytest.mark.parametrize("name, wheel", [("v5e-4", "libtpu"), ("h100:1", "jax-cuda12-plugin")])
def test_a_missing_compiler_says_what_to_install(name, wheel):
    machine = machines.named(name)
    if machines.missing(machine.kind.platform) is None:
        pytest.skip(f"{wheel} is installed here")
    with pytest.raises(ValueError, match=rf"{wheel} is not installed: pip install peftax\[aot\]"):
        machine.devices()


def test_devices_of_this_machine():
    assert len(machines.named("cpu:8").devices()) == 8
    with pytest.raises(ValueError, match="JAX_NUM_CPU_DEVICES=9"):
        machines.named("cpu:9").devices()
