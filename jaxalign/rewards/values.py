"""What a Reward may return: one real number per text. Checked wherever a function of the user's is called."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import at_least_float32
from jaxalign._files import printed
from jaxalign._programs import ProgramError, defined_at
from jaxalign.shapes import RewardValues, TextIndex, TextLength, TextMask, TextTokens
from jaxalign.types import Array, CheckedReward, Params, Reward


def function_name(function: Any) -> str:
    """Names a function for an error: MODULE.FUNCTION, through partial applications and checked rewards."""
    while isinstance(function, functools.partial | CheckedReward):
        function = function.func if isinstance(function, functools.partial) else function.score
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '')}.{name}".lstrip(".")


def host_values(values: Any, shape: tuple[int, ...], *, function: Any, rows: str = "") -> Any:
    """Checks what a reward function returned, and leaves its type: numpy's stay numpy's.

    Args:
      values: its result; a tensor of another library is taken as numpy reads it.
      shape: the shape it must have, a number per text.
      function: the function, which the error names.
      rows: of the batch, for the error (`_programs.of_prompts`).

    Returns:
      The values as an array.

    Raises:
      ValueError: another shape; booleans, complex numbers, strings, None or other objects. It says what came.
    """
    expected = f"{function_name(function)}: expected one real number per text, shape {shape}"
    if masked := sum(int(np.ma.count_masked(each)) for each in _masked_arrays(values)):
        raise ProgramError(f"{expected}, found {masked} masked{rows}{defined_at(function)}")
    try:
        array = values if isinstance(values, np.ndarray | np.generic | jax.Array) else _as_array(values)
    except Exception as error:  # of numpy, or of what the object does when it is read as an array
        words = " ".join(str(error).split())
        raise ProgramError(f"{expected}, found {type(values).__name__} ({words}){rows}{defined_at(function)}") from None
    real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    if array.shape != shape or not real:
        found = type(values).__name__ if array.dtype == object else f"shape {array.shape} of {array.dtype}"
        shown = "" if isinstance(array, jax.core.Tracer) else f" ({' '.join(printed(values).split()):.80})"
        raise ProgramError(f"{expected}, found {found}{shown}{rows}{defined_at(function)}")
    return array


def _masked_arrays(values: Any) -> list[Any]:
    """The arrays of numpy.ma in what a function gave: what stands under a mask is no number."""
    return [each for each in (values, *(values if isinstance(values, list | tuple) else ())) if np.ma.isMA(each)]


def check_range(values: Any, *, function: Any, rows: str = "") -> None:
    """Checks that numbers stay finite as the type that jax reads them in: float32, or float64 where that is enabled.

    Args:
      values: of `host_values`.
      function, rows: as in `host_values`.

    Raises:
      ValueError: a finite number is beyond that type.
    """
    dtype = np.dtype(jnp.result_type(float))
    with np.errstate(over="ignore"):
        given, read = np.asarray(values, np.float64), np.asarray(values, dtype)
    lost = given[np.isfinite(given) & ~np.isfinite(read)]
    if lost.size:
        name, where = function_name(function), defined_at(function)
        raise ProgramError(f"{name}: expected numbers that {dtype} holds, found {lost[0]:g}{rows}{where}")


def check_values(values: Any, shape: tuple[int, ...], *, function: Any) -> Array:
    """Checks what a user's reward gave and makes an array of it.

    Args:
      values: what it gave.
      shape: the shape expected, one number per text.
      function: the reward, for the error.

    Returns:
      The values, at least float32.

    Raises:
      ValueError: as of `host_values`: another shape, or what are no real numbers.
    """
    return at_least_float32(host_values(values, shape, function=function))


def _as_array(values: Any) -> Any:
    """A list of numbers as an array; of tracers jax makes one, of all else numpy, which takes any type."""
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))
    return jnp.asarray(values) if traced else np.asarray(values)


def on_host(reward: Any) -> bool:
    """Tells whether a reward runs programs of its own on the device.

    A callback inside a compiled program would wait for the device that waits for it, so such a reward is called between
    programs.

    Args:
      reward: a Reward.

    Returns:
      True for such a reward.
    """
    return bool(getattr(reward, "on_host", False))


def compiled(reward: Reward) -> Reward:
    """Gives a reward under jit; one that is called on the host as it is.

    Args:
      reward: a Reward.

    Returns:
      A Reward of the same numbers.
    """
    return reward if on_host(reward) else jax.jit(reward)


def call_reward(
    reward: Reward,
    params: Params,
    tokens: TextTokens,
    mask: TextMask,
    prompt_length: TextLength,
    index: TextIndex,
) -> RewardValues:
    """Calls a Reward and checks what it returns.

    Args:
      reward: any Reward.
      params: its parameters.
      tokens, mask: the texts, [N,L].
      prompt_length: [N], real prompt tokens of each.
      index: [N], the prompt's row in its set.

    Returns:
      The rewards [N], at least float32.

    Raises:
      ValueError: the result is not one real number per text; it names the function.
    """
    found = reward(params, tokens, mask, prompt_length, index)
    return check_values(found, tuple(np.shape(prompt_length)), function=reward)
