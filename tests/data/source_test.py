import json

import pytest

from peftax.data import source

ROWS = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(10)]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
def test_local_files(kind, tmp_path):
    import datasets

    path = tmp_path / f"data.{kind}"
    table = datasets.Dataset.from_list(ROWS)
    write = {"parquet": table.to_parquet, "csv": table.to_csv}.get(kind, table.to_json)
    write(str(path))
    rows = source.load(path, cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 10 and list(rows) == ROWS and rows[3] == ROWS[3]
    part = source.load(str(path), split="train[:30%]", cache_dir=str(tmp_path / "cache"))
    assert list(part) == ROWS[:3]


def test_chats_keep_their_messages(tmp_path):
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps(chat) for _ in range(2)))
    rows = source.load(path, cache_dir=str(tmp_path / "cache"))
    assert rows[1] == chat


def test_in_memory_and_saved(tmp_path):
    import datasets

    assert source.load(ROWS) is ROWS
    assert source.load(r for r in ROWS) == ROWS
    table = datasets.Dataset.from_list(ROWS)
    assert source.load(table)[0] == ROWS[0]
    datasets.DatasetDict(valid=table).save_to_disk(str(tmp_path / "saved"))
    assert list(source.load(tmp_path / "saved", split="valid")) == ROWS
    with pytest.raises(ValueError, match="split 'train' is none of: valid"):
        source.load(tmp_path / "saved")


def test_errors_are_one_clear_line(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "notes.txt").write_text("a")
    cases = [
        ([], ValueError, "the given list: split 'train' is empty"),
        (["text"], ValueError, "rows must be dicts, the first is a str"),
        (tmp_path / "trian.jsonl", FileNotFoundError, "did you mean .*train.jsonl"),
        (tmp_path / "empty.jsonl", ValueError, "is empty: it has no rows"),
        (tmp_path / "notes.txt", ValueError, "cannot read .txt; use .jsonl"),
        ("nobody/no-such-data", ValueError, "cannot load split 'train' of nobody/no-such-data"),
    ]
    for what, kind, words in cases:
        with pytest.raises(kind, match=words) as err:
            source.load(what, cache_dir=str(tmp_path / "cache"))
        assert "\n" not in str(err.value)
    with pytest.raises(ValueError, match="cannot load split 'test'"):
        source.load(tmp_path / "train.jsonl", split="test", cache_dir=str(tmp_path / "cache"))


# --- rows of other columns ------------------------------------------------------------------------


def test_templates_name_the_columns():
    rows = [{"question": "6 x 7?", "answer": 42, "task_id": 3}, {"question": "{a}", "answer": "b"}]
    made = source.templated(rows, "Q: {question}\nA:", " {answer}{{}}</s>")
    assert made == [
        {"prompt": "Q: 6 x 7?\nA:", "completion": " 42{}</s>", "task_id": 3},
        {"prompt": "Q: {a}\nA:", "completion": " b{}</s>"},  # braces of a row are text
    ]


def test_the_first_prompt_whose_columns_are_filled():
    prompts = ("{instruction}\n{input}\n", "{instruction}\n")
    rows = [{"instruction": "a", "input": text, "output": "o"} for text in ("b", "", None)]
    made = source.templated(rows, prompts, "{output}")
    assert [r["prompt"] for r in made] == ["a\nb\n", "a\n", "a\n"]


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        ("{questoin}", "{answer}", "asks for the column 'questoin'.*nearest: 'question'"),
        ("{question}", "{output}", "asks for the column 'output', rows have \\['answer', 'note', 'question'\\]"),
        ("{question", "{answer}", "a brace that is text is written twice"),
        ("{question}", None, "belong together"),
        (None, "{answer}", "belong together"),
        ("{}", "{answer}", "braces hold no column's name"),
        ("{question}", "{note}", "row 0 holds nothing in 'note'"),
    ],
)
def test_templates_that_do_not_fit(prompt, completion, message):
    with pytest.raises(ValueError, match=message):
        source.templated([{"question": "a", "answer": "b", "note": None}], prompt, completion)
