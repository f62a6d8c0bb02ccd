"""Transformations Phi of a calibrated reward c in [0, 1]: plain functions [...] -> [...], increasing, differentiable.

RLHF with reward Phi(C) and KL weight beta aligns for an inference-time procedure. The best Phi for best-of-N and
worst-of-N solves a fixed point (`fixed_point`); the forms below come close. All but the logarithm run from 0 to 1 or
from −1 to 0, so that a training loop sees rewards of one size. Source: InfAlign, arXiv 2412.19792.
"""

from __future__ import annotations

import functools
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import at_least_float32
from jaxalign._checks import is_concrete
from jaxalign.shapes import Numbers
from jaxalign.types import Array, ArrayLike


class Transform(Protocol):
    """Phi: calibrated rewards [...] in [0, 1] -> rewards [...]."""

    def __call__(self, c: Array, /) -> Array: ...


def identity(c: ArrayLike) -> Numbers:
    """Gives Phi(c) = c, which is optimal for the standard win rate.

    Args:
      c: [...], calibrated rewards.

    Returns:
      [...], at least float32.
    """
    return at_least_float32(c)


def log(c: ArrayLike) -> Numbers:
    """Gives Phi(c) = log c, whose tilt is the law of best-of-(1 + 1/beta), the target of best-of-n distillation.

    Args:
      c: [...], calibrated rewards; calibrate with smooth=True, so that none is 0.

    Returns:
      [...]; −inf at 0.
    """
    return jnp.log(at_least_float32(c))


@functools.cache
def exponential(a: float) -> Transform:
    """Gives Phi(c) = (e^{ac} − 1)/(e^a − 1) for a > 0, (1 − e^{ac})/(1 − e^a) for a < 0.

    That is sign(a)·e^{ac}, shifted and scaled to run from 0 to 1. A beta for sign(a)·e^{ac} itself is beta/|e^a − 1|
    here.

    Args:
      a: not 0. a > 0 stresses the top quantiles (best-of-N), a < 0 the bottom (worst-of-N).

    Returns:
      A Transform; the same a gives the same function.

    Raises:
      ValueError: a that is 0 or not finite, or whose size is below 1e-30 or above 1e30.
    """
    a = float(a)
    if not 1e-30 <= abs(a) <= 1e30:
        raise ValueError(f"a: expected a finite number that is not 0, of size 1e-30 to 1e30, found {a}")

    def transform(c: ArrayLike) -> Array:
        c = at_least_float32(c)
        if a < 0:
            return jnp.expm1(a * c) / math.expm1(a)
        # e^{a(c−1)}·(1 − e^{−ac})/(1 − e^{−a}): no e^a, which overflows.
        return jnp.exp(a * (c - 1)) * jnp.expm1(-a * c) / math.expm1(-a)

    return transform


@functools.cache
def best_of_n_power(n: int) -> Transform:
    """Gives Phi(c) = c^(2N−1), the shape of the optimal transform for best-of-N as beta -> inf.

    Args:
      n: N >= 1.

    Returns:
      A Transform; the same N gives the same function.

    Raises:
      ValueError: no whole number of at least 1.
    """
    _check_n(n)
    return lambda c: at_least_float32(c) ** (2 * n - 1)


@functools.cache
def worst_of_n_power(n: int) -> Transform:
    """Gives Phi(c) = −(1 − c)^(2N−1), the shape of the optimal transform for worst-of-N as beta -> inf.

    Args:
      n: N >= 1.

    Returns:
      A Transform; the same N gives the same function.

    Raises:
      ValueError: no whole number of at least 1.
    """
    _check_n(n)
    return lambda c: -((1 - at_least_float32(c)) ** (2 * n - 1))


def tabulated(c: ArrayLike, value: ArrayLike) -> Transform:
    """Gives Phi by linear interpolation, constant beyond the table's ends: a fixed point as a transform.

    Args:
      c: [M], M >= 2 sorted quantiles.
      value: [M], Phi at these.

    Returns:
      A Transform.

    Raises:
      ValueError: shapes; on concrete values also c not sorted, a value that is NaN or falls.
    """
    c, value = at_least_float32(c), at_least_float32(value)
    if c.ndim != 1 or c.shape != value.shape or c.shape[0] < 2:
        raise ValueError(f"c, value: expected one shape [M], M at least 2, found {c.shape} and {value.shape}")
    if is_concrete(c) and not (np.diff(np.asarray(c)) >= 0).all():
        raise ValueError("c: expected sorted quantiles, found some that fall")
    if is_concrete(value):
        _check_steps("value", np.asarray(value))
    return lambda x: jnp.interp(at_least_float32(x), c, value)


def transformed(transform: Transform, c: Array) -> Array:
    """Applies a transform to quantiles and checks what it returns.

    Args:
      transform: Phi.
      c: [...], quantiles in [0, 1].

    Returns:
      Phi(c) [...], at least float32.

    Raises:
      ValueError: the result has another shape or is no array of real numbers; it names the function.
    """
    value = transform(c)
    name = getattr(transform, "__qualname__", repr(transform))
    real = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)
    if not real or value.shape != c.shape:
        found = f"shape {value.shape} of {value.dtype}" if hasattr(value, "dtype") else type(value).__name__
        raise ValueError(f"transform {name}: expected real numbers of shape {c.shape}, found {found}")
    return at_least_float32(value)


def check_increasing(transform: Transform, *, name: str = "transform") -> None:
    """Checks that a transform is finite inside (0, 1), never falls there, and is no constant.

    A map that falls would train for the worse. It is looked at on the host, at 1023 equal steps.

    Args:
      transform: Phi.
      name: the argument, for the error.

    Raises:
      ValueError: a transform that is none of these, or changes the shape.
    """
    with jax.ensure_compile_time_eval():
        values = np.asarray(transformed(transform, jnp.arange(1, 1024) / 1024))
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: expected finite values inside (0, 1), found NaN or infinity")
    _check_steps(name, values)
    if values[0] == values[-1]:
        raise ValueError(f"{name}: expected a transform that increases, found a constant")


def _check_steps(name: str, values: np.ndarray) -> None:
    # Rounding of a value may make a flat stretch fall by its last digit.
    slack = 4 * np.finfo(values.dtype).eps * np.abs(values[np.isfinite(values)]).max(initial=0)
    if not (np.diff(values) >= -slack).all():
        raise ValueError(f"{name}: expected values that do not decrease in c, found NaN or some that do")


def _check_n(n: int) -> None:
    if isinstance(n, bool) or int(n) != n or n < 1:
        raise ValueError(f"n: expected a whole number of at least 1, found {n}")
