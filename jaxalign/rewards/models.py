"""Rewards that a language model with a head, or an autoregressive reward model, gives to whole responses."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxalign import mdp, models
from jaxalign._arrays import at_least_float32
from jaxalign._builders import cached
from jaxalign._checks import check_has_logits, check_model, check_prompt_fits
from jaxalign.rewards import prefixes
from jaxalign.shapes import Candidates, RewardValues, Scores, TextIndex, TextLength, TextMask, TextTokens
from jaxalign.types import (
    Array,
    CheckedReward,
    HeadModel,
    HostCheck,
    LanguageModel,
    Params,
    PrefixTokenGradient,
    Reward,
    TokenBatch,
)


class EmbeddingModel(HeadModel, Protocol):
    """A HeadModel whose input embeddings can be read and replaced, as gradients in them need."""

    def embed(self, params: Params, tokens: Array) -> Array:
        """Input embeddings [...,D] of tokens [...]."""

    def hidden(
        self,
        params: Params,
        tokens: TextTokens,
        *,
        mask: TextMask | None = None,
        at: Array | None = None,
        embeddings: Array | None = None,
    ) -> Array:
        """As HeadModel.hidden; embeddings [B,L,D] stand in for those of the tokens."""


class SequenceModel(LanguageModel, Protocol):
    """A LanguageModel that reads whole texts in parallel, as the likelihood of a response needs."""

    def hidden(
        self, params: Params, tokens: TextTokens, *, mask: TextMask | None = None, at: Array | None = None
    ) -> Array:
        """As HeadModel.hidden."""


@cached
def from_model(lm: HeadModel) -> Reward:
    """Builds the reward of a reward model: its scalar at the last real token, under either padding.

    Args:
      lm: a model with a scalar head. One that offers `prefixes.PrefixModel` keeps a prefix in its cache.

    Returns:
      A Reward with the model's params.

    Raises:
      ValueError: a model without a scalar head.
    """
    if lm.head_width != 1:
        raise ValueError(f"from_model: expected a model with a scalar head, found head_width = {lm.head_width}")

    def reward(
        params: Params, tokens: TextTokens, mask: TextMask, prompt_length: TextLength, index: TextIndex
    ) -> RewardValues:
        hidden = lm.hidden(params, tokens, mask=mask, at=mdp.last_index(mask)[:, None])
        return lm.head(params, hidden)[:, 0, 0]

    kept = prefixes.model_prefix(lm) if isinstance(lm, prefixes.PrefixModel) else None
    return CheckedReward(reward, _model_check(lm), lm.vocab_size, kept)


class TokenScore(Protocol):
    """Scores candidate tokens [N,K] at column position [N] of texts [N,L] by the reward's gradient: [N,K]."""

    def __call__(
        self,
        params: Params,
        tokens: TextTokens,
        mask: TextMask,
        prompt_length: TextLength,
        position: TextLength,
        candidates: Candidates,
    ) -> Scores: ...


class RewardAndTokenScore(Protocol):
    """As TokenScore, with the reward of the text from the same pass: (reward [N], score [N,K])."""

    def __call__(
        self,
        params: Params,
        tokens: TextTokens,
        mask: TextMask,
        prompt_length: TextLength,
        position: TextLength,
        candidates: Candidates,
    ) -> tuple[RewardValues, Scores]: ...


@dataclasses.dataclass(frozen=True)
class TokenGradient:
    """First-order scores of the tokens at one position, as `decoding.ggro` takes them."""

    score: TokenScore
    """score(params, tokens [N,L], mask [N,L], prompt_length [N], position [N], candidates [N,K]) -> [N,K]."""
    reward: Reward
    """The Reward that is differentiated."""
    with_reward: RewardAndTokenScore
    """As score, but (reward [N], score [N,K]) in one pass."""
    check: HostCheck | None = None
    """check(params, prompts, max_new_tokens): host checks."""
    vocab_size: int | None = None
    """V, compared with the policy's; None: any."""
    prefix: PrefixTokenGradient | None = None
    """Its form at the first token of a segment, which reads the prefix once."""

    def __call__(
        self,
        params: Params,
        tokens: TextTokens,
        mask: TextMask,
        prompt_length: TextLength,
        position: TextLength,
        candidates: Candidates,
    ) -> Scores:
        return self.score(params, tokens, mask, prompt_length, position, candidates)


@cached
def token_gradient(lm: EmbeddingModel) -> TokenGradient:
    """Builds the token gradient of a reward model: g_v = E[v]·∂r/∂e for each candidate token v at one position.

    e is the input embedding [D] at column `position`, r the reward of `from_model(lm)`, E the embedding table. The
    difference g_v − g_current estimates, to first order, what replacing the token that stands there adds to the reward.
    The gradient is one vector [D] a row, with the numbers of the one-hot gradient, of which nothing [N,L,V] is made.

    Args:
      lm: a model with a scalar head.

    Returns:
      A TokenGradient with the model's params.

    Raises:
      ValueError: a model without a scalar head.

    Source: GGRO, arXiv 2606.09635.
    """
    reward = from_model(lm)

    def with_reward(
        params: Params,
        tokens: TextTokens,
        mask: TextMask,
        prompt_length: TextLength,
        position: TextLength,
        candidates: Candidates,
    ) -> tuple[RewardValues, Scores]:
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

    def score(
        params: Params,
        tokens: TextTokens,
        mask: TextMask,
        prompt_length: TextLength,
        position: TextLength,
        candidates: Candidates,
    ) -> Scores:
        return with_reward(params, tokens, mask, prompt_length, position, candidates)[1]

    kept = prefixes.model_token_gradient(lm) if isinstance(lm, prefixes.PrefixModel) else None
    return TokenGradient(score, reward, with_reward, _model_check(lm), lm.vocab_size, kept)


@cached
def log_likelihood(lm: SequenceModel) -> Reward:
    """Builds the sequence reward of an autoregressive reward model, Σ_t log pi_r(y_t|x,y_<t).

    EOS is included and the length is not normalised.

    Args:
      lm: a language model.

    Returns:
      A Reward in nats, with the model's params.

    Raises:
      ValueError: a model without vocabulary logits, or without `hidden`.

    Source: GenARM, arXiv 2410.08193, eq. 4.
    """
    check_model("log_likelihood", lm, ("hidden", "logits", "vocab_size", "max_length"))
    check_has_logits("log_likelihood", lm)

    def reward(
        params: Params, tokens: TextTokens, mask: TextMask, prompt_length: TextLength, index: TextIndex
    ) -> RewardValues:
        tokens, mask = mdp.compact(tokens, mask)
        hidden = lm.hidden(params, tokens, mask=mask)
        response = mdp.response_part(mask, prompt_length)[:, 1:]
        value = models.token_log_prob(lm, params, hidden[:, :-1], tokens[:, 1:])
        return jnp.where(response, value, 0).sum(axis=-1)

    return CheckedReward(reward, _model_check(lm), lm.vocab_size)


def _model_check(lm: HeadModel | SequenceModel) -> HostCheck:
    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        check_prompt_fits(lm, prompts, max_new_tokens, name="reward's prompts")

    return check
