"""Calibrated rewards on random prompts solved exactly, for the study `infalign`: what it costs that calibration rests
on K samples, and what it gains over raw rewards at one KL weight for prompts of different scale."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import gibbs, infalign
from jaxalign.types import Array

from . import common


@dataclasses.dataclass(frozen=True)
class Options(common.Options):
    """Options of these tables."""

    prompts: int = 200
    """Random prompts of the finite tables and of equal mean KL."""
    outcomes: int = 64
    """Outcomes of each."""
    tables: tuple[int, ...] = (4, 8, 16, 32, 100, 1000)
    """Base samples K per prompt that calibration rests on."""
    mean_kl: float = 0.5
    """Mean KL over prompts of both [nats]."""


class Prompts(NamedTuple):
    """Random prompts over a finite set of outcomes."""

    log_base: Array
    """[prompts, outcomes], in nats."""
    reward: Array
    """[prompts, outcomes], ~ N(0,1), without ties."""
    rank: Array
    """[prompts, outcomes], the reward's order from 0."""


def random_prompts(config: Options) -> Prompts:
    """Draws prompts.

    Args:
      config: how many, and over how many outcomes.

    Returns:
      Prompts.
    """
    rng = np.random.default_rng(config.seed)
    log_base = np.log(rng.dirichlet(np.ones(config.outcomes), config.prompts))
    reward = rng.normal(size=log_base.shape)
    return Prompts(jnp.asarray(log_base), jnp.asarray(reward), infalign.ranks(reward))


@functools.partial(jax.jit, static_argnames="kl")
def at_mean_kl(log_base: Array, reward: Array, *, kl: float) -> Array:
    """Gives the tilted policies of the one beta at which their mean KL to the base is a given one.

    Args:
      log_base: [prompts, outcomes], in nats.
      reward: [prompts, outcomes].
      kl: the mean KL, in nats.

    Returns:
      [prompts, outcomes], log-probabilities in nats.
    """

    def policy(log_beta: Array) -> Array:
        return gibbs.log_policy(log_base, reward, beta=jnp.exp(log_beta))

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = (low + high) / 2
        above = gibbs.kl(policy(middle), log_base).mean() > kl
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    ends = jnp.log(jnp.array([1e-6, 1e4], log_base.dtype))
    low, high = jax.lax.fori_loop(0, 60, halve, (ends[0], ends[1]))
    return policy((low + high) / 2)


GOALS = {
    "identity, alone": ("identity", infalign.none()),
    "exp:10, best of 4": ("exp:10", infalign.best_of(4)),
    "exp:-10, worst of 4": ("exp:-10", infalign.worst_of(4)),
}


def finite_tables(config: Options, prompts: Prompts) -> list[dict[str, Any]]:
    """Rows of win rates where the calibrated reward rests on K base samples a prompt."""
    base = jnp.exp(prompts.log_base)
    rng = np.random.default_rng([config.seed, 1])
    rows = []
    for size in (*config.tables, None):
        row: dict[str, Any] = {"samples K": "exact" if size is None else str(size)}
        c = infalign.mid_rank(base, rank=prompts.rank)
        if size is not None:
            law = np.asarray(base) / np.asarray(base).sum(-1, keepdims=True)
            drawn = np.stack([rng.choice(config.outcomes, size, p=p) for p in law])
            c = infalign.calibrate(
                prompts.reward, reference=jnp.take_along_axis(prompts.reward, jnp.asarray(drawn), axis=-1)
            )
        for goal, (text, procedure) in GOALS.items():
            policy = jnp.exp(at_mean_kl(prompts.log_base, infalign.parse_transform(text)(c), kl=config.mean_kl))
            row |= common.estimate(
                goal, infalign.procedure_win_rate(policy, base=base, rank=prompts.rank, procedure=procedure)
            )
        rows.append(row)
    return rows


def equal_mean_kl(config: Options, prompts: Prompts) -> list[dict[str, Any]]:
    """Rows of win rates with one beta for all prompts, whose rewards have scales e^N(0,1)."""
    rng = np.random.default_rng([config.seed, 2])
    base = jnp.exp(prompts.log_base)
    raw = prompts.reward * np.exp(rng.normal(size=(config.prompts, 1)))
    mean = (base * raw).sum(-1, keepdims=True)
    deviation = jnp.sqrt((base * (raw - mean) ** 2).sum(-1, keepdims=True))
    rewards = {
        "raw": raw,
        "z-score": (raw - mean) / deviation,
        "calibrated": infalign.mid_rank(base, rank=prompts.rank),
    }
    rows = []
    for name, reward in rewards.items():
        policy = at_mean_kl(prompts.log_base, reward, kl=config.mean_kl)
        kl = gibbs.kl(policy, prompts.log_base)
        found = common.estimate("win rate alone", infalign.win_rate(jnp.exp(policy), against=base, rank=prompts.rank))
        rows.append({"reward at one beta": name} | found | {"mean KL": float(kl.mean()), "largest KL": float(kl.max())})
    return rows
