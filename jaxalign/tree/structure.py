"""The states and responses of a small decision process, enumerated once on the host."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._checks import check_rng
from jaxalign.shapes import PerResponse, StateTable
from jaxalign.types import Array, ArrayLike


@dataclasses.dataclass(frozen=True)
class Tree:
    """All token sequences of up to `horizon` tokens over `vocab_size`; hashable, static under jit.

    States are heap-numbered: the root is 0 and the child of state s under token z is s·V + 1 + z. There are
    S = (V^T − 1)/(V − 1) states in which a token is drawn; those after an EOS are dead, never reached. Tables of
    policies and Q are [S,V]. The M responses are numbered in the order of the rows of `responses`.

    Raises:
      ValueError: a vocabulary below 2, a horizon below 1, an eos_id outside the vocabulary, or more than 2^24
        sequences.
    """

    vocab_size: int
    """V >= 2."""
    horizon: int
    """T >= 1, the longest response."""
    eos_id: int | None = 0
    """The token that ends a response, included in it; one without an EOS ends at T tokens. None: every response has
    exactly T tokens."""

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size: expected at least 2, found {self.vocab_size}")
        if self.horizon < 1:
            raise ValueError(f"horizon: expected at least 1, found {self.horizon}")
        if self.eos_id is not None and not 0 <= self.eos_id < self.vocab_size:
            raise ValueError(f"eos_id: expected an id in [0, {self.vocab_size}) or None, found {self.eos_id}")
        if self.vocab_size**self.horizon > 1 << 24:
            raise ValueError(f"horizon: expected at most 2^24 sequences, found {self.vocab_size}^{self.horizon}")

    @property
    def num_states(self) -> int:
        """S."""
        result: int = (self.vocab_size**self.horizon - 1) // (self.vocab_size - 1)
        return result

    @property
    def num_responses(self) -> int:
        """M."""
        return len(self.responses[0])

    def level(self, depth: int) -> slice:
        """Gives the states of one depth.

        Args:
          depth: tokens drawn before them, from 0.

        Returns:
          A contiguous slice of [S].
        """
        first = (self.vocab_size**depth - 1) // (self.vocab_size - 1)
        return slice(first, first + self.vocab_size**depth)

    @functools.cached_property
    def responses(self) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [M,T] int32, zeros after the end; mask [M,T] bool, EOS included)."""
        return self._enumeration[:2]

    @functools.cached_property
    def nodes(self) -> np.ndarray:
        """The state [M,T] in which each token is drawn; 0 where the mask is False."""
        return self._enumeration[2]

    @functools.cached_property
    def leaf(self) -> np.ndarray:
        """The response [S,V] that token z of state s completes; -1 where it completes none."""
        return self._enumeration[3]

    @functools.cached_property
    def alive(self) -> np.ndarray:
        """[S]: False below an EOS."""
        alive = np.ones(self.num_states, bool)
        if self.eos_id is not None:
            for depth in range(1, self.horizon):
                parent = alive[self.level(depth - 1)][:, None] & (np.arange(self.vocab_size) != self.eos_id)
                alive[self.level(depth)] = parent.reshape(-1)
        return alive

    @functools.cached_property
    def depth(self) -> np.ndarray:
        """Tokens drawn before state s, [S]."""
        return np.repeat(np.arange(self.horizon), [self.vocab_size**d for d in range(self.horizon)])

    @functools.cached_property
    def _enumeration(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        v, horizon = self.vocab_size, self.horizon
        ends = []  # (state, token) pairs that complete a response
        for depth in range(horizon):
            states = np.arange(self.num_states)[self.level(depth)]
            states = states[self.alive[states]]
            tokens = (
                np.arange(v) if depth == horizon - 1 else np.array([self.eos_id] if self.eos_id is not None else [])
            )
            pairs = np.stack(np.meshgrid(states, tokens.astype(int), indexing="ij"), axis=-1).reshape(-1, 2)
            ends.append(pairs)
        pairs = np.concatenate(ends)
        lengths = np.repeat(np.arange(1, horizon + 1), [len(e) for e in ends])
        count = len(pairs)
        tokens, nodes = np.zeros((count, horizon), np.int32), np.zeros((count, horizon), np.int32)
        state, token, rows = pairs[:, 0].copy(), pairs[:, 1].copy(), np.arange(count)
        for back in range(horizon):
            at = lengths - 1 - back
            live = at >= 0
            tokens[rows[live], at[live]], nodes[rows[live], at[live]] = token[live], state[live]
            token = np.where(state > 0, (state - 1) % v, 0)
            state = np.where(state > 0, (state - 1) // v, 0)
        mask = np.arange(horizon) < lengths[:, None]
        leaf = np.full((self.num_states, v), -1, np.int32)
        leaf[pairs[:, 0], pairs[:, 1]] = np.arange(count)
        return tokens, mask, nodes, leaf


def check_table(tree: Tree, name: str, table: ArrayLike, axes: str) -> None:
    """Checks the shape of a table over a tree.

    Args:
      tree: the tree.
      name: the argument, for the error.
      table: the table.
      axes: "S" for states, "SV" for states and tokens, "M" for responses.

    Raises:
      ValueError: another shape.
    """
    sizes = {"S": tree.num_states, "V": tree.vocab_size, "M": tree.num_responses}
    expected = tuple(sizes[axis] for axis in axes)
    if np.shape(table) != expected:
        raise ValueError(f"{name}: expected a table [{','.join(axes)}] of shape {expected}, found {np.shape(table)}")


def random(rng: Array, tree: Tree, *, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[StateTable, PerResponse]:
    """Draws a policy and a reward.

    Args:
      rng: a key; consumed.
      tree: the tree.
      dtype: of both tables.

    Returns:
      (log_policy [S,V], the log_softmax of N(0,1) logits; reward [M] ~ N(0,1)).

    Raises:
      ValueError: an rng that is no key.
    """
    check_rng(rng)
    base, paid = jax.random.split(rng)
    logits = jax.random.normal(base, (tree.num_states, tree.vocab_size), dtype)
    return jax.nn.log_softmax(logits), jax.random.normal(paid, (tree.num_responses,), dtype)
