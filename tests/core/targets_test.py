import pytest

from peftax.core.targets import Targets, by_pattern, layer_number

Q, UP, HEAD = "model.layers.11.self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head"


def hits(kind="linear", **settings):
    target = Targets(**settings)
    return [name for name in (Q, UP, HEAD) if target.match(name, kind)]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"modules": ["q_proj", "lm_head"]}, [Q, HEAD]),
        ({"modules": ["self_attn.q_proj"]}, [Q]),
        ({"modules": [UP]}, [UP]),
        ({"modules": ["proj"]}, []),  # a suffix of whole parts, not of letters
        ({"modules": ["1.mlp.up_proj"]}, [UP]),
        ({"modules": ["1.self_attn.q_proj"]}, []),  # 11 is not 1
        ({"modules": r".*\.(q|up)_proj"}, [Q, UP]),
        ({"modules": "q_proj"}, []),  # a regex matches the whole name
        ({"modules": r".*\.1\..*"}, [UP]),
        ({"modules": "all-linear"}, [Q, UP]),  # all but the head
        ({"modules": "all-linear", "exclude": ["q_proj"]}, [UP]),
        ({"modules": ["q_proj", "up_proj"], "exclude": r".*up.*"}, [Q]),
        ({"modules": ["q_proj", "up_proj"], "layers": 1}, [UP]),
        ({"modules": ["q_proj", "up_proj", "lm_head"], "layers": [0, 11]}, [Q]),
        ({"modules": "all-linear", "layers": (1,)}, [UP]),
        ({"modules": ["q_proj"], "layers": [1]}, []),
        ({"modules": None, "parameters": ["q_proj.weight"]}, [Q]),
        ({"modules": ["lm_head"], "parameters": ["mlp.up_proj.weight"], "exclude": ["up_proj"]}, [UP, HEAD]),
        ({"modules": None, "parameters": ["q_proj"]}, []),  # a module is no parameter
        ({"modules": None, "parameters": ["q_proj.weight"], "whole": ["q_proj"]}, []),
    ],
)
def test_match(settings, expected):
    assert hits(**settings) == expected


def test_a_stack_of_experts_is_one_parameter():
    target = Targets(modules=None, parameters=["experts.down_proj"])
    assert target.match("layers.0.experts.down_proj.3", "linear")
    assert target.parameter("layers.0.experts.down_proj.3") == "layers.0.experts.down_proj"
    assert not target.match("layers.0.experts.down_proj.3", "embed")
    assert not target.match("layers.0.experts.3.down_proj", "linear")  # a module of its own
    with pytest.raises(ValueError, match="'experts' is one string"):
        Targets(modules=None, parameters="experts")


@pytest.mark.parametrize("kind", ["embed", "head", "conv"])
def test_all_linear_is_of_linear_modules(kind):
    assert hits(kind, modules="all-linear") == []
    assert hits(kind, modules=["q_proj"]) == [Q]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"modules": []}, "empty"),
        ({"modules": ""}, "empty"),
        ({"modules": "q_proj", "layers": [1]}, "layers: works with a list"),
        ({"modules": "(q_proj"}, "no regular expression"),
        ({"modules": ["q_proj"], "exclude": "*"}, "no regular expression"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        Targets(**settings)


def test_by_pattern():
    patterns = {"q_proj": 4, r"layers\.1\..*": 2, r".*\.up_proj": 3}
    assert by_pattern(patterns, Q, 8) == 4
    assert by_pattern(patterns, UP, 8) == 2  # the first that matches
    assert by_pattern(patterns, HEAD, 8) == 8
    assert by_pattern({"proj": 4}, Q, 8) == 8
    assert by_pattern(None, Q, 8) == 8


def test_layer_number():
    assert [layer_number(n) for n in (Q, UP, HEAD)] == [11, 1, None]
