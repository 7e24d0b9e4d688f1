"""What `peftax inspect` shows: which tokens count, where examples end, which sites are chosen; nothing is trained."""

import io
import json
import re
import shutil

import jax
import numpy as np
import pytest
from rich.console import Console

from peftax import cli, recipe, weights
from peftax.data import chat, packing
from peftax.train import inspect, setup
from tests.data import tiny
from tests.train import tiny_run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return tiny_run.base_folder(folder / "base"), tiny_run.data_file(folder / "data.jsonl")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr("peftax.sharding.jax.devices", lambda: devices)


def printed(show, *args) -> str:
    console = Console(file=io.StringIO(), width=200)
    show(*args, console)
    return console.file.getvalue()


def test_a_batch_shows_what_counts_and_where_examples_end():
    tokenizer = tiny.tokenizer()

    def turns(*texts):
        return {"messages": [{"role": r, "content": t} for r, t in zip(["user", "assistant"] * 2, texts, strict=False)]}

    rows = [turns("six?", "it is 6", "and?", "Päris"), turns("x [red] y?", "no")]
    examples, _ = chat.encode_all(rows, tokenizer, length=128)
    out = printed(inspect.show_batch, packing.pack(examples, 128), tokenizer, 4)
    assert re.findall("⟦(.*?)⟧", out.split("\n", 1)[1], re.DOTALL) == [
        "it is 6<|im_end|>",
        "Päris<|im_end|>",
        "no<|im_end|>",
    ]
    head, first, second = re.split("--- example .*\n", out)
    sizes = [len(e.tokens) for e in examples]
    assert f"row 0: 2 examples, {sum(sizes)} of 128 places" in head
    assert f"tokens {sizes[0]} to {sum(sizes) - 1}, 3 count" in out
    assert "Päris" in first and "x [red] y?" in second and "six?" not in second
    plain = out.replace("⟦", "").replace("⟧", "")
    assert tokenizer.decode(examples[1].tokens) in plain


def test_rows_that_are_not_shown_are_told():
    tokenizer = tiny.tokenizer()
    examples, _ = chat.encode_all([{"prompt": "a", "completion": "b"}] * 3, tokenizer, length=64)
    out = printed(inspect.show_batch, packing.pad(examples, 64), tokenizer, 1)
    assert out.count("example 1:") == 1 and "2 more rows: --rows=3" in out


def test_marks_are_of_the_tokens_that_are_predicted():
    np.testing.assert_array_equal(inspect.counts(np.float32([0, 0, 1, 1, 0])), [False, False, False, True, True])


@pytest.mark.parametrize("scan", ["True", "False"])
@pytest.mark.parametrize(
    ("overrides", "chosen"),
    [
        (["method.targets=('q_proj','v_proj')", "method.layers=(1,)"], {"q_proj": "1 of 2", "v_proj": "1 of 2"}),
        (
            ["method.targets=('q_proj',)", "method.modules_to_save=('o_proj',)"],
            {"q_proj": "2 of 2", "o_proj": "2 of 2"},
        ),
        (["method.name=full"], None),
    ],
)
def test_sites_stand_in_one_line_for_all_layers(files, scan, overrides, chosen):
    keys = [("model.path", str(files[0])), ("model.scan", scan), *(tuple(o.split("=", 1)) for o in overrides)]
    config = recipe.load("default", keys).to_dict()
    run = setup.sketch(setup.outline(**config["model"], mesh=config["mesh"]), config["method"])
    out = printed(inspect.show_sites, run)
    lines = dict(re.findall(r"(\w+) +│ \w+ +│ +\d+x\d+ │ +(\d of \d)", out))
    assert set(lines) == {*"q_proj k_proj v_proj o_proj gate_proj up_proj down_proj embed_tokens lm_head".split()}
    if chosen is None:
        assert all(count[0] == count[-1] for count in lines.values())
    else:
        assert {site: count for site, count in lines.items() if count[0] != "0"} == chosen
        assert [*lines][: len(chosen)] == [*chosen]


def test_a_chosen_block_is_listed(files):
    config = recipe.load("default", [("model.path", str(files[0])), ("method.name", "adapter")]).to_dict()
    run = setup.sketch(setup.outline(**config["model"], mesh=config["mesh"]), config["method"])
    out = printed(inspect.show_sites, run)
    assert re.search(r"model/layers/mlp +│ block +│ +32x32 │ 2 of 2", out)
    assert re.search(r"down_proj +│ linear +│ +48x32 │ 0 of 2", out)


def test_a_mesh_shows_where_leaves_lie(files, monkeypatch):
    """Shape, axes and bytes a device: of up_proj, 2 layers of 32 x 48 in f32, an eighth; a head of 3 stays whole."""
    eight = jax.local_devices()
    keys = [("model.path", str(files[0])), ("mesh.fsdp", "2"), ("mesh.tensor", "4")]
    config = recipe.load("default", keys).to_dict()
    one = setup.sketch(setup.outline(path=str(files[0])), config["method"])
    assert printed(inspect.show_mesh, one) == ""
    monkeypatch.setattr("peftax.sharding.jax.devices", lambda: eight)
    run = setup.sketch(setup.outline(**config["model"], mesh=config["mesh"]), config["method"])
    out = printed(inspect.show_mesh, run)
    assert "data 1 x fsdp 2 x tensor 4 x sequence 1" in out
    assert re.search(r"mlp/up_proj/kernel +│ +1 │ +2x32x48 │ +-, fsdp, tensor │ +1.5 KiB │ +│", out), out
    heads, kv = (run.base.config[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    assert re.search(rf"attention over tensor 4: a device has \d of {heads} heads and \d of {kv} key heads", out)


def test_inspect_reads_no_weights_and_writes_nothing(files, tmp_path, capsys, monkeypatch):
    base, data = files
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights.Source, "read", None)
    monkeypatch.setattr("peftax.weights.source.Safetensors.read", None)
    options = [f"--config.model.path={base}", f"--config.data.train={data}", "--config.data.length=64"]
    assert cli.main(["inspect", "--config=default", *options, "--config.train.batch_size=8", "--rows=1"]) == 0
    out = capsys.readouterr().out
    for words in (
        "⟦",
        "q_proj",
        "2 of 2",
        "0 of 1",
        "trainable",
        "activations kept",
        "one chunk of logits",
        "there are",
    ):
        assert words in out
    assert list(tmp_path.iterdir()) == []


def test_too_much_memory_is_said_with_what_to_change(files, capsys, monkeypatch):
    base, data = files
    monkeypatch.setattr("peftax.train.memory.available", lambda: 1000)
    options = [f"--config.model.path={base}", f"--config.data.train={data}", "--config.data.length=64"]
    assert cli.main(["inspect", "--config=default", *options, "--config.train.batch_size=8"]) == 0
    assert "too much. Give it config.train.batch_size=1" in capsys.readouterr().out.replace("\n", " ")


def test_wrong_shapes_are_seen_from_the_headers(files, tmp_path, capsys):
    base = shutil.copytree(files[0], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    options = [f"--config.model.path={base}", f"--config.data.train={files[1]}"]
    assert cli.main(["inspect", "--config=default", *options]) == 1
    assert "has shape (32, 48), the model needs (32, 40)" in capsys.readouterr().err
