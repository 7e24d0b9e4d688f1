"""Chains by name, such as MAM's: the laws hold for what stands in one config."""

import jax
import pytest

from peftax import methods
from peftax.core import tree
from peftax.core.method import parts
from peftax.weights import adapters
from tests.methods import contract_test, tiny

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


def started(name, **settings):
    method = methods.make(name, **settings)
    return jax.eval_shape(lambda p: method.init(jax.random.key(0), p, tiny.found()), tiny.params())


@pytest.mark.parametrize(
    "first, second, settings",
    [
        ("bitfit", "lora", {}),
        ("lora", "ia3", {"lora": {"bias": "all", "targets": ["q_proj"]}}),
        ("lora", "prompt", {"lora": {"modules_to_save": ["embed_tokens"]}}),
        ("lora", "full", {"full": {"targets": r".*\.mlp\..*"}}),
        ("lora", "full", {"full": {"targets": ".*"}}),
    ],
)
def test_order_does_not_decide_what_trains(first, second, settings):
    """The base's leaves are taken when others have seen them, and others' leaves are none of them."""
    one, other = (started(name, **settings) for name in (f"{first}+{second}", f"{second}+{first}"))
    assert tree.flatten(one.trainable).keys() == tree.flatten(other.trainable).keys()
    assert tree.flatten(one.frozen).keys() == tree.flatten(other.frozen).keys()
    assert not any(path.endswith("/default/scale") for path in tree.flatten(one.trainable))


def test_what_two_train_is_refused():
    with pytest.raises(ValueError, match=r"chain: bitfit and modules_to_save both train 'model/layers/.*/bias'"):
        started("bitfit+lora", lora={"bias": "all"})
    with pytest.raises(ValueError, match="chain: dora stands on 'model/layers/mlp/.*_proj/kernel' as it was .* full"):
        started("full+dora", full={"targets": r".*\.mlp\..*"})


@pytest.mark.parametrize("name", ["bitfit+lora", "lora+bitfit"])
def test_a_folder_of_leaves_of_the_base_beside_an_adapter(name, tmp_path):
    method = methods.make(name, lora={"rank": 2, "targets": ["q_proj"]})
    part = jax.jit(lambda p: method.init(jax.random.key(0), p, tiny.found()))(tiny.params())
    part = part._replace(trainable=tiny.perturb(part.trainable))
    adapters.save(tmp_path / "a", part, method, tiny.found())
    _, loaded, _ = adapters.load(tmp_path / "a", tiny.params(), tiny.found())
    tiny.close(loaded.trainable, part.trainable, 0.0)
    tiny.close(loaded.frozen, part.frozen, 0.0)


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
