"""Hugging Face PEFT on PyTorch: eager attention, SDPA, or SDPA and torch.compile."""

from __future__ import annotations

import contextlib

import numpy as np
import peft
import torch
import transformers

from experiments.speed import side

NF4 = transformers.BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
ATTENTION = {"eager": "eager", "sdpa": "sdpa", "compile": "sdpa"}


def load(args, told):
    packed = args.dtype == "nf4"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        told["base"],
        dtype=torch.float32 if packed else getattr(torch, args.dtype),
        quantization_config=NF4 if packed else None,
        attn_implementation=ATTENTION[args.kind],
    )
    # autocast_adapter_dtype, the default, keeps the adapter in f32 on a bf16 base
    model = peft.PeftModel.from_pretrained(model, args.inputs / args.adapter, is_trainable=True)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=told["rate"], weight_decay=0.0, fused=True)
    forward = torch.compile(model) if args.kind == "compile" else model

    def one(tokens: np.ndarray) -> float:
        tokens = torch.from_numpy(tokens).long()
        targets = tokens[:, 1:].contiguous()
        cast = torch.autocast("cpu", torch.bfloat16) if args.autocast else contextlib.nullcontext()
        with cast:  # shift_labels: the targets as they are, so that the last position counts too
            out = forward(input_ids=tokens[:, :-1], labels=targets, shift_labels=targets, use_cache=False)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(out.loss.detach())

    return one


def main() -> None:
    args = side.arguments(kind="sdpa", autocast=0)
    torch.set_num_threads(args.threads)
    side.serve(args, load)


if __name__ == "__main__":
    main()
