"""The configuration of the transformer: sizes, positions, windows, heads. All are hashable and checked when made."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, Literal

from jaxalign.models.block import MOST, MOST_LAYERS, Block, Rope, check_integer, check_positive

ACTIVATION_NAMES = ("silu", "relu", "gelu", "tanh")
HEAD_KINDS = ("reward", "value", "q")

MOST_LABELS = 1_000_000
"""Each label has a name, which is made before the score's tensor is looked at."""


@dataclasses.dataclass(frozen=True)
class Follower:
    """The shaped reward that a value or Q head was trained for (`critics.follower`).

    Fields:
      objective: "exceedance": the head gives the logit of Pr_ref(u > m | prefix), m the leader's threshold; "soft": the
        soft value beta·log E_ref[exp(r/beta) | prefix]. Either gives the follower's exact weight of a prefix, for this
        beta and bound and no other.
      beta: the KL weight, > 0.
      bound: the shaped reward lies in [0, bound].

    Raises:
      ValueError: another objective, or a beta or bound that is not a finite value > 0.
    """

    objective: Literal["exceedance", "soft"]
    beta: float
    bound: float

    def __post_init__(self) -> None:
        if self.objective not in ("exceedance", "soft"):
            raise ValueError(f"objective: expected 'exceedance' or 'soft', found {self.objective!r}")
        for name in ("beta", "bound"):
            check_positive(name, getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Distribution:
    """The law of the reward that a value or Q head gives of each prefix (`critics.distribution`).

    Fields:
      support: c_1 < … < c_K, in units of reward; two inner points may be equal: a reward at them then counts as the
        left one, a larger one as the right.
      mode: "atoms": every reward is a support point; "grid": rewards lie between them, and each counts as the law on
        its two neighbours whose mean it is (`losses.two_hot`).
      rank: of a Q head: in how many ways a token moves the law that the tokens of a state share; 1: it shifts it,
        2: and widens it; K − 1: to any law.

    Raises:
      ValueError: fewer than two points, points that are not finite or not in order, another mode, a rank below 1.
    """

    support: tuple[float, ...]
    mode: Literal["atoms", "grid"] = "grid"
    rank: int = 2

    def __post_init__(self) -> None:
        given: Any = self.support
        if not isinstance(given, tuple | list) or any(isinstance(point, str | bool) for point in given):
            raise ValueError(f"support: expected a tuple of numbers, found {given!r:.200}")
        points = tuple(float(point) for point in given)
        if len(points) < 2:
            raise ValueError(f"support: expected at least two points, found {points}")
        if not all(math.isfinite(point) for point in points):
            raise ValueError(f"support: expected finite points, found {points}")
        twins = [a == b for a, b in itertools.pairwise(points)]
        if any(a > b for a, b in itertools.pairwise(points)) or twins[0] or twins[-1]:
            raise ValueError(f"support: expected points that increase, inner ones at most twice, found {points}")
        if any(a and b for a, b in itertools.pairwise(twins)):
            raise ValueError(f"support: expected each point at most twice, found {points}")
        if self.mode not in ("atoms", "grid"):
            raise ValueError(f"mode: expected 'atoms' or 'grid', found {self.mode!r}")
        check_integer("rank", self.rank, 1)
        object.__setattr__(self, "support", points)


def default_labels(count: int) -> tuple[str, ...]:
    """The names that transformers gives to labels without one."""
    return tuple(f"LABEL_{i}" for i in range(count))


@dataclasses.dataclass(frozen=True)
class Head:
    """What reads the hidden states beside the vocabulary.

    Fields:
      kind: "reward": linear, num_labels wide, without a bias (…ForSequenceClassification); "value": to one number; "q":
        to one number per token.
      num_labels: the width of a reward head.
      labels: the names of a reward head's labels, in the order of its columns; () for LABEL_0, LABEL_1, …
      hidden_size: the width of the hidden layers of a value or Q head; None: linear with a bias.
      num_hidden: how many such layers (RE-Control's value nets have one or two, with "relu").
      activation: between the layers.
      pooling: of a reward head: "last" reads a text where transformers does (`models.read_index`), "mean" reads the
        mean of the hidden states of its tokens (`models.pooled`), as transformers' ModernBERT names it.
      bound: of a reward head: its output is bound·sigmoid(score), a reward in [0, bound]; None: the score itself.
      follower: of a value or Q head that was trained for a shaped reward.
      distribution: of a value or Q head that gives the law of the reward: to log-probabilities of its support.

    Raises:
      ValueError: a value outside these, or one that does not belong to this kind.
    """

    kind: Literal["reward", "value", "q"]
    num_labels: int = 1
    hidden_size: int | None = None
    num_hidden: int = 1
    activation: Literal["silu", "relu", "gelu", "tanh"] = "silu"
    bound: float | None = None
    follower: Follower | None = None
    labels: tuple[str, ...] = ()
    distribution: Distribution | None = None
    pooling: Literal["last", "mean"] = "last"

    def __post_init__(self) -> None:
        if self.kind not in HEAD_KINDS:
            raise ValueError(f"kind: expected 'reward', 'value' or 'q', found {self.kind!r}")
        if self.activation not in ACTIVATION_NAMES:
            raise ValueError(f"activation: expected one of {ACTIVATION_NAMES}, found {self.activation!r}")
        if self.kind == "reward" and self.hidden_size is not None:
            raise ValueError(f"hidden_size: expected None for a reward head, found {self.hidden_size}")
        if self.hidden_size is not None:
            check_integer("hidden_size", self.hidden_size, 1)
        if self.bound is not None:
            check_positive("bound", self.bound)
            if self.kind != "reward":
                raise ValueError(f"bound: expected None of a {self.kind} head, found {self.bound}")
        if self.pooling not in ("last", "mean"):
            raise ValueError(f"pooling: expected 'last' or 'mean', found {self.pooling!r}")
        if self.pooling != "last" and self.kind != "reward":
            raise ValueError(f"pooling: expected 'last' of a {self.kind} head, found {self.pooling!r}")
        if self.follower is not None and self.kind == "reward":
            raise ValueError("follower: expected a value or Q head, found a reward head")
        if self.follower is not None and not isinstance(self.follower, Follower):
            raise ValueError(f"follower: expected a models.Follower, found {self.follower!r}")
        if self.distribution is not None:
            if not isinstance(self.distribution, Distribution):
                raise ValueError(f"distribution: expected a models.Distribution, found {self.distribution!r}")
            if self.kind == "reward" or self.follower is not None:
                raise ValueError("distribution: expected a value or Q head without a follower, found another")
        if self.kind != "reward" and self.num_labels != 1:
            raise ValueError(f"num_labels: expected 1 for a {self.kind} head, found {self.num_labels}")
        check_integer("num_labels", self.num_labels, 1, MOST_LABELS)
        check_integer("num_hidden", self.num_hidden, 1, MOST_LAYERS)
        self._check_labels()

    def _check_labels(self) -> None:
        if not isinstance(self.labels, tuple | list) or not all(isinstance(name, str) for name in self.labels):
            raise ValueError(f"labels: expected a tuple of names, found {self.labels!r}")
        labels = tuple(self.labels)
        if labels and self.kind != "reward":
            raise ValueError(f"labels: expected none of a {self.kind} head, found {labels}")
        if labels and len(labels) != self.num_labels:
            raise ValueError(f"labels: expected {self.num_labels} names, found {labels}")
        # One spelling of transformers' own names, so that equal heads are equal.
        object.__setattr__(self, "labels", () if labels == default_labels(len(labels)) else labels)

    @property
    def label_names(self) -> tuple[str, ...]:
        """The name of each label of a reward head; () of another head."""
        if self.kind != "reward":
            return ()
        return self.labels or default_labels(self.num_labels)

    @property
    def hidden_layers(self) -> tuple[str, ...]:
        """Names of the layers before the last, in the parameters and in a checkpoint."""
        count = 0 if self.hidden_size is None else self.num_hidden
        return tuple("inner" if i == 0 else f"inner_{i}" for i in range(count))


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder-only transformer. Hashable: two models of one configuration share their traces.

    Fields:
      vocab_size: V.
      hidden_size: D, the width of the residual stream.
      num_layers: layers.
      num_heads: query heads of each layer.
      num_kv_heads: heads of keys and values, a divisor of num_heads.
      head_dim: the width of a head; what is rotated of it is even.
      intermediate_size: the width of the MLP.
      max_length: the context, prompt and response together [tokens].
      family: how a folder names its tensors, a key of `families.FAMILIES`; the computation does not depend on it.
      block: what a layer computes, where families differ.
      rope: rotary positions, or None for none in any layer.
      ropes: those of each layer, None in a layer without, where they differ; () when all layers have `rope`. With
        them `rope` is the first of them.
      norm_eps: of the norms.
      windows: one sliding window per layer [tokens], None for full attention; () when all layers are full.
      tie_embeddings: whether the embedding is also the output matrix.
      qkv_bias, out_bias, mlp_bias: which projections have a bias.
      qk_norm: whether queries and keys have norms.
      eos_ids: the ids that end a response; one id is taken as a tuple of one.
      bos_id: the id that begins a text, or None.
      pad_id: the id of padding, or None; it may lie outside the vocabulary. A reward head is not read at it
        (`models.read_index`).
      head: what reads the hidden states beside the vocabulary, or None.
      generation: the further fields of generation_config.json (temperature, top_p, repetition_penalty, …) as a JSON
        object, "" for none; they are kept when the model is saved, and `policies.read_generation_config` reads them.

    Raises:
      ValueError: a field outside its range.
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
    block: Block = Block()  # noqa: RUF009
    rope: Rope | None = Rope()  # noqa: RUF009
    ropes: tuple[Rope | None, ...] = ()
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
    generation: str = ""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        for name in (*sizes, "intermediate_size", "max_length"):
            check_integer(name, getattr(self, name), 1, MOST_LAYERS if name == "num_layers" else MOST)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of {self.num_heads} heads, found {self.num_kv_heads}")
        if not isinstance(self.block, Block):
            raise ValueError(f"block: expected a models.Block, found {self.block!r}")
        self._set_ropes()
        if self.head is not None and not isinstance(self.head, Head):
            raise ValueError(f"head: expected a models.Head or None, found {self.head!r}")
        check_positive("norm_eps", self.norm_eps)
        self._set_tuple("windows", self.windows)
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(f"windows: expected one per layer ({self.num_layers}), found {len(self.windows)}")
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"windows: expected None or at least 1 token, found {self.windows}")
        if not any(self.windows):  # one spelling of "all full", so that equal models are equal
            object.__setattr__(self, "windows", ())
        self._set_tuple("eos_ids", (self.eos_ids,) if isinstance(self.eos_ids, int) else self.eos_ids)
        for i in self.eos_ids:
            check_integer("eos_ids", i, 0)
        for name in ("bos_id", "pad_id"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), -1)

    def _set_ropes(self) -> None:
        self._set_tuple("ropes", self.ropes)
        if self.ropes and len(self.ropes) != self.num_layers:
            raise ValueError(f"ropes: expected one per layer ({self.num_layers}), found {len(self.ropes)}")
        if self.ropes:  # one spelling of "all alike" and of what is not read, so that equal models are equal
            object.__setattr__(self, "rope", next((rope for rope in self.ropes if rope is not None), None))
            object.__setattr__(self, "ropes", self.ropes if len(set(self.ropes)) > 1 else ())
        for rope in (self.rope, *self.ropes):
            if rope is not None and not isinstance(rope, Rope):
                raise ValueError(f"rope: expected a models.Rope or None, found {rope!r}")
            if rope is not None:
                rope.rotated(self.head_dim)

    def _set_tuple(self, name: str, values: Any) -> None:
        """A list as a tuple, without which the Config has no hash."""
        if not isinstance(values, tuple | list):
            raise ValueError(f"{name}: expected a tuple, found {values!r}")
        object.__setattr__(self, name, tuple(values))

    def window(self, layer: int) -> int | None:
        """Gives the sliding window of a layer.

        Args:
          layer: its number, from 0.

        Returns:
          The window [tokens]; None for full attention.
        """
        return self.windows[layer] if self.windows else None

    def layer_rope(self, layer: int) -> Rope | None:
        """Gives the rotary positions of a layer.

        Args:
          layer: its number, from 0.

        Returns:
          The Rope; None for none.
        """
        return self.ropes[layer] if self.ropes else self.rope

    @property
    def fixed_length(self) -> int | None:
        """Up to how many tokens a text has frequencies that do not depend on its length; None where none do."""
        read = [rope.original_max_length for rope in (self.rope, *self.ropes) if rope is not None and rope.reads_length]
        return min(read) if read else None

    @property
    def query_scale(self) -> float:
        """What scores q·k are multiplied by."""
        return self.head_dim**-0.5 if self.block.query_scale is None else self.block.query_scale

    @property
    def reward_pad_id(self) -> int | None:
        """The pad id of a model with a reward head, which is not read at it; None of other heads and without one."""
        return self.pad_id if self.head is not None and self.head.kind == "reward" else None

    @property
    def reward_pooling(self) -> Literal["last", "mean"]:
        """How a reward head reads a text (`Head.pooling`); "last" of other heads and without one."""
        return "last" if self.head is None else self.head.pooling

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of a reward head's labels; () of other heads and without one."""
        return () if self.head is None else self.head.label_names

    @property
    def head_width(self) -> int:
        """W of the head's output; 0 without a head."""
        if self.head is None:
            return 0
        if self.head.distribution is not None:
            return len(self.head.distribution.support)
        return {"reward": self.head.num_labels, "value": 1, "q": self.vocab_size}[self.head.kind]
