"""A policy of one's own: a table of bigrams as two functions, tilted and sampled as any other."""

import jax
import jax.numpy as jnp

from jaxalign import Policy, StepOutput, critics, decoding, mdp, models, policies, prompt_batch


def step(table, rng, last, token):
    log_prob = jax.nn.log_softmax(table[last := jnp.where(token < 0, last, token)])  # token -1: the row is frozen
    return last, StepOutput(log_prob, log_prob, jnp.zeros(len(last)))


def init(table, rng, prompts, max_new_tokens):
    last = prompts.tokens[jnp.arange(len(prompts.mask)), mdp.last_index(prompts.mask)]
    return step(table, rng, last, last)


arm, arm_params = models.tiny(11, seed=1)
table, texts = 2 * jax.random.normal(jax.random.key(0), (11, 11)), [[3, 4, 7], [5]]
params = policies.TiltParams(policy=table, critic=arm_params, beta=2.0)
guided = policies.tilt(Policy(init, step), critics.genarm(arm))
drawn = decoding.sample(guided, params, jax.random.key(2), prompt_batch(texts), max_new_tokens=4, eos_ids=0)
