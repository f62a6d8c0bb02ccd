"""The types of the algebra, and the few tree functions that every module needs.

One idea carries the library: for a state s of a token-level decision process the aligned policy is
pi(z|s) ∝ pi_ref(z|s) · exp(Q(s,z)/beta). A `Policy` is pi or pi_ref, a `Critic` is Q, a `Reward` is what lies behind Q.
All three are (tuples of) pure, jit-safe functions; parameters are plain pytrees and travel beside them.

Laws that every Policy and Critic keeps (tests/test_laws.py holds them against each one):

1. Every array leaf of a state or StepOutput has the batch axis first, so `take_rows` and `repeat_rows` are tree maps.
2. Token -1 (choice -1) means that the row stands still: its state keeps, its output is undefined.
3. What is per prompt (beta, weights) is read from params at init, broadcast to [B] and kept in the state.
4. `prompts` may mirror `params`: one TokenBatch goes to all, a dict gives each model its own template.
5. log_prob = log_prob_ref + increments - log_norm on the support; a truncation's kept mass enters log_norm.
6. A Policy is built once and reused: a new closure is a new trace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

Array = jax.Array
ArrayLike = jax.typing.ArrayLike
Params = Any  # a pytree of arrays
State = Any  # a pytree of arrays, batch axis first
Prompts = Any  # a TokenBatch, or a dict of them that mirrors params


class TokenBatch(NamedTuple):
    """Prompts. tokens [B,P] int32; mask [B,P] bool, True on real tokens (either padding); index [B] int32: the prompt's
    row in its set, by which per-prompt tables are looked up and random numbers drawn. None: 0..B-1."""

    tokens: Array
    mask: Array
    index: Array | None = None  # type: ignore[assignment]  # shadows tuple.index, which nobody calls on a batch


class StepOutput(NamedTuple):
    """What a policy says of the next token. log_prob [B,V] of this policy; log_prob_ref [B,V] of the base below every
    tilt; log_norm [B], the log-normaliser of law 5; hidden [B,D] after the final norm, or None."""

    log_prob: Array
    log_prob_ref: Array
    log_norm: Array
    hidden: Array | None = None


class Policy(NamedTuple):
    """A distribution over the next token, and how it moves.

    init(params, rng, prompts, max_new_tokens) -> (state, StepOutput); step(params, rng, state, token [B]) -> the same.

    The rest is optional. log_prob(params, prompts, tokens [B,T], mask [B,T]) -> Completions: a parallel form of
    teacher-forced scoring. check(params, prompts, max_new_tokens): value checks on the host, ValueErrors.
    vocab_size: V, compared when policies and critics are put together.
    """

    init: Callable[..., tuple[State, StepOutput]]
    step: Callable[..., tuple[State, StepOutput]]
    log_prob: Callable[..., Completions] | None = None
    check: Callable[..., None] | None = None
    vocab_size: int | None = None


class Critic(NamedTuple):
    """A score of candidate next tokens.

    init(params, rng, prompts, max_new_tokens) -> state
    score(params, rng, state, output, candidates [B,K] | None) -> (q [B,K] or [B,V], proposal)
    advance(params, proposal, choice [B]) -> state, where choice indexes the candidates
    kind: "level", q = V(sz) or r(sz); "increment", q summed over tokens is the score, as log pi_r(z|s).
    `check` and `vocab_size` as for a Policy. beta: the only KL weight that `tilt` may divide this score by, None for
    any; a critic that gives log weights has 1.
    """

    init: Callable[..., State]
    score: Callable[..., tuple[Array, State]]
    advance: Callable[..., State]
    kind: Literal["level", "increment"]
    check: Callable[..., None] | None = None
    vocab_size: int | None = None
    beta: float | None = None


Reward = Callable[..., Array]
"""(params, tokens [N,L], mask [N,L], prompt_length [N], index [N]) -> reward [N]. prompt_length counts real prompt
tokens, so the response is `mdp.response_part(mask, prompt_length)` under either padding."""


class PrefixReward(NamedTuple):
    """A Reward of texts that share a beginning, which is read once.

    init(params, prompts, max_new_tokens) -> state, the prompt alone
    score(params, state, tokens [N,M,S], mask [N,M,S]) -> (reward [N,M], proposal): M segments after the prefix of each
        row, real where mask is True from their first column on; an empty one has the prefix's reward
    commit(params, state, proposal, choice [N]) -> state: segment `choice` of each row joins its prefix, −1: none

    Laws 1 and 2 hold for states and proposals, whose rows may be mixed. The same numbers as the Reward's own."""

    init: Callable[..., State]
    score: Callable[..., tuple[Array, State]]
    commit: Callable[..., State]


class PrefixGain(NamedTuple):
    """A gain (`decoding.ggro`) at the first token of a segment. reward: the PrefixReward behind it, which makes and
    moves the state; score(params, state, tokens [N,S], mask [N,S], candidates [N,K]) -> (reward [N], gain [N,K],
    proposal), as the reward's with M = 1."""

    reward: PrefixReward
    score: Callable[..., tuple[Array, Array, State]]


@dataclasses.dataclass(frozen=True)
class CheckedReward:
    """A Reward that brings its host checks. score: the Reward; check(params, prompts, max_new_tokens) raises
    ValueErrors; vocab_size: V, compared with the policy's (None: any); prefix: its form for texts that share a
    beginning (None: `prefixes.whole_text`)."""

    score: Reward
    check: Callable[..., None] | None = None
    vocab_size: int | None = None
    prefix: PrefixReward | None = None

    def __call__(self, params: Params, tokens: Array, mask: Array, prompt_length: Array, index: Array) -> Array:
        return self.score(params, tokens, mask, prompt_length, index)


class Completions(NamedTuple):
    """Responses and what was known of each token. tokens [B,T] int32; mask [B,T] bool, EOS included; log_prob,
    log_prob_ref [B,T] of each token; log_norm [B,T]; kl [B,T], exact over the next-token distribution, or None;
    finished [B]: ended by EOS; truncated [B]: ended by the limit. in_support [B]: False where a given response holds a
    token of probability zero (`decoding.log_prob`), None where responses were sampled. Masked-out entries are 0."""

    tokens: Array
    mask: Array
    log_prob: Array
    log_prob_ref: Array
    log_norm: Array
    kl: Array | None
    finished: Array
    truncated: Array
    in_support: Array | None = None


class Selection(NamedTuple):
    """best: Completions [B,T]; samples: Completions [B,n,T]; reward [B,n]."""

    best: Completions
    samples: Completions
    reward: Array
