"""Blockwise decoding from a DPO model, scored by a reward model; KL to the model that DPO started from."""

import jax

from jaxalign import critics, decoding, policies


def main(dpo, reference, judge, prompts, eos_ids):
    policy = policies.with_reference(policies.language_model(dpo[0]), policies.language_model(reference[0]))
    params = {"policy": {"policy": dpo[1], "reference": reference[1]}, "critic": judge[1]}
    found = decoding.blockwise(
        policy,
        critics.args(judge[0]),
        params,
        jax.random.key(0),
        prompts,
        num_samples=3,
        block_size=2,
        max_new_tokens=5,
        eos_ids=eos_ids,
    )
    drawn = found.completions
    return drawn, (drawn.log_prob - drawn.log_prob_ref).sum(1) + found.kl.value
