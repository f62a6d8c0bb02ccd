"""Controlled decoding: the base's value of the text after each candidate."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from jaxalign import models
from jaxalign._arrays import at_least_float32
from jaxalign._blocks import merged, merged_candidates, split
from jaxalign._builders import cached
from jaxalign._parts import called, check_array, check_function_argument, check_model
from jaxalign.critics import reads
from jaxalign.critics._distribution import distribution, with_numbers
from jaxalign.critics._model_critics import candidate_critic, gather, vocabulary_critic
from jaxalign.shapes import Candidates, Hidden, Scores
from jaxalign.types import Array, CandidateModel, Critic, Params, State, StepOutput, TokenBatch


@cached
def value(lm: CandidateModel) -> Critic:
    """Controlled decoding: q(s,z) = V(sz), the value of the state after z (arXiv 2310.17022). Level.

    params: the model's. A scalar head reads V(sz) at each candidate (K tokens in one pass, as `args`); a Q head (V
    wide) gives all V(sz) at the state s, so that a step costs one token. The model may share its weights with the base:
    pass the base's arrays with the head beside them. For a Q head on hidden states that the policy computes anyway see
    `hidden_value`.

    Args:
      lm: a model with a scalar head or a Q head, of the base's vocabulary; of a head of laws the mean is read.

    Returns:
      A level Critic.

    Raises:
      ValueError: a model without such a head, or with one of log weights (`follower` reads those).
    """
    check_model("value", lm, ("vocab_size", "max_length", "head_width", "prefill", "step", "head"))
    spec = getattr(getattr(lm, "config", None), "head", None)
    if spec is not None and spec.follower is not None:
        raise ValueError(f"value: expected a head of values, found one of log weights ({spec.follower})")
    if spec is not None and spec.distribution is not None and isinstance(lm, models.LanguageModel):
        return with_numbers(distribution(lm, reads.mean()), {})
    if lm.head_width == lm.vocab_size and (spec is None or spec.kind == "q"):
        return vocabulary_critic("value", lm, lm.head, "level")
    return candidate_critic("value", lm)


class QHead(Protocol):
    """Values [B,V] of the next tokens from hidden states [B,D]."""

    def __call__(self, params: Params, hidden: Hidden, /) -> Array: ...


class HiddenValueState(NamedTuple):
    """State of `hidden_value`, which keeps nothing."""


@cached
def hidden_value(head: QHead, *, vocab_size: int | None = None) -> Critic:
    """A Q head on the hidden states of the policy below: q(s,·) = head(params, hidden [B,D]) -> [B,V]. Level.

    No model of its own and no cache. params: the head's. A scalar head cannot serve here, since hidden belongs to s and
    not to the candidates sz: use `value` with the base's weights.

    Args:
      head: `lm.head` of a model with a Q head is one.
      vocab_size: V, to be compared with the policy's; None: unknown.

    Returns:
      A level Critic.

    Raises:
      ValueError: while tracing, a policy without hidden states, or a head of another shape.
    """
    check_function_argument("head", head)

    def init(params: Params, rng: Array, prompts: TokenBatch, max_new_tokens: int) -> State:
        return HiddenValueState()

    def score(
        params: Params, rng: Array, state: HiddenValueState, output: StepOutput, candidates: Candidates | None
    ) -> tuple[Scores, State]:
        if output.hidden is None:
            raise ValueError("hidden_value: expected a policy that gives hidden states, found hidden = None")
        q = head(params, output.hidden)
        check_array(f"hidden_value: head ({called(head)})", q, output.log_prob.shape, "a value per row and token")
        return gather(at_least_float32(q), candidates), state

    def advance(params: Params, proposal: HiddenValueState, choice: Array) -> State:
        return proposal

    def verify(
        params: Params,
        rng: Array,
        state: HiddenValueState,
        outputs: StepOutput,
        candidates: Array | None,
        tokens: Array,
        mask: Array,
        choices: Array,
    ) -> tuple[Array, State]:
        # Each output says all of its state.
        q, proposal = score(params, rng, state, merged(outputs), merged_candidates(candidates))
        return split(q, tokens.shape[0]), proposal

    def accept(params: Params, proposal: State, count: Array) -> State:
        return proposal

    return Critic(init, score, advance, "level", None, vocab_size, verify=verify, accept=accept)
