"""What the algebra asks of a language model. `jaxalign.models.LanguageModel` offers all of it."""

from __future__ import annotations

from typing import Protocol

from jaxalign.shapes import (
    Array,
    Candidates,
    Choice,
    NextToken,
    PromptMask,
    PromptTokens,
    TextLength,
    TextMask,
    TextTokens,
)
from jaxalign.types._policies import Params, State


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
