"""What a model offers to be trained: `models.LanguageModel` does, and so can a model of your own."""

from __future__ import annotations

from typing import Literal, Protocol

from jax.typing import DTypeLike

from jaxalign import models
from jaxalign.types import Array, HeadModel, Params


class HasDType(Protocol):
    """A model that computes in one type."""

    @property
    def dtype(self) -> DTypeLike:
        """Type of activations and of the weights as they are used."""


class TextModel(HasDType, Protocol):
    """What a language model offers to be trained on texts."""

    @property
    def vocab_size(self) -> int:
        """V."""

    def hidden(self, params: Params, tokens: Array, *, mask: Array | None = None, at: Array | None = None) -> Array:
        """Hidden states [B,L,D] after the final norm, or [B,R,D] at the columns at [B,R]."""

    def logits(self, params: Params, hidden: Array) -> Array:
        """[...,D] -> [...,V] in at least float32."""


class ScoringModel(HasDType, HeadModel, Protocol):
    """What a model with a head offers to be trained as a reward or a value."""

    @property
    def config(self) -> models.Config:
        """Its `head` is read: the kind and the bound."""

    @property
    def reward_pad_id(self) -> int | None:
        """The id by which the token is found at which a reward is read (`models.read_index`)."""

    @property
    def reward_pooling(self) -> Literal["last", "mean"]:
        """Whether a reward is read there, or from the mean of the hidden states (`models.pooled`)."""


class PolicyModel(TextModel, Protocol):
    """What a language model offers to be trained by policy gradients, with a head of values where its config says."""

    @property
    def config(self) -> models.Config:
        """Its `head` is read: whether there is one."""

    def head(self, params: Params, hidden: Array) -> Array:
        """[...,D] -> [...,W] in at least float32."""
