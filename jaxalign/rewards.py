"""Rewards of whole responses: (params, tokens [N,L], mask [N,L], prompt_length [N], index [N]) -> reward [N].

Each combinator takes Rewards and gives a Reward, which keeps a prefix (`PrefixReward`) where all its parts do. All come
out in at least float32.
"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import mdp, models, prefixes, shaping
from jaxalign.checks import check_has_logits, check_prompt_fits, entry, is_concrete
from jaxalign.types import Array, CheckedReward, Params, PrefixGain, Reward, TokenBatch, at_least_float32


def from_model(lm: Any) -> Reward:
    """r(x,y): a reward model's scalar at the last real token, under either padding. params: the model's. It keeps a
    prefix in the model's cache."""
    if lm.config.head is None or lm.head_width != 1:
        raise ValueError("from_model: expected a model with a scalar head")

    def reward(params: Params, tokens: Array, mask: Array, prompt_length: Array, index: Array) -> Array:
        hidden = lm.hidden(params, tokens, mask=mask)
        last = mdp.last_index(mask)
        return lm.head(params, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])[:, 0]

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
        rows, last = jnp.arange(tokens.shape[0]), mdp.last_index(mask)
        embeddings = lm.embed(params, jnp.where(mask, tokens, 0))

        def total(e: Array) -> tuple[Array, Array]:
            hidden = lm.hidden(params, tokens, mask=mask, embeddings=embeddings.at[rows, position].set(e))
            found = lm.head(params, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])[:, 0]
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


def from_numpy(f: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Reward:
    """A program on host arrays: f(tokens [N,L], mask [N,L], prompt_length [N], index [N]) -> [N] numbers. params: None.

    Works under jit through a callback; it has no gradient, and a result of another shape is a ValueError. float32, or
    float64 where jax has it enabled.
    """

    def dtype() -> np.dtype:
        return jnp.dtype(jnp.result_type(float))

    def call(tokens: Array, mask: Array, prompt_length: Array, index: Array) -> np.ndarray:
        found = np.asarray(f(*(np.asarray(a) for a in (tokens, mask, prompt_length, index))), dtype())
        if found.shape != np.shape(prompt_length):
            raise ValueError(f"from_numpy: expected one number per row, {np.shape(prompt_length)}, found {found.shape}")
        return found

    def reward(params: Params, tokens: Array, mask: Array, prompt_length: Array, index: Array) -> Array:
        shape = jax.ShapeDtypeStruct(prompt_length.shape, dtype())
        return jax.pure_callback(call, shape, tokens, mask, prompt_length, index, vmap_method="sequential")

    return reward


def program(spec: str, *, name: str = "reward") -> Callable[..., Any]:
    """The function of "MODULE:FUNCTION": of a reward, f(prompts, responses) -> one number each. ValueError that names
    the field where there is none."""
    module, _, function = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}: expected MODULE:FUNCTION, found {spec!r} ({error})") from error
    if not callable(found):
        raise ValueError(f"{name}: expected MODULE:FUNCTION, found {spec!r}, a {type(found).__name__}")
    return found


def is_program(spec: str) -> bool:
    """Whether an option names a program, "MODULE:FUNCTION", and not a folder."""
    return bool(re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec)) and not pathlib.Path(spec).exists()


def from_text(decode: Callable[[Sequence[int]], str], f: Callable[[list[str], list[str]], Sequence[float]]) -> Reward:
    """A program on text: f(prompts, responses) -> one number each. params: None.

    `decode` turns token ids into text (a tokenizer's decode). This is the explicit path for a reward model with another
    tokenizer: decode here, re-encode inside f.
    """

    def score(tokens: np.ndarray, mask: np.ndarray, prompt_length: np.ndarray, index: np.ndarray) -> np.ndarray:
        rows = [row[real].tolist() for row, real in zip(tokens, mask.astype(bool), strict=True)]
        prompts = [decode(row[:n]) for row, n in zip(rows, prompt_length.tolist(), strict=True)]
        responses = [decode(row[n:]) for row, n in zip(rows, prompt_length.tolist(), strict=True)]
        return np.asarray(f(prompts, responses))

    return from_numpy(score)
