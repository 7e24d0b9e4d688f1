import copy
import json

import pytest

from peftax.data import asset, chat
from peftax.data import function_calling as fc
from tests.data import tiny


def tool(name, required=("city",), **properties):
    schema = {"type": "dict", "properties": properties, "required": list(required)}
    return {"name": name, "description": f"About {name}.", "parameters": schema}


WEATHER = tool(
    "weather.get",
    city={"type": "string", "description": "The city. Like 'Paris'."},
    unit={"type": "string", "enum": ["C", "F"]},
    days={"type": "integer", "description": "How many."},
    tags={"type": "array", "items": {"type": "string"}},
    area={"type": "dict", "properties": {"w": {"type": "float"}, "h": {"type": "float"}}},
)
ROW = {
    "id": "a",
    "category": "simple",
    "question": "Weather in Paris for 3 days?",
    "tools": [WEATHER],
    "answer": {
        "name": "weather.get",
        "arguments": {
            "days": [3],
            "city": ["Paris", "Paris, France"],
            "unit": ["", "C"],
            "tags": [["big", "old"], ["big"]],
            "area": [{"w": [1.5, 2], "h": ["", 4]}],
        },
    },
}
RIGHT = {"city": "Paris", "days": 3, "tags": ["big", "old"], "area": {"w": 1.5}}


def answer(arguments, name="weather.get"):
    return json.dumps([{"name": name, "arguments": arguments}])


def test_target_is_the_first_accepted_values_in_the_tools_order():
    assert fc.target(ROW) == (
        '[{"name":"weather.get","arguments":{"city":"Paris","days":3,"tags":["big","old"],"area":{"w":1.5}}}]'
    )
    assert fc.score(fc.target(ROW), ROW) == {"parse": True, "name": True, "match": True}


def test_value_spans():
    text = fc.target(ROW)
    spans = [text[a:b] for a, b in fc.value_spans(ROW)]
    assert spans == ["Paris", "3", '["big","old"]', '{"w":1.5}']
    row = copy.deepcopy(ROW)
    row["answer"]["arguments"] |= {"city": ['Zü"ri\nch'], "days": [True]}
    text = fc.target(row)
    assert [text[a:b] for a, b in fc.value_spans(row)][:2] == ['Zü\\"ri\\nch', "true"]
    row["answer"]["arguments"] = {}
    assert fc.value_spans(row) == []


def test_spans_reach_the_tokens():
    tok = tiny.tokenizer()
    example = chat.encode(fc.example(ROW, grouped=True), tok)
    values = tok.decode(example.tokens[example.groups == 1])
    for value in ("Paris", "3", "big", "1.5"):
        assert value in values
    assert "weather" not in values and not example.groups[example.weights == 0].any()
    assert "spans" not in fc.example(ROW)


@pytest.mark.parametrize(
    "change, match",
    [
        ({}, True),
        ({"city": "paris france"}, True),  # the leaderboard's leniency on strings
        ({"city": "Lyon"}, False),
        ({"city": ["Paris"]}, False),
        ({"city": None}, False),
        ({"days": 3.0}, True),  # 1 == 1.0
        ({"days": "3"}, False),
        ({"days": True}, False),
        ({"unit": "C"}, True),
        ({"unit": "F"}, False),
        ({"unit": ""}, True),
        ({"days": ""}, False),
        ({"tags": ["Big"]}, True),
        ({"tags": ["old", "big"]}, False),
        ({"area": {"w": 2.0, "h": 4}}, True),
        ({"area": {"h": 4}}, False),  # w has no "" among its values
        ({"area": {"w": 2, "x": 1}}, False),
        ({"area": 2}, False),
        ({"wind": 1}, False),  # unknown
        ({"days": ...}, False),  # left out, but its values hold no ""
        ({"city": ...}, False),  # required
    ],
)
def test_match(change, match):
    given = {k: v for k, v in {**RIGHT, **change}.items() if v is not ...}
    assert fc.score(answer(given), ROW) == {"parse": True, "name": True, "match": match}


def test_match_in_a_list_of_dicts():
    row = copy.deepcopy(ROW)
    row["tools"] = [tool("add_all", ["items"], items={"type": "array", "items": {"type": "dict"}})]
    accepted = [[{"item": ["tea"], "n": [2]}, {"item": ["Bun", "roll"], "n": ["", 1]}]]
    row["answer"] = {"name": "add_all", "arguments": {"items": accepted}}
    assert fc.target(row).endswith('{"items":[{"item":"tea","n":2},{"item":"Bun"}]}}]')

    def given(*items):
        return fc.score(answer({"items": list(items)}, "add_all"), row)["match"]

    assert given({"item": "tea", "n": 2}, {"item": "roll", "n": 1})
    assert not given({"item": "tea", "n": 2})
    assert not given({"item": "bun"}, {"item": "tea", "n": 2})


@pytest.mark.parametrize(
    "text, parse, name",
    [
        ("Sure!\n```json\n" + answer(RIGHT) + "\n```\nDone.", True, True),
        (json.dumps({"name": "weather.get", "arguments": RIGHT}), True, True),
        ("see [1]: " + answer(RIGHT), True, True),
        (answer(RIGHT, "weather.set"), True, False),
        (json.dumps([{"name": "weather.get", "arguments": RIGHT}] * 2), True, False),
        (answer(RIGHT)[:-4], False, False),
        ('[{"name": "weather.get", "arguments": "city"}]', False, False),
        ('[{"weather.get": {}}]', False, False),
        ("weather.get(city='Paris')", False, False),
        ("[]", False, False),
        ("[" * 1500, False, False),
        ("", False, False),
    ],
)
def test_parse(text, parse, name):
    got = fc.score(text, ROW)
    assert (got["parse"], got["name"], got["match"]) == (parse, name, name)


def test_aggregate_tells_rows_with_more_tools_apart():
    two = {**ROW, "tools": [WEATHER, tool("other")]}
    scores = [fc.score(answer(RIGHT), ROW), fc.score("?", two), fc.score(answer({}), two)]
    assert fc.aggregate(scores, [ROW, two, two]) == {
        "all": {"rows": 3, "parse": 2 / 3, "name": 2 / 3, "match": 1 / 3},
        "one tool": {"rows": 1, "parse": 1.0, "name": 1.0, "match": 1.0},
        "2+ tools": {"rows": 2, "parse": 0.5, "name": 0.5, "match": 0.0},
    }


def test_tools_are_rendered_compactly():
    (shown,) = json.loads(fc.render_tools([WEATHER]))
    assert shown == {
        "name": "weather.get",
        "description": "About weather.get.",
        "parameters": {
            "city": "string",
            "unit?": ["C", "F"],
            "days?": "integer",
            "tags?": "array of string",
            "area?": {"w?": "float", "h?": "float"},
        },
    }
    (short,) = json.loads(fc.render_tools([WEATHER], "short"))
    assert short["parameters"]["city"] == "string: The city."
    (full,) = json.loads(fc.render_tools([WEATHER], "full"))
    assert full["parameters"]["city"] == "string: The city. Like 'Paris'."
    with pytest.raises(ValueError, match="none of: tools, short, full"):
        fc.render_tools([WEATHER], "long")


def test_prompts_of_all_rows_begin_with_the_prefix():
    tok = tiny.tokenizer()
    other = {**ROW, "question": "Another?", "tools": [tool("other")]}
    for instructed in (False, True):
        options = dict(instructed=instructed, shots=[other, ROW])
        shared = tok.apply_chat_template(fc.prefix(**options))["input_ids"]
        for row in (ROW, other):
            ids = chat.prompt_ids(fc.prompt(row, **options), tok)
            assert ids[: len(shared)] == shared and len(ids) > len(shared)
    assert len(fc.prompt(ROW, shots=[other, ROW])) == 6
    assert fc.FORMAT not in fc.prompt(ROW)[0]["content"]
    assert fc.prompt(ROW, instructed=True)[0]["content"].endswith(fc.FORMAT)
    assert fc.example(ROW)["messages"][:-1] == fc.prompt(ROW)


def test_components_are_connected_over_all_listed_tools():
    def row(i, *names):
        return {"id": str(i), "tools": [tool(n) for n in names]}

    parts = fc.components([row(0, "a", "b"), row(1, "c"), row(2, "d", "b"), row(3, "d"), row(4, "e")])
    assert [[r["id"] for r in p] for p in parts] == [["0", "2", "3"], ["1"], ["4"]]


# ---- on the real data ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    try:
        return fc.load(asset.fetch(*asset.BFCL))
    except FileNotFoundError as err:
        pytest.skip(str(err))


@pytest.fixture(scope="module", params=[0, 1, 2])
def splits(request, rows):
    return fc.split(rows, seed=request.param)


def pairs(splits):
    return [(splits[a], splits[b]) for a, b in (("train", "valid"), ("train", "test"), ("valid", "test"))]


def test_no_function_name_is_in_two_splits(splits):
    for a, b in pairs(splits):
        names = [{t["name"] for r in part for t in r["tools"]} for part in (a, b)]
        assert names[0] and names[1] and not names[0] & names[1]


def test_no_question_is_asked_twice(splits):
    asked = [fc.normalize(r["question"]) for part in splits.values() for r in part]
    assert len(asked) == len(set(asked))


def test_sizes_and_the_giant_component(rows, splits):
    sizes = {k: len(v) for k, v in splits.items()}
    assert sum(sizes.values()) == len(rows) and sizes["test"] >= 200 and 80 <= sizes["valid"] <= 120
    giant = {r["id"] for r in fc.components(rows)[0]}
    assert len(giant) > 700 and giant <= {r["id"] for r in splits["train"]}
    share = lambda part: sum(len(r["tools"]) > 1 for r in part) / len(part)  # noqa: E731
    assert abs(share(splits["test"]) - share(rows)) < 0.05


def test_the_split_is_set_by_its_seed(rows):
    ids = [{k: [r["id"] for r in v] for k, v in fc.split(rows, seed=s).items()} for s in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]


def test_every_target_scores_and_its_spans_are_its_values(rows):
    for row in rows:
        text = fc.target(row)
        assert fc.score(text, row)["match"], row["id"]
        values = [v for v in json.loads(text)[0]["arguments"].values() if v != ""]
        for (a, b), value in zip(fc.value_spans(row), values, strict=True):
            quoted = f'"{text[a:b]}"' if isinstance(value, str) else text[a:b]
            assert json.loads(quoted) == value, row["id"]


def test_shots_are_fixed_and_from_train(splits):
    shots = fc.pick_shots(splits["train"])
    assert len(shots) == 3 and shots == fc.pick_shots(splits["train"])
    assert all(s in splits["train"] and len(s["tools"]) > 1 for s in shots)
    assert len({s["answer"]["name"] for s in shots}) == 3
    assert sum(len(fc.prompt(s)[1]["content"]) for s in shots) < 1500
    with pytest.raises(ValueError, match="only 1 of 3 shots"):
        fc.pick_shots(shots[:1])
