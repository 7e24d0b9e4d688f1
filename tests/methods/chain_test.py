"""Chains by name, such as MAM's: the laws hold for what stands in one config."""

import pytest

from peftax import methods
from peftax.core.method import parts
from tests.methods import contract_test

LAWS = [
    contract_test.test_2_partition,
    contract_test.test_2_axes_name_every_leaf,
    contract_test.test_2_init_works_on_shapes_and_count_agrees,
    contract_test.test_4_trainable_leaves_only,
    contract_test.test_5_init_is_the_same_unrolled,
    contract_test.test_6_an_adapter_that_tracing_never_reached,
    contract_test.test_7_frozen_is_an_argument,
    contract_test.test_9_packing,
    contract_test.test_10_overfits_one_batch,
]


@pytest.fixture(scope="module")
def mam():
    """He et al., 2022: a prefix in attention, a scaled adapter beside the feed-forward."""
    case = contract_test.Case("prefix+adapter")
    settings = {"prefix": {"length": 3}, "adapter": {"placement": "scaled_parallel", "size": 5}}
    case.method = methods.make("prefix+adapter", **settings)
    case.acting = list(parts(case.method))
    return case


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(mam, law):
    law(mam)


def test_made_from_a_config():
    method = methods.make("prefix+adapter", prefix={"length": 3})
    assert [p.name for p in parts(method)] == ["prefix", "adapter"]
    assert method.config["prefix"]["length"] == 3 and method.config["adapter"] == methods.defaults("adapter")
    assert methods.defaults("prefix+adapter") == {name: methods.defaults(name) for name in ("prefix", "adapter")}


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("prefix+adaptor", {}, "'adaptor' does not exist; the nearest: 'adapter'"),
        ("lora+lora", {}, "'lora' comes twice"),
        ("prefix+adapter", {"length": 3}, "no setting 'length'; the nearest: "),
        ("prefix+adapter", {"prefix": {"lenght": 3}}, "prefix: no setting 'lenght'; the nearest: 'length'"),
        ("prefix+adapter", {"prefix": 3}, r"prefix\+adapter: prefix is 3; want its settings, as {'length': 20}"),
    ],
)
def test_mistakes_are_one_line(name, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        methods.make(name, **settings)
