"""A model of one's own: a table of bigrams becomes a policy, and a second table guides it."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxalign import critics, decoding, mdp, policies, prompt_batch


@dataclasses.dataclass(frozen=True)
class Bigrams:  # what types.LanguageModel asks for; params are a table [V,V], a hidden state is one of its rows
    vocab_size, max_length, eos_ids = 11, 64, (0,)
    logits = staticmethod(lambda params, hidden: hidden)
    step = staticmethod(lambda params, last, token: (params[new := jnp.where(token < 0, last, token)], new))

    def prefill(self, params, tokens, mask, capacity):
        return self.step(params, tokens[:, 0], tokens[jnp.arange(len(tokens)), mdp.last_index(mask)])


base, guide = jax.random.normal(jax.random.key(0), (2, 11, 11))
policy = policies.tilt(policies.language_model(Bigrams()), critics.genarm(Bigrams()))
params, prompts = policies.TiltParams(base, guide, beta=2.0), prompt_batch([[3, 4], [5]])
drawn = decoding.sample(policy, params, jax.random.key(1), prompts, max_new_tokens=6)
