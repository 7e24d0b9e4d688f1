"""A Llama with biases, grouped heads and tied tables, as transformers makes it; and batches to train it on."""

import numpy as np
import torch
import transformers

ROWS, T, VOCAB = 4, 13, 61


def base(at, *, hidden_size=48, intermediate_size=80, head_dim=8):
    """torch's model, saved at `at`."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        attention_bias=True,
        mlp_bias=True,
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
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(at)
    return model


def batches(steps):
    """(tokens, which are held, which are to be learned): ragged completions, padded on the right."""
    rng = np.random.default_rng(1)
    for _ in range(steps):
        tokens = rng.integers(1, VOCAB, (ROWS, T)).astype(np.int32)
        ends = rng.integers(6, T + 1, ROWS)
        starts = ends - rng.integers(1, 5, ROWS)
        at = np.arange(T)[None]
        held = at < ends[:, None]
        yield tokens * held, held.astype(np.int32), held & (at >= starts[:, None])


def ours(tokens, held, counted):
    """One of these batches as our loss takes it."""
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "weights": np.pad(counted[:, 1:], ((0, 0), (0, 1))).astype(np.float32),
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape),
        "segment_ids": held,
    }


def theirs(tokens, held, counted):
    """The same as transformers' arguments."""
    ids = torch.tensor(tokens).long()
    labels = torch.where(torch.tensor(counted), ids, -100)
    return {"input_ids": ids, "attention_mask": torch.tensor(held), "labels": labels}
