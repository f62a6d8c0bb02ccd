"""Given responses: what `log_prob` and `draw_margins` check of them on the host."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxalign._checks import is_concrete
from jaxalign.decoding.requests import EosIds, check_request, open_prompts
from jaxalign.prompts import any_prompts
from jaxalign.types import Array, Params, Policy, Prompts


def open_responses(
    policy: Policy, params: Params, rng: Array, prompts: Prompts, tokens: Array, mask: Array, eos_ids: EosIds
) -> tuple[Prompts, Array, Array, tuple[int, ...]]:
    """Checks responses [B,T] to prompts.

    Returns:
      (the prompts with one index in every entry, tokens, mask as bool, eos_ids as a tuple of ints).

    Raises:
      ValueError: tokens and mask of other shapes or types, another number of them than of prompts, a mask with holes,
        ids outside the vocabulary, and those of `requests.check_request`.
    """
    _check_types(tokens, mask)
    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
    prompts, _, ids = check_request(policy, params, rng, open_prompts(prompts, None), tokens.shape[1], eos_ids)
    if tokens.shape[0] != any_prompts(prompts).tokens.shape[0]:
        raise ValueError(
            f"tokens: expected one response per prompt, {any_prompts(prompts).tokens.shape[0]}, found {tokens.shape[0]}"
        )
    _check_values(policy, tokens, mask)
    return prompts, tokens, mask.astype(bool), ids


def _check_types(tokens: Array, mask: Array) -> None:
    """ValueErrors of given responses: shapes and types."""
    if np.ndim(tokens) != 2 or np.shape(tokens) != np.shape(mask):
        raise ValueError(f"tokens, mask: expected one shape [B,T], found {np.shape(tokens)} and {np.shape(mask)}")
    if not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
        raise ValueError(f"tokens: expected integer ids, found dtype {jnp.result_type(tokens)}")
    if not jnp.issubdtype(jnp.result_type(mask), jnp.bool_) and not jnp.issubdtype(jnp.result_type(mask), jnp.integer):
        raise ValueError(f"mask: expected bool, found dtype {jnp.result_type(mask)}")


def _check_values(policy: Policy, tokens: Array, mask: Array) -> None:
    """ValueErrors of given responses: holes, ids outside the vocabulary."""
    if is_concrete(mask):
        host = np.asarray(mask, bool)
        holes = np.flatnonzero((host[:, 1:] & ~host[:, :-1]).any(axis=1))
        if holes.size:
            raise ValueError(f"mask: expected right-padded responses, found real tokens after padding in rows {holes}")
    if is_concrete(tokens, mask) and policy.vocab_size is not None:
        real = np.asarray(tokens)[np.asarray(mask, bool)]
        if real.size and (real.min() < 0 or real.max() >= policy.vocab_size):
            raise ValueError(
                f"tokens: expected ids in [0, {policy.vocab_size}), found ids from {real.min()} to {real.max()}"
            )
