import jax
import pytest

from peftax import methods
from peftax.core import lift
from peftax.core.method import Method, Partition, chain, check_tasks, parts
from peftax.methods.lora import lora
from tests.core import toys


def leaf(name, **fields):
    """A method that takes one leaf."""

    def init(key, params, sites):
        del key, sites
        return Partition({k: v for k, v in params.items() if k != name}, {name: params[name]})

    return Method(name=name, init=init, fold=lambda p, s: {**p, "folded": (*p.get("folded", ()), name)}, **fields)


def test_chain():
    both = chain(leaf("a", needs="norms"), leaf("b"))
    part = both.init(jax.random.key(0), {"a": 1, "b": 2, "c": 3}, None)
    assert part == Partition({"c": 3}, {"a": 1, "b": 2})
    assert both.fold({}, None)["folded"] == ("a", "b")
    assert both.name == "a+b" and both.needs == "norms"
    assert [p.name for p in parts(chain(both, leaf("c")))] == ["a", "b", "c"]
    alone = leaf("a")
    assert parts(alone) == (alone,)


def test_the_first_method_of_a_chain_draws_the_same_alone():
    _, params, _, all_sites = toys.found("mlp")
    adapted = methods.make("lora", rank=2)
    biases = lift.select("biases", lambda name: name.endswith(".bias"))
    alone = toys.start(adapted, params, all_sites).trainable
    chained = toys.start(chain(adapted, biases), params, all_sites).trainable
    assert (alone["up"]["lora"]["default"]["a"] == chained["up"]["lora"]["default"]["a"]).all()


def test_a_method_misspelled():
    with pytest.raises(ValueError, match="'loar' does not exist; the nearest: 'lora'"):
        methods.make("loar")


def test_a_setting_misspelled():
    with pytest.raises(TypeError, match="lora: no setting 'rnak'; the nearest: 'rank'"):
        methods.make("lora", rnak=4)


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("lora", {"rank_pattern": {"up": 0}}, "lora: rank 0 must be at least 1"),
        ("dora", {"rank_pattern": {"up": 0}}, "dora: rank 0 must be at least 1"),
        ("dora", {"dropout": 1.0}, r"dora: dropout 1.0 must lie in \[0, 1\)"),
        ("vera", {"dropout": -0.5}, r"vera: dropout -0.5 must lie in \[0, 1\)"),
        ("prompt", {"modules_to_save": "lm_head"}, "modules_to_save: 'lm_head' is one string; give a list of names"),
        ("lora+ia3", {"lora": {"modules_to_save": "norm"}}, "modules_to_save: 'norm' is one string"),
    ],
)
def test_a_setting_that_cannot_be(name, settings, message):
    with pytest.raises(ValueError, match=message):
        methods.make(name, **settings)


def test_one_module_to_save_is_a_list():
    with pytest.raises(ValueError, match="modules_to_save: 'lm_head' is one string"):
        lora(modules_to_save="lm_head")


@pytest.mark.parametrize(
    "name, tasks, message",
    [
        ("multitask_prompt", (1, 2), "task 2 is none of 0 to 1"),
        ("lora", (0,), "lora: has no tasks; leave out the task 0"),
    ],
)
def test_a_task_that_there_is_not(name, tasks, message):
    method = methods.make(name, **({"tasks": 2} if name == "multitask_prompt" else {}))
    with pytest.raises(ValueError, match=message):
        check_tasks(method, tasks)


def test_methods_are_found_by_their_files():
    assert {"bitfit", "full", "lora"} <= set(methods.names())
    for name in methods.names():
        module = methods.module(name)
        assert module.__doc__ and "Source:" in module.__doc__
        assert methods.make(name).config.keys() == methods.defaults(name).keys()


def test_importing_the_registry_imports_no_method():
    """`names` only lists files, so that a broken method does not break the others."""
    import subprocess
    import sys

    code = "import sys, peftax.methods as m; m.names(); print('peftax.methods.lora' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
