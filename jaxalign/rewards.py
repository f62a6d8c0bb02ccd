"""Rewards of whole responses: (params, tokens [N,L], mask [N,L], prompt_length [N], index [N]) -> reward [N].

Each combinator takes Rewards and gives a Reward. All come out in at least float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import mdp, models
from jaxalign.types import Array, Params, Reward, at_least_float32


def from_model(lm: Any) -> Reward:
    """r(x,y): a reward model's scalar at the last real token, under either padding. params: the model's."""
    if lm.config.head is None or lm.head_width != 1:
        raise ValueError("from_model: expected a model with a scalar head")

    def reward(params: Params, tokens: Array, mask: Array, prompt_length: Array, index: Array) -> Array:
        hidden = lm.hidden(params, tokens, mask=mask)
        last = mdp.last_index(mask)
        return lm.head(params, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])[:, 0]

    return reward


def log_likelihood(lm: Any) -> Reward:
    """Σ_t log pi_r(y_t|x,y_<t), the sequence reward of an autoregressive reward model, EOS included, no length
    normalisation (GenARM, arXiv 2410.08193, eq. 4). params: the model's."""

    def reward(params: Params, tokens: Array, mask: Array, prompt_length: Array, index: Array) -> Array:
        tokens, mask = mdp.compact(tokens, mask)
        hidden = lm.hidden(params, tokens, mask=mask)
        response = mdp.response_part(mask, prompt_length)[:, 1:]
        value = models.token_log_prob(lm, params, hidden[:, :-1], tokens[:, 1:])
        return jnp.where(response, value, 0).sum(axis=-1)

    return reward


def weighted_sum(rewards: Sequence[Reward]) -> Reward:
    """Σ_i w_i·r_i. params {"rewards": a sequence, "weights": [m]}."""
    rewards = tuple(rewards)

    def reward(params: Params, tokens: Array, mask: Array, prompt_length: Array, index: Array) -> Array:
        weights = at_least_float32(params["weights"])
        if weights.shape != (len(rewards),) or len(params["rewards"]) != len(rewards):
            raise ValueError(
                f"weights: expected {len(rewards)} weights and as many params, found shape {weights.shape} "
                f"and {len(params['rewards'])} params"
            )
        each = [r(p, tokens, mask, prompt_length, index) for r, p in zip(rewards, params["rewards"], strict=True)]
        return jnp.tensordot(weights, jnp.stack([at_least_float32(r) for r in each]), axes=1)

    return reward


def map_reward(reward: Reward, f: Callable[[Params, Array, Array], Array]) -> Reward:
    """r' = f(map_params, r [N], index [N]); params {"reward", "map"}. Scaling, clipping, calibration and shaping by
    per-prompt tables are such maps."""

    def mapped(params: Params, tokens: Array, mask: Array, prompt_length: Array, index: Array) -> Array:
        value = at_least_float32(reward(params["reward"], tokens, mask, prompt_length, index))
        return f(params["map"], value, index)

    return mapped


def from_numpy(f: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Reward:
    """A program on host arrays: f(tokens [N,L], mask [N,L], prompt_length [N], index [N]) -> [N] numbers. params: None.

    Works under jit through a callback; it has no gradient, and a result of another shape is a ValueError.
    """

    def call(tokens: Array, mask: Array, prompt_length: Array, index: Array) -> np.ndarray:
        found = np.asarray(f(*(np.asarray(a) for a in (tokens, mask, prompt_length, index))), np.float32)
        if found.shape != np.shape(prompt_length):
            raise ValueError(f"from_numpy: expected one number per row, {np.shape(prompt_length)}, found {found.shape}")
        return found

    def reward(params: Params, tokens: Array, mask: Array, prompt_length: Array, index: Array) -> Array:
        shape = jax.ShapeDtypeStruct(prompt_length.shape, jnp.float32)
        return jax.pure_callback(call, shape, tokens, mask, prompt_length, index, vmap_method="sequential")

    return reward


def from_text(decode: Callable[[Sequence[int]], str], f: Callable[[list[str], list[str]], Sequence[float]]) -> Reward:
    """A program on text: f(prompts, responses) -> one number each. params: None.

    `decode` turns token ids into text (a tokenizer's decode). This is the explicit path for a reward model with another
    tokenizer: decode here, re-encode inside f.
    """

    def score(tokens: np.ndarray, mask: np.ndarray, prompt_length: np.ndarray, index: np.ndarray) -> np.ndarray:
        rows = [row[real].tolist() for row, real in zip(tokens, mask.astype(bool), strict=True)]
        prompts = [decode(row[:n]) for row, n in zip(rows, prompt_length.tolist(), strict=True)]
        responses = [decode(row[n:]) for row, n in zip(rows, prompt_length.tolist(), strict=True)]
        return np.asarray(f(prompts, responses), np.float32)

    return from_numpy(score)
