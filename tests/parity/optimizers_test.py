"""LoRA+, LoRA-FA and AdaLoRA's budget: ten steps from the same adapter follow Hugging Face PEFT's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: run with .venv-parity")

import peft  # noqa: E402
from peft import optimizers as theirs  # noqa: E402

from peftax import methods, models, weights  # noqa: E402
from peftax.core import injection, sites, tree  # noqa: E402
from peftax.core.method import Partition  # noqa: E402
from peftax.train import loss, optimizers  # noqa: E402
from peftax.train.step import State, make_step  # noqa: E402
from peftax.weights import adapters  # noqa: E402
from tests.parity import tiny  # noqa: E402
from tests.parity.tiny import T, base  # noqa: E402

pytestmark = pytest.mark.parity
STEPS, RATE, EPS = 10, 3e-3, 1e-4  # a large eps: rounding is not what is compared


class Pair:
    """PEFT's model, and the same adapter on the same base here."""

    def __init__(self, at, config, settings):
        self.reference = peft.get_peft_model(base(at), config)
        with torch.no_grad():
            for n, p in self.reference.named_parameters():
                if "lora_" in n:
                    p.copy_(torch.randn_like(p) * 0.2)
        source = weights.open(at)
        self.model = models.build(source.config)
        self.params = params = weights.load(source, models.abstract(self.model))
        self.found = sites.find(self.model.apply, params, jax.ShapeDtypeStruct((1, 2), jnp.int32))
        self.method = methods.make(settings.pop("name"), **settings)
        frozen, trainable = self.method.init(jax.random.key(0), params, self.found)
        self.part = Partition(self.filled(frozen), self.filled(trainable))
        self.frozen, self.trainable = self.part

    def filled(self, half):
        """This half with the values of PEFT's adapter and of the biases that train."""
        flat = {path: np.array(x) for path, x in tree.flatten(half).items()}
        by_name = self.found.by_name()
        for name, p in self.reference.named_parameters():
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            value = p.detach().numpy()
            if ".lora_" in name:
                module, leaf = name.split(".lora_")
                site, layer = by_name[module]
                path = f"{site.path}/{self.method.name}/default/{leaf.removeprefix('embedding_')[0].lower()}"
                value = value.T
            elif name.endswith(".bias"):
                site, layer = by_name[name.removesuffix(".bias")]
                path = site.bias
            else:
                continue
            if path in flat:
                flat[path][(layer,) if site.stack else ()] = value
        return tree.unflatten({path: jnp.asarray(x) for path, x in flat.items()})

    def steps(self, optimizer):
        """(losses, trainable half) after STEPS steps here."""
        penalty = self.method.penalty
        step = make_step(
            injection.inject(self.model.apply, self.method),
            loss.causal_lm,
            optimizer,
            penalty=None if penalty is None else lambda params: penalty(params, self.found),
        )
        state, losses = State.create(jax.tree.map(jnp.copy, self.trainable), optimizer), []
        for batch in tiny.batches(STEPS):
            state, metrics = step(state, self.frozen, tiny.ours(*batch))
            losses.append(float(metrics["loss"]))
        return np.array(losses), state.trainable

    def their_steps(self, optimizer, after=lambda step: None):
        self.reference.train()
        losses = []
        for i, batch in enumerate(tiny.batches(STEPS)):
            out = self.reference(**tiny.theirs(*batch), use_cache=False)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            after(i + 1)
            losses.append(float(out.loss.detach()))
        return np.array(losses)

    def compare(self, optimizer, their_optimizer, after=lambda step: None):
        began = tree.flatten(self.trainable)
        losses, trainable = self.steps(optimizer)
        expected = self.their_steps(their_optimizer, after)
        wanted = tree.flatten(self.filled(self.trainable))
        for path, x in tree.flatten(trainable).items():
            moved = float(jnp.abs(wanted[path] - began[path]).max())
            assert moved > 1e-7, path
            assert float(jnp.abs(x - wanted[path]).max()) <= 1e-3 * moved, path
            assert float(jnp.abs(x - wanted[path]).max()) <= 1e-4 * float(jnp.abs(wanted[path]).max()), path
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
        return trainable


def constant(**settings):
    config = {"schedule": "constant", "learning_rate": RATE, "warmup_steps": 0, "final_fraction": 0.0, "eps": EPS}
    return {**config, "clip": None, **settings}


def made(pair, **settings):
    return optimizers.from_config(constant(**settings), steps=STEPS, method=pair.method, sites=pair.found)[0]


def test_lora_plus(tmp_path):
    modules = ["q_proj", "down_proj", "embed_tokens"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=modules, bias="lora_only")
    settings = {"name": "lora", "rank": 3, "alpha": 6.0, "targets": modules, "bias": "lora_only"}
    pair = Pair(tmp_path, config, settings)
    ratio, slow = 8.0, 1e-4
    optimizer = theirs.create_loraplus_optimizer(
        pair.reference,
        torch.optim.AdamW,
        lr=RATE,
        eps=EPS,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=0.1,
        loraplus_lr_embedding=slow,
    )
    factors = (("embed_tokens/lora/", slow / RATE), ("/lora/.*/b$", ratio), ("/bias$", ratio))
    pair.compare(made(pair, factors=factors, weight_decay=0.1, no_decay=("/bias$",)), optimizer)


def test_lora_fa(tmp_path, monkeypatch):
    """PEFT multiplies in bf16 where it finds it; here both are in f32."""
    monkeypatch.setattr(theirs.lorafa, "is_bf16_available", lambda: False)
    modules = ["q_proj", "up_proj"]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=modules, bias="lora_only", alpha_pattern={"up_proj": 9}
    )
    settings = {
        "name": "lora",
        "rank": 3,
        "alpha": 6.0,
        "targets": modules,
        "bias": "lora_only",
        "alpha_pattern": {"up_proj": 9.0},
        "freeze_a": True,
    }
    pair = Pair(tmp_path, config, settings)
    optimizer = theirs.create_lorafa_optimizer(pair.reference, r=3, lora_alpha=6, lr=RATE, weight_decay=0.1)
    optimizer.param_groups[0]["eps"] = EPS
    trainable = pair.compare(made(pair, name="lora_fa", weight_decay=0.1), optimizer)
    assert not any(path.endswith("/a") for path in tree.flatten(trainable))


@pytest.mark.parametrize("every", [1, 3])
def test_adalora(tmp_path, every):
    """Penalty, importance, budget and last ranks; update_and_allocate after each step, counted from 1."""
    modules = ["q_proj", "down_proj"]
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=4,
        target_r=2,
        lora_alpha=8,
        tinit=2,
        tfinal=3,
        deltaT=every,
        total_step=STEPS,
        target_modules=modules,
        orth_reg_weight=0.3,
    )
    settings = {"rank": 4, "target_rank": 2, "alpha": 8.0, "first_steps": 2, "final_steps": 3, "every": every}
    pair = Pair(tmp_path, config, {"name": "adalora", **settings, "orthogonal": 0.3, "targets": modules})
    trained = [p for p in pair.reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, eps=EPS, weight_decay=0.0)
    trainable = pair.compare(made(pair), optimizer, pair.reference.base_model.update_and_allocate)
    left = sum(int((np.asarray(x) != 0).sum()) for p, x in tree.flatten(trainable).items() if p.endswith("/e"))
    assert left == 2 * 4

    # the shrunk adapter, from PEFT to here and back
    pair.reference.save_pretrained(tmp_path / "theirs")
    tokens, held, _ = next(tiny.batches(1))
    here = {"positions": np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape), "segment_ids": held}

    def logits(method, part):
        return injection.inject(pair.model.apply, method)({"params": tree.merge(*part)}, tokens, *here.values())

    def their_logits(model):
        with torch.no_grad():
            return model.eval()(input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(held)).logits.numpy()

    method, part, raw = adapters.load(tmp_path / "theirs", pair.params, pair.found)
    assert sum(map(sum, raw["rank_pattern"].values())) == 8
    seen = held > 0
    expected = their_logits(pair.reference)[seen]
    plain = np.asarray(pair.model.apply({"params": pair.params}, tokens, *here.values()))[seen]
    effect = np.abs(expected - plain).max()
    assert np.abs(np.asarray(logits(method, part))[seen] - expected).max() <= 1e-5 + 1e-3 * effect
    adapters.save(tmp_path / "ours", pair.part._replace(trainable=trainable), pair.method, pair.found)
    back = peft.PeftModel.from_pretrained(base(tmp_path / "again"), tmp_path / "ours")
    ours = np.asarray(logits(pair.method, pair.part._replace(trainable=trainable)))[seen]
    assert np.abs(their_logits(back)[seen] - ours).max() <= 1e-5 + 1e-3 * effect
