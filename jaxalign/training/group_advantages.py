"""What the rewards of a prompt's samples are worth, each by itself or as the best, the worst or any of k draws."""

from __future__ import annotations

from jaxalign import advantages
from jaxalign.types import Array


def of_group(name: str) -> tuple[str, int]:
    """Reads the name of an advantage of k samples.

    Args:
      name: "max@k", "min@k" or "pass@k".

    Returns:
      ("max", "min" or "pass", k).

    Raises:
      ValueError: another name, or a k below 1.
    """
    kind, _, k = name.partition("@")
    if kind not in ("max", "min", "pass") or not k.isdecimal() or int(k) < 1:
        raise ValueError(f"advantage: expected mean, or max@K, min@K or pass@K with K at least 1, found {name!r}")
    return kind, int(k)


def check_advantage(algorithm: str, advantage: str) -> None:
    """ValueError for a name that is none, and for a group of k samples with another algorithm than rloo."""
    if advantage != "mean":
        of_group(advantage)
        if algorithm != "rloo":
            raise ValueError(f"advantage: expected {advantage} with rloo, found {algorithm}")


def worth(algorithm: str, advantage: str, reward: Array) -> Array:
    """Gives the advantages of rewards alone, of which a mean over samples is taken.

    Args:
      algorithm: "rloo" or "grpo".
      advantage: "mean", or for "rloo" max@k, min@k, pass@k.
      reward: [B,n].

    Returns:
      [B,n].
    """
    if algorithm == "grpo":
        return advantages.group_relative(reward)
    if advantage == "mean":
        return advantages.leave_one_out(reward)
    kind, k = of_group(advantage)
    found = {"max": advantages.max_at_k, "min": advantages.min_at_k, "pass": advantages.pass_at_k}[kind]
    return found(reward, k=k) * reward.shape[-1]
