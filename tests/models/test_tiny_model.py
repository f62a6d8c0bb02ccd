"""The model for trying things: its vocabulary, its head, and that it decodes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxalign import models, rewards, text
from jaxalign.data.tokenizers import word_level


def test_it_takes_the_ids_of_a_tokenizer():
    words = word_level(["a", "b"])
    lm, params = models.tiny(words)
    assert (lm.vocab_size, lm.eos_ids, lm.config.pad_id) == (len(words), (words.eos_token_id,), words.pad_token_id)
    assert text.generate(lm, params, words, ["a b"], max_new_tokens=2).completions.tokens.shape == (1, 2)
    reward, reward_params = models.tiny(words, head="reward")
    assert text.score(rewards.from_model(reward), reward_params, words, ["a"], ["b"]).shape == (1,)


def test_numbers_heads_and_seeds():
    lm, params = models.tiny(11, num_layers=2, max_length=32)
    assert (lm.vocab_size, lm.eos_ids, lm.max_length, lm.config.num_layers) == (11, (0,), 32, 2)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, models.tiny(11, num_layers=2)[1]))
    assert not np.array_equal(
        params["transformer"]["embedding"], models.tiny(11, seed=1)[1]["transformer"]["embedding"]
    )
    assert [models.tiny(11, head=head)[0].head_width for head in ("reward", "value", "q")] == [1, 1, 11]
    assert models.tiny(head=models.Head("reward", num_labels=3))[0].head_width == 3
    with pytest.raises(ValueError, match="kind: expected 'reward', 'value' or 'q', found 'logits'"):
        models.tiny(head="logits")
