"""Decode on a small decision process that is solved exactly:

python -m eval.demo --out runs/demo

A random base policy over responses of up to six tokens, a random reward, and four ways to tilt the base: ARGS with a
noisy reward of the partial response, controlled decoding with the exact value, GenARM with the autoregressive reward
that its training converges to, and the exact soft value; and best-of-n. Each is decoded by the library's own decoders,
and its sampled reward and KL stand beside the exact law. Writes results.json and frontier.png.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _hosts, _io, _runs, commands, decoding, metrics, policies, tree
from jaxalign.evaluation.exact_laws import METHODS, Point, critic_tables, exact_law, plot, print_table
from jaxalign.types import Array


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of eval.demo."""

    out: str
    """Run folder: results.json, frontier.png, config.json, versions.json."""
    vocab: int = 4
    """Vocabulary size V [tokens]."""
    horizon: int = 6
    """Longest response T [tokens]; token 0 is EOS."""
    samples: int = 4000
    """Responses drawn per method and setting."""
    betas: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5, 0.3, 0.2)
    """KL weights [reward per nat]."""
    n: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Responses per prompt of best-of-n."""
    noise: float = 1.0
    """Standard deviation of the error of ARGS' reward on partial text [reward]."""
    seed: int = 0
    """Seed of the process and of all draws."""
    config: str = ""
    """JSON or TOML file of defaults for these options."""


def check(config: Config) -> None:
    """ValueErrors before anything is written."""
    if config.samples < 2:
        raise ValueError(f"samples: expected at least 2 for an interval, found {config.samples}")
    if not config.betas or not all(0 < beta < np.inf for beta in config.betas):
        raise ValueError(f"betas: expected finite values > 0, found {config.betas}")
    if any(n < 1 for n in config.n):
        raise ValueError(f"n: expected at least 1 response each, found {config.n}")
    if config.vocab < 2 or config.horizon < 1 or config.vocab**config.horizon > 200_000:
        raise ValueError(
            "vocab, horizon: expected at least 2 tokens, 1 step and at most 200000 responses, "
            f"found {config.vocab} and {config.horizon}"
        )
    if config.noise < 0:
        raise ValueError(f"noise: expected a standard deviation >= 0, found {config.noise}")


def run(config: Config) -> list[Point]:
    """All points; the table is printed, results.json and frontier.png are written."""
    _hosts.check_single("eval.demo")
    check(config)
    t = tree.Tree(config.vocab, config.horizon, eos_id=0)
    out = _runs.open_run(config.out, config)
    base, reward = tree.random(jax.random.key(config.seed), t)
    log_base = tree.response_log_prob(t, base)
    prompts = tree.prompts(config.samples)
    rng = jax.random.key(config.seed + 2)
    shared: dict[str, Any] = {"max_new_tokens": config.horizon, "eos_ids": (0,)}

    def point(method: str, setting: float, law: Array, drawn: Any, sampled_kl: float, kind: str) -> Point:
        found = np.asarray(reward)[np.asarray(tree.response_index(t, drawn.tokens, drawn.mask))]
        mean, half = metrics.mean_interval(found)
        exact = float(tree.expected(law, values=reward)), float(tree.sequence_kl(law, log_base))
        return Point(method, setting, exact[0], mean, half, exact[1], sampled_kl, kind)

    built = {kind: policies.tilt(tree.policy(t), tree.critic(t, kind)) for kind in ("level", "increment")}
    points = []
    for beta in config.betas:
        for method, (kind, q) in critic_tables(t, base, reward, beta, noise=config.noise, seed=config.seed).items():
            params = {"policy": base, "critic": q, "beta": jnp.asarray(beta)}
            drawn = decoding.sample(built[kind], params, rng, prompts, **shared)
            law = exact_law(t, built[kind], params)
            assert drawn.kl is not None  # only a parallel form leaves it out
            points.append(point(method, beta, law, drawn, float(drawn.kl.sum(1).mean()), "sum of exact per-step KL"))
    for n in config.n:
        both = {"policy": base, "reward": reward}
        chosen = decoding.best_of_n(tree.policy(t), tree.reward(t), both, rng, prompts, num_samples=n, **shared)
        law = tree.best_of_n_law(log_base, score=reward, n=n)
        drawn, kl = chosen.completions, chosen.kl
        points.append(point("best of n", n, law, drawn, float(kl.value.mean()), kl.formula))
    points.sort(key=lambda p: (list(METHODS).index(p.method), p.kl))
    table = [p._asdict() for p in points]
    _io.write_json(
        out / "results.json", {"base_reward": float(tree.expected(log_base, values=reward)), "points": table}
    )
    plot(t, base, reward, points, out / "frontier.png")
    print_table(points)
    print(f"wrote {out / 'results.json'} and {out / 'frontier.png'}")
    return points


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)
