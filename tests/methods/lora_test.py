import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peftax import models
from peftax.core import hf, injection, sites, tree
from peftax.core import targets as target
from peftax.core.method import Ctx
from peftax.methods import lora as file
from peftax.methods.lora import lora
from peftax.train import loss, optimizers
from peftax.train.step import State, make_step
from tests.core import toys
from tests.methods import tiny


def shapes(method, scan=True):
    """The partition's shapes on the tiny Llama, by path below model/layers."""
    params = tree.abstract(tiny.params(scan))
    part = jax.eval_shape(lambda p: method.init(jax.random.key(0), p, tiny.found(scan)), params)
    return {p: x.shape for p, x in tree.flatten(part.trainable).items()}


def start(method, scan=True):
    init = jax.jit(lambda p: method.init(jax.random.key(0), p, tiny.found(scan)))
    return init(tiny.params(scan))


def adapted(names):
    return {p.split("/lora/")[0].rsplit("/", 1)[-1] for p in names if "/lora/" in p}


def test_by_hand():
    """x = [1, 2], A = [[1], [1]], B = [[1, 0, 2]], s = 4 / 1; xW + b = [5, 4, 1] + [1, 1, 1]; (xA)B s = 3 [1,
    0, 2] 4.
    """
    model, x = nn.Dense(3), jnp.array([[1.0, 2.0]])
    w, b = jnp.array([[1.0, 0.0, 1.0], [2.0, 2.0, 0.0]]), jnp.ones(3)
    holder = nn.Sequential([model])
    params = {"layers_0": {"kernel": w, "bias": b}}
    method = lora(rank=1, alpha=4.0, targets=["layers_0"])
    frozen, trainable = method.init(jax.random.key(0), params, sites.find(holder.apply, params, x))
    leaves = trainable["layers_0"]["lora"]["default"]
    assert leaves["a"].shape == (2, 1) and leaves["b"].tolist() == [[0.0, 0.0, 0.0]]
    leaves["a"], leaves["b"] = jnp.array([[1.0], [1.0]]), jnp.array([[1.0, 0.0, 2.0]])
    merged = tree.merge(frozen, trainable)
    y = injection.inject(holder.apply, method)({"params": merged}, x)
    assert y.tolist() == [[6.0 + 12.0, 5.0, 2.0 + 24.0]]
    folded = method.fold(merged, sites.find(holder.apply, params, x))["layers_0"]
    assert folded["kernel"].tolist() == [[5.0, 0.0, 9.0], [6.0, 2.0, 8.0]]
    assert folded["bias"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("stabilized, scale", [(False, 16 / 4), (True, 16 / math.sqrt(4))])
def test_scale(stabilized, scale):
    frozen, _ = start(lora(rank=4, alpha=16.0, rank_stabilized=stabilized, targets=["q_proj"]))
    np.testing.assert_array_equal(
        frozen["model"]["layers"]["self_attn"]["q_proj"]["lora"]["default"]["scale"], [scale, scale]
    )


def test_init_is_pefts():
    """a ~ U(±1/√in), b = 0; on an embedding a = 0, b ~ N(0, 1)."""
    method = lora(rank=8, targets=["q_proj", "embed_tokens"])
    _, trainable = start(method)
    leaves = trainable["model"]["layers"]["self_attn"]["q_proj"]["lora"]["default"]
    bound = 1 / math.sqrt(24)
    assert 0.9 * bound < float(jnp.abs(leaves["a"]).max()) <= bound and not leaves["b"].any()
    assert float(leaves["a"].std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    table = trainable["model"]["embed_tokens"]["lora"]["default"]
    assert table["a"].shape == (37, 8) and not table["a"].any()
    assert float(table["b"].std()) == pytest.approx(1.0, rel=0.2)


# --- where ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"targets": "all-linear"}, "q k v o gate up down"),
        ({"targets": ["q_proj", "v_proj"]}, "q v"),
        ({"targets": r".*self_attn\.[qk]_proj"}, "q k"),
        ({"targets": "all-linear", "exclude": ["up_proj", "down_proj"]}, "q k v o gate"),
        ({"targets": "all-linear", "exclude": r".*mlp.*"}, "q k v o"),
    ],
)
def test_targets(settings, expected):
    assert adapted(shapes(lora(**settings))) == {f"{n}_proj" for n in expected.split()}


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"]])
def test_tables_are_targets_when_named(targets):
    assert adapted(shapes(lora(targets=targets))) == set(targets)


def test_layers_unrolled_and_scanned_count_the_same():
    method = lora(rank=3, targets=["q_proj"], layers=1)
    assert adapted(shapes(method, scan=False)) == {"q_proj"}
    assert not any("layers/0" in p for p in shapes(method, scan=False))
    counted = [sites.count(method, tiny.params(scan), tiny.found(scan)) for scan in (True, False)]
    assert counted[0] == counted[1] and counted[0]["trainable"] == 3 * (24 + 40)


def test_rank_and_alpha_patterns():
    """One layer has rank 2, the others 4; under a scan the leaves are as large as the largest."""
    method = lora(
        rank=4, alpha=8.0, targets=["q_proj"], rank_pattern={"0.self_attn.q_proj": 2}, alpha_pattern={"q_proj": 12.0}
    )
    at = "self_attn/q_proj/lora/default"
    assert shapes(method)[f"model/layers/{at}/a"] == (2, 24, 4)
    assert shapes(method, scan=False)[f"model/layers/0/{at}/a"] == (24, 2)
    counted = [sites.count(method, tiny.params(scan), tiny.found(scan))["trainable"] for scan in (True, False)]
    assert counted == [(2 + 4) * (24 + 40)] * 2
    frozen, trainable = start(method)
    leaves = trainable["model"]["layers"]["self_attn"]["q_proj"]["lora"]["default"]
    assert leaves["a"][0, :, :2].all() and not leaves["a"][0, :, 2:].any() and leaves["a"][1].all()
    scale = frozen["model"]["layers"]["self_attn"]["q_proj"]["lora"]["default"]["scale"]
    assert scale.tolist() == [12.0 / 2, 12.0 / 4]
    unrolled = start(method, scan=False).trainable["model"]["layers"]
    own = unrolled["0"]["self_attn"]["q_proj"]["lora"]["default"]["a"]
    np.testing.assert_allclose(leaves["a"][0, :, :2], own, atol=1e-7)


def test_padded_ranks_stay_zero_under_adam():
    method = lora(
        rank=4, targets=["q_proj", "up_proj"], layers=None, rank_pattern={"0.self_attn.q_proj": 2, "1.mlp.up_proj": 3}
    )
    frozen, trainable = start(method)
    optimizer = optimizers.make(name="adamw", schedule=optax.constant_schedule(1e-2), weight_decay=0.1)
    step = make_step(injection.inject(tiny.model().apply, method), loss.causal_lm, optimizer)
    state = State.create(trainable, optimizer)
    for _ in range(5):
        state, _ = step(state, frozen, tiny.batch())
    for (site, leaf), layer, rank in [(("self_attn", "q_proj"), 0, 2), (("mlp", "up_proj"), 1, 3)]:
        leaves = state.trainable["model"]["layers"][site][leaf]["lora"]["default"]
        assert not leaves["a"][layer, :, rank:].any() and not leaves["b"][layer, rank:].any()
        assert leaves["a"][layer, :, :rank].all() and leaves["b"][layer, :rank].all()
        assert leaves["b"][1 - layer].all()


# --- what else trains -----------------------------------------------------------------------------


@pytest.mark.parametrize("bias, expected", [("none", ""), ("lora_only", "q v"), ("all", "q k v o gate up down")])
def test_bias(bias, expected):
    got = shapes(lora(rank=2, targets=["q_proj", "v_proj"], bias=bias))
    biases = {p.split("/")[-2] for p in got if p.endswith("/bias")}
    assert biases == {f"{n}_proj" for n in expected.split()}


def test_lora_only_needs_whole_stacks():
    method = lora(targets=["q_proj"], layers=1, bias="lora_only")
    with pytest.raises(ValueError, match="scan=False"):
        shapes(method)
    assert "model/layers/1/self_attn/q_proj/bias" in shapes(method, scan=False)


def test_modules_to_save_train_whole_and_get_no_adapter():
    got = shapes(lora(rank=2, targets=["q_proj", "lm_head"], modules_to_save=["lm_head", "model.norm"]))
    assert got["lm_head/kernel"] == (24, 37) and got["model/norm/scale"] == (24,)
    assert adapted(got) == {"q_proj"}
    assert not any("layernorm" in p for p in got)
    got = shapes(lora(rank=2, targets=["q_proj"], modules_to_save=["norm"]))  # any end of a name, as in PEFT
    assert got["model/layers/input_layernorm/scale"] == (2, 24)


def test_modules_to_save_that_match_nothing():
    with pytest.raises(ValueError, match="modules_to_save.*lm_haed.*'lm_head'"):
        shapes(lora(rank=2, targets=["q_proj"], modules_to_save=["lm_haed"]))


def test_a_tied_head_holds_nothing_to_save():
    model = models.build({**tiny.CONFIG, "tie_word_embeddings": True})
    base = models.abstract(model)
    found = sites.find(model.apply, base, jax.ShapeDtypeStruct((1, 2), jnp.int32))

    def trained(*modules):
        method = lora(targets=["q_proj"], modules_to_save=modules)
        part = jax.eval_shape(lambda p: method.init(jax.random.key(0), p, found), base)
        return [p for p in tree.flatten(part.trainable) if "/lora/" not in p]

    with pytest.raises(ValueError, match="'lm_head' is a head tied to the table 'model.embed_tokens'.*name the table"):
        trained("norm", "lm_head")
    assert trained("lm_head", "embed_tokens") == trained("embed_tokens") == ["model/embed_tokens/embedding"]


# --- dropout --------------------------------------------------------------------------------------


def test_dropout_keeps_the_expectation_and_acts_before_a():
    theta = {"a": jnp.eye(4), "b": jnp.eye(4), "scale": jnp.float32(1.0)}
    x, w = jnp.full((2, 50_000, 4), 2.0), jnp.zeros((4, 4))
    dropped = Ctx(key=jax.random.key(0)).drop(x, 0.25)
    assert set(np.unique(np.asarray(dropped)).round(5)) == {0.0, np.float32(2 / 0.75).round(5)}
    assert float(dropped.mean()) == pytest.approx(2.0, rel=5e-3)
    model = nn.Sequential([nn.Dense(4)])
    params = {"layers_0": {"kernel": w, "bias": jnp.ones(4)}}
    method = lora(rank=4, dropout=0.25, targets=["layers_0"])
    frozen, trainable = method.init(jax.random.key(0), params, sites.find(model.apply, params, x[:, :2]))
    merged = tree.merge(frozen, {"layers_0": {"lora": {"default": {"a": theta["a"], "b": theta["b"]}}}})
    run = injection.inject(model.apply, method)
    scale = 16.0 / 4
    trained = run({"params": merged}, x, ctx=Ctx(key=jax.random.key(3)))
    assert float(trained.mean()) == pytest.approx(1 + 2 * scale, rel=5e-3)  # the bias and xW are not dropped
    np.testing.assert_array_equal(run({"params": merged}, x), jnp.full(x.shape, 1 + 2 * scale))
    columns = np.asarray(trained).reshape(-1, 4)
    assert (columns == 1.0).any(0).all() and not (columns == columns[:, :1]).all()


def test_every_chunk_of_the_loss_drops_other_inputs_of_the_head():
    """All positions are alike, so that only what is dropped differs; outputs dropped of all rows are one choice."""

    def apply(variables, *args, method, ctx):
        if method == "hidden":
            return jnp.ones((1, 12, 64)), None
        h = ctx.drop(args[0], 0.5) if variables["params"]["inputs"] else ctx.drop_outputs(args[0], 0.5, 0.0)
        return jnp.concatenate([h.mean(-1, keepdims=True), h[..., :1]], axis=-1)

    batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.zeros((1, 12), jnp.int32))
    batch["weights"] = jnp.ones((1, 12))
    for inputs in (True, False):
        nll = loss.token_losses(apply, {"inputs": inputs}, batch, Ctx(key=jax.random.key(0)), chunk=4)
        alike = [np.array_equal(a, b) for a, b in itertools.combinations(nll.reshape(3, 4), 2)]
        assert alike == [not inputs] * 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "rank 0"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"bias": "some"}, "'some' is none of"),
        ({"targets": []}, "targets: empty"),
        ({"targets": "q_proj", "layers": [0]}, "works with a list"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        lora(**settings)


# --- Hugging Face's words -------------------------------------------------------------------------


def test_config_there_and_back():
    mine = lora(rank=3, alpha=5.0, rank_stabilized=True, targets=["q_proj"], layers=[1], bias="all").config
    again = lora(**file.HF.read(file.HF.write(mine))).config
    same = [k for k in mine if mine[k] != again[k] and (mine[k] or again[k])]
    assert same == []


HONOURED = ("lora_bias", "target_parameters", "trainable_token_indices", "use_dora")


@pytest.mark.parametrize("field", [f for f in hf.LORA_VARIANTS if f not in HONOURED])
def test_a_field_that_asks_for_another_method_is_refused(field):
    config = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    assert file.HF.read({**config, field: None}) == file.HF.read({**config, field: False})
    with pytest.raises(hf.Unsupported, match=rf"LORA with {field} \(.*\) is not supported; the nearest is plain lora"):
        file.HF.read({**config, field: {"any": 1}})


@pytest.mark.parametrize("start", ["corda", "loftq", "lora_ga", "pissa_niter_4"])
def test_a_base_that_its_folder_does_not_hold_is_refused(start):
    with pytest.raises(hf.Unsupported, match=f"'{start}' stands on a moved base.*path_initial_model"):
        file.HF.read({"peft_type": "LORA", "target_modules": ["q_proj"], "init_lora_weights": start})


def test_dora_has_a_format_of_its_own():
    assert not file.HF.matches({"use_dora": True})


def test_numbers_of_a_pattern_of_layers():
    """`layers_pattern` says after which part the number stands; without it the first counts."""
    config = {"peft_type": "LORA", "target_modules": ["up", "x.down"], "layers_to_transform": [1, 3]}
    match = target.Targets(modules=file.HF.read({**config, "layers_pattern": ["experts", "h"]})["targets"]).match
    assert match("layers.0.experts.1.up", "linear") and match("h.3.x.down", "linear")
    assert not match("layers.1.experts.0.up", "linear") and not match("h.3.down", "linear")
    assert file.HF.read({**config, "layers_to_transform": []})["layers"] is None


def test_a_bias_on_b():
    """Trains, scales as the update does, and folds into the module's own."""
    model, x = nn.Sequential([nn.Dense(3)]), jnp.array([[1.0, 2.0]])
    params = {"layers_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    method = lora(rank=1, alpha=4.0, targets=["layers_0"], b_bias=True)
    found = sites.find(model.apply, params, x)
    frozen, trainable = method.init(jax.random.key(0), params, found)
    trainable["layers_0"]["lora"]["default"]["c"] = jnp.array([1.0, 0.0, -2.0])
    merged = tree.merge(frozen, trainable)
    assert injection.inject(model.apply, method)({"params": merged}, x).tolist() == [[4.0 + 4.0, 4.0, 4.0 - 8.0]]
    assert method.fold(merged, found)["layers_0"]["bias"].tolist() == [5.0, 1.0, -7.0]
    assert sites.count(method, params, found)["trainable"] == 2 + 3 + 3
    with pytest.raises(ValueError, match="has no place for B's"):
        method.fold({"layers_0": {k: v for k, v in merged["layers_0"].items() if k != "bias"}}, _without_bias(x))


def _without_bias(x):
    model = nn.Sequential([nn.Dense(3, use_bias=False)])
    return sites.find(model.apply, {"layers_0": {"kernel": jnp.ones((2, 3))}}, x)


def test_biases_of_its_targets_alone():
    """Neither a norm's nor, of all linear modules, a convolution's."""
    _, params, _, found = toys.found("encoder")
    trained = tree.flatten(toys.start(lora(bias="lora_only"), params, found).trainable)
    biases = {path for path in trained if path.endswith("/bias")}
    assert biases == {f"attention/{n}/bias" for n in ("query", "key", "value", "out")} | {"out/bias"}
    _, params, _, found = toys.found("cnn")
    trained = tree.flatten(toys.start(lora(bias="lora_only"), params, found).trainable)
    assert {path for path in trained if path.endswith("/bias")} == {"head/bias"}
