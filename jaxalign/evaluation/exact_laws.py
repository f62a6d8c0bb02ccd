"""Methods on a small decision process that is solved exactly: their exact laws, and the picture that shows them with
what the decoders draw (`python -m eval.demo`)."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _io, decoding, tree
from jaxalign.types import Array, Params, Policy

METHODS = {"exact soft value": "C0", "controlled decoding": "C1", "GenARM": "C2", "ARGS": "C3", "best of n": "C4"}
"""Method -> its colour."""


class Point(NamedTuple):
    """One method at one setting."""

    method: str
    """The name of the method among METHODS."""
    setting: float
    """beta, or n of best-of-n."""
    reward: float
    """Expected reward under the exact law."""
    sampled_reward: float
    """Mean reward of the responses drawn."""
    sampled_reward_95: float
    """Half the width of the 95 % interval of sampled_reward."""
    kl: float
    """KL of the exact law to the base [nats]."""
    sampled_kl: float
    """The KL that the decoder reports, averaged [nats]."""
    kl_kind: str
    """The kind of number that sampled_kl is."""


def exact_law(t: tree.Tree, policy: Policy, params: Params) -> Array:
    """log pi(y) [M] of any Policy on a process: every response is scored by `decoding.log_prob`."""
    tokens, mask = (jnp.asarray(x) for x in t.responses)
    scored = decoding.log_prob(policy, params, jax.random.key(0), tree.prompts(t.num_responses), tokens, mask)
    return scored.log_prob.sum(axis=1)


def critic_tables(
    t: tree.Tree, base: Array, reward: Array, beta: float, *, noise: float, seed: int
) -> dict[str, tuple[str, Array]]:
    """The critics that tilt the base.

    Args:
      t: the process.
      base: its base policy, log-probabilities [S,V].
      reward: of each response [M].
      beta: the KL weight [reward per nat].
      noise: standard deviation of the error of ARGS' reward on partial text [reward].
      seed: of that error.

    Returns:
      Method -> (kind of critic, its table q [S,V]).
    """
    error = noise * jax.random.normal(jax.random.key(seed + 1), (t.num_states, t.vocab_size))
    value = tree.q_values(t, tree.value(t, base, reward), reward=reward)
    return {
        "exact soft value": ("level", tree.q_values(t, tree.soft_value(t, base, reward, beta=beta), reward=reward)),
        "controlled decoding": ("level", value),
        # log pi_r is trained to r/beta_r + const with beta_r = 1; the guidance weight is then 1/beta.
        "GenARM": ("increment", tree.policy_of(t, jax.nn.log_softmax(reward))),
        "ARGS": ("level", jnp.where(jnp.asarray(t.leaf) >= 0, value, value + error)),
    }


def print_table(points: Sequence[Point]) -> None:
    """Prints exact and sampled numbers side by side."""
    print(f"{'method':20} {'beta or n':>9} {'reward':>8} {'sampled':>16} {'KL':>7} {'reported':>9}  kind of KL")
    for p in points:
        sampled = f"{p.sampled_reward:.3f} ± {p.sampled_reward_95:.3f}"
        print(
            f"{p.method:20} {p.setting:9g} {p.reward:8.3f} {sampled:>16} {p.kl:7.3f} {p.sampled_kl:9.3f}  {p.kl_kind}"
        )


def plot(t: tree.Tree, base: Array, reward: Array, points: Sequence[Point], path: pathlib.Path) -> None:
    """Draws reward against KL: exact laws as lines, sampled means with their intervals as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.4), layout="constrained")
    log_base = tree.response_log_prob(t, base)
    laws = [tree.optimal_log_prob(t, base, reward, beta=float(b)) for b in np.geomspace(30, 0.15, 60)]
    frontier = [(float(tree.sequence_kl(law, log_base)), float(tree.expected(law, values=reward))) for law in laws]
    axes.plot(*zip(*frontier, strict=True), color="0.75", lw=5, label="optimum at each KL", zorder=0)
    for method, colour in METHODS.items():
        mine = [p for p in points if p.method == method]
        axes.plot([p.kl for p in mine], [p.reward for p in mine], color=colour, lw=1.3, label=method)
        axes.errorbar(
            [p.kl for p in mine],
            [p.sampled_reward for p in mine],
            [p.sampled_reward_95 for p in mine],
            fmt="o",
            ms=3.5,
            color=colour,
            capsize=2,
        )
    axes.set_xlabel("KL to the base [nats], exact")
    axes.set_ylabel("expected reward")
    axes.set_title(f"Exact laws (lines) and decoded samples (points), {t.num_responses} responses", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.grid(alpha=0.25)
    with _io.whole_file(path) as sink:
        figure.savefig(sink, dpi=150, format="png")
    pyplot.close(figure)
