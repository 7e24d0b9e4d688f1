"""Hugging Face PEFT on PyTorch (SDPA): a run from an adapter folder, and what is asked of its outcome."""

from __future__ import annotations

import numpy as np
import peft
import torch
import transformers

from experiments.same_run_two_frameworks.inputs import NEW, RATES
from experiments.speed import side


class Trainer:
    """Called with tokens [rows, length + 1] it makes a step and gives the loss."""

    def __init__(self, args, told):
        self.base, self.steps = told["base"], 0
        self.model = self.attach(args.inputs / args.adapter)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=RATES[args.adapter], weight_decay=0.0, fused=True)
        self.budget = getattr(self.model.base_model, "update_and_allocate", None)  # AdaLoRA's

    def attach(self, folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.base, dtype=torch.float32, attn_implementation="sdpa"
        )
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=True).train()

    def __call__(self, tokens: np.ndarray) -> float:
        self.steps += 1
        loss = _loss(self.model, tokens)
        loss.backward()
        self.optimizer.step()
        if self.budget is not None:
            self.budget(self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def save(self, into: str) -> None:
        self.model.save_pretrained(into)

    def gradients(self, folder: str, batch: list, into: str) -> None:
        """At the adapter of a folder, written as one."""
        model = self.attach(folder)
        _loss(model, np.asarray(batch)).backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
        model.save_pretrained(into)

    def generate(self, folder: str, prompts: list[list[int]]) -> list[list[int]]:
        """Greedy, with the adapter of a folder."""
        model, answers = self.attach(folder).eval(), []
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
            )
            new = out[0, len(prompt) :].tolist()
            answers.append(new[:-1] if new[-1] in ends else new)
        return answers


def _loss(model, tokens: np.ndarray) -> torch.Tensor:
    tokens = torch.from_numpy(tokens).long()
    targets = tokens[:, 1:].contiguous()  # given as they are, so that the last position counts too
    return model(input_ids=tokens[:, :-1], labels=targets, shift_labels=targets, use_cache=False).loss


def main() -> None:
    args = side.arguments()
    torch.set_num_threads(args.threads)
    side.serve(args, Trainer)


if __name__ == "__main__":
    main()
