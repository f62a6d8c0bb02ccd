"""What scores candidate tokens by the gradient of a reward."""

from __future__ import annotations

from typing import Protocol

from jaxalign.shapes import Candidates, RewardValues, Scores, TextLength, TextMask, TextTokens
from jaxalign.types import Params


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
