"""A KL weight per prompt: one compiled program, an array of betas, and the KL that each of them costs."""

import jax
import jax.numpy as jnp

from jaxalign import critics, decoding, models, policies, prompt_batch

shape = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "intermediate_size": 64}
base = arm = models.LanguageModel(models.Config(vocab_size=64, max_length=64, eos_ids=(0,), **shape))
policy = policies.tilt(policies.language_model(base), critics.genarm(arm))
prompts = prompt_batch([[5, 6, 7], [8, 9], [8, 9], [4]])

params = policies.TiltParams(
    policy=base.init(jax.random.key(0)), critic=arm.init(jax.random.key(1)), beta=jnp.array([0.1, 0.5, 2.0, 1e9])
)
drawn = decoding.sample(policy, params, jax.random.key(2), prompts, max_new_tokens=12)
print("KL to the base, per prompt [nats]:", drawn.kl.sum(axis=1))
