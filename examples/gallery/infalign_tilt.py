"""InfAlign's tilt without training: the reward's place among base responses of the prompt.

Source: arXiv 2412.19792
Equation: pi(y) ∝ b(y) exp(C(x,y)/beta), C the quantile of r(x,y) under b
When: rewards whose scale differs between prompts
Cost: K base responses per prompt once, n particles
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import decoding, rewards


def method(base, reward, params, rng, prompts, n, **limits):
    return decoding.smc(base, rewards.calibrated(reward), params, rng, prompts, num_particles=n, **limits)


def build(given):
    plain = {"policy": given.params, "reward": given.reward_params}

    def draw(rng, prompts):
        found = decoding.best_of_n(
            given.policy, given.reward, plain, jax.random.fold_in(rng, 1), prompts, num_samples=16, **given.limits
        )
        rows = 2 ** int(np.asarray(prompts.index).max()).bit_length()  # a table by the prompts' index, of few sizes
        table = jnp.tile(jnp.arange(16.0), (rows, 1)).at[prompts.index].set(jnp.sort(found.info.reward, axis=1))
        own = {"reward": given.reward_params, "map": {"table": table}}
        params = {"policy": given.params, "reward": own, "beta": given.strength}
        return method(given.policy, given.reward, params, rng, prompts, 16, **given.limits)

    return draw
