"""A gradient into a reward model: given responses become more likely under GenARM by one step on the model it reads."""

import jax
import jax.numpy as jnp

from jaxalign import critics, decoding, models, policies, prompt_batch

(base, base_params), (arm, arm_params) = models.tiny(64, seed=0), models.tiny(64, seed=1)
policy = policies.tilt(policies.language_model(base), critics.genarm(arm))
prompts, responses = prompt_batch([[5, 6, 7], [8, 9]]), jnp.array([[11, 12, 0], [13, 0, 0]])
mask = jnp.array([[True, True, True], [True, True, False]])


def likelihood(arm_params):
    params = policies.TiltParams(policy=base_params, critic=arm_params, beta=0.5)
    return decoding.log_prob(policy, params, jax.random.key(2), prompts, responses, mask).log_prob.sum()


rate, (before, gradient) = 1e-5, jax.value_and_grad(likelihood)(arm_params)
after = likelihood(jax.tree.map(lambda p, g: p + rate * g, arm_params, gradient))
print(f"log-likelihood of the responses {before:.4f}, after the step {after:.4f}")
