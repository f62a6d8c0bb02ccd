"""Values by backward induction, one vectorised level at a time. Every value V [S] is BEFORE the token is drawn in s;
every Q [S,V] after it: Q(s,z) = V(sz), or the reward of the response that z completes. Values of dead states are 0."""

from __future__ import annotations

import functools
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxalign._arrays import NEGATIVE, at_least_float32, is_supported, log_mean_exp
from jaxalign.shapes import PerResponse, StateTable, StateValues
from jaxalign.tree.structure import Tree, check_table
from jaxalign.types import Array, ArrayLike


class _Backup(Protocol):
    """The values [n] of one level's states from their Q(s,·) [n,V]; at: the level's slice of [S]."""

    def __call__(self, q: Array, at: slice) -> Array: ...


def _backward(tree: Tree, reward: Array, backup: _Backup) -> Array:
    """V [S], V(s) = backup(Q(s,·) [n,V], the level's slice) from the deepest level to the root."""
    leaf = jnp.asarray(tree.leaf)
    paid = reward[jnp.maximum(leaf, 0)]
    levels: list[Array] = []
    below = jnp.zeros((tree.vocab_size**tree.horizon,), reward.dtype)
    for depth in reversed(range(tree.horizon)):
        at = tree.level(depth)
        q = jnp.where(leaf[at] >= 0, paid[at], below.reshape(-1, tree.vocab_size))
        below = jnp.where(jnp.asarray(tree.alive)[at], backup(q, at), 0)
        levels.append(below)
    return jnp.concatenate(levels[::-1])


def _mean(log_policy: Array, q: Array) -> Array:
    weight = jnp.exp(log_policy)
    return jnp.where(weight > 0, weight * q, 0).sum(axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def value(tree: Tree, log_policy: StateTable, reward: PerResponse) -> StateValues:
    """Gives the value of a policy, V_pi(s) = E_pi[r | s]; V_ref for the base.

    Args:
      tree: the tree.
      log_policy: [S,V], in nats.
      reward: [M].

    Returns:
      [S], in units of reward.

    Raises:
      ValueError: a table of another shape.
    """
    check_table(tree, "log_policy", log_policy, "SV")
    check_table(tree, "reward", reward, "M")
    log_policy, reward = at_least_float32(log_policy), at_least_float32(reward)
    return _backward(tree, reward, lambda q, at: _mean(log_policy[at], q))


@functools.partial(jax.jit, static_argnums=0)
def q_values(tree: Tree, values: StateValues, *, reward: PerResponse) -> StateTable:
    """Gives Q(s,z) of values: V(sz), or the reward of the response that z completes.

    Args:
      tree: the tree.
      values: [S], V.
      reward: [M].

    Returns:
      [S,V], in units of reward.

    Raises:
      ValueError: a table of another shape.
    """
    check_table(tree, "values", values, "S")
    check_table(tree, "reward", reward, "M")
    leaf = jnp.asarray(tree.leaf)
    child = jnp.arange(tree.num_states)[:, None] * tree.vocab_size + 1 + jnp.arange(tree.vocab_size)
    inner = values[jnp.minimum(child, tree.num_states - 1)]
    return jnp.where(leaf >= 0, at_least_float32(reward)[jnp.maximum(leaf, 0)], inner)


@functools.partial(jax.jit, static_argnums=0)
def soft_value(tree: Tree, log_ref: StateTable, reward: PerResponse, *, beta: ArrayLike) -> StateValues:
    """Gives the soft value, V_soft(s) = beta·log E_ref[exp(r/beta) | s].

    It is beta·logsumexp_z(log pi_ref(z|s) + V_soft(sz)/beta), level by level.

    Args:
      tree: the tree.
      log_ref: [S,V], the base policy, in nats.
      reward: [M].
      beta: the KL weight > 0, in units of reward per nat.

    Returns:
      [S], in units of reward.

    Raises:
      ValueError: a table of another shape.
    """
    check_table(tree, "log_ref", log_ref, "SV")
    check_table(tree, "reward", reward, "M")
    log_ref, reward = at_least_float32(log_ref), at_least_float32(reward)

    def backup(q: Array, at: slice) -> Array:
        inside = is_supported(log_ref[at])
        top = jnp.where(inside, q, NEGATIVE).max(axis=-1, keepdims=True)
        return top[:, 0] + beta * log_mean_exp(log_ref[at], jnp.where(inside, (q - top) / beta, 0))

    return _backward(tree, reward, backup)


@jax.jit
def tilted_policy(log_policy: StateTable, q: StateTable, *, beta: ArrayLike) -> StateTable:
    """Gives one tilt in tables, log softmax_z(log pi(z|s) + q(s,z)/beta).

    Args:
      log_policy: [S,V], in nats.
      q: [S,V].
      beta: the KL weight > 0, in units of q per nat.

    Returns:
      [S,V], in nats.
    """
    log_policy, q = at_least_float32(log_policy), at_least_float32(q)
    # Differences of q before the division: beside q/beta of 1e7 log_policy would be lost.
    top = jnp.where(is_supported(log_policy), jax.lax.stop_gradient(q), -jnp.inf).max(axis=-1, keepdims=True)
    return jax.nn.log_softmax(log_policy + (q - jnp.where(jnp.isfinite(top), top, 0)) / beta)


def optimal_policy(tree: Tree, log_ref: StateTable, reward: PerResponse, *, beta: ArrayLike) -> StateTable:
    """Gives the token-level factors of the Gibbs optimum, pi*(z|s) = pi_ref(z|s)·exp((V_soft(sz) − V_soft(s))/beta).

    Args:
      tree: the tree.
      log_ref: [S,V], the base policy, in nats.
      reward: [M].
      beta: the KL weight > 0, in units of reward per nat.

    Returns:
      [S,V], in nats.

    Raises:
      ValueError: a table of another shape.
    """
    # Less the largest reward that the base can reach: a soft value of 1e6 would know beta·log Z to a 16th alone.
    top = jax.lax.stop_gradient(max_value(tree, log_ref, reward)[0])
    below = at_least_float32(reward) - jnp.where(jnp.isfinite(top), top, 0)
    q = q_values(tree, soft_value(tree, log_ref, below, beta=beta), reward=below)
    result: Array = tilted_policy(log_ref, q, beta=beta)
    return result


def transfer_value(tree: Tree, log_ref: StateTable, reward: PerResponse, *, beta: ArrayLike) -> StateValues:
    """Gives the value of the Gibbs optimum itself, V_TQ(s) = E_{pi*_beta}[r | s].

    Args:
      tree: the tree.
      log_ref: [S,V], the base policy, in nats.
      reward: [M].
      beta: the KL weight > 0, in units of reward per nat.

    Returns:
      [S], in units of reward.

    Raises:
      ValueError: a table of another shape.

    Source: Transfer Q*, arXiv 2405.20495.
    """
    result: Array = value(tree, optimal_policy(tree, log_ref, reward, beta=beta), reward)
    return result


@functools.partial(jax.jit, static_argnums=0)
def max_value(tree: Tree, log_ref: StateTable, reward: PerResponse) -> StateValues:
    """Gives the largest reward that the base can still reach from each state.

    Args:
      tree: the tree.
      log_ref: [S,V], the base policy, in nats.
      reward: [M].

    Returns:
      [S], in units of reward.

    Raises:
      ValueError: a table of another shape.
    """
    check_table(tree, "log_ref", log_ref, "SV")
    check_table(tree, "reward", reward, "M")
    log_ref = at_least_float32(log_ref)
    return _backward(
        tree, at_least_float32(reward), lambda q, at: jnp.where(is_supported(log_ref[at]), q, NEGATIVE).max(axis=-1)
    )
