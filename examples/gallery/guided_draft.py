"""Guided speculative inference's sampler: n draws of a small model, chosen as if the base had drawn them.

Source: arXiv 2506.04118 (without its fall-back)
Equation: P(i) ∝ (b(y_i)/d(y_i)) exp(r(y_i)/beta) among n draws of d
When: a draft model close to the base, which then only scores; soft best-of-n at the cost of the draft
Cost: n responses of the draft, n passes of the base, n rewards
"""

from jaxalign import decoding, policies


def method(base, draft, reward, params, rng, prompts, n, **limits):
    proposal, never = policies.with_reference(draft, base), decoding.resampling.never
    return decoding.smc(proposal, reward, params, rng, prompts, num_particles=n, when=never, **limits)


def build(given):
    (draft, d), n = given.model("draft"), int(given.strength)
    both = policies.ReferenceParams(d, given.params)
    params, parts = {"policy": both, "reward": given.reward_params, "beta": 1.0}, (policies.language_model(draft),)
    return lambda rng, prompts: method(given.policy, *parts, given.reward, params, rng, prompts, n, **given.limits)
