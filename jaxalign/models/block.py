"""What a layer computes where families of models differ: rotary positions, experts, and one description of a block."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
NORM_KINDS = ("rms", "layer")
NORM_PLACES = ("pre", "post", "both")
RESIDUALS = ("sequential", "parallel", "parallel_shared")
BLOCK_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
QK_NORMS = ("head", "all_heads")


MOST = 2**31 - 1
"""Sizes and ids are int32 on devices."""

MOST_LAYERS = 10_000
"""More layers than any model has: the names of their parameters alone would fill the memory."""


def check_integer(name: str, value: Any, least: int, most: int = MOST) -> None:
    """ValueError unless value is an integer, at least `least` and at most `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an integer, at least {least}, found {value!r}")
    if value > most:
        raise ValueError(f"{name}: expected at most {most}, found {value:.6g}")


def check_positive(name: str, value: Any) -> None:
    """ValueError unless value is a finite number > 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e300:
        raise ValueError(f"{name}: expected a finite value > 0, found {value!r}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, found {value!r}")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions.

    Fields:
      theta: the base of the wavelengths.
      kind: "default": unscaled; "linear": frequencies divided by factor; "llama3": only the long wavelengths are
        scaled, by the low and high factors; "yarn": wavelengths are scaled from beta_slow to beta_fast turns
        (arXiv 2309.00071); "dynamic": theta grows with a text's length beyond original_max_length (NTK); "longrope":
        each frequency is divided by its own factor, by one set for texts up to original_max_length and by another for
        longer ones (arXiv 2402.13753).
      factor: by which frequencies are divided, or what theta of "dynamic" grows by.
      low_freq_factor: wavelengths above original_max_length/low_freq_factor are scaled whole.
      high_freq_factor: wavelengths below original_max_length/high_freq_factor are left as they are.
      original_max_length: the context that the model was first trained for [tokens].
      share: how much of each head is rotated, its first int(share·hd) numbers, in (0, 1].
      beta_fast, beta_slow: of "yarn": dimensions that turn more often than beta_fast in the original context are left
        as they are, and those below beta_slow scaled whole.
      truncate: of "yarn": whether these limits are rounded outwards to whole dimensions.
      attention_factor: of "yarn" and "longrope": what cosines and sines are multiplied by.
      short_factors, long_factors: of "longrope": a factor for each frequency.

    Raises:
      ValueError: another kind, a value that is not finite and > 0, a share above 1, factors that are missing.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192
    share: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope kind: expected one of {ROPE_KINDS}, found {self.kind!r}")
        for name in (
            *("theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_length", "share"),
            *("beta_fast", "beta_slow", "attention_factor"),
        ):
            check_positive(name, getattr(self, name))
        if self.share > 1:
            raise ValueError(f"share: expected at most 1, the whole of each head, found {self.share}")
        for name in ("short_factors", "long_factors"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            for value in getattr(self, name):
                check_positive(name, value)
        if self.kind == "longrope" and not (self.short_factors and len(self.short_factors) == len(self.long_factors)):
            raise ValueError(
                f"short_factors, long_factors: expected one for each frequency in both, found "
                f"{len(self.short_factors)} and {len(self.long_factors)}"
            )

    @property
    def reads_length(self) -> bool:
        """Whether the frequencies depend on how long a text is."""
        return self.kind in ("dynamic", "longrope")

    def rotated(self, head_dim: int) -> int:
        """Gives how many numbers of a head are rotated.

        Args:
          head_dim: the width of a head.

        Returns:
          An even number.

        Raises:
          ValueError: an odd number, or factors for another number.
        """
        width = int(head_dim * self.share)
        if width < (4 if self.kind == "dynamic" else 2) or width % 2:
            raise ValueError(
                f"head_dim: expected an even number, whose halves rotate together, found {width} of {head_dim}"
            )
        if self.kind == "longrope" and len(self.short_factors) != width // 2:
            raise ValueError(f"short_factors: expected {width // 2} frequencies, found {len(self.short_factors)}")
        return width


@dataclasses.dataclass(frozen=True)
class Experts:
    """A layer's MLPs of which each token runs through a few.

    Fields:
      count: how many MLPs, each as wide as `Config.intermediate_size`.
      per_token: how many of them a token runs through, those of the largest probability.
      normalized: whether the probabilities of these are scaled to sum to 1.

    Raises:
      ValueError: fewer than one of either, or more per token than there are.
    """

    count: int
    per_token: int
    normalized: bool = True

    def __post_init__(self) -> None:
        check_integer("count", self.count, 1)
        check_integer("per_token", self.per_token, 1)
        if self.per_token > self.count:
            raise ValueError(f"per_token: expected at most {self.count} experts, found {self.per_token}")


@dataclasses.dataclass(frozen=True)
class Block:
    """What a layer, and what surrounds the layers, computes. The defaults are Llama's.

    Fields:
      norm: "rms": x/sqrt(mean x² + eps)·scale; "layer": (x − mean)/sqrt(var + eps)·scale + bias.
      norm_offset: added to the scale of an RMS norm (Gemma: 1, whose parameters are around 0).
      norm_place: "pre": before attention and MLP; "post": on what they give, before it is added (OLMo 2); "both".
      residual: "sequential": the MLP reads what attention has been added to; "parallel": both read the layer's input,
        each by a norm of its own; "parallel_shared": by one norm.
      activation: of the MLP; "gelu_tanh" is the approximation of "gelu" by tanh.
      gated: whether the MLP is down(a(gate(x))·up(x)), or down(a(up(x))).
      qk_norm: what a norm of queries and keys runs over, where `Config.qk_norm` says that there is one: each head, or
        all heads together (OLMo 2).
      learned_positions: whether an embedding of the position is added to that of the token (GPT-2, OPT).
      position_offset: the row of position 0 among them.
      query_scale: what scores q·k are multiplied by; None: 1/sqrt(hd).
      attention_cap: c of c·tanh(score/c) before the softmax; None: none.
      logits_cap: the same of the vocabulary's logits.
      embedding_scale: what embeddings of tokens are multiplied by.
      residual_scale: what attention and MLP are multiplied by before they are added.
      logits_scale: what the vocabulary's logits are multiplied by, before any cap.
      experts: the MLPs that stand in place of one, or None.

    Raises:
      ValueError: a value outside these.
    """

    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    norm_place: Literal["pre", "post", "both"] = "pre"
    residual: Literal["sequential", "parallel", "parallel_shared"] = "sequential"
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    qk_norm: Literal["head", "all_heads"] = "head"
    learned_positions: bool = False
    position_offset: int = 0
    query_scale: float | None = None
    attention_cap: float | None = None
    logits_cap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    experts: Experts | None = None

    def __post_init__(self) -> None:
        _check_choice("norm", self.norm, NORM_KINDS)
        _check_choice("norm_place", self.norm_place, NORM_PLACES)
        _check_choice("residual", self.residual, RESIDUALS)
        _check_choice("activation", self.activation, BLOCK_ACTIVATIONS)
        _check_choice("qk_norm", self.qk_norm, QK_NORMS)
        check_integer("position_offset", self.position_offset, 0)
        for name in ("query_scale", "attention_cap", "logits_cap"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        for name in ("embedding_scale", "residual_scale", "logits_scale"):
            check_positive(name, getattr(self, name))
        if self.norm_offset not in (0.0, 1.0) or (self.norm_offset and self.norm != "rms"):
            raise ValueError(f"norm_offset: expected 0, or 1 of an RMS norm, found {self.norm_offset!r}")
        if self.residual == "parallel_shared" and self.norm_place != "pre":
            raise ValueError(f"norm_place: expected 'pre' where one norm is shared, found {self.norm_place!r}")
        if self.experts is not None and not isinstance(self.experts, Experts):
            raise ValueError(f"experts: expected a models.Experts or None, found {self.experts!r}")
        if self.experts is not None and not self.gated:
            raise ValueError("gated: expected True of experts, found False")

    @property
    def has_attention_norm(self) -> bool:
        """Whether attention reads a norm of the residual stream."""
        return self.norm_place != "post"

    @property
    def has_mlp_norm(self) -> bool:
        """Whether the MLP reads a norm of its own."""
        return self.norm_place != "post" and self.residual != "parallel_shared"

    @property
    def has_post_norms(self) -> bool:
        """Whether what attention and MLP give goes through norms."""
        return self.norm_place != "pre"
