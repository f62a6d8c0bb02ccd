"""Blockwise decoding from a policy that DPO trained, scored by a reward model; KL to the model that DPO began with."""

import jax

from jaxalign import critics, decoding, models, policies, prompt_batch

(lm, dpo), (_, reference) = models.tiny(64, seed=0), models.tiny(64, seed=1)
reward, reward_params = models.tiny(64, head="reward", seed=2)

policy = policies.with_reference(policies.language_model(lm), policies.language_model(lm))
params = {"policy": policies.ReferenceParams(dpo, reference), "critic": reward_params}
prompts, rng = prompt_batch([[5, 6, 7], [8, 9], [4]]), jax.random.key(3)
found = decoding.blockwise(
    policy, critics.args(reward), params, rng, prompts, num_samples=3, block_size=2, max_new_tokens=5
)
drawn = found.completions
kl = (drawn.log_prob - drawn.log_prob_ref).sum(axis=1) + found.kl.value  # of the draws, and at most that of the choices
print("KL to the model that DPO began with, at most, per prompt [nats]:", kl)
