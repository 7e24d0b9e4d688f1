"""Prompts and prefixes behind a network, and those that begin with a text, are Hugging Face PEFT's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch lives in the parity venv")

import peft  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from peftax import methods  # noqa: E402
from peftax.core import injection, sites, tree  # noqa: E402
from peftax.weights import adapters  # noqa: E402
from tests.parity.adapters_test import GOLDEN, base, torch_logits  # noqa: E402

pytestmark = pytest.mark.parity
__all__ = ["base"]  # the fixture
LENGTH, WIDTH = 5, 24
TEXT = "a text of a few words"


def ids():
    return np.load(GOLDEN / "input_ids.npy").astype(np.int32)


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def same(ours, theirs, without):
    effect = np.abs(theirs - without).max()
    assert effect > 0.02
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-5 + 1e-3 * effect


def same_both_ways(base, tmp_path, method, part, theirs):
    """PEFT's model gives our logits, and so does PEFT with the folder that we write."""
    folder, model, _, found = base
    ours = jax.jit(injection.inject(model.apply, method))({"params": tree.merge(*part)}, ids())
    without = torch_logits(plain(folder), ids())
    same(ours, torch_logits(theirs, ids()), without)

    adapters.save(tmp_path / "a", part, method, found, base=str(folder))
    again = peft.PeftModel.from_pretrained(plain(folder), tmp_path / "a")
    same(ours, torch_logits(again.eval(), ids()), without)


def lstm_leaves(encoder):
    leaves, lstm = {}, encoder.lstm_head
    for i in range(lstm.num_layers):
        ways = [[getattr(lstm, f"{part}_l{i}{way}") for way in ("", "_reverse")] for part in ("weight_ih", "weight_hh")]
        leaves[f"x{i}"], leaves[f"h{i}"] = (torch.stack([w.T for w in way]) for way in ways)
        biases = [[getattr(lstm, f"bias_{part}_l{i}{way}") for part in ("ih", "hh")] for way in ("", "_reverse")]
        leaves[f"b{i}"] = torch.stack([torch.stack(way) for way in biases])
    return leaves


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_p_tuning_while_it_trains(base, tmp_path, kind):
    """The same network gives the same logits; counts agree; PEFT loads what we write of it."""
    folder, _, params, found = base
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=LENGTH,
        encoder_hidden_size=WIDTH,
        encoder_reparameterization_type=kind,
        encoder_num_layers=2,
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(plain(folder), config)
    encoder = theirs.prompt_encoder["default"]
    leaves = {"e": encoder.embedding.weight} | (lstm_leaves(encoder) if kind == "LSTM" else {})
    for i, module in enumerate(m for m in encoder.mlp_head if isinstance(m, torch.nn.Linear)):
        leaves |= {f"w{i}": module.weight.T, f"c{i}": module.bias}
    method = methods.make("p_tuning", length=LENGTH, size=WIDTH, encoder=kind.lower())
    part = method.init(jax.random.key(0), params, found)
    at = "model/embed_tokens/p_tuning/default"
    mine = {f"{at}/{leaf}": jnp.asarray(value.detach().numpy()) for leaf, value in leaves.items()}
    shapes = {path: x.shape for path, x in tree.flatten(part.trainable).items()}
    assert {path: x.shape for path, x in mine.items()} == shapes
    assert sites.count(method, params, found)["trainable"] == theirs.get_nb_trainable_parameters()[0]
    part = part._replace(trainable=tree.unflatten(mine))
    same_both_ways(base, tmp_path, method, part, theirs)


@pytest.mark.parametrize("zeros", [False, True])
def test_prefix_behind_a_network(base, tmp_path, zeros):
    folder, _, params, found = base
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=LENGTH,
        encoder_hidden_size=WIDTH,
        prefix_projection=True,
        init_weights="zero" if zeros else None,
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(plain(folder), config)
    encoder = theirs.prompt_encoder["default"]
    first, last = encoder.transform[0], encoder.transform[2]
    method = methods.make("prefix", length=LENGTH, projection=WIDTH, init="zeros" if zeros else "normal")
    part = method.init(jax.random.key(0), params, found)
    assert sites.count(method, params, found)["trainable"] == theirs.get_nb_trainable_parameters()[0]
    layers = len(part.trainable["model"]["layers"]["self_attn"]["core_attn"]["prefix"]["default"]["c_k"])
    own = {"e": encoder.embedding.weight, "w": first.weight.T, "c": first.bias}
    w, c = last.weight.reshape(layers, 2, -1, WIDTH), last.bias.reshape(layers, 2, -1)
    each = {"w_k": w[:, 0].mT, "w_v": w[:, 1].mT, "c_k": c[:, 0], "c_v": c[:, 1]}
    flat = {f"prefix/default/{k}": x for k, x in own.items()}
    flat |= {f"model/layers/self_attn/core_attn/prefix/default/{k}": x for k, x in each.items()}
    flat = {path: jnp.asarray(x.detach().numpy()) for path, x in flat.items()}
    assert {p: x.shape for p, x in flat.items()} == {p: x.shape for p, x in tree.flatten(part.trainable).items()}
    if zeros:
        start = tree.flatten(part.trainable)
        for path in (p for p in flat if "core_attn" in p):
            np.testing.assert_array_equal(start[path], flat[path])
    part = part._replace(trainable=tree.unflatten(flat))
    same_both_ways(base, tmp_path, method, part, theirs)


class Words:
    """A tokenizer of known ids."""

    def __call__(self, text, **kwargs):
        return {"input_ids": torch.tensor([self.ids(text)])}

    def ids(self, text):
        return [3 + len(word) * 7 + i for i, word in enumerate(text.split())]


def test_a_prefix_that_begins_with_a_text(base):
    """PEFT's own recipe: initialize_kv_prefix_from_text."""
    folder, model, params, found = base
    theirs = peft.get_peft_model(
        plain(folder), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    )
    kv = peft.initialize_kv_prefix_from_text(theirs, Words(), text=TEXT, use_chat_template=False)
    method = methods.make("prefix", length=LENGTH, init="tokens", init_ids=Words().ids(TEXT))

    def prefill(text):
        cache = model.init_cache(1, len(text))
        _, cache = model.apply({"params": params}, jnp.asarray(text)[None], cache=cache, method="hidden")
        return cache["k"][:, 0], cache["v"][:, 0]

    part = method.begin(method.init(jax.random.key(0), params, found), prefill, found)
    leaves = part.trainable["model"]["layers"]["self_attn"]["core_attn"]["prefix"]["default"]
    expected = kv.numpy().reshape(LENGTH, len(leaves["k"]), 2, -1)
    for i, leaf in enumerate(("k", "v")):
        np.testing.assert_allclose(leaves[leaf], expected[:, :, i].swapaxes(0, 1), atol=1e-5)
    ours = jax.jit(injection.inject(model.apply, method))({"params": tree.merge(*part)}, ids())
    same(ours, torch_logits(theirs.eval(), ids()), torch_logits(plain(folder), ids()))
