"""Blockwise decoding from a DPO model, scored by a reward model; KL to the model that DPO started from."""

import jax

from jaxalign import critics, decoding, metrics, policies


def main(dpo, reference, judge, prompts, eos_ids):
    policy = policies.with_reference(policies.language_model(dpo[0]), policies.language_model(reference[0]))
    params = {"policy": {"policy": dpo[1], "reference": reference[1]}, "critic": judge[1]}
    drawn = decoding.blockwise(
        policy,
        critics.args(judge[0]),
        params,
        jax.random.key(0),
        prompts,
        candidates=3,
        block=2,
        max_new_tokens=5,
        eos_ids=eos_ids,
    )
    kl = (drawn.log_prob - drawn.log_prob_ref).sum(1) + metrics.blockwise_kl_bound(
        drawn.mask, block_size=2, num_samples=3
    )
    return drawn, kl
