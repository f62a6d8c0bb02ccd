"""Rewards of whole responses: (params, tokens [N,L], mask [N,L], prompt_length [N], index [N]) -> reward [N].

Each combinator takes Rewards and gives a Reward, which keeps a prefix (`PrefixReward`) where all its parts do. All come
out in at least float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from jaxalign import infalign, shaping
from jaxalign._arrays import at_least_float32
from jaxalign._checks import entry, is_concrete
from jaxalign.rewards import prefixes
from jaxalign.types import Array, CheckedReward, Params, Reward, TokenBatch


def _vocab_size(rewards: Sequence[Reward]) -> int | None:
    """The one vocabulary of several Rewards, None where none has one. ValueError where they differ."""
    sizes = sorted({size for size in (getattr(r, "vocab_size", None) for r in rewards) if size is not None})
    if len(sizes) > 1:
        raise ValueError(f"rewards: expected one vocabulary, found {sizes} tokens")
    return sizes[0] if sizes else None


def _check(reward: Reward, params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
    check = getattr(reward, "check", None)
    if check is not None:
        check(params, prompts, max_new_tokens)


def weighted_sum(rewards: Sequence[Reward]) -> Reward:
    """Σ_i w_i·r_i. params {"rewards": a sequence, "weights": [m]}. ValueError where they are not one per reward."""
    rewards = tuple(rewards)
    if not rewards:
        raise ValueError("rewards: expected at least one reward, found none")
    vocab_size = _vocab_size(rewards)

    def weights_of(params: Params) -> Array:
        weights, each = at_least_float32(entry(params, "weights")), entry(params, "rewards")
        if weights.shape != (len(rewards),) or len(each) != len(rewards):
            raise ValueError(
                f"weights: expected {len(rewards)} weights and as many params, found shape {weights.shape} "
                f"and {len(each)} params"
            )
        return weights

    def reward(params: Params, tokens: Array, mask: Array, prompt_length: Array, index: Array) -> Array:
        weights_of(params)  # its errors before those of the parts
        each = [r(p, tokens, mask, prompt_length, index) for r, p in zip(rewards, params["rewards"], strict=True)]
        return add(params, jnp.stack([at_least_float32(r) for r in each]), index)

    def add(params: Params, each: Array, index: Array) -> Array:
        return jnp.tensordot(weights_of(params), each, axes=1)

    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        weights = weights_of(params)
        if is_concrete(weights) and not np.all(np.isfinite(np.asarray(weights))):
            raise ValueError(f"weights: expected finite numbers, found {np.asarray(weights)}")
        for r, p in zip(rewards, params["rewards"], strict=True):
            _check(r, p, prompts, max_new_tokens)

    kept = prefixes.combined(rewards, lambda params: params["rewards"], add)
    return CheckedReward(reward, check, vocab_size, kept)


def combine(weights: Sequence[float], each: Sequence[tuple[Reward, Params]]) -> tuple[Reward, Params]:
    """(reward, params) of Σ_i w_i·r_i, the weights [m] of `parse` beside the rewards and params that its terms name:
    the one reward itself where there is one, of weight 1, else a `weighted_sum`. ValueErrors: of `weighted_sum`."""
    if list(weights) == [1]:
        return each[0]
    params = {"rewards": [p for _, p in each], "weights": np.asarray(weights, np.float32)}
    return weighted_sum([reward for reward, _ in each]), params


def map_reward(reward: Reward, f: Callable[[Params, Array, Array], Array]) -> Reward:
    """r' = f(map_params, r [N], index [N]); params {"reward", "map"}. Scaling, clipping, calibration and shaping by
    per-prompt tables are such maps."""

    def mapped(params: Params, tokens: Array, mask: Array, prompt_length: Array, index: Array) -> Array:
        value = at_least_float32(reward(params["reward"], tokens, mask, prompt_length, index))
        return f(params["map"], value, index)

    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        entry(params, "map")
        _check(reward, entry(params, "reward"), prompts, max_new_tokens)

    kept = prefixes.combined(
        [reward], lambda params: [params["reward"]], lambda params, value, index: f(params["map"], value[0], index)
    )
    return CheckedReward(mapped, check, _vocab_size([reward]), kept)


def calibrated(
    reward: Reward, *, transform: infalign.Transform | None = None, width: float | None = None, smooth: bool = False
) -> Reward:
    """Phi(C(x,y)): the reward's place among base samples of its prompt, in [0,1], transformed (InfAlign, arXiv
    2412.19792, eqs. 4 and 12). None: C itself.

    params {"reward", "map": {"table": [prompts,K] ascending rewards of the base's samples, read at the prompt's
    index}}. width, smooth: of `infalign.calibrate`; a transform that is −inf at 0 (log) needs smooth. ValueError for a
    transform that falls somewhere.
    """
    if transform is not None:
        infalign.check_increasing(transform)

    def place(params: Params, value: Array, index: Array) -> Array:
        table = at_least_float32(entry(params, "table"))[index]
        c = infalign.calibrate(value[:, None], table, width=width, smooth=smooth, is_sorted=True)[:, 0]
        return c if transform is None else transform(c)

    return map_reward(reward, place)


def shaped(reward: Reward, *, sharpness: float | None = None) -> Reward:
    """Stackelberg shaping by per-prompt thresholds: bound·1[r > m], or bound·sigmoid(sharpness·(r − m)).

    params {"reward", "map": {"threshold": [prompts], read at the prompt's index, or one number; "bound": B > 0}};
    thresholds by `shaping.optimal_threshold` on base samples. For best-of-n, `decoding.rejection` and training.
    """

    def shape(params: Params, value: Array, index: Array) -> Array:
        threshold, bound = at_least_float32(entry(params, "threshold")), entry(params, "bound")
        per_row = threshold if threshold.ndim == 0 else threshold[index]
        if sharpness is None:
            return shaping.threshold_reward(value[:, None], per_row, bound=bound)[:, 0]
        return shaping.soft_threshold_reward(value[:, None], per_row, bound=bound, sharpness=sharpness)[:, 0]

    return map_reward(reward, shape)
