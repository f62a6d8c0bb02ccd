"""Rewards of given texts: a reward model and a Python function added up, applied to prompts with their responses."""

import jax
import jax.numpy as jnp

from jaxalign import mdp, models, prompt_batch, rewards
from jaxalign.data import tokenizers

tokenizer = tokenizers.word_level(["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and"])
shape = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "intermediate_size": 64}
config = models.Config(vocab_size=len(tokenizer), max_length=64, head=models.Head("reward"), **shape)
lm = models.LanguageModel(config)

polite = lambda prompts, responses: [float(response.endswith("tree")) for response in responses]
total = rewards.weighted_sum([rewards.from_model(lm), rewards.from_text(tokenizer, polite)])
params = rewards.WeightedSumParams(rewards=[lm.init(jax.random.key(0)), None], weights=jnp.array([1.0, 0.5]))

texts = [("the cat", "sat on a mat"), ("the cat", "ran under the tree"), ("a dog", "and a tree")]
prompts = prompt_batch([tokenizer.encode(prompt) for prompt, _ in texts])
responses = prompt_batch([tokenizer.encode(response) for _, response in texts])
whole = mdp.concatenate(prompts, responses.tokens, responses.mask)
found = total(params, *whole, jnp.arange(3))
