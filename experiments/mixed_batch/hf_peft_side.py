"""Hugging Face PEFT on PyTorch: `adapter_names`, one for each row."""

from __future__ import annotations

import sys

import peft
import torch
import transformers

from experiments.mixed_batch import cases


def load(told, inputs):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        told["base"], dtype=torch.float32, attn_implementation="sdpa"
    )
    model = peft.PeftModel.from_pretrained(model, inputs / "adapter0", adapter_name="0")
    for i in range(1, cases.ADAPTERS):
        model.load_adapter(inputs / f"adapter{i}", adapter_name=str(i))
    model.eval()

    @torch.inference_mode()
    def run(case, ids):
        more = {}
        if (cases.CASES.get(case)) is None:
            active = case if case.isdigit() else "0"
            if model.active_adapter != active:
                model.set_adapter(active)
        else:
            more["adapter_names"] = [str(i) for i in cases.which(case)]
        ids = torch.from_numpy(ids).long()
        return model(input_ids=ids, use_cache=False, logits_to_keep=1, **more).logits[:, -1].numpy()

    return run


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    cases.serve(load)
