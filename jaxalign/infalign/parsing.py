"""Transformations by the names that command lines and configuration files give them."""

from __future__ import annotations

import functools

import jax
import numpy as np

from jaxalign._checks import check_positive
from jaxalign.infalign import curves, transforms
from jaxalign.infalign.fixed_point import optimal_transform
from jaxalign.infalign.procedures import Procedure, best_of, worst_of
from jaxalign.infalign.transforms import Transform

NAMES = (
    "identity, log, exp:A (A not 0), bon:N, won:N, best_of:N, worst_of:N (N at least 1), and for a beta bon_fp:N, "
    "won_fp:N"
)
RESIDUAL = 1e-6
"""Of a fixed point that is taken for solved [nats]."""


def parse_transform(text: str, *, beta: float | None = None) -> Transform:
    """Gives the transform that a command line names.

    Args:
      text: identity, log, exp:A, bon:N (`best_of_n_power`), won:N (`worst_of_n_power`), best_of:N (c^N, the win rate of
        a response over the best of N of the base) or worst_of:N (1 − (1 − c)^N); for a beta also bon_fp:N and won_fp:N,
        the optimum for best-of-N and worst-of-N (`fixed_transform`).
      beta: the KL weight > 0 that a fixed point is solved for.

    Returns:
      A Transform; the same text and beta give the same function.

    Raises:
      ValueError: another text, with the list of those that there are.
      RuntimeError: as `fixed_transform`.
    """
    name, colon, number = text.strip().partition(":")
    try:
        if name == "identity" and not colon:
            return transforms.identity
        if name == "log" and not colon:
            return transforms.log
        if name == "exp" and colon:
            return transforms.exponential(float(number))
        if name == "bon" and colon:
            return transforms.best_of_n_power(int(number))
        if name == "won" and colon:
            return transforms.worst_of_n_power(int(number))
        if name == "best_of" and colon:
            return best_of(int(number)).cumulative
        if name == "worst_of" and colon:
            return worst_of(int(number)).cumulative
        if needs_beta(text) and colon:
            if beta is None:
                raise ValueError("it is solved for a beta, and none was given")
            return fixed_transform((best_of if name == "bon_fp" else worst_of)(int(number)), beta=float(beta))
    except ValueError as error:
        raise ValueError(f"transform: expected one of {NAMES}; found {text!r} ({error})") from None
    raise ValueError(f"transform: expected one of {NAMES}; found {text!r}")


def needs_beta(text: str) -> bool:
    """Tells whether the transform of a name is solved for one beta.

    Args:
      text: as for `parse_transform`.

    Returns:
      True for bon_fp and won_fp.
    """
    return text.strip().partition(":")[0] in ("bon_fp", "won_fp")


@functools.cache
def fixed_transform(procedure: Procedure, *, beta: float) -> Transform:
    """Gives the optimal transform for a procedure as a function of the quantile: RLHF with it maximises W^P − beta·KL.

    It is solved in float64 and interpolated between the grid's points; its values are in units of the procedure's win
    rate.

    Args:
      procedure: what runs on top.
      beta: the KL weight > 0 of that RLHF, in units of win rate per nat.

    Returns:
      A Transform; equal arguments give the same function.

    Raises:
      ValueError: beta <= 0.
      RuntimeError: the residual stays above 1e-6 nats.

    Source: InfAlign, arXiv 2412.19792.
    """
    check_positive("beta", beta)
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        found = optimal_transform(procedure, beta=beta)
        c, value, residual = np.asarray(curves.grid().c), np.asarray(found.reward), float(found.residual)
    if not residual <= RESIDUAL:
        raise RuntimeError(f"beta: no fixed point was reached at {beta:g}, the residual is {residual:.1e} nats")
    # Arrays of the type that is the default where it is called, not of float64 here.
    return lambda x: transforms.tabulated(c, value)(x)
