"""A reward written in numpy: distinct tokens of the response."""

import jax
import numpy as np

from jaxalign import decoding, mdp, policies, rewards


def distinct(tokens, mask, prompt_length, index):
    response = np.asarray(mdp.response_part(mask, prompt_length))
    return np.array([len(set(row[real].tolist())) for row, real in zip(tokens, response, strict=True)])


def main(base, prompts, eos_ids):
    policy, reward = policies.language_model(base[0]), rewards.from_numpy(distinct)
    params = {"policy": base[1], "reward": None}
    key = jax.random.key(0)
    return decoding.best_of_n(policy, reward, params, key, prompts, num_samples=4, max_new_tokens=5, eos_ids=eos_ids)
