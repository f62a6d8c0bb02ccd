"""What a reading of laws of rewards is, and the scores that it gives (`critics.reads` holds those that there are)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import NEGATIVE, at_least_float32
from jaxalign._checks import check_positive, is_concrete
from jaxalign._parts import check_function_argument
from jaxalign.types import Array, ArrayLike

Numbers = Mapping[str, Any]


class LogOmega(Protocol):
    """The weights of the support: f(numbers, support [K], log p(x) [B,K]) -> log omega [B,K] or [K], or a pair of it
    and of what was taken out of it, [B,1] or [1]."""

    def __call__(self, numbers: Numbers, support: Array, log_p_prompt: Array, /) -> Array | tuple[Array, Array]: ...


class Value(Protocol):
    """A value of laws: f(numbers, support [K], log p [B,...,K], log p(x) [B,K]) -> [B,...], in units of reward.

    Each number is given as [B,1,…], so that it multiplies what is given and what is returned."""

    def __call__(self, numbers: Numbers, support: Array, log_p: Array, log_p_prompt: Array, /) -> Array: ...


@dataclasses.dataclass(frozen=True)
class Read:
    """A reading of laws of rewards. Hashable, without arrays; its numbers stand in params.

    Fields:
      name: how messages name it.
      numbers: the names of its numbers, of which each is a scalar or [B].
      log_omega: of a log-weight reading; None of a reward reading.
      value: of a reward reading; None of a log-weight reading.
      positive: the numbers that are > 0.
      shares: the numbers that are in (0, 1].
      relative: whether a constant in all rewards leaves the tilt as it is, so that `origin` may be taken out of them.
      free: names of further parameters, of any form.
      on_atoms: in place of `log_omega` or `value` where every reward is a support point; None: the same function.
    """

    name: str
    numbers: tuple[str, ...] = ()
    log_omega: LogOmega | None = None
    value: Value | None = None
    positive: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    on_atoms: Any = None
    shares: tuple[str, ...] = ()
    relative: bool = False


def of(
    *, log_omega: LogOmega | None = None, value: Value | None = None, numbers: tuple[str, ...] = (), name: str = "of"
) -> Read:
    """Makes a reading of one's own.

    Args:
      log_omega: the weights of the support, f(numbers, support [K], log p(x) [B,K]) -> [B,K] or [K].
      value: in its place, a value in units of reward, f(numbers, support, log p [B,...,K], log p(x)) -> [B,...].
      numbers: the names of its numbers in params, each a scalar or one per prompt [B].
      name: how messages name it.

    Returns:
      A Read.

    Raises:
      ValueError: both functions, neither, or what is no function.
    """
    if (log_omega is None) == (value is None):
        raise ValueError(f"of: expected log_omega or value, found {'neither' if value is None else 'both'}")
    check_function_argument("log_omega" if value is None else "value", log_omega if value is None else value)
    return Read(name, tuple(numbers), log_omega, value)


def check_numbers(read: Read, numbers: Any) -> None:
    """Checks the names of a reading's numbers, and their values where they are concrete.

    Raises:
      ValueError: no mapping, other names, a number that should be positive or in (0, 1] and is not, or NaN.
    """
    wanted = (*read.numbers, *read.free)
    if not isinstance(numbers, Mapping) or set(numbers) != set(wanted):
        raise ValueError(f"read: expected numbers {wanted} for {read.name}, found {numbers!r}")
    for name in read.positive:
        check_positive(name, numbers[name])
    for name in read.numbers:
        found = np.asarray(numbers[name]) if is_concrete(numbers[name]) else np.ones(1)
        if np.isnan(found).any():
            raise ValueError(f"{name}: expected a number, found {found}")
        if name in read.shares and not ((found > 0) & (found <= 1)).all():
            raise ValueError(f"{name}: expected a share in (0, 1], found {found}")


def origin(support: Sequence[float]) -> float:
    """The reward that relative readings are set against: 0, or the middle of a support that lies ten times its own
    width from 0: float32 then has too few digits left for its differences.

    Args:
      support: c_1 ≤ … ≤ c_K.

    Returns:
      A constant in units of reward.
    """
    middle, width = (support[0] + support[-1]) / 2, support[-1] - support[0]
    return middle if abs(middle) > 10 * width else 0.0


def log_weights(
    read: Read, numbers: Numbers, support: Array, log_p_prompt: Array, *, atoms: bool
) -> tuple[Array, Array]:
    """The weights of a log-weight reading: (log omega [B,K] with largest entry 0, what was taken out of it [B])."""
    function = read.on_atoms if atoms and read.on_atoms is not None else read.log_omega
    assert function is not None
    log_p_prompt = _finite(log_p_prompt)
    found = function(numbers, support, log_p_prompt)
    found, taken = found if isinstance(found, tuple) else (found, jnp.zeros(1))
    found = at_least_float32(found)
    if found.shape not in (log_p_prompt.shape, support.shape, (1, *support.shape)):
        raise ValueError(
            f"{read.name}: expected log_omega of shape {log_p_prompt.shape}, a weight per prompt and support point, "
            f"found {found.shape}"
        )
    found = jnp.maximum(jnp.broadcast_to(found, log_p_prompt.shape), NEGATIVE)
    shift = found.max(axis=-1)
    # Tested for below, not for above: a NaN must show in every value that rests on it.
    shift = jnp.where(shift < NEGATIVE / 2, 0, shift)
    return jnp.maximum(found - shift[:, None], NEGATIVE), shift + taken[..., 0]


def weigh(log_omega: Array, shift: Array, log_p: Array) -> Array:
    """q [B,...] of a log-weight reading, for laws log_p [B,...,K]; NEGATIVE where a law has no weighted mass."""
    between = (1,) * (log_p.ndim - 2)
    log_omega = log_omega.reshape(log_omega.shape[0], *between, -1)
    total = jax.nn.logsumexp(jnp.maximum(log_p + log_omega, NEGATIVE), axis=-1)
    return jnp.where(total < NEGATIVE / 2, NEGATIVE, total + shift.reshape(-1, *between))


def value_of(read: Read, numbers: Numbers, support: Array, log_p: Array, log_p_prompt: Array, *, atoms: bool) -> Array:
    """q [B,...] of a reward reading, for laws log_p [B,...,K]."""
    function = read.on_atoms if atoms and read.on_atoms is not None else read.value
    assert function is not None
    rows = log_p.ndim - 2

    def aligned(x: ArrayLike) -> Array:
        x = at_least_float32(x)
        return x.reshape(*x.shape, *(1,) * rows) if x.ndim else x

    given = {name: aligned(numbers[name]) if name in read.numbers else numbers[name] for name in numbers}
    found = at_least_float32(function(given, support, _finite(log_p), _finite(log_p_prompt)))
    if found.shape != log_p.shape[:-1]:
        raise ValueError(f"{read.name}: expected a value of shape {log_p.shape[:-1]}, found {found.shape}")
    return found


def _finite(log_p: Array) -> Array:
    """log p with NEGATIVE for −inf, whose product with a cotangent of zero would be NaN."""
    return jnp.maximum(log_p, NEGATIVE)
