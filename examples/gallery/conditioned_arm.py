"""One preference-conditioned autoregressive reward: the weights are written into its own prompt.

Source: arXiv 2410.08193 with the weights in the prompt
Equation: log pi = log softmax(log b(x) + log pi_r(w, x)/beta) at every state
When: one reward model that was trained on prompts with the weights in front
Cost: base and one reward, one pass each
"""

import jax.numpy as jnp

from jaxalign import critics, decoding, policies


def method(base, arm):
    return policies.tilt(base, critics.from_policy(arm))


def build(given):
    arm, a = given.model("arm")
    policy, params = method(given.policy, policies.language_model(arm)), policies.TiltParams(given.params, a, 1.0)
    ids = jnp.asarray(given.tokenizer.encode(f"{given.strength:g}", add_special_tokens=False))

    def draw(rng, prompts):
        front = jnp.broadcast_to(ids, (len(prompts.tokens), len(ids)))
        tokens = jnp.concatenate([front.astype(prompts.tokens.dtype), prompts.tokens], axis=1)
        mask = jnp.concatenate([jnp.ones(front.shape, bool), prompts.mask], axis=1)
        own = prompts._replace(tokens=tokens, mask=mask)
        return decoding.sample(policy, params, rng, {"policy": prompts, "critic": own}, **given.limits)

    return draw
