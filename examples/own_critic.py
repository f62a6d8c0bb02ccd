"""A critic of one's own: a level that pays for ending soon, tilting a small process at two strengths."""

import jax
import jax.numpy as jnp

from jaxalign import Critic, decoding, policies, tree

critic = Critic(
    init=lambda params, rng, prompts, max_new_tokens: jnp.zeros(prompts.tokens.shape[0]),  # tokens so far [B]
    score=lambda params, rng, state, output, candidates: (
        2.0 * ((jnp.arange(4)[None] if candidates is None else candidates) == 0) - state[:, None],
        state,
    ),
    advance=lambda params, proposal, choice: proposal + (choice >= 0),  # choice -1: the row is frozen
    kind="level",
)
process = tree.Tree(vocab_size=4, horizon=6)  # token 0 ends a response
table, _ = tree.random(jax.random.key(0), process)
policy = policies.tilt(tree.policy(process), critic)
params = policies.TiltParams(policy=table, critic=None, beta=jnp.repeat(jnp.array([1e6, 0.5]), 200))
drawn = decoding.sample(policy, params, jax.random.key(1), tree.prompts(400), max_new_tokens=6, eos_ids=0)
length = drawn.mask.sum(axis=1).reshape(2, 200).mean(axis=1)
print("mean length at beta 1e6 and 0.5:", length)
