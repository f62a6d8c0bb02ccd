"""A gradient through shaping: how the utility delivered by the best bounded payment moves with the base policy."""

import jax
import jax.numpy as jnp

from jaxalign import gibbs, shaping

logits, utility = jnp.array([2.0, 0.5, 0.0, -1.0]), jnp.array([0.0, 1.0, 2.0, 3.0])


def delivered(logits, utility, bound=3.0, beta=1.0):
    log_base = jax.nn.log_softmax(logits)
    threshold = shaping.optimal_threshold(utility, log_base=log_base, gain=bound / beta)
    paid = shaping.threshold_reward(utility, threshold=threshold, bound=bound)
    return gibbs.utility(gibbs.log_policy(log_base, paid, beta=beta), utility), threshold


value, threshold = delivered(logits, utility)
print(f"utility delivered {value:.4f}, its own threshold {threshold:.4f}")
print("d utility / d logits ", jax.grad(lambda x: delivered(x, utility)[0])(logits))
print("d threshold / d utility", jax.grad(lambda u: delivered(logits, u)[1])(utility))
