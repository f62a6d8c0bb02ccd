"""A model of one's own as a Policy: a table of bigrams. It is tilted, sampled and scored as any other."""

import jax
import jax.numpy as jnp

from jaxalign import critics, decoding, mdp, policies
from jaxalign.types import Policy, StepOutput


def step(table, rng, state, token):
    last = jnp.where(token < 0, state["last"], token)
    log_prob = jax.nn.log_softmax(table[last])
    return {"last": last}, StepOutput(log_prob, log_prob, jnp.zeros(len(last)))


def init(table, rng, prompts, max_new_tokens):
    last = prompts.tokens[jnp.arange(len(prompts.tokens)), mdp.last_index(prompts.mask)]
    return step(table, rng, {"last": last}, last)


def main(table, arm, prompts, eos_ids):
    policy = policies.tilt(Policy(init, step), critics.genarm(arm[0]))
    params = {"policy": table, "critic": arm[1], "beta": 2.0}
    return decoding.sample(policy, params, jax.random.key(0), prompts, max_new_tokens=4, eos_ids=eos_ids)
