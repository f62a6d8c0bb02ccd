"""Tokenizers made from text, in the form that transformers saves and loads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jaxalign._transformers import transformers

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def word_level(words: Sequence[str]) -> Any:
    """A tokenizer of whole words, for texts whose words are separated by spaces.

    Args:
      words: each once; their ids follow those of <pad>, <eos> and <unk>, in the order given.

    Returns:
      A tokenizer of transformers. Texts come back from their ids with single spaces.

    Raises:
      ValueError: no words, or one twice.
    """
    import tokenizers  # needed where a tokenizer is made alone

    if not words or len(set(words)) < len(words):
        raise ValueError(
            f"words: expected at least one, each once, found {len(words)} with {len(set(words))} different"
        )
    vocabulary = {word: i for i, word in enumerate((PAD, EOS, UNKNOWN, *words))}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return _fast(raw)


def byte_level(texts: Iterable[str], *, vocab_size: int) -> Any:
    """Trains byte-level BPE: any text has ids, and comes back from them byte by byte.

    Args:
      texts: what it is trained on.
      vocab_size: at most so many tokens, <pad>, <eos>, <unk> and the 256 bytes included.

    Returns:
      A tokenizer of transformers.

    Raises:
      ValueError: a vocab_size below 259.
    """
    import tokenizers  # needed where a tokenizer is made alone

    if vocab_size < 259:
        raise ValueError(f"vocab_size: expected at least 259 (256 bytes and 3 special tokens), found {vocab_size}")
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, UNKNOWN],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return _fast(raw)


def _fast(raw: Any) -> Any:

    return transformers().PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)
