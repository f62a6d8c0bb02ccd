"""Rewards that a language model with a head, or an autoregressive reward model, gives to whole responses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import mdp, models
from jaxalign._arrays import at_least_float32
from jaxalign._checks import check_has_logits, check_prompt_fits
from jaxalign.rewards import prefixes
from jaxalign.types import Array, CheckedReward, Params, PrefixGain, Reward, TokenBatch


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
