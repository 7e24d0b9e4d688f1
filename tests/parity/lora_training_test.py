"""From the same adapter and the same batches, 20 steps of LoRA follow Hugging Face PEFT's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason="needs torch: run with .venv-parity")

import peft  # noqa: E402
import transformers  # noqa: E402

from peftax import models, weights  # noqa: E402
from peftax.core import injection, sites, tree  # noqa: E402
from peftax.methods.lora import lora  # noqa: E402
from peftax.train import loss  # noqa: E402
from peftax.train.step import State, make_step  # noqa: E402

pytestmark = pytest.mark.parity
torch.set_num_threads(1)

STEPS, ROWS, T, VOCAB = 20, 4, 13, 61
RATE, DECAY, EPS = 5e-3, 0.01, 1e-6
CASES = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all_linear_rslora": {"r": 3, "lora_alpha": 6, "use_rslora": True, "target_modules": "all-linear"},
    "ranks_and_biases": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "rank_pattern": {"0.self_attn.q_proj": 2},
        "alpha_pattern": {"up_proj": 12},
        "bias": "all",
    },
}


def base(at):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=41,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        attention_bias=True,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn_like(p) * 0.2)
            elif not bool((p == 1).all()):
                p.copy_(torch.randn_like(p) * 0.1)
    model.save_pretrained(at)
    return model


def batches():
    """Ragged completions, padded on the right."""
    rng = np.random.default_rng(1)
    for _ in range(STEPS):
        tokens = rng.integers(1, VOCAB, (ROWS, T)).astype(np.int32)
        ends = rng.integers(6, T + 1, ROWS)
        starts = ends - rng.integers(1, 5, ROWS)
        at = np.arange(T)[None]
        held = at < ends[:, None]
        counted = held & (at >= starts[:, None])  # tokens to be learned
        yield tokens * held, held.astype(np.int32), counted


def theirs(model):
    """(losses, first gradients by name) of PEFT's model under torch's AdamW."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=DECAY, eps=EPS)
    model.train()
    losses, first = [], {}
    for tokens, held, counted in batches():
        ids = torch.tensor(tokens).long()
        labels = torch.where(torch.tensor(counted), ids, -100)
        out = model(input_ids=ids, attention_mask=torch.tensor(held), labels=labels, use_cache=False)
        optimizer.zero_grad()
        out.loss.backward()
        if not first:
            first = {n: p.grad.numpy().copy() for n, p in trained.items()}
        optimizer.step()
        losses.append(float(out.loss.detach()))
    return np.array(losses), first


def into(trainable, named, found):
    """PEFT's tensors laid into the trainable tree; ranks below a stack's largest are padded with zeros."""
    flat = {p: np.zeros(x.shape, np.float32) for p, x in tree.flatten(trainable).items()}
    by_name = found.by_name()
    for name, value in named.items():
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        module, leaf = name.split(".lora_") if ".lora_" in name else name.rsplit(".", 1)
        site, layer = by_name[module]
        if leaf == "bias":
            own = flat[site.bias]
        else:
            own = flat[f"{site.path}/lora/default/{leaf[0].lower()}"]
            value = value.T
        own = own[layer] if site.stack else own
        own[tuple(slice(n) for n in value.shape)] = value
    return tree.unflatten({p: jnp.asarray(x) for p, x in flat.items()})


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("name", CASES)
def test_follows_peft(tmp_path, name, scan):
    config = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **CASES[name])
    reference = peft.get_peft_model(base(tmp_path), config)
    with torch.no_grad():  # from the middle: B at zero would hide A
        for n, p in reference.named_parameters():
            if "lora_" in n:
                p.copy_(torch.randn_like(p) * 0.2)
    start = {n: p.detach().numpy().copy() for n, p in reference.named_parameters() if p.requires_grad}

    source = weights.open(tmp_path)
    model = models.build(source.config, scan=scan)
    params = weights.load(source, models.abstract(model))
    found = sites.find(model.apply, params, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    case = CASES[name]
    method = lora(
        rank=case["r"],
        alpha=case["lora_alpha"],
        rank_stabilized=case.get("use_rslora", False),
        targets=case["target_modules"],
        rank_pattern=case.get("rank_pattern"),
        alpha_pattern=case.get("alpha_pattern"),
        bias=case.get("bias", "none"),
    )
    frozen, trainable = method.init(jax.random.key(0), params, found)
    assert sites.count(method, params, found)["trainable"] == sum(x.size for x in start.values())
    trainable = into(trainable, start, found)

    optimizer = optax.chain(optax.trace(0.0), optax.adamw(RATE, weight_decay=DECAY, eps=EPS))
    step = make_step(injection.inject(model.apply, method), loss.causal_lm, optimizer)
    state, losses, first = State.create(trainable, optimizer), [], None
    for tokens, held, counted in batches():
        batch = {
            "tokens": tokens,
            "targets": np.roll(tokens, -1, 1),
            "weights": np.pad(counted[:, 1:], ((0, 0), (0, 1))).astype(np.float32),
            "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (ROWS, T)),
            "segment_ids": held,
        }
        state, metrics = step(state, frozen, batch)
        first = jax.tree.map(np.array, state.opt_state[0].trace) if first is None else first
        losses.append(float(metrics["loss"]))

    expected, gradients = theirs(reference)
    expected_first, first = tree.flatten(into(trainable, gradients, found)), tree.flatten(first)
    assert first.keys() == expected_first.keys()
    for path, value in expected_first.items():
        worst = float(jnp.abs(first[path] - value).max() / jnp.abs(value).max())
        assert worst <= 1e-4, f"{path}: {worst:.1e}"
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert abs(losses[-1] - losses[0]) > 1e-2
