import numpy as np
import pytest

from peftax.data import chat
from tests.data import tiny


def turn(role, content):
    return {"role": role, "content": content}


SINGLE = [turn("system", "be brief"), turn("user", "what is 6 * 7?"), turn("assistant", "42")]
MULTI = [*SINGLE, turn("user", "and in words?"), turn("assistant", "forty-two, of course")]


def learned(example, tok):
    """The learned stretches, as text."""
    out, on = [], False
    for token, weight in zip(example.tokens, example.weights, strict=True):
        if weight and not on:
            out.append([])
        on = bool(weight)
        if on:
            out[-1].append(int(token))
    return [tok.decode(ids) for ids in out]


@pytest.mark.parametrize("messages", [SINGLE, MULTI], ids=["single", "multi"])
def test_every_assistant_turn_counts_and_nothing_else(messages):
    tok = tiny.tokenizer()
    example = chat.encode({"messages": messages}, tok)
    answers = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    assert learned(example, tok) == answers


@pytest.mark.parametrize("messages", [SINGLE, MULTI], ids=["single", "multi"])
def test_training_prompt_is_the_generation_prompt(messages):
    tok = tiny.tokenizer()
    example = chat.encode({"messages": messages}, tok)
    ids = example.tokens.tolist()
    assert ids == tok.apply_chat_template(messages)["input_ids"]  # the template's ids, none added
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tok.apply_chat_template(messages[:i], add_generation_prompt=True)["input_ids"]
        assert ids[: len(prompt)] == prompt == chat.prompt_ids(messages[:i], tok)
        assert example.weights[len(prompt) - 1] == 0 and example.weights[len(prompt)] == 1


def test_answer_that_begins_with_space_still_follows_the_prompt():
    tok = tiny.tokenizer()
    messages = [turn("user", "go"), turn("assistant", "\n  indented")]
    example = chat.encode({"messages": messages}, tok)
    prompt = chat.prompt_ids(messages[:1], tok)
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert learned(example, tok) == ["\n  indented<|im_end|>"]
    assert tok.decode(example.tokens) == tok.apply_chat_template(messages, tokenize=False)


def test_columns_of_none_are_not_shown_to_the_template():
    tok = tiny.tokenizer()
    padded = [{**m, "name": None} for m in SINGLE]
    same = chat.encode({"messages": padded, "prompt": None}, tok).tokens
    assert same.tolist() == chat.encode({"messages": SINGLE}, tok).tokens.tolist()


@pytest.mark.parametrize("prompt, completion", [("Q: six? A:", " 42\n"), ("Q: six? A: ", "42")])
def test_prompt_and_completion(prompt, completion):
    tok = tiny.tokenizer(template=None)
    example = chat.encode({"prompt": prompt, "completion": completion}, tok)
    ids = chat.prompt_ids(prompt, tok)
    assert example.tokens[: len(ids)].tolist() == ids
    assert learned(example, tok) == [completion]
    assert tok.decode(example.tokens) == prompt + completion


def test_first_token_is_never_learned():
    example = chat.encode({"prompt": "", "completion": "the answer"}, tiny.tokenizer())
    assert example.weights[0] == 0 and example.weights[1:].all()


ANSWERED = "{% if messages[-1]['role'] == 'assistant' %}done {% endif %}" + tiny.CHATML


@pytest.mark.parametrize(
    "row, template, words",
    [
        ({"messages": SINGLE}, None, "no chat template"),
        ({"messages": SINGLE}, ANSWERED, "not prefix-stable"),
        ({"messages": SINGLE}, "{{ raise_exception('roles!') }}", "refuses turns.*roles!"),
        ({"messages": SINGLE[:2]}, tiny.CHATML, "no assistant turn"),
        ({"messages": [turn("user", "a"), {"role": "assistant"}]}, tiny.CHATML, "no text content"),
        ({"text": "a"}, tiny.CHATML, "needs 'messages', or 'prompt' and 'completion'"),
        ({"prompt": "a", "completion": ""}, tiny.CHATML, "no token to learn"),
        ({"prompt": "a", "completion": None}, tiny.CHATML, r"this one has \['prompt'\]"),
        ({"prompt": "1+1=", "completion": 2}, tiny.CHATML, "'completion' is 2, no text"),
        ({"prompt": SINGLE, "completion": SINGLE}, tiny.CHATML, "chats belong into 'messages'"),
        ({"messages": [{"from": "human", "value": "a"}]}, tiny.CHATML, "must be a list of .*'from'"),
        ({"messages": "[]"}, tiny.CHATML, "must be a list of"),
    ],
)
def test_errors_are_one_clear_line(row, template, words):
    with pytest.raises(ValueError, match=words) as err:
        chat.encode(row, tiny.tokenizer(template))
    assert "\n" not in str(err.value)


def test_spans_become_groups_of_tokens():
    tok = tiny.tokenizer()
    content = 'say "Päris" 42'
    a, b = content.index("P"), content.index('" 4')
    row = {"messages": [turn("user", content), turn("assistant", content)], "spans": [(a, b)]}
    example = chat.encode(row, tok)
    assert tok.decode(example.tokens[example.groups == 1]) == "Päris"
    assert not example.groups[example.weights == 0].any()  # the user's copy is left alone
    assert chat.encode({"messages": row["messages"]}, tok).groups is None


def test_length_policies_and_their_counts():
    tok = tiny.tokenizer()
    rows = [{"prompt": "a" * n, "completion": "b" * 20} for n in (2, 25, 60, 3)]
    sizes = [len(chat.encode(r, tok).tokens) for r in rows]
    length = sizes[1] - 5
    assert sizes[0] < length < sizes[2] - 20

    kept, counts = chat.encode_all(rows, tok, length=length, split="valid")
    assert [e.row for e in kept] == [0, 3]
    assert counts == dict(
        split="valid",
        rows=4,
        kept=2,
        dropped=2,
        truncated=0,
        tokens=sizes[0] + sizes[3],
        learned=40,
    )

    kept, counts = chat.encode_all(rows, tok, length=length, policy="truncate")
    assert [e.row for e in kept] == [0, 1, 3]  # of row 2 the whole answer would be cut
    assert (counts["kept"], counts["dropped"], counts["truncated"]) == (3, 1, 1)
    assert len(kept[1].tokens) == length and kept[1].weights.sum() == 15

    with pytest.raises(ValueError, match=f"train row 1 has {sizes[1]} tokens, above.*{length}"):
        chat.encode_all(rows, tok, length=length, policy="error")
    with pytest.raises(ValueError, match="none of: drop, truncate, error"):
        chat.encode_all(rows, tok, length=length, policy="cut")
    with pytest.raises(ValueError, match="all 4 rows"):
        chat.encode_all(rows, tok, length=4)
    with pytest.raises(ValueError, match="train row 1: a row needs"):
        chat.encode_all([rows[0], {"text": "x"}], tok, length=length)


def test_types():
    example = chat.encode({"messages": SINGLE}, tiny.tokenizer())
    assert example.tokens.dtype == np.int32 and example.weights.dtype == np.float32
