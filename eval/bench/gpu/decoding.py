"""Decoding on one GPU: plain sampling beside the rate of the memory, and methods beside plain sampling."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxalign import critics, decoding, models, policies, rewards
from jaxalign.types import TokenBatch

from .. import common
from .sizes import Row, Rows, Sizes, bandwidth_share, first_and_median, model

Base = Literal["1B", "8B"]
RNG_SEED = 1


def plain(sizes: Sizes, base: Base) -> Rows:
    """Sampling at temperature 1 at several batch sizes; the prefill of the prompts is part of the time.

    Args:
      sizes: of the models.
      base: which of them is sampled.

    Returns:
      A row for each batch size.
    """
    lm, params = _base(sizes, base)
    policy = policies.language_model(lm)
    for batch in sizes.batches:

        def measure(batch: int = batch) -> Row:
            prompts = _prompts(sizes, lm, batch)
            compiling, seconds = first_and_median(lambda: _sample(sizes, policy, params, prompts), sizes.repeats)
            each = seconds / sizes.new
            row = {"base": base, "method": "plain", "batch": batch, "tokens/s": batch / each, "ms/token": 1e3 * each}
            return row | {"share of bandwidth": bandwidth_share(lm, params, each), "cost": 1.0, "compile s": compiling}

        yield f"plain, {base}, batch {batch}", measure


def deterministic(sizes: Sizes, base: Base) -> Rows:
    """Sampling in chunks of rows, whose tokens are the same at any batch size, beside plain sampling of the same batch.

    Args:
      sizes: of the models, the batch and a chunk.
      base: which of them is sampled.

    Returns:
      One row: its time over that of plain sampling, both timed in turn ("cost").
    """
    lm, params = _base(sizes, base)
    policy, (batch, chunk) = policies.language_model(lm), sizes.chunks
    prompts = _prompts(sizes, lm, batch)

    def measure() -> Row:
        def run(chunk: int | None) -> Any:
            return jax.block_until_ready(_sample(sizes, policy, params, prompts, chunk))

        begin = time.perf_counter()
        run(chunk)
        first = time.perf_counter() - begin
        both = {"plain": lambda: run(None), "chunks": lambda: run(chunk)}
        found = common.alternate(both, repeats=sizes.repeats, warmup=2)
        each = found["chunks"] / sizes.new
        row = {"base": base, "method": f"deterministic, G = {chunk}", "batch": batch, "tokens/s": batch / each}
        row |= {"ms/token": 1e3 * each, "cost": found["chunks"] / found["plain"]}
        return row | {"compile s": max(first - found["chunks"], 0.0)}

    yield f"deterministic, {base}, batch {batch}", measure


def methods(sizes: Sizes, base: Base) -> Rows:
    """Methods whose critics and rewards have the small model's shape, one prompt, as costs over plain sampling.

    Args:
      sizes: of the models.
      base: which of them is steered.

    Returns:
      A row for each method: its time over that of plain sampling of one response, and for several responses also the
      time of as many plain samples drawn one by one over its own ("gain").
    """
    lm, params = _base(sizes, base)
    prompts = _prompts(sizes, lm, 1)
    policy = policies.language_model(lm)
    found: dict[str, float] = {}

    def first() -> float:
        if "plain" not in found:
            run = lambda: _sample(sizes, policy, params, prompts)  # noqa: E731
            found["plain"] = first_and_median(run, sizes.repeats)[1]
        return found["plain"]

    arm = model(sizes.small)
    body = arm.init(jax.random.key(1))
    scalar, by_token = (model(sizes.small, models.Head(kind)) for kind in ("reward", "q"))
    scored = {**body, "head": scalar.init_head(jax.random.key(2))}
    valued = {**body, "head": by_token.init_head(jax.random.key(3))}

    def tilted(critic: Any, values: Any, top_k: int | None = None) -> tuple[Any, Any]:
        guided = policies.tilt(policy, critic, top_k=top_k)
        return guided, {"policy": params, "critic": values, "beta": jnp.asarray(1.0)}

    def sampled(critic: Any, values: Any, top_k: int | None = None) -> Callable[[], Any]:
        guided, both = tilted(critic, values, top_k)
        return lambda: _sample(sizes, guided, both, prompts)

    def best() -> Any:
        return decoding.best_of_n(
            policy,
            rewards.from_model(scalar),
            {"policy": params, "reward": scored},
            jax.random.key(RNG_SEED),
            prompts,
            num_samples=sizes.samples,
            max_new_tokens=sizes.new,
            eos_ids=(),
        )

    def particles() -> Any:
        proposal, both = tilted(critics.value(by_token), valued)
        return decoding.smc(
            proposal,
            rewards.from_model(scalar),
            {"policy": both, "reward": scored, "beta": 1.0},
            jax.random.key(RNG_SEED),
            prompts,
            num_particles=sizes.samples,
            max_new_tokens=sizes.new,
            eos_ids=(),
        )

    k, n = sizes.candidates, sizes.samples
    runs: dict[str, tuple[Callable[[], Any], int]] = {
        f"ARGS, k = {k}, reward of 1B": (sampled(critics.args(scalar), scored, k), 1),
        "GenARM, reward of 1B": (sampled(critics.genarm(arm), body), 1),
        "CD, Q head of 1B": (sampled(critics.value(by_token), valued), 1),
        f"best of {n}, reward of 1B": (best, n),
        f"SMC, {n} particles by CD, reward of 1B": (particles, n),
    }
    for name, (run, responses) in runs.items():

        def measure(name: str = name, run: Callable[[], Any] = run, responses: int = responses) -> Row:
            alone = first()
            compiling, seconds = first_and_median(run, sizes.repeats)
            row = {"base": base, "method": name, "batch": 1, "tokens/s": sizes.new / seconds}
            row |= {"ms/token": 1e3 * seconds / sizes.new, "cost": seconds / alone}
            return row | {"gain": responses * alone / seconds if responses > 1 else None, "compile s": compiling}

        yield f"{name}, base {base}", measure


def _base(sizes: Sizes, base: Base) -> tuple[models.LanguageModel, Any]:
    lm = model(sizes.small if base == "1B" else sizes.large)
    return lm, lm.init(jax.random.key(0))


def _prompts(sizes: Sizes, lm: models.LanguageModel, batch: int) -> TokenBatch:
    tokens = jax.random.randint(jax.random.key(4), (batch, sizes.prompt), 0, lm.vocab_size, jnp.int32)
    return TokenBatch(tokens, jnp.ones(tokens.shape, bool))


def _sample(sizes: Sizes, policy: Any, params: Any, prompts: TokenBatch, chunk: int | None = None) -> Any:
    limits: dict[str, Any] = {"max_new_tokens": sizes.new, "eos_ids": (), "deterministic": chunk}
    return decoding.sample(policy, params, jax.random.key(RNG_SEED), prompts, **limits)
