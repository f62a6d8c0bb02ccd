"""Best-of-n over a policy that a value model and a partial-text reward guide together."""

import jax

from jaxalign import critics, decoding, policies, rewards


def main(base, judge, value, prompts, eos_ids):
    (lm, params), (judge_lm, judged), (value_lm, valued) = base, judge, value
    both = critics.weighted_sum([critics.args(judge_lm), critics.value(value_lm)])
    policy = policies.tilt(policies.language_model(lm), both, top_k=4)
    guided = {"policy": params, "critic": {"critics": [judged, valued], "weights": [0.3, 0.7]}, "beta": 0.5}
    return decoding.best_of_n(
        policy,
        rewards.from_model(judge_lm),
        {"policy": guided, "reward": judged},
        jax.random.key(0),
        prompts,
        num_samples=3,
        max_new_tokens=3,
        eos_ids=eos_ids,
    )
