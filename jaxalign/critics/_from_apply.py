"""Any function from texts to scores as a Critic."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxalign import _modules, mdp
from jaxalign._arrays import at_least_float32
from jaxalign._builders import cached
from jaxalign._checks import check_count, check_prompts
from jaxalign._parts import called, check_array, check_function_argument
from jaxalign.critics._model_critics import chosen_token, gather
from jaxalign.shapes import Candidates, Scores, TextMask, TextTokens
from jaxalign.types import Array, Critic, CriticKind, Params, State, StepOutput, TokenBatch

_BLOCK = 32  # texts a row that are read at a time where a function of texts scores the whole vocabulary


class TextScores(Protocol):
    """Scores of tokens [B,L], real where mask [B,L] is True, right-padded: [B,L,V] of the token after each of them, or
    [B] of the texts. What stands for padding is not read."""

    def __call__(self, params: Params, tokens: TextTokens, mask: TextMask, /) -> Array: ...


class ScoredText(NamedTuple):
    """State and proposal of `from_apply`."""

    text: mdp.State
    """The text so far."""
    candidates: Candidates | None = None
    """In a proposal, the candidates [B,K] that were scored; None in a state, and for the whole vocabulary."""


def from_apply(
    score: TextScores,
    *,
    kind: CriticKind,
    per: Literal["token", "text"] = "token",
    vocab_size: int | None = None,
) -> Critic:
    """Any function from texts to scores as a Critic.

    params: those of the function. There is no cache: the text is read anew for each token, and once for each candidate
    with per="text", so that a step costs K whole texts (`policies.tilt(…, top_k=K)`).

    Args:
      score: score(params, tokens [B,L], mask [B,L]) -> scores. Define it once: it is compared by identity.
      kind: "level", a score of the text with the candidate, or "increment", what the candidate adds.
      per: "token": scores [B,L,V] of the token after each of the text; "text": one [B] of each text, which ends in the
        candidate.
      vocab_size: V, which is compared with the policy's; None: any.

    Returns:
      A Critic.

    Raises:
      ValueError: no function, another kind or per, a vocabulary below 1; while tracing, scores of another shape, with
        the function's name.
    """
    check_function_argument("score", score)
    if kind not in ("level", "increment"):
        raise ValueError(f"kind: expected 'level' or 'increment', found {kind!r}")
    if per not in ("token", "text"):
        raise ValueError(f"per: expected 'token' or 'text', found {per!r}")
    if vocab_size is not None:
        check_count("vocab_size", vocab_size, least=1, unit="token")
    return _from_apply(score, kind, per, vocab_size)


@cached
def _from_apply(
    function: TextScores, kind: CriticKind, per: Literal["token", "text"], vocab_size: int | None
) -> Critic:
    name = f"from_apply: score ({called(function)})"

    def init(params: Params, rng: Array, prompts: TokenBatch, max_new_tokens: int) -> State:
        return ScoredText(mdp.initial_state(prompts, max_new_tokens))

    def real(tokens: Array, length: Array) -> Array:
        return jnp.arange(tokens.shape[1]) < length[:, None]

    def of_tokens(params: Params, text: mdp.State, vocab: int) -> Array:
        """[B,V], of the tokens after the text."""
        found = function(params, text.tokens, real(text.tokens, text.length))
        check_array(name, found, (*text.tokens.shape, vocab), "a score per text, place and token")
        return at_least_float32(jnp.take_along_axis(found, (text.length - 1)[:, None, None], axis=1)[:, 0])

    def of_texts(params: Params, text: mdp.State, candidates: Array) -> Array:
        """[B,k], of the texts that end in each of candidates [B,k]."""
        batch, k = candidates.shape
        here = jnp.arange(text.tokens.shape[1]) == text.length[:, None]
        tokens = jnp.where(here[:, None], candidates[..., None], text.tokens[:, None])
        tokens = tokens.reshape(batch * k, -1).astype(text.tokens.dtype)
        found = function(params, tokens, real(tokens, jnp.repeat(text.length + 1, k)))
        check_array(name, found, (batch * k,), "a score per text")
        return at_least_float32(found).reshape(batch, k)

    def score(
        params: Params, rng: Array, state: ScoredText, output: StepOutput, candidates: Candidates | None
    ) -> tuple[Scores, State]:
        batch, vocab = output.log_prob.shape
        proposal = state._replace(candidates=candidates)
        if per == "token":
            return gather(of_tokens(params, state.text, vocab), candidates), proposal
        if candidates is not None:
            return of_texts(params, state.text, candidates), proposal
        width = min(_BLOCK, vocab)
        # The last block may run over the end: its surplus tokens are scored and cut.
        ids = jnp.minimum(jnp.arange(-(-vocab // width) * width, dtype=jnp.int32), vocab - 1).reshape(-1, width)
        each = jax.lax.map(lambda row: of_texts(params, state.text, jnp.broadcast_to(row, (batch, width))), ids)
        return jnp.moveaxis(each, 0, 1).reshape(batch, -1)[:, :vocab], proposal

    def advance(params: Params, proposal: ScoredText, choice: Array) -> State:
        token = chosen_token(proposal.candidates, choice)
        most = proposal.text.tokens.shape[1]  # a decoder ends rows: the text alone is kept here
        return ScoredText(mdp.transition(proposal.text, token, eos_ids=(), max_new_tokens=most))

    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        check_prompts(prompts)

    return Critic(init, score, advance, kind, check, vocab_size)


def from_nnx(
    module: Any, *, kind: CriticKind, per: Literal["token", "text"] = "token", vocab_size: int | None = None
) -> tuple[Critic, Params]:
    """A flax nnx module module(tokens [B,L], mask [B,L]) -> scores as a Critic and its parameters.

    Args:
      module: an nnx.Module; it is split once, and its state are the parameters.
      kind, per, vocab_size: as in `from_apply`.

    Returns:
      (Critic, params), differentiable in params.

    Raises:
      ValueError: as in `from_apply`.
    """
    function, params = _modules.of_nnx(module)
    return from_apply(function, kind=kind, per=per, vocab_size=vocab_size), params


def from_equinox(
    module: Any, *, kind: CriticKind, per: Literal["token", "text"] = "token", vocab_size: int | None = None
) -> tuple[Critic, Params]:
    """An equinox module module(tokens [B,L], mask [B,L]) -> scores as a Critic and its parameters.

    Args:
      module: an equinox.Module of whole batches (jax.vmap one of single texts); its arrays are the parameters.
      kind, per, vocab_size: as in `from_apply`.

    Returns:
      (Critic, params), differentiable in params.

    Raises:
      ValueError: as in `from_apply`.
    """
    function, params = _modules.of_equinox(module)
    return from_apply(function, kind=kind, per=per, vocab_size=vocab_size), params


def from_torch(
    module: Any, *, kind: CriticKind, per: Literal["token", "text"] = "token", vocab_size: int | None = None
) -> tuple[Critic, Params]:
    """A torch module module(tokens [B,L], mask [B,L]) -> scores as a Critic, read on the host without a cache.

    transformers' models serve as they are: an output with `logits` is read, and of a classifier with one label these
    are the scores of texts. There are no parameters, and so no gradients by them; those of a policy under a tilt are
    right.

    Args:
      module: in evaluation mode; called under no_grad with an int64 and a bool tensor where its parameters lie.
      kind, per: as in `from_apply`.
      vocab_size: V, which per="token" needs.

    Returns:
      (Critic, ()).

    Raises:
      ValueError: as in `from_apply`; per="token" without a vocab_size; while it draws, an error of the module or scores
        of another shape, with its name.
    """
    if per == "token" and vocab_size is None:
        raise ValueError("vocab_size: expected the number of scores of a place with per='token', found None")
    function = _modules.of_torch(module, vocab_size=vocab_size if per == "token" else None)
    return from_apply(function, kind=kind, per=per, vocab_size=vocab_size), ()
