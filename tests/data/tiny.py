"""A byte-level tokenizer with a ChatML template, trained on a few lines: tests need no network."""

from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LINES = [
    "what is the weather in Paris?",
    "the answer is 42, of course",
    '[{"name":"add","arguments"',
]


@cache
def _trained() -> str:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[
            AddedToken("<|im_start|>", special=True),
            AddedToken("<|im_end|>", special=True),
        ],
        show_progress=False,
    )
    tok.train_from_iterator(LINES * 4, trainer)
    return tok.to_str()


def tokenizer(template: str | None = CHATML) -> Any:
    tok = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    tok.chat_template = template
    return tok
