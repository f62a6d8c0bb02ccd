"""The leader's gradient through a follower that is trained: theta*(phi) = argmax over theta of J(theta, phi).

`implicit` solves the linear system of the implicit function by Hessian-vector products, `best_response` puts its
derivatives on a trained theta, `unrolled` differentiates through the steps of a short training. `surrogates.nudged`
needs no derivative of the training at all. phi: the leader's parameters, theta: the follower's, both pytrees.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxalign._arrays import with_root_derivatives
from jaxalign._checks import check_count, check_positive, fields_of, is_concrete
from jaxalign.shapes import Scalar
from jaxalign.types import Array, Params


class BilevelObjective(Protocol):
    """A number [] of the follower's parameters and the leader's: J, which the follower maximises, or U, the leader."""

    def __call__(self, follower: Params, leader: Params, /) -> Array: ...


class BilevelParams(NamedTuple):
    """Parameters of both players; a dict of the same names is accepted."""

    leader: Params
    """phi."""
    follower: Params
    """theta: at its optimum for phi, or where its training starts."""


class Implicit(NamedTuple):
    """The leader's gradient at a follower's optimum."""

    value: Scalar
    """[], U(theta, phi)."""
    gradient: Params
    """dU(theta*(phi), phi)/dphi, of the leader's structure."""
    inner_gradient: Scalar
    """[], the norm of dJ/dtheta: 0 at an optimum, where alone the gradient means something."""
    residual: Scalar
    """[], the norm of what the linear solve left, relative to dU/dtheta."""
    products: Array
    """[], Hessian-vector products that were taken."""


def implicit(
    inner_objective: BilevelObjective,
    outer: BilevelObjective,
    params: BilevelParams | Params,
    *,
    damping: float = 1e-3,
    tolerance: float | None = 1e-3,
    steps: int = 10,
    accuracy: float = 1e-6,
) -> Implicit:
    """Gives the leader's gradient through a follower at its optimum, by the implicit function.

    dU/dphi = U_phi + (d²J/dphi dtheta)ᵀ·(−d²J/dtheta² + damping)⁻¹·U_theta. Conjugate gradients take one
    Hessian-vector product each; at the optimum −d²J/dtheta² is symmetric and >= 0, beta times the Fisher information of
    a KL-regularised follower. It is singular along shifts of a softmax, hence the damping.

    Args:
      inner_objective: J(theta, phi), what the follower has maximised.
      outer: U(theta, phi), the leader's utility.
      params: BilevelParams, or {"leader", "follower"}.
      damping: > 0, in units of J's curvature; its error is of its size relative to the curvature.
      tolerance: the largest norm of dJ/dtheta that is taken for an optimum; None for any.
      steps: >= 1, products at most.
      accuracy: of the linear solve, its residual relative to U_theta, at which it stops.

    Returns:
      An Implicit. Under jit its gradient is NaN where dJ/dtheta is above the tolerance.

    Raises:
      ValueError: damping, tolerance or accuracy <= 0, steps < 1; on concrete values a norm of dJ/dtheta above the
        tolerance.
    """
    for name, value in (("damping", damping), ("accuracy", accuracy)):
        check_positive(name, value)
    if tolerance is not None:
        check_positive("tolerance", tolerance)
    check_count("steps", steps, least=1)
    phi, theta = fields_of(params, BilevelParams)
    flat, unravel = ravel_pytree(theta)

    def slope(x: Array, phi: Params) -> Array:
        found: Array = jax.grad(lambda x: inner_objective(unravel(x), phi))(x)
        return found

    value, (driven, direct) = jax.value_and_grad(lambda x, phi: outer(unravel(x), phi), (0, 1))(flat, phi)
    gradient = slope(flat, phi)
    _, hessian = jax.linearize(lambda x: slope(x, phi), flat)
    solved, residual, products = _conjugate(lambda v: damping * v - hessian(v), driven, steps, accuracy)
    through = jax.grad(lambda phi: jnp.vdot(slope(flat, phi), solved))(phi)
    norm = jnp.sqrt(jnp.vdot(gradient, gradient))
    if tolerance is not None:
        if is_concrete(norm) and not float(norm) <= tolerance:
            raise ValueError(
                f"inner_objective: expected an optimum, a gradient of norm at most {tolerance}, found {float(norm):.3g}"
                " (train the follower further, or tolerance=None)"
            )
        through = jax.tree.map(lambda x: jnp.where(norm <= tolerance, x, jnp.nan), through)
    return Implicit(value, jax.tree.map(jnp.add, direct, through), norm, residual, products)


def _conjugate(product: Any, target: Array, steps: int, accuracy: float) -> tuple[Array, Array, Array]:
    """(x, |target − A x|/|target|, products) of A x = target, A symmetric and positive."""
    size = jnp.vdot(target, target)

    def going(carry: tuple[Array, Array, Array, Array, Array]) -> Array:
        return (carry[4] < steps) & (carry[3] > accuracy**2 * size)

    def step(carry: tuple[Array, Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array, Array]:
        x, left, along, norm, taken = carry
        moved = product(along)
        curve = jnp.vdot(along, moved)
        length = norm / jnp.where(curve > 0, curve, jnp.inf)  # a curvature <= 0 is no maximum's: no step along it
        left = left - length * moved
        new = jnp.vdot(left, left)
        return x + length * along, left, left + new / norm * along, new, taken + 1

    start = (jnp.zeros_like(target), target, target, size, jnp.zeros((), jnp.int32))
    x, _, _, norm, taken = jax.lax.while_loop(going, step, start)
    return x, jnp.sqrt(norm / jnp.where(size > 0, size, 1)), taken


def best_response(
    inner_objective: BilevelObjective, params: BilevelParams | Params, *, damping: float = 1e-6, steps: int = 50
) -> Params:
    """Gives the follower's parameters with the derivatives of theta*(phi), in both modes, up to the third.

    Newton steps whose values are taken off again, −d²J/dtheta² + damping solved by conjugate gradients in a rule that
    has a transpose. Where only the gradient is wanted, `implicit` costs half and says how well it is solved.

    Args:
      inner_objective: J(theta, phi).
      params: BilevelParams, or {"leader", "follower"}, the follower at its optimum.
      damping: > 0, in units of J's curvature.
      steps: products of each linear solve at most, >= 1.

    Returns:
      theta, of the same value.

    Raises:
      ValueError: damping <= 0, steps < 1.
    """
    check_positive("damping", damping)
    check_count("steps", steps, least=1)
    phi, theta = fields_of(params, BilevelParams)
    flat, unravel = ravel_pytree(jax.lax.stop_gradient(theta))

    def slope(x: Array) -> Array:
        found: Array = jax.grad(lambda x: inner_objective(unravel(x), phi))(x)
        return found

    def newton(x: Array) -> Array:
        def product(v: Array) -> Array:
            moved: Array = damping * v - jax.jvp(slope, (x,), (v,))[1]
            return moved

        def solve(product: Any, target: Array) -> Array:
            return _conjugate(product, target, steps, 1e-14)[0]

        change: Array = jax.lax.custom_linear_solve(product, slope(x), solve, symmetric=True)
        return change

    return unravel(with_root_derivatives(flat, newton))


def unrolled(
    inner_objective: BilevelObjective,
    outer: BilevelObjective,
    params: BilevelParams | Params,
    *,
    steps: int,
    step_size: float,
) -> Scalar:
    """Gives the leader's utility after some gradient steps of the follower, differentiable through them.

    Right for a follower that really stops after so many steps; for one that trains on, the error is that of its
    training. Each step is computed again in the backward pass, so that memory grows by one theta a step.

    Args:
      inner_objective: J(theta, phi), which the follower climbs.
      outer: U(theta, phi).
      params: BilevelParams, or {"leader", "follower"}, the follower where it starts.
      steps: K >= 1.
      step_size: > 0, of theta <- theta + step_size·dJ/dtheta.

    Returns:
      U(theta_K, phi), [].

    Raises:
      ValueError: steps < 1, step_size <= 0.
    """
    check_count("steps", steps, least=1)
    check_positive("step_size", step_size)
    phi, theta = fields_of(params, BilevelParams)

    @jax.checkpoint
    def step(theta: Params, _: None) -> tuple[Params, None]:
        gradient = jax.grad(inner_objective)(theta, phi)
        return jax.tree.map(lambda x, g: x + (step_size * g).astype(x.dtype), theta, gradient), None

    theta, _ = jax.lax.scan(step, theta, length=steps)
    return outer(theta, phi)
