"""python -m eval.studies conformal: the share of good responses that a conformal threshold cuts

Value-filtered decoding cuts a response where its value V falls to c. With c the k-th smallest of the least values along
n good responses of the base, k = floor(a (n + 1)), a new good response is cut with probability at most a, and k/(n + 1)
where no two values are equal. On random processes, whose values and good responses are known exactly: the share cut
over splits into calibration and test responses, its mean and its spread, beside those of the Beta law.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import commands, tree

from . import common


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.studies conformal."""

    sizes: tuple[int, ...] = (19, 99, 399)
    """Good responses n that the threshold rests on."""
    levels: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Levels a."""
    splits: int = 200
    """Draws of n responses and of those that are tested."""
    tested: int = 1000
    """Responses tested in each split."""
    good: float = 0.3
    """The share of good responses: those of highest reward."""


def threshold(least: np.ndarray, level: float) -> float:
    """Gives the conformal threshold.

    Args:
      least: [n], the least value along each good response.
      level: a.

    Returns:
      The k-th smallest, k = floor(a (n + 1)); −inf for k = 0.
    """
    k = int(level * (len(least) + 1) + 1e-9)
    return float(np.sort(least)[k - 1]) if k else -np.inf


def least_values(seed: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Gives the least value along each good response of a random process, and the law of good responses.

    Args:
      seed: of the process.
      share: of good responses under the base.

    Returns:
      (least values, probabilities), each [good responses].
    """
    process = tree.Tree(4, 5, eos_id=0)
    with jax.enable_x64(True):
        log_base, reward = tree.random(jax.random.key(seed), process, dtype=jnp.dtype("float64"))
        law = np.exp(np.asarray(tree.response_log_prob(process, log_base)))
        order = np.argsort(-np.asarray(reward))
        good = np.zeros(len(law), bool)
        good[order[np.cumsum(law[order]) <= share]] = True
        paid = jnp.asarray(good, jnp.float64)
        q = tree.q_values(process, tree.value(process, log_base, paid), reward=paid)
    tokens, mask = process.responses
    least = np.where(mask, np.asarray(q)[process.nodes, tokens], np.inf).min(axis=1)
    return least[good], law[good] / law[good].sum()


def run(config: Config) -> list[dict[str, Any]]:
    """All rows; writes conformal.json and conformal.png."""
    common.check(config)
    least, law = least_values(config.seed, config.good)
    rows: list[dict[str, Any]] = []
    shares: dict[tuple[int, float], np.ndarray] = {}
    for ties in (True, False):
        for n in config.sizes:
            for level in config.levels:
                rng = np.random.default_rng([config.seed, n])
                cut = np.zeros(config.splits)
                for i in range(config.splits):
                    drawn = rng.choice(least, size=n + config.tested, p=law)
                    if not ties:
                        drawn = drawn + 1e-9 * rng.random(len(drawn))
                    c = threshold(drawn[:n], level)
                    cut[i] = ((drawn[n:] < c) if ties else (drawn[n:] <= c)).mean()
                k = int(level * (n + 1) + 1e-9)
                mean = k / (n + 1)
                spread = mean * (1 - mean) / (n + 2)  # of the Beta law, to which the tested responses add theirs
                expected = np.sqrt(spread + (mean * (1 - mean) - spread) / config.tested)
                row: dict[str, Any] = {"values": "as they are" if ties else "without ties", "n": n, "a": level}
                row |= common.estimate("share cut", cut) | {"k/(n + 1)": mean}
                rows.append(row | {"deviation": float(cut.std()), "without ties": float(expected)})
                if not ties:
                    shares[n, level] = cut
    out = common.report("conformal", config, rows)
    figure, axes = common.pyplot().subplots(1, len(config.levels), figsize=(12, 3.6), layout="constrained")
    for panel, level in zip(np.atleast_1d(axes), config.levels, strict=True):
        for n, colour in zip(config.sizes, ("#E69F00", "#0072B2", "#009E73", "#CC79A7"), strict=False):
            bins = np.linspace(0, 3 * level, 31)
            panel.hist(shares[n, level], bins=bins, histtype="step", color=colour, lw=1.6, label=f"n = {n}")
        panel.axvline(level, color="black", ls="--", lw=1)
        panel.set_title(f"a = {level:g}", fontsize=10)
        panel.set_xlabel("share of good responses cut")
    np.atleast_1d(axes)[0].set_ylabel(f"of {config.splits} splits")
    np.atleast_1d(axes)[0].legend(frameon=False, fontsize=8.5)
    common.save(figure, out / "conformal.png")
    return rows


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))
