"""Training by hand: DPO on one pair with jax.value_and_grad and optax, without the library's loop."""

import jax
import optax

from jaxalign import losses, models

lm, params = models.tiny(64)
reference = params
pair = jax.numpy.array([[5, 6, 7, 0], [5, 6, 9, 0]])  # chosen, rejected; the first two tokens are the prompt


def loss(params):
    log_probs = [jax.nn.log_softmax(lm.apply(p, pair).logits[:, 1:-1]) for p in (params, reference)]
    new, old = (jax.numpy.take_along_axis(l, pair[:, 2:, None], axis=2).sum(axis=1) for l in log_probs)  # [2,1]
    return losses.dpo(*new, chosen_log_prob_ref=old[0], rejected_log_prob_ref=old[1], beta=0.1)


state = (optimizer := optax.adam(1e-2)).init(params)
for _ in range(5):
    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradient, state)
    params = optax.apply_updates(params, updates)
