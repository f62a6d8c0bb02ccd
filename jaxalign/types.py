"""The types of the algebra: what a Policy, a Critic and a Reward are, and what decoders give.

One idea carries the library: for a state s of a token-level decision process the aligned policy is
pi(z|s) ∝ pi_ref(z|s) · exp(Q(s,z)/beta). A `Policy` is pi or pi_ref, a `Critic` is Q, a `Reward` is what lies behind Q.
All three are made of pure, jit-safe functions; parameters are plain pytrees and travel beside them. A Protocol per
function states its arguments by name; a function of your own keeps those names.

Laws that every Policy and Critic keeps (`jaxalign.testing` checks them for your own):

1. Every array leaf of a state or StepOutput has the batch axis first, so `take_rows` and `repeat_rows` are tree maps.
2. Token -1 (choice -1) means that the row is frozen for this step: its state is kept, its output is undefined.
3. What is per prompt (beta, weights) is read from params at init, broadcast to [B] and kept in the state.
4. `prompts` may mirror `params`: one TokenBatch goes to all models, a dict gives each model its own template.
5. log_prob = log_prob_ref + increments - log_norm on the support; a truncation's kept mass enters log_norm.
6. A Policy is built once and reused: a new closure is a new trace. The library's builders are cached by value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from jaxalign.results import KL, Completions, Decoded, KLKind
from jaxalign.shapes import (
    Array,
    ArrayLike,
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
    RewardValues,
    Scores,
    TextIndex,
    TextLength,
    TextMask,
    TextTokens,
)

__all__ = [
    "KL",
    "Array",
    "ArrayLike",
    "CandidateModel",
    "CheckedReward",
    "Completions",
    "Critic",
    "CriticKind",
    "Decoded",
    "HeadModel",
    "HostCheck",
    "KLKind",
    "LanguageModel",
    "Params",
    "Policy",
    "PrefixReward",
    "PrefixTokenGradient",
    "Prompts",
    "Reward",
    "State",
    "StepOutput",
    "TextReward",
    "TokenBatch",
]

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
    for `decoding.speculative`; None: it takes one step after the other."""
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
        -> (q [B,S,K], proposal): scores after many tokens in one pass, for `decoding.speculative`; None: one after the
        other.
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


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


class Reward(Protocol):
    """The reward [N] of whole texts. prompt_length [N] counts real prompt tokens, so that the response is
    `mdp.response_part(mask, prompt_length)` under either padding; index [N] is the prompt's row in its set."""

    def __call__(
        self, params: Params, tokens: TextTokens, mask: TextMask, prompt_length: TextLength, index: TextIndex
    ) -> RewardValues: ...


class TextReward(Protocol):
    """A reward of strings, on the host: one number per response."""

    def __call__(self, prompts: list[str], responses: list[str]) -> Sequence[float]: ...


class PrefixInit(Protocol):
    """The state of the prompts alone."""

    def __call__(self, params: Params, prompts: TokenBatch, max_new_tokens: int) -> State: ...


class PrefixScore(Protocol):
    """Scores M segments [N,M,S] after the prefix of each row, real where mask is True from their first column on:
    (reward [N,M], proposal). An empty segment has the prefix's reward."""

    def __call__(self, params: Params, state: State, tokens: Array, mask: Array) -> tuple[Array, State]: ...


class PrefixCommit(Protocol):
    """Segment choice [N] of each row joins its prefix; -1: none."""

    def __call__(self, params: Params, state: State, proposal: State, choice: Choice) -> State: ...


class PrefixReward(NamedTuple):
    """A Reward of texts that share a beginning, which is read once. Laws 1 and 2 hold for states and proposals, whose
    rows may be mixed. It gives the same numbers as the Reward."""

    init: PrefixInit
    """init(params, prompts, max_new_tokens) -> state."""
    score: PrefixScore
    """score(params, state, tokens [N,M,S], mask [N,M,S]) -> (reward [N,M], proposal)."""
    commit: PrefixCommit
    """commit(params, state, proposal, choice [N]) -> state."""


class PrefixTokenGradientScore(Protocol):
    """As PrefixScore with M = 1, and the first-order score of each candidate as the segment's first token: (reward [N],
    score [N,K], proposal)."""

    def __call__(
        self, params: Params, state: State, tokens: Array, mask: Array, candidates: Candidates
    ) -> tuple[Array, Array, State]: ...


class PrefixTokenGradient(NamedTuple):
    """First-order scores (`rewards.token_gradient`) of tokens in the place of a segment's first."""

    reward: PrefixReward
    """The PrefixReward behind it, which makes and moves the state."""
    score: PrefixTokenGradientScore
    """score(params, state, tokens [N,S], mask [N,S], candidates [N,K]) -> (reward [N], score [N,K], proposal)."""


@dataclasses.dataclass(frozen=True)
class CheckedReward:
    """A Reward that brings its host checks."""

    score: Reward
    """The Reward itself."""
    check: HostCheck | None = None
    """check(params, prompts, max_new_tokens) raises ValueErrors."""
    vocab_size: int | None = None
    """V, compared with the policy's; None: any."""
    prefix: PrefixReward | None = None
    """Its form for texts that share a beginning; None: `rewards.prefixes.whole_text`."""
    on_host: bool = False
    """Whether it runs programs of its own on the device, so that it is called outside compiled programs."""

    def __call__(
        self, params: Params, tokens: TextTokens, mask: TextMask, prompt_length: TextLength, index: TextIndex
    ) -> RewardValues:
        return self.score(params, tokens, mask, prompt_length, index)


# ---------------------------------------------------------------------------------------------------------------------
# Models: what the algebra asks of a language model. `jaxalign.models.LanguageModel` offers all of it.


class LanguageModel(Protocol):
    """What a model of your own offers to be a Policy (`policies.language_model`) or GenARM's critic."""

    @property
    def vocab_size(self) -> int:
        """V."""

    @property
    def max_length(self) -> int:
        """Longest text [tokens], prompt and response."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a response."""

    def prefill(self, params: Params, tokens: PromptTokens, mask: PromptMask, capacity: int) -> tuple[Array, State]:
        """Encodes prompts [B,P]: (hidden [B,D] at the last real token, a cache with `capacity` slots per row)."""

    def step(self, params: Params, cache: State, token: NextToken) -> tuple[Array, State]:
        """Appends token [B], -1 freezes a row: (hidden [B,D], cache)."""

    def logits(self, params: Params, hidden: Array) -> Array:
        """[...,D] -> [...,V] in at least float32."""


class HeadModel(Protocol):
    """What a model offers to be read by its head at every token: value models with a Q head, rewards of whole texts."""

    @property
    def vocab_size(self) -> int:
        """V."""

    @property
    def max_length(self) -> int:
        """Longest text [tokens]."""

    @property
    def head_width(self) -> int:
        """W: 1 for a scalar head, V for a Q head, 0 without a head."""

    def hidden(
        self, params: Params, tokens: TextTokens, *, mask: TextMask | None = None, at: Array | None = None
    ) -> Array:
        """Hidden states [B,L,D] after the final norm, or [B,R,D] at the columns at [B,R]."""

    def head(self, params: Params, hidden: Array) -> Array:
        """[...,D] -> [...,W] in at least float32."""


class CandidateModel(HeadModel, Protocol):
    """What a model offers to score K candidate tokens in one pass over a shared prefix (ARGS, scalar value heads)."""

    def prefill(
        self, params: Params, tokens: PromptTokens, mask: PromptMask, capacity: int, *, at: TextLength | None = None
    ) -> tuple[Array, State]:
        """As LanguageModel.prefill; `at` [B], given to a model with a `reward_pad_id` alone, says which of its real
        tokens, from 0, each row's hidden state is asked of."""

    def step(self, params: Params, cache: State, token: NextToken) -> tuple[Array, State]:
        """As LanguageModel.step."""

    def candidates(self, params: Params, cache: State, tokens: Candidates) -> tuple[Array, State]:
        """K alternative next tokens [B,K]: (hidden [B,K,D], entries to `commit`)."""

    def commit(self, cache: State, entries: State, choice: Choice) -> State:
        """Writes candidate choice [B] of each row into the cache; -1 freezes a row."""
