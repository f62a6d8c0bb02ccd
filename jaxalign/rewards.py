"""Rewards of whole responses: (params, tokens [N,L], mask [N,L], prompt_length [N], index [N]) -> reward [N].

Each combinator takes Rewards and gives a Reward, which keeps a prefix (`PrefixReward`) where all its parts do. All come
out in at least float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import infalign, mdp, models, prefixes, shaping
from jaxalign.checks import check_has_logits, check_prompt_fits, entry, is_concrete
from jaxalign.programs import from_numpy, from_text, is_program, parse, program
from jaxalign.types import Array, CheckedReward, Params, PrefixGain, Reward, TokenBatch, at_least_float32

__all__ = [
    "CheckedGain",
    "calibrated",
    "combine",
    "embedding_gain",
    "from_model",
    "from_numpy",
    "from_text",
    "is_program",
    "log_likelihood",
    "map_reward",
    "parse",
    "program",
    "shaped",
    "weighted_sum",
]


def from_model(lm: Any) -> Reward:
    """r(x,y): a reward model's scalar at the last real token, under either padding. params: the model's. It keeps a
    prefix in the model's cache."""
    if lm.config.head is None or lm.head_width != 1:
        raise ValueError("from_model: expected a model with a scalar head")

    def reward(params: Params, tokens: Array, mask: Array, prompt_length: Array, index: Array) -> Array:
        hidden = lm.hidden(params, tokens, mask=mask, at=mdp.last_index(mask)[:, None])
        return lm.head(params, hidden)[:, 0, 0]

    return CheckedReward(reward, _model_check(lm), lm.vocab_size, prefixes.of_model(lm))


@dataclasses.dataclass(frozen=True)
class CheckedGain:
    """A first-order score of tokens, as `decoding.nudge` takes it. score: (params, tokens [N,L], mask [N,L],
    prompt_length [N], position [N], candidates [N,K]) -> [N,K]; reward: the Reward behind it; with_reward: as score,
    but (reward [N], score [N,K]) in one pass; check, vocab_size as in a CheckedReward; prefix: its form at the first
    token of a segment, which reads the prefix once."""

    score: Callable[..., Array]
    reward: Reward
    with_reward: Callable[..., tuple[Array, Array]]
    check: Callable[..., None] | None = None
    vocab_size: int | None = None
    prefix: PrefixGain | None = None

    def __call__(self, *arguments: Any) -> Array:
        return self.score(*arguments)


def embedding_gain(lm: Any) -> CheckedGain:
    """The first-order score of tokens at one position: gain(params, tokens [N,L], mask [N,L], prompt_length [N],
    position [N], candidates [N,K]) -> g [N,K], g_v = E[v]·∂r/∂e, with e the input embedding [D] at column `position`
    and r the reward of `from_model(lm)`; params: the model's.

    g_v − g_current is the first-order gain of replacing the token that stands there (GGRO, arXiv 2606.09635). The
    gradient is one vector [D] a row: the numbers of the one-hot gradient, of which nothing [N,L,V] is made.
    """
    reward = from_model(lm)

    def with_reward(
        params: Params, tokens: Array, mask: Array, prompt_length: Array, position: Array, candidates: Array
    ) -> tuple[Array, Array]:
        del prompt_length
        rows, last = jnp.arange(tokens.shape[0]), mdp.last_index(mask)[:, None]
        embeddings = lm.embed(params, jnp.where(mask, tokens, 0))

        def total(e: Array) -> tuple[Array, Array]:
            hidden = lm.hidden(params, tokens, mask=mask, embeddings=embeddings.at[rows, position].set(e), at=last)
            found = lm.head(params, hidden)[:, 0, 0]
            return found.sum(), found

        gradient, found = jax.grad(total, has_aux=True)(embeddings[rows, position])
        table = at_least_float32(lm.embed(params, candidates))
        return found, jnp.einsum("nkd,nd->nk", table, at_least_float32(gradient))

    def gain(*arguments: Any) -> Array:
        return with_reward(*arguments)[1]

    return CheckedGain(gain, reward, with_reward, _model_check(lm), lm.vocab_size, prefixes.gain_of_model(lm))


def log_likelihood(lm: Any) -> Reward:
    """Σ_t log pi_r(y_t|x,y_<t), the sequence reward of an autoregressive reward model, EOS included, no length
    normalisation (GenARM, arXiv 2410.08193, eq. 4). params: the model's."""
    check_has_logits("log_likelihood", lm)

    def reward(params: Params, tokens: Array, mask: Array, prompt_length: Array, index: Array) -> Array:
        tokens, mask = mdp.compact(tokens, mask)
        hidden = lm.hidden(params, tokens, mask=mask)
        response = mdp.response_part(mask, prompt_length)[:, 1:]
        value = models.token_log_prob(lm, params, hidden[:, :-1], tokens[:, 1:])
        return jnp.where(response, value, 0).sum(axis=-1)

    return CheckedReward(reward, _model_check(lm), lm.vocab_size)


def _model_check(lm: Any) -> Callable[..., None]:
    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        check_prompt_fits(lm, prompts, max_new_tokens, name="reward's prompts")

    return check


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
