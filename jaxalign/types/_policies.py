"""What a Policy and a Critic are, and the functions that each is made of."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from jaxalign.results import Completions
from jaxalign.shapes import (
    Array,
    Candidates,
    Choice,
    Hidden,
    LogProbs,
    NextToken,
    PerPrompt,
    PromptIndex,
    PromptMask,
    PromptTokens,
    ResponseMask,
    ResponseTokens,
    Scores,
)

Params: TypeAlias = Any
"""A pytree of arrays."""
State: TypeAlias = Any
"""A pytree of arrays, batch axis first; usually a NamedTuple."""
Prompts: TypeAlias = Any
"""A TokenBatch, or a dict (or sequence) of them that mirrors params."""


class TokenBatch(NamedTuple):
    """Prompts as token ids; `jaxalign.prompts.prompt_batch` makes one from lists of ids."""

    tokens: PromptTokens
    """[B,P] int32, either padding."""
    mask: PromptMask
    """[B,P] bool, True on real tokens."""
    index: PromptIndex | None = None  # type: ignore[assignment]  # shadows tuple.index, which nobody calls on a batch
    """[B] int32: the prompt's row in its set, by which per-prompt tables are looked up and random numbers drawn. None
    stands for 0..B-1."""


class StepOutput(NamedTuple):
    """What a policy says of the next token."""

    log_prob: LogProbs
    """[B,V], of this policy."""
    log_prob_ref: LogProbs
    """[B,V], of the base below every tilt."""
    log_norm: PerPrompt
    """[B], the log-normaliser of law 5."""
    hidden: Hidden | None = None
    """[B,D] after the model's final norm, or None."""


# ---------------------------------------------------------------------------------------------------------------------
# Policies


class PolicyInit(Protocol):
    """Encodes the prompts. rng is consumed; the state has room for max_new_tokens."""

    def __call__(
        self, params: Params, rng: Array, prompts: Prompts, max_new_tokens: int
    ) -> tuple[State, StepOutput]: ...


class PolicyStep(Protocol):
    """Appends token [B]; -1 freezes a row (law 2). rng is consumed."""

    def __call__(self, params: Params, rng: Array, state: State, token: NextToken) -> tuple[State, StepOutput]: ...


class PolicyLogProb(Protocol):
    """Scores given responses [B,T] in parallel."""

    def __call__(self, params: Params, prompts: Prompts, tokens: ResponseTokens, mask: ResponseMask) -> Completions: ...


class PolicyVerify(Protocol):
    """Reads the next tokens [B,S] of each row at once: (StepOutput, proposal), the output's leaves [B,S,...] being
    what `step` says after each token. mask [B,S]: real tokens, which stand in front; a row without any is frozen.
    Outputs at other places, and after a token of probability zero, are undefined. The state is not changed. below:
    what the policy below has already said of these tokens, as its own verify gives it; the policy then reads it in
    place of that part. rng is consumed."""

    def __call__(
        self,
        params: Params,
        rng: Array,
        state: State,
        tokens: Array,
        mask: Array,
        below: tuple[StepOutput, State] | None = None,
    ) -> tuple[StepOutput, State]: ...


class PolicyAccept(Protocol):
    """The state after the first count [B] real tokens of a proposal of `verify`: that of as many steps. 0 freezes a
    row."""

    def __call__(self, params: Params, proposal: State, count: Array) -> State: ...


class HostCheck(Protocol):
    """Checks values on the host before anything is traced; raises ValueErrors that name the field."""

    def __call__(self, params: Params, prompts: Prompts, max_new_tokens: int) -> None: ...


class Policy(NamedTuple):
    """A distribution over the next token, and how it moves."""

    init: PolicyInit
    """init(params, rng, prompts, max_new_tokens) -> (state, StepOutput)."""
    step: PolicyStep
    """step(params, rng, state, token [B]) -> (state, StepOutput)."""
    log_prob: PolicyLogProb | None = None
    """log_prob(params, prompts, tokens [B,T], mask [B,T]) -> Completions: a parallel form of teacher-forced scoring."""
    check: HostCheck | None = None
    """check(params, prompts, max_new_tokens): value checks on the host."""
    vocab_size: int | None = None
    """V, compared where policies and critics are put together; None: unknown."""
    eos_ids: tuple[int, ...] | None = None
    """The ids that end a response, which decoders use unless told otherwise; None: unknown."""
    verify: PolicyVerify | None = None
    """verify(params, rng, state, tokens [B,S], mask [B,S]) -> (StepOutput [B,S,...], proposal): many steps in one pass,
    for `decoding.speculative` and `decoding.log_prob`; None: it takes one step after the other."""
    accept: PolicyAccept | None = None
    """accept(params, proposal, count [B]) -> state, with `verify`."""
    below: Policy | None = None
    """The policy that this one tilts, whose params and state are its entry `policy`; None: none, or not told."""


# ---------------------------------------------------------------------------------------------------------------------
# Critics

CriticKind = Literal["level", "increment"]


class CriticInit(Protocol):
    """Encodes the prompts. rng is consumed; the state has room for max_new_tokens."""

    def __call__(self, params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> State: ...


class CriticScore(Protocol):
    """Scores candidates [B,K] (None: the whole vocabulary) of the state: (q [B,K] or [B,V], proposal). The proposal
    holds what `advance` needs. output is the StepOutput of the policy that is tilted. rng is consumed."""

    def __call__(
        self, params: Params, rng: Array, state: State, output: StepOutput, candidates: Candidates | None
    ) -> tuple[Scores, State]: ...


class CriticAdvance(Protocol):
    """Moves to candidate choice [B], an index into the candidates; -1 freezes a row (law 2)."""

    def __call__(self, params: Params, proposal: State, choice: Choice) -> State: ...


class CriticVerify(Protocol):
    """Moves along the next tokens [B,S] of each row and scores candidates [B,S,K] (None: the whole vocabulary) after
    each: (q [B,S,K], proposal). state: the proposal of `score` before the first of them. outputs: StepOutput of the
    policy that is tilted, leaves [B,S,...]. mask [B,S]: real tokens, which stand in front. choices [B,S]: the place of
    each token among the candidates before it, as `advance` takes it; -1 for none. rng is consumed."""

    def __call__(
        self,
        params: Params,
        rng: Array,
        state: State,
        outputs: StepOutput,
        candidates: Array | None,
        tokens: Array,
        mask: Array,
        choices: Array,
    ) -> tuple[Array, State]: ...


class CriticAccept(Protocol):
    """The proposal, as `score` gives it, after the first count [B] real tokens of a proposal of `verify`; 0 freezes a
    row."""

    def __call__(self, params: Params, proposal: State, count: Array) -> State: ...


class _CriticFields(NamedTuple):
    init: CriticInit
    score: CriticScore
    advance: CriticAdvance
    kind: CriticKind
    check: HostCheck | None = None
    vocab_size: int | None = None
    beta: float | None = None
    verify: CriticVerify | None = None
    accept: CriticAccept | None = None


class Critic(_CriticFields):
    """A score q of candidate next tokens.

    Fields:
      init: init(params, rng, prompts, max_new_tokens) -> state.
      score: score(params, rng, state, output, candidates [B,K] | None) -> (q [B,K] or [B,V], proposal).
      advance: advance(params, proposal, choice [B]) -> state.
      kind: "level": q = V(sz) or r(sz), the score of the text so far; "increment": q summed over the tokens is the
        score, as log pi_r(z|s).
      check: value checks on the host, or None.
      vocab_size: V, compared with the policy's; None: unknown.
      beta: the only KL weight that `tilt` may divide this score by, None for any; a critic that gives log weights has
        1.
      verify: verify(params, rng, state, outputs, candidates [B,S,K] | None, tokens [B,S], mask [B,S], choices [B,S])
        -> (q [B,S,K], proposal): scores after many tokens in one pass, for `decoding.speculative` and
        `decoding.log_prob`; None: one after the other.
      accept: accept(params, proposal, count [B]) -> the proposal of `score`, with `verify`.

    Raises:
      ValueError: a kind that is neither "level" nor "increment".
    """

    __slots__ = ()

    def __new__(
        cls,
        init: CriticInit,
        score: CriticScore,
        advance: CriticAdvance,
        kind: CriticKind,
        check: HostCheck | None = None,
        vocab_size: int | None = None,
        beta: float | None = None,
        verify: CriticVerify | None = None,
        accept: CriticAccept | None = None,
    ) -> Critic:
        if kind not in ("level", "increment"):
            raise ValueError(f"kind: expected 'level' or 'increment', found {kind!r}")
        return super().__new__(cls, init, score, advance, kind, check, vocab_size, beta, verify, accept)

    def _replace(self, **changes: Any) -> Critic:
        """A Critic with some fields changed, checked as a new one."""
        return Critic(**(self._asdict() | changes))
