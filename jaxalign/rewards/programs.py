"""Rewards that are programs on the host: functions of numpy arrays or of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._builders import cached
from jaxalign.rewards.values import host_values
from jaxalign.shapes import RewardValues, TextIndex, TextLength, TextMask, TextTokens
from jaxalign.types import Array, Params, Reward, TextReward

Ints = np.ndarray[Any, np.dtype[np.int32]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]
Numbers = np.ndarray[Any, np.dtype[Any]]


class NumpyReward(Protocol):
    """A reward of host arrays: (tokens [N,L], mask [N,L], prompt_length [N], index [N]) -> [N] numbers."""

    def __call__(self, tokens: Ints, mask: Bools, prompt_length: Ints, index: Ints, /) -> Numbers: ...


@cached
def from_numpy(f: NumpyReward) -> Reward:
    """Builds a Reward of a program on host arrays.

    It works under jit through a callback and has no gradient. Its numbers are float32, or float64 where jax has that
    enabled.

    Args:
      f: f(tokens [N,L], mask [N,L], prompt_length [N], index [N]) -> [N] numbers, all numpy arrays.

    Returns:
      A Reward whose params are None.

    Raises:
      ValueError: when it is used, f returns anything but one real number per row.
    """
    return _from_numpy(f, f)


def _from_numpy(f: NumpyReward, named: NumpyReward | TextReward) -> Reward:
    """As `from_numpy`, with errors that name the function `named`."""

    def dtype() -> np.dtype[Any]:
        return np.dtype(jnp.result_type(float))

    def call(tokens: Any, mask: Any, prompt_length: Any, index: Any) -> Numbers:
        found = f(*(np.asarray(a) for a in (tokens, mask, prompt_length, index)))
        return np.asarray(host_values(found, np.shape(prompt_length), function=named), dtype())

    def reward(
        params: Params, tokens: TextTokens, mask: TextMask, prompt_length: TextLength, index: TextIndex
    ) -> RewardValues:
        shape = np.empty(prompt_length.shape, dtype())
        found: Array = jax.pure_callback(call, shape, tokens, mask, prompt_length, index, vmap_method="sequential")
        return found

    return reward


@cached
def from_text(decode: Callable[[Sequence[int]], str], f: TextReward) -> Reward:
    """Builds a Reward of a program on text.

    This is also the explicit path for a reward model with another tokenizer: decode here, encode again inside f.

    Args:
      decode: turns token ids into text (a tokenizer's decode).
      f: f(prompts: list[str], responses: list[str]) -> one number per response.

    Returns:
      A Reward whose params are None.

    Raises:
      ValueError: when it is used, f returns anything but one real number per response.
    """

    def score(tokens: Ints, mask: Bools, prompt_length: Ints, index: Ints) -> Numbers:
        rows = [row[real].tolist() for row, real in zip(tokens, mask.astype(bool), strict=True)]
        prompts = [decode(row[:n]) for row, n in zip(rows, prompt_length.tolist(), strict=True)]
        responses = [decode(row[n:]) for row, n in zip(rows, prompt_length.tolist(), strict=True)]
        found: Numbers = host_values(f(prompts, responses), prompt_length.shape, function=f)
        return found

    return _from_numpy(score, f)
