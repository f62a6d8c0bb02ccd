"""What the closed form says of policies aligned with calibrated rewards: beta for a KL, win rates at a KL."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import gibbs, infalign, metrics

from . import infalign as closed

RATES = ("win_rate", "best_of_n", "worst_of_n")


def closed_form(text: str, kl: np.ndarray, n: int) -> tuple[np.ndarray, infalign.Curve]:
    """Gives the closed form of a transform of the calibrated reward at given KL; call it under enable_x64.

    Args:
      text: the transform, as `parse_transform` reads it.
      kl: [KL], in nats.
      n: the N of the procedures.

    Returns:
      (beta, Curve), [KL] each; NaN beyond the KL that it reaches.

    Raises:
      ValueError: a KL that is not reached.
    """
    if infalign.needs_beta(text):
        kind, _, its_n = text.partition(":")
        best = kind == "bon_fp"
        beta, _ = closed.optimum("best_of_n" if best else "worst_of_n", int(its_n), kl)
        runs = (infalign.best_of if best else infalign.worst_of)(int(its_n))
        found = infalign.optimal_transform(runs, beta=np.nan_to_num(beta, nan=1.0))
        rates = infalign.curve(found.log_policy, n=n)
        return beta, jax.device_get(jax.tree.map(lambda x: jnp.where(np.isnan(beta), jnp.nan, x), rates))
    phi = infalign.parse_transform(text)
    beta = np.asarray(infalign.match_kl(phi, kl=jnp.asarray(kl)))
    return beta, jax.device_get(infalign.tilted_curve(phi, beta=beta, n=n))


def beta_for(reward: np.ndarray, kl: float) -> float:
    """Gives the one beta at which the mean over prompts of KL(Gibbs‖base) is a given one.

    Args:
      reward: [prompts,K], of base samples.
      kl: in nats.

    Returns:
      beta, in units of reward per nat.
    """
    even = np.full(reward.shape, -np.log(reward.shape[-1]))
    low, high = np.log(1e-6), np.log(1e6)
    with jax.enable_x64(True):
        for _ in range(60):
            middle = (low + high) / 2
            found = gibbs.kl(gibbs.log_policy(even, reward, beta=float(np.exp(middle))), even).mean()
            low, high = (middle, high) if found > kl else (low, middle)
    return float(np.exp(low))


def at_its_kl(transform: str, each: dict[str, np.ndarray], n: int) -> dict[str, float | None]:
    """From each["kl"] and win rates [prompts] of a policy: the closed form's win rates at its mean KL
    (predicted_RATE), and how far the measured means lie below (short_of_RATE) with 95 % half-widths, the KL's error
    included to first order. predicted_RATE None at a KL that the closed form does not reach.

    Where the win rate is concave in the KL, a policy whose prompts differ in KL falls short of the curve at the mean
    even if it is optimal for each; so does one whose quantiles have atoms.
    """
    kl = float(each["kl"].mean())
    step = 0.01 * max(kl, 0.01)
    with jax.enable_x64(True):
        try:
            curve = closed_form(transform, np.array([kl, kl + step]), n)[1]
            found = {name: np.asarray(getattr(curve, name)) for name in RATES}
        except ValueError:  # too small or too large for any beta
            found = dict.fromkeys(RATES, np.full(2, np.nan))
    out: dict[str, float | None] = {}
    for name, (here, beyond) in found.items():
        if np.isnan([here, beyond]).any():
            out[f"predicted_{name}"] = None
            continue
        out[f"predicted_{name}"] = float(here)
        short = here + (beyond - here) / step * (each["kl"] - kl) - each[name]
        gap = metrics.mean_interval(short)
        out |= {f"short_of_{name}": gap.mean, f"short_of_{name}_95": gap.half_width}
    return out
