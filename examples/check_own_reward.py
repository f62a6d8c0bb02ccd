"""Tests of one's own parts: the laws hold for a reward that reads the mask, and find the fault in one that does not."""

import jax.numpy as jnp

from jaxalign import mdp, prompt_batch, testing


def length(params, tokens, mask, prompt_length, index):
    return params * mdp.response_part(mask, prompt_length).sum(axis=1)


def last_token(params, tokens, mask, prompt_length, index):
    return params * tokens[:, -1]  # the last column, which may be padding


prompts = prompt_batch([[5], [6, 7], [8, 9, 1], [2, 3], [4, 4, 4, 4]])
testing.check_reward(length, jnp.array(0.5), prompts, vocab_size=11)
try:
    testing.check_reward(last_token, jnp.array(0.5), prompts, vocab_size=11)
except AssertionError as error:
    fault = str(error)
    print("found:", fault)
