"""Compose policies: GenARM guides the base, ARGS tilts the result once more, and best-of-4 selects from that."""

import jax

from jaxalign import critics, decoding, models, policies, prompt_batch, rewards

(base, base_params), (arm, arm_params) = models.tiny(64, seed=0), models.tiny(64, seed=1)
reward, reward_params = models.tiny(64, head="reward", seed=2)
prompts = prompt_batch([[5, 6, 7], [8, 9]])

guided = policies.tilt(policies.language_model(base), critics.genarm(arm))
twice = policies.tilt(guided, critics.args(reward), top_k=10)
inner = policies.TiltParams(policy=base_params, critic=arm_params, beta=0.5)
outer = policies.TiltParams(policy=inner, critic=reward_params, beta=2.0)

params, rng = {"policy": outer, "reward": reward_params}, jax.random.key(3)
best = decoding.best_of_n(twice, rewards.from_model(reward), params, rng, prompts, num_samples=4, max_new_tokens=12)
print(best.completions.tokens, best.info.reward, best.kl.kind, best.kl.value)
