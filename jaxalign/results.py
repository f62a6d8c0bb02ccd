"""What decoders give: responses with what was known of each token, and the KL that they cost."""

from __future__ import annotations

import dataclasses
from typing import Generic, Literal, NamedTuple, TypeVar

import jax

from jaxalign.shapes import PerPrompt, PerPromptFlag, PerToken, ResponseMask, ResponseTokens


class Completions(NamedTuple):
    """Responses and what was known of each token. Entries where mask is False are 0."""

    tokens: ResponseTokens
    """[B,T] int32."""
    mask: ResponseMask
    """[B,T] bool, True on the response's tokens, its EOS included."""
    log_prob: PerToken
    """[B,T], of each token under the policy that drew it (in nats)."""
    log_prob_ref: PerToken
    """[B,T], of each token under the base."""
    log_norm: PerToken
    """[B,T], the log-normaliser of law 5 at each token."""
    kl: PerToken | None
    """[B,T], the exact KL of each step's next-token distribution to the base's [nats], or None."""
    finished: PerPromptFlag
    """[B]: ended by an EOS."""
    truncated: PerPromptFlag
    """[B]: ended by the limit."""
    in_support: PerPromptFlag | None = None
    """[B]: False where a given response holds a token of probability zero (`decoding.log_prob`); None where responses
    were drawn."""


KLKind = Literal[
    "exact", "bound", "estimated_bound", "estimate", "stationary_estimate", "log_ratio", "surprisal", "unknown"
]
"""What kind of number a KL is.

- "exact": Σ_t of the exact KL of each step's next-token distribution along the response drawn.
- "bound": an upper bound on the KL of the decoder's law.
- "estimated_bound": a random number whose mean is an upper bound on it.
- "estimate": an unbiased or consistent estimate of it.
- "stationary_estimate": an estimate of the KL of the law that a Markov chain tends to.
- "log_ratio": log of the policy's over the base's probability of this response.
- "surprisal": -log pi_ref(y), which the KL is for a deterministic decoder.
- "unknown": no number is known; value is NaN.
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KL:
    """The KL of a decoder to the base or to the policy it draws from, and what kind of number that is."""

    value: PerPrompt
    """[B], in nats."""
    kind: KLKind = dataclasses.field(metadata={"static": True})
    """What kind of number value is."""
    formula: str = dataclasses.field(default="", metadata={"static": True})
    """How value is computed, in words and symbols, as tables show it."""
    reference: Literal["base", "policy", "tempered policy"] = dataclasses.field(
        default="base", metadata={"static": True}
    )
    """What the KL is to: the base below every tilt, or the policy that the decoder draws from, at its temperature."""

    @property
    def label(self) -> str:
        """The kind as tables show it: with the reference where that is a tempered policy."""
        return f"{self.kind}, to the {self.reference}" if self.reference == "tempered policy" else self.kind


Info = TypeVar("Info")


class Decoded(NamedTuple, Generic[Info]):
    """What every decoder but `sample` and `log_prob` gives."""

    completions: Completions
    """The response kept for each prompt, [B,T]."""
    kl: KL
    """Its KL to the base."""
    info: Info
    """What this decoder knows besides: a NamedTuple of its own, arrays with B first."""
