"""Blockwise decoding from a policy that DPO trained, scored by a reward model; KL to the model that DPO began with."""

import jax

from jaxalign import critics, decoding, models, policies, prompt_batch

shape = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "intermediate_size": 64}
lm = models.LanguageModel(models.Config(vocab_size=64, max_length=64, eos_ids=(0,), **shape))
reward = models.with_head(lm, models.Head("reward"))
dpo, reference, reward_params = (model.init(jax.random.key(i)) for i, model in enumerate((lm, lm, reward)))

policy = policies.with_reference(policies.language_model(lm), policies.language_model(lm))
params = {"policy": policies.ReferenceParams(dpo, reference), "critic": reward_params}
prompts, rng = prompt_batch([[5, 6, 7], [8, 9], [4]]), jax.random.key(3)
found = decoding.blockwise(
    policy, critics.args(reward), params, rng, prompts, num_samples=3, block_size=2, max_new_tokens=5
)
drawn = found.completions
kl = (drawn.log_prob - drawn.log_prob_ref).sum(axis=1) + found.kl.value  # of the draws, and at most that of the choices
print("KL to the model that DPO began with, at most, per prompt [nats]:", kl)
