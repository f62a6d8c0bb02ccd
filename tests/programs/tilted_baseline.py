"""Transfer Q* whose roll-outs come from a policy that a GenARM reward already guides."""

import jax

from jaxalign import critics, decoding, policies, rewards


def main(base, arm, judge, prompts, eos_ids):
    (lm, params), (arm_lm, arm_params), (judge_lm, judged) = base, arm, judge
    plain = policies.language_model(lm)
    guided = policies.tilt(plain, critics.genarm(arm_lm))
    critic = critics.transfer_q(guided, rewards.from_model(judge_lm), eos_ids=eos_ids, num_samples=2, lookahead=2)
    aligned = {"policy": params, "critic": arm_params, "beta": 0.5}
    return decoding.sample(
        policies.tilt(plain, critic, top_k=3),
        {"policy": params, "critic": {"baseline": aligned, "reward": judged}, "beta": 0.1},
        jax.random.key(0),
        prompts,
        max_new_tokens=3,
        eos_ids=eos_ids,
    )
