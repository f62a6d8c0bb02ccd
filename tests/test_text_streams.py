"""Streams of characters: what is given is whole, never changes, and adds up to the text."""

from __future__ import annotations

import pytest
import tokenizers
import transformers

from jaxalign import text
from jaxalign import tokens as tokenization
from jaxalign.data.tokenizers import byte_level
from tests.conftest import tiny_lm

STRANGE = "naïve café €5 – 你好 🙂👍🏽 ok"


def pieces_of(tokenizer, ids, every=1):
    """What a stream would give of ids, a few at a time, and then the rest."""
    byte_ids, given, out = tokenization.byte_tokens(tokenizer), "", []
    for end in range(every, len(ids) + every, every):
        settled = tokenization.settled_text(tokenizer, ids[:end], byte_ids)
        assert settled.startswith(given)
        out.append(settled[len(given) :])
        given = settled
    whole = tokenization.decode_text(tokenizer, ids)
    assert whole.startswith(given)
    return [*out, whole[len(given) :]]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_characters_of_several_bytes_come_whole(every):
    tokenizer = byte_level([STRANGE.encode().decode("latin-1")], vocab_size=259)  # every byte is a token
    ids = tokenizer(STRANGE)["input_ids"]
    assert len(ids) == len(STRANGE.encode())
    pieces = pieces_of(tokenizer, ids, every)
    assert "".join(pieces) == STRANGE
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 8


def test_bytes_that_are_no_character_are_given_once_they_are_settled():
    tokenizer = byte_level(["a"], vocab_size=259)
    broken = tokenizer("€")["input_ids"][:2]
    ids = [*broken, *tokenizer("a")["input_ids"], *broken]
    assert pieces_of(tokenizer, ids) == ["", "", "\ufffda", "", "", "\ufffd"]


def test_byte_fallback_waits_for_the_end_of_its_run():
    """There a run of bytes is decoded as a whole: one wrong byte turns characters before it into replacements."""
    vocab = {"<unk>": 0, "▁a": 1, **{f"<0x{i:02X}>": i + 2 for i in range(256)}}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    raw.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
    euro = [byte + 2 for byte in "€".encode()]
    assert fast.decode([*euro, 0xFF + 2]) == "\ufffd" * 4  # the character is gone
    assert pieces_of(fast, [1, *euro, 0xFF + 2, 1]) == [" a", "", "", "", "", "\ufffd" * 4 + " a", ""]
    assert pieces_of(fast, [1, *euro, 1]) == [" a", "", "", "", "€ a", ""]


def test_a_stream_of_bytes_has_no_broken_pieces():
    """A model over bytes draws parts of characters; each piece is final all the same."""
    tokenizer = byte_level(["a"], vocab_size=259)
    lm, params = tiny_lm(0, num_layers=1, vocab_size=259, eos_ids=(1,))
    pieces: list[list[str]] = [[], []]
    found = text.generate(
        lm,
        params,
        tokenizer,
        ["€", "a"],
        seed=1,
        max_new_tokens=40,
        stream=lambda row, piece: pieces[row].append(piece),
        stream_every=1,
    )
    assert found.texts == ["".join(row) for row in pieces]
    assert max(map(len, pieces)) > 10
