"""Laws of the reward from every prefix of a small tree, by enumeration, and the laws of responses that readings decode.

Prefixes are numbered by depth: 0 is the prompt, 1 to 3 have one token, the last 81 are the finished responses."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import losses, tree
from jaxalign.critics import _reading, reads

TREE = tree.Tree(3, 4, eos_id=None)
ATOMS = tuple(np.arange(-3, 3.25, 0.5))
PREFIX = np.stack([(3**d - 1) // 2 + np.arange(81) // 3 ** (4 - d) for d in range(5)], axis=1)  # [81,5] of responses


def grid(count: int) -> tuple[float, ...]:
    return tuple(np.linspace(-3, 3, count))


class World(NamedTuple):
    """Tables over the tree, in float64."""

    log_ref: np.ndarray
    """[40,3]."""
    log_base: np.ndarray
    """[81], the base's law over responses."""
    reward: np.ndarray
    """[81]."""


@functools.cache
def world(name: str) -> World:
    """A: rewards anywhere in [-3, 3]. B: the same, rounded to halves."""
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(40, 3))
    reward = np.clip(1.2 * rng.normal(size=81), -3, 3)
    log_ref = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    log_base = log_ref[PREFIX[:, :4], np.arange(81)[:, None] // 3 ** (3 - np.arange(4)) % 3].sum(axis=1)
    return World(log_ref, log_base, reward if name == "A" else np.round(2 * reward) / 2)


def prefix_mean(log_law: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The mean of a table [81,...] of responses given each prefix, [121,...], under a law [81]."""
    weight = np.exp(log_law)
    means = []
    for depth in range(5):
        own = weight.reshape(3**depth, -1)
        blocks = table.reshape(3**depth, 3 ** (4 - depth), *table.shape[1:])
        means.append(np.einsum("py,py...->p...", own / own.sum(axis=1, keepdims=True), blocks))
    return np.concatenate(means)


@jax.jit
def _two_hot(reward, support):
    return losses.two_hot(reward, support=support)


def two_hot(reward, support) -> np.ndarray:
    return np.asarray(_two_hot(jnp.asarray(reward), jnp.asarray(support)))


@functools.cache
def laws(name: str, support: tuple[float, ...]) -> np.ndarray:
    """p(s) [121,K] of every prefix under the base."""
    return prefix_mean(world(name).log_base, two_hot(world(name).reward, support))


def log_of(p: np.ndarray) -> np.ndarray:
    return np.log(p, out=np.full_like(p, -np.inf), where=p != 0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def compute(read: reads.Read, atoms: bool, numbers, support, log_p, log_p_prompt):
    """q [B,...] of either kind of reading."""
    if read.value is None:
        return _reading.weigh(*_reading.log_weights(read, numbers, support, log_p_prompt, atoms=atoms), log_p)
    return _reading.value_of(read, numbers, support, log_p, log_p_prompt, atoms=atoms)


def read_at(read: reads.Read, p: np.ndarray, support: tuple[float, ...], **numbers) -> np.ndarray:
    """q [N] of laws p [N,K], of which the first is the prompt's; rewards are support points where it is ATOMS."""
    _reading.check_numbers(read, numbers)
    log_p = jnp.asarray(log_of(p))
    numbers = {name: jnp.asarray(value, log_p.dtype) for name, value in numbers.items()}
    points = jnp.asarray(support, log_p.dtype)
    return np.asarray(compute(read, support == ATOMS, numbers, points, log_p[None], log_p[:1]))[0]


def decoded(name: str, read: reads.Read, support: tuple[float, ...], **numbers) -> np.ndarray:
    """log pi(y) [81] of the tilt with beta 1 by a reading, token by token."""
    q = read_at(read, laws(name, support), support, **numbers)
    tilted = tree.tilted_policy(world(name).log_ref, q[1:].reshape(40, 3), beta=1.0)
    return np.asarray(tree.response_log_prob(TREE, tilted))


def reweighed(name: str, weight: np.ndarray) -> np.ndarray:
    """log of pi_ref(y)·weight(y)/Σ [81]."""
    total = np.exp(world(name).log_base) * weight
    return log_of(total / total.sum())


def mean_and_kl(name: str, log_law: np.ndarray) -> tuple[float, float]:
    """(E r, KL to the base) of a law over responses."""
    p = np.exp(log_law)
    return float(p @ world(name).reward), float(np.where(p > 0, p * (log_law - world(name).log_base), 0).sum())
