"""Tests of parts of one's own: a critic that keeps the laws, and the message of one that counts frozen rows."""

import jax.numpy as jnp

from jaxalign import Critic, prompt_batch, testing


def short(frozen_rows_count: bool) -> Critic:
    def score(params, rng, length, output, candidates):  # a level: minus the tokens so far, 2 for ending with token 0
        tokens = jnp.arange(6)[None] if candidates is None else candidates
        return jnp.where(tokens == 0, 2.0, -length[:, None]), length

    def advance(params, length, choice):
        return length + (frozen_rows_count | (choice >= 0))

    return Critic(lambda params, rng, prompts, max_new_tokens: jnp.zeros(len(prompts.tokens)), score, advance, "level")


given = {"params": None, "prompts": prompt_batch([[1, 2], [3], [4, 5, 1]]), "vocab_size": 6}
testing.check_critic(short(frozen_rows_count=False), **given)
try:
    testing.check_critic(short(frozen_rows_count=True), **given)
except AssertionError as error:
    print(message := str(error))
