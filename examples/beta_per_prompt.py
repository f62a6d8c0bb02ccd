"""A KL weight per prompt: one compiled program, an array of betas, and the KL that each of them costs."""

import jax
import jax.numpy as jnp

from jaxalign import critics, decoding, models, policies, prompt_batch

(base, base_params), (arm, arm_params) = models.tiny(64, seed=0), models.tiny(64, seed=1)
policy = policies.tilt(policies.language_model(base), critics.genarm(arm))
prompts = prompt_batch([[5, 6, 7], [8, 9], [8, 9], [4]])

params = policies.TiltParams(policy=base_params, critic=arm_params, beta=jnp.array([0.1, 0.5, 2.0, 1e9]))
drawn = decoding.sample(policy, params, jax.random.key(2), prompts, max_new_tokens=12)
print("KL to the base, per prompt [nats]:", drawn.kl.sum(axis=1))
