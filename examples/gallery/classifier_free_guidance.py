"""Classifier-free guidance: the prompt counts for more than it does to the model.

Source: arXiv 2306.17806
Equation: log pi = log softmax(log b(x) + g (log b(x) - log b(x'))) at every state
When: responses that follow the prompt too little; x' is the prompt without what should count
Cost: base, three passes
"""

import jax.numpy as jnp

from jaxalign import critics, decoding, policies


def method(base):
    return policies.tilt(base, critics.weighted_sum([critics.from_policy(base)] * 2))


def build(given):
    weights = jnp.array([given.strength, -given.strength])
    critic = critics.WeightedSumParams([given.params, given.params], weights)
    params, policy = policies.TiltParams(given.params, critic, 1.0), method(given.policy)

    def draw(rng, prompts):
        last = jnp.cumsum(prompts.mask[:, ::-1], axis=1)[:, ::-1] == 1  # x' is the prompt's last token alone
        without = prompts._replace(mask=prompts.mask & last)
        both = {"policy": prompts, "critic": {"critics": [prompts, without]}}
        return decoding.sample(policy, params, rng, both, **given.limits)

    return draw
