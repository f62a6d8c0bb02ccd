"""python -m eval.bench bilevel: a leader's gradient by tokens against an iteration of train.rl (RLOO) of equal samples.

A reward model that leads token by token is timed twice: stepped through each response, as any follower is, and with the
candidates of all steps in one pass, as train.shaping trains it. Beside it, the Hessian-vector products that an implicit
gradient takes, and its error.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import bilevel, commands, critics, decoding, gibbs, models, policies, shaping, tree
from jaxalign._arrays import repeat_rows
from jaxalign.training import tilted_texts
from jaxalign.types import Array

from . import common, rl


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.bench bilevel."""

    batch: int = 16
    """Responses of a gradient, and of an iteration of train.rl."""
    samples: int = 4
    """Responses per prompt."""
    prompt: int = 32
    """Prompt length [tokens]."""
    new: int = 64
    """New tokens per response; no row stops early."""
    candidates: int = 8
    """Next tokens that a reward model weighs."""
    repeats: int = 6
    """Timed runs of each side; the median is printed."""
    layers: int = 2
    """Layers of the model."""
    width: int = 128
    """Width of the model, a multiple of 64; heads of 64."""
    vocab: int = 384
    """Vocabulary of the model."""
    horizon: int = 4
    """Of the process of the implicit gradient [tokens]."""


def run(config: Config) -> list[dict[str, Any]]:
    """Seconds of each side and their ratio; products, residual and error of the implicit gradient."""
    mesh = common.check(config, (config.batch,))
    if mesh is not None:
        raise ValueError(f"mesh: expected none, found {config.mesh!r}")
    if config.samples < 2 or config.batch % config.samples:
        raise ValueError(f"samples: expected a divisor >= 2 of the batch of {config.batch}, found {config.samples}")
    lm, params = common.build(0, common.config(layers=config.layers, width=config.width, vocab=config.vocab))
    lm = models.LanguageModel(dataclasses.replace(lm.config, eos_ids=()), config.dtype)
    q_lm, q_params = common.build(
        1, common.config(layers=config.layers, width=config.width, vocab=config.vocab, head=models.Head("q"))
    )
    r_lm, r_params = common.build(
        2, common.config(layers=config.layers, width=config.width, vocab=config.vocab, head=models.Head("reward"))
    )
    plain = policies.language_model(lm)
    tilt = policies.tilt(plain, critics.hidden_value(q_lm.head, vocab_size=config.vocab))
    tilted = {"policy": params, "critic": q_params, "beta": jnp.asarray(1.0)}
    guided = policies.tilt(plain, critics.args(r_lm), top_k=min(config.candidates, config.vocab))
    led = {"policy": params, "critic": r_params, "beta": jnp.asarray(1.0)}
    prompts = common.prompts(config.batch // config.samples, config.prompt, vocab=config.vocab)

    def gradient(follower: Any, own: Any, wrt: str) -> Callable[[int], Any]:
        def once(seed: int) -> Any:
            return bilevel.leader_gradient(
                follower,
                rl.even_share,
                {"follower": own, "utility": None},
                jax.random.key(seed),
                prompts,
                wrt=wrt,
                estimator="score",
                samples=config.samples,
                max_new_tokens=config.new,
                eos_ids=(),
            ).gradient

        return once

    @jax.jit
    def in_parallel(critic: Any, tokens: Array, mask: Array, utility: Array) -> Any:
        def scalar(critic: Any) -> Array:
            flat = (x.reshape(-1, config.new) for x in (tokens, mask))
            given = (r_lm, critic, lm, params, repeat_rows(prompts, config.samples), *flat)
            log_prob = tilted_texts.tilted_log_prob(*given, beta=1.0, top_k=min(config.candidates, config.vocab))
            return shaping.score_function(log_prob.reshape(utility.shape), utility=utility)

        return jax.grad(scalar)(critic)

    def together(seed: int) -> Any:
        limits: dict[str, Any] = {"max_new_tokens": config.new, "eos_ids": (), "num_samples": config.samples}
        drawn = decoding.sample(guided, led, jax.random.key(seed), prompts, **limits)
        utility = (drawn.tokens % 2 == 0).mean(axis=-1)
        return in_parallel(r_params, drawn.tokens, drawn.mask, utility)

    shapes = {name: getattr(config, name) for name in ("batch", "samples", "prompt", "new", "repeats")}
    iteration = statistics.median(one["whole"] for one in rl._ours(lm, params, rl.Config(**shapes, torch=False)))
    rows: list[dict[str, Any]] = []
    for name, once in {
        "the model's weights": gradient(plain, params, ""),
        "a Q head that tilts it": gradient(tilt, tilted, "critic"),
        "a reward model, stepped": gradient(guided, led, "critic"),
        "a reward model, all steps in one pass": together,
    }.items():
        seconds = _median(once, config.repeats)
        rows.append({"leader": name, "gradient s": seconds, "RLOO s": iteration, "ratio": seconds / iteration})
    solved = [implicit(config)]
    common.report("bilevel", rows, config.out)
    common.report("implicit", solved, config.out)
    return rows + solved


def _median(once: Callable[[int], Any], repeats: int) -> float:
    """Seconds of a run, after two that compile."""
    found = []
    for seed in range(2 + repeats):
        begin = time.perf_counter()
        jax.block_until_ready(once(seed))
        found.append(time.perf_counter() - begin)
    return statistics.median(found[2:])


def implicit(config: Config) -> dict[str, Any]:
    """Products of the implicit gradient through a tabular policy at its optimum, and its error against the closed form.

    Args:
      config: horizon.

    Returns:
      A row.
    """
    with jax.enable_x64(True):
        process = tree.Tree(3, config.horizon)
        base, utility = tree.random(jax.random.key(2), process, dtype=jnp.float64)
        reward = jax.random.normal(jax.random.key(3), utility.shape)
        log_base = tree.response_log_prob(process, base)

        def law(theta: Array) -> Array:
            found: Array = tree.response_log_prob(process, jax.nn.log_softmax(theta))
            return found

        def inner(theta: Array, reward: Array) -> Array:
            return gibbs.utility(law(theta), reward) - gibbs.kl(law(theta), log_base)

        best = {"leader": reward, "follower": tree.optimal_policy(process, base, reward, beta=1.0)}
        found = shaping.implicit(
            inner, lambda theta, _: gibbs.utility(law(theta), utility), best, damping=1e-6, accuracy=1e-2
        )
        exact = jax.grad(lambda r: shaping.leader_utility(log_base, r, utility=utility, beta=1.0))(reward)
        error = jnp.linalg.norm(found.gradient - exact) / jnp.linalg.norm(exact)
        row = {"parameters": base.size, "products": int(found.products), "residual": float(found.residual)}
        return row | {"relative error": float(error)}


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)
