"""python -m eval.bench shaping: optimal thresholds against one sort and numpy's bisection; cost of a threshold head."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import commands, models, shaping
from jaxalign.types import Array, Params

from . import common

TOLERANCE = 1e-4  # of a threshold, in float32, utilities of deviation 1


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.bench shaping."""

    prompts: int = 100_000
    """Prompts, one threshold each."""
    samples: int = 64
    """Base samples per prompt."""
    gain: float = 3.0
    """Gain bound/beta [1]."""
    bisections: int = 50
    """Steps of numpy's bisection."""
    batch: int = 8
    """Prompts of the prefill."""
    length: int = 256
    """Length of its prompts [tokens]."""
    repeats: int = 5
    """Timed runs of each side, alternating; the median is printed."""
    layers: int = 8
    """Layers of the model."""
    width: int = 512
    """Width of the model, a multiple of 64; heads of 64."""


def bisection(utility: np.ndarray, gain: float, steps: int) -> np.ndarray:
    """Solves F(m) = Σ w_m·(u − m) per row as the paper does, vectorised over prompts.

    Args:
      utility: [P,n].
      gain: bound/beta.
      steps: bisections.

    Returns:
      The roots [P], in units of utility.
    """
    low, high = utility.min(axis=1), utility.max(axis=1)
    weight = np.float32(np.exp(gain))
    for _ in range(steps):
        m = (low + high) / 2
        above = utility >= m[:, None]
        f = (np.where(above, weight, np.float32(1)) * (utility - m[:, None])).sum(axis=1)
        low, high = np.where(f > 0, m, low), np.where(f > 0, high, m)
    return np.asarray((low + high) / 2)


def sorted_prefix(utility: Array, gain: float) -> Array:
    """Gives the same root as the largest of n weighted means of a sorted row: what `optimal_threshold` is measured by.

    Args:
      utility: [P,n].
      gain: bound/beta.

    Returns:
      The roots [P], in units of utility.
    """
    u = -jnp.sort(-utility, axis=-1)
    n = u.shape[-1]
    low = jnp.exp(-gain)
    count = jnp.arange(1, n + 1, dtype=u.dtype)
    above = jnp.cumsum(u, axis=-1)
    return ((above + low * (above[:, -1:] - above)) / (count + low * (n - count))).max(axis=-1)


def run(config: Config) -> list[dict[str, Any]]:
    """Seconds of each side and its ratio to ours. RuntimeError: a side's thresholds differ by more than 1e-4."""
    mesh = common.check(config, (config.prompts, config.batch))
    if not config.gain >= 0:
        raise ValueError(f"gain: expected at least 0, found {config.gain}")
    host = np.random.default_rng(0).normal(size=(config.prompts, config.samples)).astype(np.float32)
    utility = common.share(jnp.asarray(host), mesh)
    find = functools.partial(shaping.optimal_threshold, gain=config.gain)
    sides = {
        "threshold": jax.jit(find),
        "threshold and gradient": jax.jit(jax.value_and_grad(lambda u: find(u).sum())),
        "one jnp.sort": jax.jit(lambda u: jnp.sort(u, axis=-1)),
        "sorted-prefix form": jax.jit(functools.partial(sorted_prefix, gain=config.gain)),
    }
    runs: dict[str, Any] = {name: functools.partial(_wait, f, utility) for name, f in sides.items()}
    bisect = functools.partial(bisection, host, config.gain, config.bisections)
    runs[f"numpy, {config.bisections} bisections"] = bisect
    found = np.asarray(sides["threshold"](utility))
    for name, other in (("numpy", bisect()), ("sorted-prefix form", np.asarray(sides["sorted-prefix form"](utility)))):
        difference = float(np.abs(found - other).max())
        # Before the timing: a wrong result has no speed. A NaN fails as well.
        if not difference <= TOLERANCE:
            raise RuntimeError(f"shaping: expected {name}'s thresholds to {TOLERANCE}, found a difference {difference}")
    seconds = common.alternate(runs, repeats=config.repeats)
    rows = _rows(seconds) + _prefill(config, mesh)
    common.report("shaping", rows, config.out)
    return rows


def _rows(seconds: dict[str, float]) -> list[dict[str, Any]]:
    """Each side beside the first."""
    first = next(iter(seconds))
    return [{"what": k, "seconds": s, "times": s / seconds[first], "of": first} for k, s in seconds.items()]


def _prefill(config: Config, mesh: Any) -> list[dict[str, Any]]:
    """Prefill of the base, and the same with m(x) read at the prompt's last token by a threshold head."""
    shape = common.config(layers=config.layers, width=config.width, length=config.length + 8)
    lm, params = common.build(0, shape, config.dtype)
    headed_lm = models.with_head(lm, models.Head("reward"))
    params = {"base": params, "head": headed_lm.init_head(jax.random.key(1))}
    params = common.place(params, mesh)
    batch = common.prompts(config.batch, config.length)
    batch = common.share(batch, mesh)

    def plain(params: Params, tokens: Array, mask: Array) -> Any:
        hidden, cache = lm.prefill(params["base"], tokens, mask, config.length + 8)
        return lm.logits(params["base"], hidden), cache

    def headed(params: Params, tokens: Array, mask: Array) -> Any:
        hidden, cache = lm.prefill(params["base"], tokens, mask, config.length + 8)
        threshold = headed_lm.head({"head": params["head"]}, hidden)
        return lm.logits(params["base"], hidden), cache, threshold

    sides = {"prefill": jax.jit(plain), "prefill with a threshold head": jax.jit(headed)}
    inputs = params, batch.tokens, batch.mask
    runs: dict[str, Any] = {name: functools.partial(_wait, f, *inputs) for name, f in sides.items()}
    return _rows(common.alternate(runs, repeats=config.repeats))


def _wait(f: Any, *args: Any) -> None:
    jax.block_until_ready(f(*args))


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))
