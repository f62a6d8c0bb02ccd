"""The one configuration of the one transformer, and its two-way map to a Hugging Face config.json."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Follower:
    """What a value or Q head says of the follower of a shaped reward in [0, bound], whose KL weight is beta.

    objective "exceedance": the logit of Pr_ref(u > m | prefix), m the leader's threshold; "soft": the soft value
    beta·log E_ref[exp(r/beta) | prefix]. Either gives the follower's exact weight of a prefix, for this beta and bound
    and no other (`critics.follower`).
    """

    objective: Literal["exceedance", "soft"]
    beta: float
    bound: float

    def __post_init__(self) -> None:
        if self.objective not in ("exceedance", "soft"):
            raise ValueError(f"objective: expected 'exceedance' or 'soft', found {self.objective!r}")
        for name in ("beta", "bound"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite value > 0, found {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Head:
    """What reads the hidden states beside the vocabulary.

    kind: "reward", linear, num_labels wide, no bias (…ForSequenceClassification); "value", to one number; "q", to one
      number per token.
    hidden_size: width of the hidden layers of a value or Q head; None: linear with a bias.
    num_hidden: how many such layers (RE-Control's value nets have one or two, with "relu").
    activation: between the layers.
    bound: of a reward head: its output is bound·sigmoid(score), a reward in [0, bound]; None: the score itself.
    follower: of a value or Q head that was trained for a shaped reward.
    """

    kind: Literal["reward", "value", "q"]
    num_labels: int = 1
    hidden_size: int | None = None
    num_hidden: int = 1
    activation: Literal["silu", "relu", "gelu", "tanh"] = "silu"
    bound: float | None = None
    follower: Follower | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("reward", "value", "q"):
            raise ValueError(f"kind: expected 'reward', 'value' or 'q', found {self.kind!r}")
        if self.activation not in ("silu", "relu", "gelu", "tanh"):
            raise ValueError(f"activation: expected 'silu', 'relu', 'gelu' or 'tanh', found {self.activation!r}")
        if self.kind == "reward" and self.hidden_size is not None:
            raise ValueError(f"hidden_size: expected None for a reward head, found {self.hidden_size}")
        if self.bound is not None and (self.kind != "reward" or not 0 < self.bound < math.inf):
            raise ValueError(f"bound: expected a finite value > 0 of a reward head, found {self.bound} of {self.kind}")
        if self.follower is not None and self.kind == "reward":
            raise ValueError("follower: expected a value or Q head, found a reward head")
        for name in ("num_labels", "num_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")

    @property
    def hidden_layers(self) -> tuple[str, ...]:
        """Names of the layers before the last, in the parameters and in a checkpoint."""
        count = 0 if self.hidden_size is None else self.num_hidden
        return tuple("inner" if i == 0 else f"inner_{i}" for i in range(count))


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: theta, and what scales them. kind "default", "linear" or "llama3"."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder-only transformer. Hashable: two models of one configuration share their traces.

    windows: one sliding window per layer [tokens], None for full attention; () when all layers are full.
    max_length: the context, prompt and response together [tokens].
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_length: int
    family: str = "llama"
    rope: Rope = Rope()
    norm_eps: float = 1e-6
    windows: tuple[int | None, ...] = ()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    head: Head | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        for name in (*sizes, "intermediate_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of {self.num_heads} heads, found {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, whose halves rotate together, found {self.head_dim}")
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(f"windows: expected one per layer ({self.num_layers}), found {len(self.windows)}")
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"windows: expected None or at least 1 token, found {self.windows}")
        if not any(self.windows):  # one spelling of "all full", so that equal models are equal
            object.__setattr__(self, "windows", ())

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer [tokens], None for full attention."""
        return self.windows[layer] if self.windows else None

    @property
    def head_width(self) -> int:
        """W of the head's output; 0 without a head."""
        if self.head is None:
            return 0
        return {"reward": self.head.num_labels, "value": 1, "q": self.vocab_size}[self.head.kind]

    @staticmethod
    def from_hf(values: dict[str, Any]) -> Config:
        """From the dict of a config.json; ValueError for a field that changes the computation and is not supported."""
        from jaxalign.models.hf import config

        return config.from_hf(values)

    def to_hf(self) -> dict[str, Any]:
        """The dict of a config.json that transformers and `from_hf` read."""
        from jaxalign.models.hf import config

        return config.to_hf(self)
