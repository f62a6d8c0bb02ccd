"""Evaluation of a method of one's own beside best-of-4: the same prompts, reward and KL of both in one table."""

import pathlib

from jaxalign import decoding, evaluation, models, policies
from jaxalign.data import tokenizers

tokenizer = tokenizers.word_level(["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and"])
models.save("runs/own/model", *models.tiny(tokenizer), tokenizer=tokenizer, overwrite=True)
pathlib.Path("runs/own/prompts.txt").write_text("the cat\na dog ran\n")
words = lambda prompts, responses: [float(len(set(response.split()))) for response in responses]  # the reward


def top(given):  # evaluation.MethodInputs -> draw(rng, prompts); given.strength is the number behind @
    policy = policies.top_k(given.policy, int(given.strength))
    return lambda rng, prompts: decoding.sample(policy, given.params, rng, prompts, **given.limits)


own = {"model": "runs/own/model", "prompts": "runs/own/prompts.txt", "out": "runs/own/run", "reward": "__main__:words"}
rows = evaluation.run(evaluation.DecodeOptions(**own, method=("best_of_n@4", "__main__:top@8,2"), max_new_tokens=8))
