"""Array types with their shapes, named by what they hold: the only place where shapes of the public signatures stand.

B prompts, P prompt tokens, T new tokens, L tokens of any text, N texts, n samples of a prompt, V vocabulary, K
candidates, D hidden size; S states and M responses, or outcomes, of a small process; "..." any axes, those of prompts.
jaxtyping's types are plain arrays to a type checker; where a rank error would be silent, the functions check at run
time.
"""

from __future__ import annotations

import jax
from jaxtyping import Array as Array
from jaxtyping import Bool, Float, Int

__all__ = [
    "Array",
    "ArrayLike",
    "Candidates",
    "Choice",
    "Hidden",
    "LogProbs",
    "NextToken",
    "Numbers",
    "OutcomeRanks",
    "Outcomes",
    "OverTokens",
    "PerPrompt",
    "PerPromptFlag",
    "PerResponse",
    "PerSample",
    "PerToken",
    "PromptIndex",
    "PromptMask",
    "PromptTokens",
    "ResponseMask",
    "ResponseTokens",
    "RewardValues",
    "Samples",
    "Scalar",
    "Scores",
    "StateTable",
    "StateValues",
    "TextIndex",
    "TextLength",
    "TextMask",
    "TextTokens",
    "TokenIds",
    "TokenIndex",
    "TokenMask",
]

ArrayLike = jax.typing.ArrayLike

PromptTokens = Int[Array, "B P"]
PromptMask = Bool[Array, "B P"]
PromptIndex = Int[Array, "B"]
NextToken = Int[Array, "B"]
Candidates = Int[Array, "B K"]
Choice = Int[Array, "B"]
LogProbs = Float[Array, "B V"]
Scores = Float[Array, "B K"]
Hidden = Float[Array, "B D"]
PerPrompt = Float[Array, "B"]
PerPromptFlag = Bool[Array, "B"]
ResponseTokens = Int[Array, "B T"]
ResponseMask = Bool[Array, "B T"]
PerToken = Float[Array, "B T"]
PerSample = Float[Array, "B n"]
TextTokens = Int[Array, "N L"]
TextMask = Bool[Array, "N L"]
TextLength = Int[Array, "N"]
TextIndex = Int[Array, "N"]
RewardValues = Float[Array, "N"]
Scalar = Float[Array, ""]

Numbers = Float[Array, "..."]
Samples = Float[Array, "... n"]
OverTokens = Float[Array, "... V"]
Outcomes = Float[Array, "... M"]
OutcomeRanks = Int[Array, "... M"]
TokenIds = Int[Array, "... L"]
TokenMask = Bool[Array, "... L"]
TokenIndex = Int[Array, "..."]
StateValues = Float[Array, "S"]
StateTable = Float[Array, "S V"]
PerResponse = Float[Array, "M"]
