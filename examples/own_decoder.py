"""A decoder of one's own: draw half a response with the library's loop, then keep the better of two second halves."""

import jax
import jax.numpy as jnp

from jaxalign import rollout, tree

process = tree.Tree(vocab_size=4, horizon=6, eos_id=None)
table, _ = tree.random(jax.random.key(0), process)
policy, prompts = tree.policy(process), tree.prompts(5)


@jax.jit
def better_of_two(params, rng):
    start, first, *second = jax.random.split(rng, 4)
    state, output = policy.init(params, start, prompts, 6)
    left = rollout.rollout(policy, params, first, state, output, steps=3, eos_ids=())
    ends = [rollout.rollout(policy, params, key, left.state, left.output, steps=3, eos_ids=()) for key in second]
    tokens = jnp.stack([end.completions.tokens for end in ends])  # [2,B,3]
    best = (tokens == 2).sum(axis=2).argmax(axis=0)  # the half with more twos
    return jnp.concatenate([left.completions.tokens, tokens[best, jnp.arange(5)]], axis=1)


found = better_of_two(table, jax.random.key(1))
