"""python -m eval.studies bilevel: leaders that climb through one follower and are answered by another, exactly

Random processes of a few tokens. A leader is a table of rewards of partial texts in [0, bound], from which the reward
of a whole response is that of its last token. Three followers answer it: the closed form of the whole responses'
reward; the base tilted at each token by the reward of the partial text; a policy that takes a few gradient steps on
E[r] − beta·KL from the base. Each leader climbs its utility through one follower by exact gradients, and all three
answer it. Everything is enumerated; intervals are over processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign import commands, gibbs, shaping, tree
from jaxalign.types import Array

from . import common


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.studies bilevel."""

    processes: int = 40
    """Random processes."""
    vocabulary: int = 3
    """Tokens, one of which ends a response."""
    horizon: int = 4
    """Longest response [tokens]."""
    bound: float = 2.0
    """Bound of the leader's reward [units of reward]."""
    beta: float = 1.0
    """KL weight of the followers [units of reward per nat]."""
    steps: int = 400
    """Steps of each leader."""
    follower_steps: int = 16
    """Gradient steps of the trained follower."""
    follower_step_size: float = 2.0
    """Size of each [nats per unit of reward]."""


Answer = Callable[[Array, Array], Array]
"""(base table [S,V], the leader's table [S,V]) -> log-probability of each response [M]."""


def followers(config: Config, process: tree.Tree) -> dict[str, Answer]:
    """Name -> what answers a leader's table.

    Args:
      config: KL weight, and steps of the trained follower.
      process: the tokens and the horizon.

    Returns:
      The three followers.
    """
    state, token = (np.zeros(process.num_responses, int) for _ in range(2))
    for s, row in enumerate(process.leaf):
        for z, response in enumerate(row):
            if response >= 0:
                state[response], token[response] = s, z

    def closed_form(base: Array, table: Array) -> Array:
        log_base = tree.response_log_prob(process, base)
        found: Array = gibbs.log_policy(log_base, table[state, token], beta=config.beta)
        return found

    def tokens(base: Array, table: Array) -> Array:
        found: Array = tree.response_log_prob(process, tree.tilted_policy(base, table, beta=config.beta))
        return found

    def trained(base: Array, table: Array) -> Array:
        log_base = tree.response_log_prob(process, base)

        def law(theta: Array) -> Array:
            found: Array = tree.response_log_prob(process, jax.nn.log_softmax(theta))
            return found

        def inner(theta: Array, table: Array) -> Array:
            log_prob = law(theta)
            return gibbs.utility(log_prob, table[state, token]) - config.beta * gibbs.kl(log_prob, log_base)

        both = {"leader": table, "follower": base}
        count, size = config.follower_steps, config.follower_step_size
        return shaping.unrolled(inner, lambda theta, _: law(theta), both, steps=count, step_size=size)

    return {"closed form": closed_form, "tokens": tokens, "trained": trained}


def run(config: Config) -> list[dict[str, Any]]:
    """All rows; writes bilevel.json and bilevel.png."""
    common.check(config)
    process = tree.Tree(config.vocabulary, config.horizon)
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(config.seed), config.processes)
        base, utility = jax.vmap(lambda key: tree.random(key, process, dtype=jnp.float64))(keys)
        answers = followers(config, process)
        log_base = jax.vmap(lambda table: tree.response_log_prob(process, table))(base)
        best = shaping.optimal_threshold(utility, log_base=log_base, gain=config.bound / config.beta)
        rows: list[dict[str, Any]] = [
            {"leader": "none", "follower": "base"} | common.estimate("utility", gibbs.utility(log_base, utility))
        ]
        for leader, through in answers.items():
            table = jax.jit(jax.vmap(lambda b, u, through=through: _climb(config, through, b, u)))(base, utility)
            for name, answer in answers.items():
                found = jax.jit(jax.vmap(answer))(base, table)
                delivered = gibbs.utility(found, utility)
                row = {"leader": leader, "follower": name} | common.estimate("utility", delivered)
                row |= common.estimate("short_of_optimum", best - delivered)
                rows.append(row | common.estimate("kl", gibbs.kl(found, log_base)))
    out = common.report("bilevel", config, rows)
    figure, axes = common.pyplot().subplots(figsize=(6, 4), layout="constrained")
    common.bars(axes, rows, list(answers))
    axes.legend(frameon=False, fontsize=8)
    common.save(figure, out / "bilevel.png")
    return rows


def _climb(config: Config, answer: Answer, base: Array, utility: Array) -> Array:
    """The table [S,V] that delivers most through a follower, by Adam on its logits from bound/2."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.2, config.steps))

    def paid(logits: Array) -> Array:
        return config.bound * jax.nn.sigmoid(logits)

    def loss(logits: Array) -> Array:
        return -gibbs.utility(answer(base, paid(logits)), utility)

    def step(carry: tuple[Array, optax.OptState], _: None) -> tuple[tuple[Array, optax.OptState], None]:
        logits, state = carry
        update, state = optimizer.update(jax.grad(loss)(logits), state)
        return (logits + update, state), None

    start = jnp.zeros(base.shape, base.dtype)
    (logits, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=config.steps)
    return paid(logits)


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)
