"""Adapters that Hugging Face PEFT wrote: equal logits, equal counts, stable round trips, clear errors."""

import json
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from peftax import methods, models, weights
from peftax.core import injection, quantization, sites, tree
from peftax.core.hf import Unsupported
from peftax.core.method import Ctx, Partition
from peftax.weights import adapters, verification
from tests.core import toys

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    c["case"]: c for c in json.loads((GOLDEN / "cases.json").read_text())["cases"] if (GOLDEN / c["case"]).is_dir()
}
REFUSED = ("LILY",)
READ = [c for c in CASES if c not in REFUSED]


def ctx(case):
    tasks = CASES[case].get("task_ids")
    return Ctx() if tasks is None else Ctx(tasks=jnp.array(tasks))


@pytest.fixture(scope="module", params=["scanned", "unrolled"])
def opened(request):
    source = weights.open(GOLDEN / "base_model.safetensors")
    model = models.build(source.config, scan=request.param == "scanned")
    shapes = models.abstract(model)
    found = sites.find(model.apply, shapes, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    return model, weights.load(source, shapes), found


@pytest.mark.parametrize("case", READ)
def test_logits_counts_and_round_trip(opened, case, tmp_path):
    model, params, found = opened
    inputs = np.load(GOLDEN / "input_ids.npy").astype(np.int32)
    expect, plain = np.load(GOLDEN / case / "logits.npy"), np.load(GOLDEN / "base_logits.npy")
    method, part, raw = adapters.load(GOLDEN / case, params, found)
    ours = injection.inject(model.apply, method)({"params": tree.merge(*part)}, inputs, ctx=ctx(case))
    expect = expect[:, -inputs.shape[1] :]  # PEFT's logits of a prompt begin with those of the prompt
    effect = np.abs(expect - plain).max()
    assert np.abs(ours - expect).max() <= 1e-5 + 1e-3 * effect
    assert effect > 0.004  # or the line above proves nothing
    name, settings, _ = adapters.read_config(GOLDEN / case)  # of what trained; a folder may hold less
    assert sites.count(methods.make(name, **settings), params, found)["trainable"] == CASES[case]["trainable_params"]

    raw["a_field_of_tomorrow"] = {"kept": True}
    adapters.save(tmp_path / "a", part, method, found, extra=raw)
    theirs = load_file(GOLDEN / case / adapters.TENSORS)
    mine = load_file(tmp_path / "a" / adapters.TENSORS)
    for key in mine.keys() & theirs.keys():
        np.testing.assert_array_equal(mine[key], theirs[key])
    repeated = ("base_layer.weight", "_proj.randlora_A", "_proj.randlora_B")
    assert {k for k in theirs if not k.endswith(repeated)} <= set(mine)
    assert set(mine) - set(theirs) <= ({"base_model.vera_A", "base_model.vera_B"} if case == "VERA_noproj" else set())
    again, part_again, raw_again = adapters.load(tmp_path / "a", params, found)
    assert raw_again["a_field_of_tomorrow"] == {"kept": True}
    adapters.save(tmp_path / "b", part_again, again, found, extra=raw_again)
    for name in (adapters.TENSORS, adapters.PEFT_CONFIG):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_do(opened, case):
    _, params, found = opened
    with pytest.raises(Unsupported, match="not supported.*nearest"):
        adapters.load(GOLDEN / case, params, found)


def test_verification_lists_the_skipped():
    results = {r.case: r for r in verification.cases(GOLDEN)}
    assert set(results) == set(CASES)
    assert all(bool(r.skipped) == (c in REFUSED) for c, r in results.items())
    assert max(r.difference / r.effect for c, r in results.items() if c not in REFUSED) < 1e-4


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(GOLDEN / "LORA", tmp_path / "lora"))


def _edit(copy, change):
    tensors = load_file(copy / adapters.TENSORS)
    change(tensors)
    save_file(tensors, copy / adapters.TENSORS)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_errors_name_the_tensor(opened, copy):
    _, params, found = opened
    _edit(copy, lambda t: t.update({"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": t[KEY]}))
    with pytest.raises(ValueError, match=r"layers\.9.* has no place"):
        adapters.load(copy, params, found)
    _edit(copy, lambda t: [t.pop(k) for k in list(t) if "layers.9" in k or k == KEY])
    with pytest.raises(ValueError, match=f"holds no tensor '{KEY}'"):
        adapters.load(copy, params, found)
    _edit(copy, lambda t: t.update({KEY: np.zeros((4, 63), np.float32)}))
    with pytest.raises(ValueError, match=r"\(4, 63\), this base needs \(4, 64\)"):
        adapters.load(copy, params, found)


def test_errors_of_files(opened, copy):
    _, params, found = opened
    data = (copy / adapters.TENSORS).read_bytes()
    (copy / adapters.TENSORS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        adapters.load(copy, params, found)
    (copy / adapters.TENSORS).rename(copy / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="pickle, which is never read"):
        adapters.load(copy, params, found)
    (copy / adapters.PEFT_CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match="is it an adapter folder"):
        adapters.load(copy, params, found)


def test_a_method_without_a_peft_type_is_saved_too(opened, tmp_path):
    _, params, found = opened
    method = methods.make("full", targets=r".*layernorm")
    part = method.init(jax.random.key(0), params, found)
    part = part._replace(trainable=jax.tree.map(lambda x: x + 0.5, part.trainable))
    adapters.save(tmp_path / "full", part, method, found)
    assert not (tmp_path / "full" / adapters.PEFT_CONFIG).exists()
    _, again, _ = adapters.load(tmp_path / "full", params, found)
    jax.tree.map(np.testing.assert_array_equal, part.trainable, again.trainable)


def test_saving_over_an_adapter_leaves_nothing_behind(opened, tmp_path):
    _, params, found = opened
    method, part, _ = adapters.load(GOLDEN / "LORA", params, found)
    for _ in range(2):
        adapters.save(tmp_path / "x", part, method, found, base="here")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert json.loads((tmp_path / "x" / adapters.PEFT_CONFIG).read_text())["base_model_name_or_path"] == "here"


def test_saving_replaces_nothing_but_an_adapter(opened, tmp_path, monkeypatch):
    _, params, found = opened
    method, part, _ = adapters.load(GOLDEN / "LORA", params, found)
    folder = tmp_path / "x"
    for held, named in [("notes.txt", "notes.txt"), ("README.md", "README.md"), ("lora/adapter_config.json", "lora")]:
        (folder / held).parent.mkdir(parents=True)
        (folder / held).write_text("mine")
        with pytest.raises(
            FileExistsError, match=f"x: holds '{named}', which is no file of an adapter.*another folder"
        ):
            adapters.save(folder, part, method, found)
        assert (folder / held).read_text() == "mine"
        shutil.rmtree(folder)
    folder.write_text("mine")
    with pytest.raises(FileExistsError, match="x: holds 'x'"):
        adapters.save(folder, part, method, found)
    folder.unlink()
    folder.mkdir()
    adapters.save(folder, part, method, found)  # empty
    (folder / "README.md").write_text("as PEFT writes it")
    (folder / "tokenizer.json").write_text("{}")
    adapters.save(folder, part, method, found)
    assert {file.name for file in folder.iterdir()} == {adapters.PEFT_CONFIG, adapters.TENSORS}
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds 'notes\.txt'"):
        adapters.save(folder, part, method, found)
    (folder / "notes.txt").unlink()

    rename = Path.rename

    def fails(self, target):
        if ".part" in self.name:
            raise OSError("the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="the disk is gone"):
        adapters.save(folder, part, method, found)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    adapters.load(folder, params, found)


def test_a_trained_leaf_that_all_sites_share_must_be_there(opened, tmp_path):
    """Frozen ones may be left to their seed."""
    _, params, found = opened
    copy = Path(shutil.copytree(GOLDEN / "VBLORA", tmp_path / "x"))
    _edit(copy, lambda t: t.pop("base_model.vblora_vector_bank"))
    with pytest.raises(ValueError, match="holds no tensor 'base_model.vblora_vector_bank'"):
        adapters.load(copy, params, found)
    copy = Path(shutil.copytree(GOLDEN / "RANDLORA", tmp_path / "y"))
    _, drawn, _ = adapters.load(copy, params, found)
    _edit(copy, lambda t: [t.pop(k) for k in list(t) if k.endswith(("randlora_A", "randlora_B"))])
    _, again, _ = adapters.load(copy, params, found)
    jax.tree.map(np.testing.assert_array_equal, drawn.frozen["randlora"], again.frozen["randlora"])


def _one(t, end):
    return next(key for key in sorted(t) if key.endswith(end))


def _with(end, change):
    """An edit of the first tensor whose name ends so."""
    return lambda t: t.update({_one(t, end): change(t[_one(t, end)].copy())})


def _put(at, value):
    def change(x):
        x[at] = value
        return x

    return change


@pytest.mark.parametrize(
    "case, edit, message",
    [
        ("SHIRA", _with("shira_indices", _put((1, 2), 999)), r"'at' of .*: the place .*, 999\) is none of a kernel of"),
        ("SHIRA", _with("shira_indices", _put((0, 0), -1)), r"the place .* \(-1, "),
        (
            "SHIRA",
            _with("shira_indices", lambda x: np.concatenate([x[:, :1], x[:, :-1]], 1)),
            r"the place .* stands twice",
        ),
        ("SHIRA", _with("shira_indices", lambda x: x[:, 1:]), r"shira_indices' has shape \(2, \d+\), this base needs"),
        ("VBLORA_topk", _with("A_topk_indices", _put((0, 0, 0), 200)), r"chooses vectors \d+ to 200 of a bank of"),
        ("VBLORA_topk", _with("A_topk_indices", lambda x: x[..., :1]), r"does not belong to weights"),
        ("FOURIERFT", _with("spectrum", lambda x: x[1:]), r"fourierft_spectrum' has shape .*, this base needs"),
        ("C3A", _with("c3a_kernel", lambda x: x.swapaxes(0, 2)), r"c3a_kernel' has shape .*, this base needs"),
        ("VERA", _with("vera_A", lambda x: x[:, :3]), r"vera_A' has shape .*, this base needs"),
    ],
)
def test_numbers_that_cannot_be(opened, tmp_path, case, edit, message):
    _, params, found = opened
    copy = Path(shutil.copytree(GOLDEN / case, tmp_path / "x"))
    _edit(copy, edit)
    with pytest.raises(ValueError, match=message) as caught:
        adapters.load(copy, params, found)
    assert "\n" not in str(caught.value)


def test_a_chain_is_a_folder_of_its_parts(opened, tmp_path):
    """One with a PEFT type, one without, and one that trains a whole leaf beside; fields of tomorrow stay."""
    _, params, found = opened
    settings = {"lora": {"rank": 2, "modules_to_save": ("norm",)}, "adapter": {"size": 3}}
    method = methods.make("lora+adapter", **settings)
    part = method.init(jax.random.key(0), params, found)
    noise = np.random.default_rng(0)
    part = part._replace(
        trainable=jax.tree.map(lambda x: x + noise.standard_normal(x.shape).astype("f"), part.trainable)
    )
    adapters.save(tmp_path / "a", part, method, found, base="here", extra={"lora": {"of_tomorrow": 1}, "mine": 2})
    assert json.loads((tmp_path / "a" / "lora" / adapters.PEFT_CONFIG).read_text())["of_tomorrow"] == 1
    again, part_again, raw = adapters.load(tmp_path / "a", params, found)
    assert again.name == "lora+adapter" and again.config["lora"]["modules_to_save"] == ("norm",) and raw["mine"] == 2
    jax.tree.map(np.testing.assert_array_equal, part.trainable, part_again.trainable)
    assert tree.flatten(part.frozen).keys() == tree.flatten(part_again.frozen).keys()
    for _ in range(2):  # the second replaces the first
        adapters.save(tmp_path / "b", part_again, again, found, extra=raw)
    for file in ("lora/adapter_config.json", "lora/" + adapters.TENSORS, "adapter/" + adapters.TENSORS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    name, own, _ = adapters.read_config(tmp_path / "b")
    assert sites.count(methods.make(name, **own), params, found)["trainable"] == tree.count(part.trainable)
    alone, one, _ = adapters.load(tmp_path / "a" / "lora", params, found)  # as PEFT sees it
    assert alone.name == "lora"
    assert {p for p in tree.flatten(part.trainable) if "/adapter/" not in p} == set(tree.flatten(one.trainable))

    (tmp_path / "a" / "lora" / adapters.PEFT_CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match="lora: holds no adapter_config.json"):
        adapters.load(tmp_path / "a", params, found)
    shutil.rmtree(tmp_path / "b" / "lora")
    shutil.copytree(GOLDEN / "IA3", tmp_path / "b" / "lora")
    with pytest.raises(ValueError, match="holds 'ia3', where .* says 'lora'"):
        adapters.load(tmp_path / "b", params, found)


def test_what_peft_does_not_read_is_said():
    assert adapters.without_peft_type("lora") is None
    assert "has no type for adapter: a peftax_adapter.json" in adapters.without_peft_type("adapter")
    both = adapters.without_peft_type("prefix+adapter")
    assert "no type for several methods in one" in both and "and none for adapter: a peftax_adapter.json" in both
    assert adapters.without_peft_type("prefix+lora").endswith("which PEFT reads one by one")


def test_a_head_that_is_not_tied_is_read_where_peft_saved_it_whole(opened, copy):
    """PEFT writes a targeted lm_head itself beside the adapter; it replaces the base's."""
    _, params, found = opened
    head = tree.flatten(params)["lm_head/kernel"]
    _edit(copy, lambda t: t.update({"base_model.model.lm_head.base_layer.weight": np.ascontiguousarray(head.T + 1)}))
    _, part, _ = adapters.load(copy, params, found)
    np.testing.assert_array_equal(tree.flatten(part.frozen)["lm_head/kernel"], head + 1)
    _edit(copy, lambda t: t.update({"base_model.model.lm_head.base_layer.weight": np.zeros((3, 64), np.float32)}))
    with pytest.raises(ValueError, match="fits no table of this base"):
        adapters.load(copy, params, found)


def test_a_trained_head_on_a_tied_base_is_not_lost(copy):
    """PEFT trains a copy of its own; here head and table are one."""
    source = weights.open(GOLDEN / "base_model.safetensors")
    model = models.build({**source.config, "tie_word_embeddings": True})
    shapes = models.abstract(model)
    found = sites.find(model.apply, shapes, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    params, key = weights.load(source, shapes), "base_model.model.lm_head.weight"
    table = np.asarray(params["model"]["embed_tokens"]["embedding"])
    config = json.loads((copy / adapters.PEFT_CONFIG).read_text())
    (copy / adapters.PEFT_CONFIG).write_text(json.dumps({**config, "modules_to_save": ["lm_head"]}))
    _edit(copy, lambda t: t.update({key: table}))
    assert not [p for p in tree.flatten(adapters.load(copy, params, found)[1].trainable) if "/lora/" not in p]
    packed = quantization.quantize(params, (("embed_tokens", {"fmt": "int8"}),), found)
    adapters.load(copy, packed, found)
    _edit(copy, lambda t: t.update({key: table + (np.arange(len(table))[:, None] == 3)}))
    for base in (params, packed):
        with pytest.raises(Unsupported, match=r"'.*lm_head.weight' is not the table 'model/embed_tokens/emb.*untie"):
            adapters.load(copy, base, found)


def test_patterns_mean_the_same_after_a_file_sorted_them(opened, tmp_path):
    _, params, found = opened
    patterns = {"rank_pattern": {"q_proj": 3, r"0\..*": 5}, "alpha_pattern": {"v_proj": 2.0, r"1\..*": 9.0}}
    method = methods.make("lora", rank=2, alpha=6.0, targets=["q_proj", "v_proj"], **patterns)
    part = method.init(jax.random.key(0), params, found)
    adapters.save(tmp_path / "a", part, method, found)
    again, part_again, raw = adapters.load(tmp_path / "a", params, found)
    assert raw["alpha_pattern"][r"model\.layers\.1\.self_attn\.v_proj"] == 2.0 and len(raw["alpha_pattern"]) == 3
    jax.tree.map(np.testing.assert_array_equal, part.trainable, part_again.trainable)
    jax.tree.map(np.testing.assert_array_equal, part.frozen["model"], part_again.frozen["model"])  # the scales
    adapters.save(tmp_path / "b", part_again, again, found)
    assert adapters.read_config(tmp_path / "b")[2]["rank_pattern"] == raw["rank_pattern"]


# --- stacked experts ------------------------------------------------------------------------------


def _experts(tmp_path, **settings):
    """(an adapter of random values on the toy bank, its sites, the folder it is saved in)."""
    _, params, _, found = toys.found("bank")
    method = methods.make("lora", **{"rank": 2, "targets": None, **settings})
    frozen, trainable = toys.start(method, params, found)
    part = Partition(frozen, toys.perturb(trainable))
    return part, found, adapters.save(tmp_path / "experts", part, method, found)


def test_stacked_experts_are_one_parameter(tmp_path):
    """Of one module's parameters the first is innermost; lora_A goes expert by expert, lora_B rank by rank."""
    part, found, folder = _experts(tmp_path, parameters=["experts.up", "down"], rank_pattern={"experts.down": 3})
    tensors = load_file(folder / adapters.TENSORS)
    at = "base_model.model.block.experts"
    assert {k.removeprefix(at): v.shape for k, v in tensors.items()} == {
        ".base_layer.lora_A.weight": (4 * 2, 6),
        ".base_layer.lora_B.weight": (5, 2 * 4),
        ".lora_A.weight": (4 * 3, 5),
        ".lora_B.weight": (6, 3 * 4),
    }
    own = part.trainable["block"]["experts"]["up"]["lora"]["default"]
    np.testing.assert_array_equal(tensors[f"{at}.base_layer.lora_A.weight"][2 * 3 + 1], own["a"][3, :, 1])
    np.testing.assert_array_equal(tensors[f"{at}.base_layer.lora_B.weight"][:, 4 * 1 + 3], own["b"][3, 1])
    _, again, raw = adapters.load(folder, toys.found("bank")[1], found)
    jax.tree.map(np.testing.assert_array_equal, part.trainable, again.trainable)
    assert raw["target_modules"] == [] and raw["target_parameters"] == ["experts.up", "down"]


@pytest.mark.parametrize("version, written", [(None, "0.19.0"), ("0.17.1", "0.19.0"), ("0.21.2", "0.21.2")])
def test_square_experts_come_back_as_they_were(tmp_path, version, written):
    """Their shapes do not tell how a file lies: its version does, ours too."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Einsum((4, 6, 6), "BEI,EIO->BEO", use_bias=False, name="up")(x)

    model, x = Model(), jnp.ones((2, 4, 6))
    params = model.init(jax.random.key(0), x)["params"]
    found = sites.find(model.apply, params, x)
    method = methods.make("lora", rank=2, targets=None, parameters=["up"])
    part = method.init(jax.random.key(0), params, found)
    part = part._replace(trainable=toys.perturb(part.trainable))
    adapters.save(tmp_path / "a", part, method, found, extra={"peft_version": version} if version else {})
    _, again, raw = adapters.load(tmp_path / "a", params, found)
    assert raw["peft_version"] == written
    jax.tree.map(np.testing.assert_array_equal, part.trainable, again.trainable)


def test_experts_that_modules_name_are_written_as_parameters(tmp_path):
    """A pattern that reached them would meet their module in PEFT, which has no dropout there."""
    settings = {"rank_pattern": {r"up\.\d": 3}, "dropout": 0.1}
    part, found, folder = _experts(tmp_path, targets="all-linear", **settings)
    raw = json.loads((folder / adapters.PEFT_CONFIG).read_text())
    assert raw["target_modules"] == ["block.router"] and raw["lora_dropout"] == 0.0
    assert raw["target_parameters"] == ["block.experts.up", "block.experts.down"]
    assert raw["rank_pattern"][r"block\.experts\.up"] == 3
    _, again, _ = adapters.load(folder, toys.found("bank")[1], found)
    jax.tree.map(np.testing.assert_array_equal, part.trainable, again.trainable)


@pytest.mark.parametrize("settings", [{"targets": r".*up\.[13]"}, {"targets": r".*up\.\d", "b_bias": True}])
def test_experts_that_no_parameter_can_say_are_written_one_by_one(tmp_path, settings):
    part, found, folder = _experts(tmp_path, **settings)
    assert "base_model.model.block.experts.up.3.lora_A.weight" in load_file(folder / adapters.TENSORS)
    method, again, _ = adapters.load(folder, toys.found("bank")[1], found)
    ours = toys.fold(method, tree.merge(*again), found)
    jax.tree.map(np.testing.assert_array_equal, ours, toys.fold(method, tree.merge(*part), found))


def test_experts_of_another_shape(tmp_path):
    _, found, folder = _experts(tmp_path, parameters=["experts.up"])
    _edit(folder, lambda t: t.update({k: v[:-1] for k, v in t.items() if "lora_A" in k}))
    with pytest.raises(ValueError, match=r"lora_A \(7, 6\).*do not fit 4 experts \[6, 5\] of rank 2.*\(8, 6\)"):
        adapters.load(folder, toys.found("bank")[1], found)
    _edit(folder, lambda t: [t.pop(k) for k in list(t) if "lora_A" in k])
    with pytest.raises(ValueError, match=r"holds no tensor 'base_model\.model\.block\.experts\.lora_A\.weight'"):
        adapters.load(folder, toys.found("bank")[1], found)
