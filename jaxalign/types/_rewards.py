"""What a Reward is, and its forms for texts that share a beginning."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from jaxalign.shapes import Array, Candidates, Choice, RewardValues, TextIndex, TextLength, TextMask, TextTokens
from jaxalign.types._policies import HostCheck, Params, State, TokenBatch


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
