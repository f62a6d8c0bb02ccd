"""Rewards of given texts: a reward model and a Python function added up, applied to prompts with their responses."""

import jax.numpy as jnp

from jaxalign import mdp, models, prompt_batch, rewards
from jaxalign.data import tokenizers

tokenizer = tokenizers.word_level(["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and"])
lm, reward_params = models.tiny(tokenizer, head="reward")

polite = lambda prompts, responses: [float(response.endswith("tree")) for response in responses]
total = rewards.weighted_sum([rewards.from_model(lm), rewards.from_text(tokenizer, polite)])
params = rewards.WeightedSumParams(rewards=[reward_params, None], weights=jnp.array([1.0, 0.5]))

texts = [("the cat", "sat on a mat"), ("the cat", "ran under the tree"), ("a dog", "and a tree")]
prompts = prompt_batch([tokenizer.encode(prompt) for prompt, _ in texts])
responses = prompt_batch([tokenizer.encode(response) for _, response in texts])
whole = mdp.concatenate(prompts, responses.tokens, responses.mask)
found = total(params, *whole, jnp.arange(3))
