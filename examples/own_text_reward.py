"""A reward of one's own on texts: best-of-8 for the number of different words, as a plain Python function."""

import jax

from jaxalign import decoding, models, policies, prompt_batch
from jaxalign.data import tokenizers

tokenizer = tokenizers.word_level(["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and"])
lm, base_params = models.tiny(tokenizer)


def variety(prompts: list[str], responses: list[str]) -> list[float]:
    return [len(set(response.split())) for response in responses]


prompts = prompt_batch([tokenizer.encode(text) for text in ("the cat", "a dog ran")])
params, rng = {"policy": base_params}, jax.random.key(1)
best = decoding.best_of_n(
    policies.language_model(lm), variety, params, rng, prompts, num_samples=8, max_new_tokens=8, tokenizer=tokenizer
)
for row, mask, reward in zip(best.completions.tokens, best.completions.mask, best.info.reward, strict=True):
    print(f"{reward.max():.0f} words:", tokenizer.decode(row[mask], skip_special_tokens=True))
