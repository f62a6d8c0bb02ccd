"""Small tokenizers of the kinds that people bring, with templates of well-known families."""

from __future__ import annotations

import functools
from typing import Any

import tokenizers
import transformers

TEXTS = [
    "user assistant system tool Human Assistant: hello there, how are you? I am fine. Yes, No.",
    "The capital of France is Paris. What is the capital of France? think about it",
    "Hello Yes No Thanks. One two three four five six seven eight nine ten.",
]
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|user|>", "<|assistant|>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set sys = '<<SYS>>\n' + messages[0].content"
    " + '\n<</SYS>>\n\n' %}{% else %}{% set rest = messages %}{% set sys = '' %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{{ (sys if loop.first else '') + m.content.strip() }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content.strip() }} {{ eos_token }}"
    "{% else %}{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
THINK = (  # opens <think> for generation alone, and leaves earlier thoughts out
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|assistant|>{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz ") | {c for text in TEXTS for c in text}
"""Characters that every tokenizer here knows."""


def _made(raw: Any, template: str | None, bos: bool, eos: bool, **names: str) -> Any:
    if bos or eos:
        raw.post_processor = tokenizers.processors.TemplateProcessing(
            single=("<s> " if bos else "") + "$A" + (" </s>" if eos else ""), special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, **({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | names)
    )
    fast.chat_template = template
    return fast


def _train(raw: Any, **options: Any) -> Any:
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIALS, show_progress=False, min_frequency=1, **options
    )
    raw.train_from_iterator(TEXTS * 2, trainer)
    return raw.to_str()


@functools.cache
def _byte_level() -> str:
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    return str(_train(raw, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))


@functools.cache
def _dummy_space() -> str:
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    decode = tokenizers.decoders
    raw.decoder = decode.Sequence(
        [decode.Replace("▁", " "), decode.ByteFallback(), decode.Fuse(), decode.Strip(" ", 1, 0)]
    )
    # Words with their space in front are learned whole, as sentencepiece does, though none is cut off before.
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    text = _train(raw, initial_alphabet=list("▁Sabcdefghijklmnopqrstuvwxyz\n:[]/<>|"))
    made = tokenizers.Tokenizer.from_str(text)
    made.pre_tokenizer = None
    return str(made.to_str())


def byte_level(template: str | None = None, *, bos: bool = False, eos: bool = False, **names: str) -> Any:
    """Byte-level BPE, as of GPT-2, Qwen and Llama-3."""
    return _made(tokenizers.Tokenizer.from_str(_byte_level()), template, bos, eos, **names)


def dummy_space(template: str | None = None, *, bos: bool = True, eos: bool = False, **names: str) -> Any:
    """Puts a space before a text, as sentencepiece's of Llama-2, Mistral and Vicuna do."""
    return _made(tokenizers.Tokenizer.from_str(_dummy_space()), template, bos, eos, **names)
