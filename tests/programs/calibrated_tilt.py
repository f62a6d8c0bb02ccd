"""A tilt by a calibrated reward: scores become quantiles of the base's rewards, and are transformed."""

import jax

from jaxalign import critics, decoding, infalign, policies

PHI = infalign.exponential(5)


def main(base, judge, table, prompts, eos_ids):
    (lm, params), (judge_lm, judged) = base, judge

    def place(table, q, log_prob, index):
        return PHI(infalign.calibrate(q, reference=table[index], is_sorted=True))

    critic = critics.map_scores(critics.args(judge_lm), place)
    return decoding.sample(
        policies.tilt(policies.language_model(lm), critic, top_k=3),
        {"policy": params, "critic": {"critic": judged, "map": table}, "beta": 0.2},
        jax.random.key(0),
        prompts,
        max_new_tokens=3,
        eos_ids=eos_ids,
    )
