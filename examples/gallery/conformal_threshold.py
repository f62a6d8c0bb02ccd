"""Conformal threshold: value-filtered decoding whose c cuts at most a share a of the good responses.

Source: arXiv 2605.14746; split conformal prediction
Equation: c = k-th smallest of min_t V(y_1..y_t) over n good draws of b, k = floor(a (n + 1)); -inf for k = 0
When: value_filter with a guarantee, Pr(cut given good) <= a, in place of a chosen number
Cost: as value_filter, and n responses with their values once
"""

import jax.numpy as jnp

from jaxalign import critics, decoding, policies


def method(least, a):
    """The threshold c from the least value along each good response, least [n]."""
    k = int(a * (len(least) + 1))
    return jnp.sort(least)[k - 1] if k else -jnp.inf


def least_value(base, value, params, rng, prompts, tokens, mask):
    """min_t V(y_1..y_t) of given responses: what a tilt by V at beta 1 adds up to is V."""
    drawn = decoding.log_prob(policies.tilt(base, value), params, rng, prompts, tokens, mask)
    values = jnp.cumsum(drawn.log_prob - drawn.log_prob_ref + drawn.log_norm, axis=1)
    return jnp.where(mask, values, jnp.inf).min(axis=1)


def keep(threshold, value, log_prob, index):
    value = jnp.where(log_prob > -1e19, value, -jnp.inf)  # of the tokens that the base may draw
    least = jnp.minimum(value.max(axis=1, keepdims=True), threshold)
    return jnp.where(value >= least, 0, -1e20)


def build(given):
    (lm, v), base = given.model("value"), given.policy
    value, both = critics.value(lm), policies.TiltParams(given.params, v, 1.0)
    filtered = policies.tilt(base, critics.map_scores(value, keep))

    def draw(rng, prompts):  # good: the better half of one draw for each prompt of the batch
        params = {"policy": given.params, "reward": given.reward_params}
        found = decoding.best_of_n(base, given.reward, params, rng, prompts, num_samples=1, **given.limits)
        least = least_value(base, value, both, rng, prompts, found.completions.tokens, found.completions.mask)
        c = method(least[jnp.argsort(found.info.reward[:, 0])[len(least) // 2 :]], given.strength)
        own = policies.TiltParams(given.params, critics.MapScoresParams(v, c), 1.0)
        return decoding.sample(filtered, own, rng, prompts, **given.limits)

    return draw
