"""Compose policies: GenARM guides the base, ARGS tilts the result once more, and best-of-4 selects from that."""

import jax

from jaxalign import critics, decoding, models, policies, prompt_batch, rewards

shape = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "intermediate_size": 64}
base = arm = models.LanguageModel(models.Config(vocab_size=64, max_length=64, eos_ids=(0,), **shape))
reward = models.with_head(base, models.Head("reward"))
base_params, arm_params, reward_params = (lm.init(jax.random.key(i)) for i, lm in enumerate((base, arm, reward)))
prompts = prompt_batch([[5, 6, 7], [8, 9]])

guided = policies.tilt(policies.language_model(base), critics.genarm(arm))
twice = policies.tilt(guided, critics.args(reward), top_k=10)
inner = policies.TiltParams(policy=base_params, critic=arm_params, beta=0.5)
outer = policies.TiltParams(policy=inner, critic=reward_params, beta=2.0)

params, rng = {"policy": outer, "reward": reward_params}, jax.random.key(3)
best = decoding.best_of_n(twice, rewards.from_model(reward), params, rng, prompts, num_samples=4, max_new_tokens=12)
print(best.completions.tokens, best.info.reward, best.kl.kind, best.kl.value)
