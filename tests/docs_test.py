"""The pages of docs/ say what the code does: keys exist, quoted code is the file's, examples run, tables are new."""

import functools
import importlib
import inspect
import json
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftax
from peftax import catalog, cli, methods, recipe, sweep
from peftax.core.method import Method
from peftax.data import packing
from peftax.methods import inits
from peftax.train import loss

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
COMING = (DOCS / "coming_from.md").read_text()


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        aim = page.parent / file if file else page
        assert aim.exists(), target
        heads = re.findall(r"^#+ (.*)$", aim.read_text(), re.M) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in heads], target


def test_the_readme_links_every_page():
    readme = (ROOT / "README.md").read_text()
    assert [p.name for p in PAGES if f"docs/{p.name}" not in readme] == []


def test_the_floors_name_every_file():
    """docs/design.md lists the files of the package, and what ops, core, data, weights and train hold."""
    text = (DOCS / "design.md").read_text()
    for folder in ("ops", "core", "data", "weights", "train"):
        (line,) = re.findall(rf"^  {folder}/ +\d  (.*)$", text, re.M)
        for file in (ROOT / "peftax" / folder).glob("[a-z]*.py"):
            assert re.search(rf"\b{file.stem}\b", line), f"{folder}/{file.name}"
    for file in (ROOT / "peftax").glob("[a-z]*.py"):
        assert re.search(rf"(^|;)  {file.name} +\d  ", text, re.M), file.name


# --- coming_from.md -------------------------------------------------------------------------------


def rows():
    """(section, method, first column, second column, third) of every row."""
    section, method = "", "lora"
    for line in COMING.splitlines():
        if line.startswith("## "):
            section = re.search(r"\w+", line)[0]
            method = (re.findall(r": `(\w+)`$", line) or ["lora"])[0]
        cells = [c.strip() for c in line.strip("|").split(" | ")]
        if line.startswith("| `"):
            assert len(cells) >= 2, line
            yield pytest.param(section, method, *(*cells, "")[:3], id=f"{section}-{cells[0]}")


@functools.cache
def commands():
    (sub,) = [a for a in cli._parser()._actions if hasattr(a, "choices") and a.choices]
    return sub.choices


def exists(word, method):
    """Is there such a key, command, option or function? None where the word claims to be none of these."""
    if word.startswith("config."):
        key, _, value = word.removeprefix("config.").partition("=")
        config = recipe.load("default", [("method.name", method)])
        config.unlock()
        if not value:
            return key in (*recipe.flat(config), "method.name")
        recipe.override(config, key, value)  # raises where there is none
        known = {"method.name": methods.names, "method.init": inits.names if method == "lora" else None}.get(key)
        return known is None or value in known()
    if word.startswith("peftax "):
        return word.removeprefix("peftax ") in commands()
    if word.startswith("--"):
        return word in commands()["train"]._option_string_actions
    if re.fullmatch(r"peftax(\.\w+)+", word):
        at, *names = word.split(".")
        found = importlib.import_module(at)
        for name in names:
            if not hasattr(found, name):
                importlib.import_module(f"{found.__name__}.{name}")
            found = getattr(found, name)
        return True
    if re.fullmatch(r"[A-Z]\w*\.\w+", word):
        owner, name = word.split(".")
        owner = getattr(peftax, owner)
        return name in getattr(owner, "__dataclass_fields__", {}) or hasattr(owner, name)
    return None


@pytest.mark.parametrize("section, method, there, here, more", list(rows()))
def test_every_key_exists(section, method, there, here, more):
    said = [exists(word, method) for word in re.findall(r"`([^`]+)`", here)]
    assert False not in said, here
    assert True in said or re.match(r"(not yet|no|always)\b", here), "names something, or says that there is nothing"
    for word in re.findall(r"`((?:config\.|peftax )[^`]+)`", more):
        assert exists(word, method), word


@pytest.mark.parity
@pytest.mark.parametrize("name", sorted(set(re.findall(r"^## (\w+Config): `", COMING, re.M))))
def test_no_field_is_left_out(name):
    import dataclasses

    import peft

    all_rows = [r.values for r in rows()]
    common = {f.name for f in dataclasses.fields(peft.PeftConfig)}
    told = {w.partition("=")[0] for r in all_rows if r[0] == name for w in re.findall(r"`([^`]+)`", r[2])}
    shared = {w for r in all_rows if r[0] == "What" for w in re.findall(r"`([^`]+)`", r[2])}
    fields = {f.name for f in dataclasses.fields(getattr(peft, name))}
    common |= set() if issubclass(getattr(peft, name), peft.PromptLearningConfig) else shared
    if name == "AdaLoraConfig":  # it inherits all of LoRA's
        common |= {f.name for f in dataclasses.fields(peft.LoraConfig)}
    assert (fields if name == "LoraConfig" else fields - common) - told == set()
    assert {w for w in told if w.isidentifier() and w not in ("False",)} - fields == set()


@pytest.mark.parity
def test_training_arguments_exist():
    import dataclasses

    import transformers

    known = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
    told = {w for r in rows() if r.values[0] == "TrainingArguments" for w in re.findall(r"`(\w+)`", r.values[2])}
    assert told - known == set()


# --- checks.md ------------------------------------------------------------------------------------


def test_the_tests_it_names_are_there():
    """A test's name stands after the link to its file."""
    told = re.findall(r"\]\(([^)]+_test\.py)\)|`(test_\w+)`", (DOCS / "checks.md").read_text())
    file = ""
    for link, name in told:
        file = (DOCS / link).read_text() if link else file
        assert link or f"def {name}(" in file, name
    assert sum(bool(name) for _, name in told) > 40


# --- the other pages ------------------------------------------------------------------------------


def test_add_a_method_shows_the_whole_file():
    file = (ROOT / "peftax/methods/ia3.py").read_text()
    shown = blocks("add_a_method.md")
    for block in shown:
        assert block in file
    lines = [[line for line in text.splitlines() if line.strip()] for text in ("".join(shown), file)]
    assert lines[0] == lines[1]


def test_the_table_of_methods(capsys):
    assert cli.main(["methods"]) == 0
    table = capsys.readouterr().out
    assert (DOCS / "methods.md").read_text() == table, "peftax methods > docs/methods.md"
    assert [m[1] for m in re.finditer(r"^\| `(\w+)` ", table, re.M)] == [*methods.names(), *inits.names()]
    readme = (ROOT / "README.md").read_text()
    assert readme == catalog.with_short_table(readme), "peftax methods --into README.md"


@pytest.mark.parametrize("name", methods.names())
def test_a_method_shown_whole(name, capsys):
    assert cli.main(["methods", name]) == 0
    page = capsys.readouterr().out
    for key in methods.defaults(name):
        assert re.search(rf"^  {key} .*  \S", page, re.M), f"{key} is explained"
    assert re.search(r"^Learning rate: \S+ to \S+ \(.+\)\.$", page, re.M | re.DOTALL), "a range, and where it is from"


def test_your_own_model():
    names: dict = {"__name__": "your_own_model"}
    for block in blocks("your_own_model.md"):
        exec(compile(block, "your_own_model.md", "exec"), names)

    assert names["losses"][-1] < 0.3 * names["losses"][0]
    x, apply, merged = names["x"], names["apply"], peftax.merge(names["frozen"], names["trainable"])
    folded = names["net"].apply({"params": names["plain"]}, x)
    assert jnp.abs(folded - apply({"params": merged}, x)).max() < 1e-4

    assert {p: s.shape for p, s in names["mine_sites"].items()} == {"layers_0": (6, 8), "layers_2": (8, 2)}

    assert names["curve"][-1] < names["curve"][0]
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    ids = np.asarray([p + a + [0] * (4 - len(p)) for p, a in zip(prompts, names["answers"], strict=True)])
    logits = jax.jit(names["prefixed"])({"params": names["trained"]}, ids)  # what the model says without a cache
    for p, a, said in zip(prompts, names["answers"], np.argmax(logits, axis=-1).tolist(), strict=True):
        assert said[len(p) - 1 : len(p) - 1 + len(a)] == a

    for method in (names["prefix"], peftax.make("prompt", length=3)):

        @jax.jit
        def both(params, *layouts, method=method):
            part = method.init(jax.random.key(3), params, names["places"])
            run = peftax.inject(names["model"].apply, method)
            return [jnp.divide(*loss.causal_lm(run, peftax.merge(*part), batch)) for batch in layouts]

        packed, padded = both(names["base"], *(lay(names["examples"], 12) for lay in (packing.pack, packing.pad)))
        assert abs(packed - padded) < 1e-5 * padded


def test_a_sweep_as_it_is_shown(tmp_path, monkeypatch, capsys):
    """The recipe has its three arms, the commands are peftax's, the code reads what such a sweep leaves."""
    shown, reading = blocks("sweeps.md")
    file, folder = tmp_path / "ranks.py", tmp_path / "runs" / "ranks"
    file.write_text(shown)
    folders = sweep.lay_out(str(file), folder)
    assert len(folders) == 9
    page = (DOCS / "sweeps.md").read_text()
    lines = re.findall(r"^(peftax .*?)(?: +#.*)?$", page, re.M)
    assert len(lines) == 6
    for line in lines:
        args, rest = cli._parser().parse_known_args(shlex.split(line)[1:])
        assert args.command in commands() and [r for r in rest if not cli.OVERRIDE.fullmatch(r)] == [], line
        for named in getattr(args, "folders", []):
            assert (tmp_path / named).exists(), line
    for flag in re.findall(r"`(--[a-z]+)", page):
        assert flag in {f for c in ("sweep", "plan") for f in commands()[c]._option_string_actions}, flag
    for engine in sweep.ENGINES:
        (told,) = re.findall(rf"^\| `{engine}` \| (.*) \|$", page, re.M)
        submit = importlib.import_module(f"peftax.engines.{engine}").submit
        known = {k for k, p in inspect.signature(submit).parameters.items() if p.kind is p.KEYWORD_ONLY}
        assert known <= set(re.findall(r"`(\w+)`", told)), engine

    for i, run in enumerate(folders):
        (run / "result.json").write_text(json.dumps({"step": 1, "valid": 1 + i / 10, "best": [1, 1 + i / 10]}))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(reading, "sweeps.md", "exec"), names)
    assert capsys.readouterr().out.count("low") == 3 and names["chosen"]["ia3"].rate == 1e-4


def test_the_record_is_described():
    """docs/design.md names every field of a method."""
    text = (DOCS / "design.md").read_text()
    for field in Method.__dataclass_fields__:
        assert f"`{field}`" in text, field
