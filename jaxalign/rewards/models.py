"""Rewards that a language model with a head, or an autoregressive reward model, gives to whole responses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import mdp, models
from jaxalign._arrays import at_least_float32
from jaxalign._builders import cached
from jaxalign._checks import Sized, check_has_logits, check_model_params, check_prompt_fits, is_concrete
from jaxalign._parts import check_model
from jaxalign.rewards import prefixes
from jaxalign.rewards import reading as readings
from jaxalign.rewards.reading import Reading, reading_of
from jaxalign.rewards.token_scores import RewardAndTokenScore, TokenScore
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


def from_model(
    lm: HeadModel,
    *,
    label: str | int | None = None,
    weighted: bool = False,
    tail: Sequence[int] = (),
    ends: int | Sequence[int] | None = None,
) -> Reward:
    """Builds the reward of a reward model: its score of the whole text, read where transformers reads it.

    The score stands at the last real token that is not the model's pad id, under either padding. With a pad id that is
    also an EOS (TRL's trainer makes these models) that is the token before the end of a finished response. A model
    without a pad id is read at the last real token, and so is a value head. A text of pads alone is read at its first
    token. A head that pools by the mean (`models.Head`) reads the mean of the hidden states. See `rewards.reading`.

    Args:
      lm: a model with a scalar head, or a classifier with several labels. One that offers `prefixes.PrefixModel` keeps
        a prefix in its cache. A model of your own may offer `reward_pad_id`, `label_names` and `eos_ids`.
      label: which label is the reward, by name or number; the score is its logit. Needed where there are several.
      weighted: the reward is Σ_l w_l·logit_l over the labels, and params are `LabelParams`. Of a classifier of two
        labels the weights (−1, 1) give the log odds of the second.
      tail: ids that follow a response that has ended, as a chat template writes them after a turn (Qwen: the newline
        after <|im_end|>). An unfinished response gets none, nor one that ends in them.
      ends: the ids that end a response; None: the model's EOS ids.

    Returns:
      A Reward with the model's params, or `LabelParams` where the labels are weighted.

    Raises:
      ValueError: a model without a head of scalars; several labels of which none is named (they are listed); a label
        that there is not; a tail outside the vocabulary, or one without an id that ends a response.
    """
    return _from_model(lm, reading_of("from_model", lm, label=label, weighted=weighted, tail=tail, ends=ends))


@cached
def _from_model(lm: HeadModel, reading: Reading) -> Reward:
    def reward(
        params: Params, tokens: TextTokens, mask: TextMask, prompt_length: TextLength, index: TextIndex
    ) -> RewardValues:
        tokens, mask = readings.whole(reading, tokens, mask, prompt_length)
        hidden = functools.partial(lm.hidden, readings.model_params(reading, params), tokens, mask=mask)
        return readings.value_of_texts(reading, lm, params, tokens, mask, hidden)

    kept = prefixes.model_prefix(lm, reading) if isinstance(lm, prefixes.PrefixModel) else None
    return CheckedReward(reward, _model_check(lm, reading), lm.vocab_size, kept)


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


def token_gradient(
    lm: EmbeddingModel,
    *,
    label: str | int | None = None,
    weighted: bool = False,
    tail: Sequence[int] = (),
    ends: int | Sequence[int] | None = None,
) -> TokenGradient:
    """Builds the token gradient of a reward model: g_v = E[v]·∂r/∂e for each candidate token v at one position.

    e is the input embedding [D] at column `position`, r the reward of `from_model` of the same arguments, E the
    embedding table. The difference g_v − g_current estimates, to first order, what replacing the token that stands
    there adds to the reward. The gradient is one vector [D] a row, with the numbers of the one-hot gradient, of which
    nothing [N,L,V] is made. It is 0 at a token behind the last that the model reads.

    Args:
      lm: a model with a scalar head.
      label, weighted, tail, ends: as in `from_model`.

    Returns:
      A TokenGradient with the params of `from_model`.

    Raises:
      ValueError: as in `from_model`.

    Source: GGRO, arXiv 2606.09635.
    """
    return _token_gradient(lm, reading_of("token_gradient", lm, label=label, weighted=weighted, tail=tail, ends=ends))


@cached
def _token_gradient(lm: EmbeddingModel, reading: Reading) -> TokenGradient:
    def with_reward(
        params: Params,
        tokens: TextTokens,
        mask: TextMask,
        prompt_length: TextLength,
        position: TextLength,
        candidates: Candidates,
    ) -> tuple[RewardValues, Scores]:
        given, rows = readings.model_params(reading, params), jnp.arange(tokens.shape[0])
        tokens, mask = readings.whole(reading, tokens, mask, prompt_length)
        embeddings = lm.embed(given, jnp.where(mask, tokens, 0))

        def total(e: Array) -> tuple[Array, Array]:
            replaced = embeddings.at[rows, position].set(e)
            hidden = functools.partial(lm.hidden, given, tokens, mask=mask, embeddings=replaced)
            found = readings.value_of_texts(reading, lm, params, tokens, mask, hidden)
            return found.sum(), found

        gradient, found = jax.grad(total, has_aux=True)(embeddings[rows, position])
        table = at_least_float32(lm.embed(given, candidates))
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

    kept = prefixes.model_token_gradient(lm, reading) if isinstance(lm, prefixes.PrefixModel) else None
    reward = _from_model(lm, reading)
    return TokenGradient(score, reward, with_reward, _model_check(lm, reading), lm.vocab_size, kept)


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

    return CheckedReward(reward, _prompt_check(lm), lm.vocab_size)


def _prompt_check(lm: Sized) -> HostCheck:
    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        check_model_params(lm, params, head=False)
        check_prompt_fits(lm, prompts, max_new_tokens, name="reward's prompts")

    return check


def _model_check(lm: HeadModel, reading: Reading) -> HostCheck:
    """The host checks of the prompts, whose response and tail must fit, and of the labels' weights."""

    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        check_model_params(lm, readings.model_params(reading, params), head=True)
        check_prompt_fits(lm, prompts, max_new_tokens + len(reading.tail), name="reward's prompts")
        if reading.label is None:
            weights = readings.label_weights(lm, params)
            if is_concrete(weights) and not np.all(np.isfinite(np.asarray(weights))):
                raise ValueError(f"weights: expected finite numbers, found {np.asarray(weights)}")

    return check
