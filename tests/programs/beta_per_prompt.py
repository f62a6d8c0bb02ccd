"""One KL weight per prompt, under best-of-n: the state is repeated, each prompt keeps its own."""

import jax

from jaxalign import critics, decoding, policies, rewards


def main(base, arm, judge, prompts, beta, eos_ids):
    policy = policies.tilt(policies.language_model(base[0]), critics.genarm(arm[0]))
    guided = {"policy": base[1], "critic": arm[1], "beta": beta}
    return decoding.best_of_n(
        policy,
        rewards.from_model(judge[0]),
        {"policy": guided, "reward": judge[1]},
        jax.random.key(0),
        prompts,
        num_samples=3,
        max_new_tokens=3,
        eos_ids=eos_ids,
    )
