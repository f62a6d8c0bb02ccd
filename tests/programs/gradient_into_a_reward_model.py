"""Make given responses more likely under GenARM by changing its reward model: one step of gradient ascent."""

import jax

from jaxalign import critics, decoding, policies


def main(base, arm, prompts, tokens, mask, rate):
    policy = policies.tilt(policies.language_model(base[0]), critics.genarm(arm[0]))

    def likelihood(reward):
        params = {"policy": base[1], "critic": reward, "beta": 0.5}
        return decoding.log_prob(policy, params, jax.random.key(0), prompts, tokens, mask).log_prob.sum()

    before, gradient = jax.value_and_grad(likelihood)(arm[1])
    after = likelihood(jax.tree.map(lambda p, g: p + rate * g, arm[1], gradient))
    return before, after, gradient
