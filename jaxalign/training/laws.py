"""Laws of the reward from every prefix: their loss on a model, their head for given rewards, figures of a fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import losses, models
from jaxalign._arrays import is_flat_on_host
from jaxalign._builders import cached
from jaxalign.models.sharding import path_name
from jaxalign.training import job as functions
from jaxalign.training import objectives
from jaxalign.training.protocols import TextModel
from jaxalign.training.step import Loss, LossAux
from jaxalign.types import Array, Params

SMOOTHING = 1e-4
"""Mass that is added to each support point of the rewards' histogram before its logarithm begins the head's bias."""
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""The betas at which a fit is measured, in standard deviations of the reward."""


@cached
def laws(lm: models.LanguageModel, *, base: TextModel | None = None) -> Loss:
    """Makes the cross-entropy of the laws of a response's reward from its prefixes, the prompt's included.

    Rewards become laws on the head's support by `losses.two_hot`. The law of each prefix is learned; with a Q head also
    the law after each token, read at the position before it. The target is the reward of the whole response, and the
    minimiser the law under the policy that drew it; or with `base`, the mean law after the base's next tokens,
    Σ_z pi_ref(z|s)·p(sz) (Bellman's equation), from anybody's responses.

    Args:
      lm: the model; its head has a models.Distribution.
      base: for Bellman's equation: the base, whose parameters the loss takes as frozen; None: the rewards themselves.

    Returns:
      The loss of batches {"tokens", "mask", "loss_mask" [b,L], "reward" [b]}, and of a frozen body's "hidden" [b,L,D]
      where they are stored, a mean over prefixes, which are its weight. With "start" [b] and without `base` those count
      that have at least so many tokens of the response, from which on the base wrote it. Metrics: cross_entropy of the
      prefixes' own laws, squared_error of their means at the last token.

    Raises:
      ValueError: a model without a head of laws; with `base`, one that is no Q head.

    Source: arXiv 2502.20548.
    """
    head = lm.config.head
    if head is None or head.distribution is None:
        raise ValueError(f"laws: expected a head of laws (models.Distribution), found {head}")
    if base is not None and head.kind != "q":
        raise ValueError(f"laws: expected a Q head for Bellman's equation, found a {head.kind} head")
    support = head.distribution.support

    def loss(params: Params, batch: Any, frozen: Params = None) -> tuple[Array, LossAux]:
        params = objectives.cast(lm, params)
        tokens, response = batch["tokens"], batch["loss_mask"]
        hidden = batch["hidden"] if "hidden" in batch else lm.hidden(params, tokens, mask=batch["mask"])
        prefixes, drawn = _learned(batch, response) if base is None else _prefixes(response)
        count = prefixes.sum()
        target = jnp.broadcast_to(
            losses.two_hot(batch["reward"], support=support)[:, None, :], (*tokens.shape, len(support))
        )
        if base is not None:
            given = jax.lax.stop_gradient(_after_next(lm, params, base, frozen, hidden, batch))
            last = _ends(response)
            target = jnp.where(last[..., None], target, given)
        own = lm.head(params, hidden)
        entropy = losses.distribution(own, target=target, mask=prefixes)
        total = entropy
        if head.kind == "q":
            after = lm.laws_after(params, hidden[:, :-1], tokens[:, 1:, None])[..., 0, :]
            read = losses.distribution(after, target=target[:, 1:], mask=drawn)
            total = total + read * drawn.sum() / jnp.maximum(count, 1)
        ends = _ends(response)
        mean = (jnp.exp(own) * jnp.asarray(support)).sum(axis=-1)
        error = jnp.where(ends, (mean - batch["reward"][:, None]) ** 2, 0).sum() / jnp.maximum(ends.sum(), 1)
        return total, LossAux(count, {"cross_entropy": entropy, "squared_error": error})

    return loss


def _prefixes(response: Array) -> tuple[Array, Array]:
    """The prompt's last token and every response token [b,L], and the tokens that are chosen at each place [b,L-1]."""
    drawn = response[:, 1:]
    return response | jnp.pad(drawn, ((0, 0), (0, 1))), drawn


def _ends(response: Array) -> Array:
    """The last token of each response [b,L]."""
    return response & ~jnp.pad(response[:, 1:], ((0, 0), (0, 1)))


def _learned(batch: Any, response: Array) -> tuple[Array, Array]:
    """`_prefixes`, of them those after which the base wrote what followed."""
    prefixes, drawn = _prefixes(response)
    if "start" not in batch:
        return prefixes, drawn
    of_base = jnp.cumsum(response, axis=1) >= batch["start"][:, None]
    return prefixes & of_base, drawn & of_base[:, 1:]


def _after_next(
    lm: models.LanguageModel, params: Params, base: TextModel, frozen: Params, hidden: Array, batch: Any
) -> Array:
    """Σ_z pi_ref(z|s)·p(sz) at each position, [b,L,K], in chunks: the laws after all tokens are held for few."""
    frozen = objectives.cast(base, frozen)
    base_hidden = base.hidden(frozen, batch["tokens"], mask=batch["mask"])
    every = jnp.arange(lm.vocab_size, dtype=jnp.int32)

    def read(hidden: Array, base_hidden: Array) -> Array:
        weight = jax.nn.softmax(base.logits(frozen, base_hidden))
        after = lm.laws_after(params, hidden, every)
        return jnp.einsum("...v,...vk->...k", weight, jnp.exp(after))

    return models.chunked(read, hidden, base_hidden, width=lm.vocab_size * lm.head_width)


def numbers_of(text: str, name: str = "atoms") -> tuple[float, ...]:
    """Reads the numbers of an option.

    Args:
      text: numbers, as in "0,1"; "" for none.
      name: the option's, for messages.

    Returns:
      Each once, in order.

    Raises:
      ValueError: what is no number.
    """
    try:
        return tuple(sorted({float(part) for part in text.split(",")})) if text else ()
    except ValueError as error:
        raise ValueError(f"{name}: expected numbers, as in 0,1, found {text!r}") from error


def range_of(text: str) -> tuple[float, ...]:
    """Reads LOW,HIGH.

    Args:
      text: of --reward-range; "" for none.

    Returns:
      The two numbers, or none.

    Raises:
      ValueError: anything but two finite numbers of which the first is smaller.
    """
    found = numbers_of(text, "reward_range")
    if text and (len(found) != 2 or not np.isfinite(found).all() or float(text.split(",")[0]) != found[0]):
        raise ValueError(f"reward_range: expected LOW,HIGH, as in -2,2, found {text!r}")
    return found


class Scored(Protocol):
    """A response with its reward."""

    @property
    def reward(self) -> float:
        """Of the whole response."""

    @property
    def row(self) -> int:
        """Row of the prompt in its file."""


def within(rows: Sequence[Scored], ends: Sequence[float], *, clip: bool) -> list[float]:
    """Gives rewards that lie within a support.

    Args:
      rows: of all responses.
      ends: the support, or its ends.
      clip: whether a reward beyond it counts as its end.

    Returns:
      The reward of each row.

    Raises:
      ValueError: without `clip`, a reward beyond the support; it names the reward, the range and the row.
    """
    # In the type that models give rewards in.
    low, high = float(np.float32(ends[0])), float(np.float32(ends[-1]))
    for row in rows:
        if not clip and not low <= np.float32(row.reward) <= high:
            raise ValueError(
                f"reward: expected rewards in [{low:g}, {high:g}], or --clip-reward, found {row.reward:g} for prompt "
                f"{row.row}"
            )
    return [row.reward if low <= np.float32(row.reward) <= high else min(max(row.reward, low), high) for row in rows]


def support_of(
    rewards: Sequence[float], *, bins: int, atoms: Sequence[float] = (), ends: Sequence[float] = ()
) -> models.Distribution:
    """Gives the support for a set of rewards: the atoms, or an even grid from the smallest to the largest.

    Args:
      rewards: of all responses that are learned from.
      bins: K >= 2, points of the grid.
      atoms: the only rewards that there are; () for a grid.
      ends: the ends of the grid; (): the smallest and the largest reward.

    Returns:
      The Distribution, of rank 2.

    Raises:
      ValueError: rewards that are not finite, all equal, or (with atoms) others than these; fewer than two bins.
    """
    found = np.asarray(rewards, np.float64)
    if not np.isfinite(found).all():
        raise ValueError(f"reward: expected finite rewards, found {found[~np.isfinite(found)][0]}")
    if atoms:
        # In the type that models give rewards in: their 0.1 is not that of float64.
        others = np.setdiff1d(found.astype(np.float32), np.asarray(atoms, np.float32))
        if others.size:
            raise ValueError(f"atoms: expected rewards among {tuple(atoms)}, found {others[0]:g}")
        return models.Distribution(tuple(sorted(float(a) for a in atoms)), "atoms")
    if bins < 2:
        raise ValueError(f"bins: expected at least 2, found {bins}")
    low, high = ends or (float(found.min()), float(found.max()))
    if low == high:
        raise ValueError(f"reward: expected rewards that differ, found {low:g} for every response")
    return models.Distribution(tuple(np.linspace(low, high, bins).tolist()), "grid")


def for_rewards(
    started: functions.StartedModel,
    rewards: Sequence[float],
    *,
    bins: int,
    atoms: Sequence[float] = (),
    ends: Sequence[float] = (),
) -> functions.StartedModel:
    """Gives a model's head of laws the support of the rewards, and their histogram as the law that it begins with.

    Args:
      started: the model, whose head of laws has as many support points.
      rewards: of all responses that are learned from.
      bins: points of the grid.
      atoms: the only rewards that there are; () for a grid.
      ends: the ends of the grid; (): the smallest and the largest reward.

    Returns:
      The model with the support in its config, and its parameters.

    Raises:
      ValueError: as `support_of`.
    """
    head = started.lm.config.head
    assert head is not None
    assert head.distribution is not None
    spec = dataclasses.replace(support_of(rewards, bins=bins, atoms=atoms, ends=ends), rank=head.distribution.rank)
    lm = dataclasses.replace(
        started.lm,
        config=dataclasses.replace(started.lm.config, head=dataclasses.replace(head, distribution=spec)),
    )
    masses = np.asarray(losses.two_hot(np.asarray(rewards, np.float32), support=spec.support)).mean(axis=0)
    begin = np.log(masses + SMOOTHING)

    def place(path: Any, x: Array) -> Array:
        return x.at[-len(begin) :].set(begin.astype(x.dtype)) if path_name(path) == "head/outer/bias" else x

    return started._replace(lm=lm, params=jax.tree_util.tree_map_with_path(place, started.params))


def measure(
    lm: models.LanguageModel,
    params: Params,
    data: functions.Data,
    collate: Callable[[list[Any]], dict[str, np.ndarray]],
    *,
    rewards: np.ndarray,
    rollouts: int,
    batch_size: int,
) -> dict[str, Any]:
    """Figures of a fit on held-out rows: how well the laws predict rewards, and which betas the data can bear.

    For the right law the mean over prefixes of exp((r − V_soft(s))/beta) is 1 at every beta. A beta at which a sum of
    exp(r/beta) over the training roll-outs rests on few of them (their Rényi divergence D2 of order 2 above
    log(roll-outs/10)) is listed as one that the data cannot bear.

    Args:
      lm: the model with its head of laws.
      params: its parameters.
      data: rows, of which those of validation are measured.
      collate: pads rows.
      rewards: of all roll-outs.
      rollouts: their number.
      batch_size: rows measured together.

    Returns:
      Figures of summary.json: support, betas without data, marginal_entropy; with validation rows cross_entropy (of a Q
      head also that of the laws after tokens, which decoding reads) and the mean ratio of each beta, None where it
      overflows: the law then gives next to nothing to a reward that there is.
    """
    head = lm.config.head
    assert head is not None
    assert head.distribution is not None
    points = head.distribution.support
    support = np.asarray(points)
    masses = np.asarray(losses.two_hot(rewards, support=head.distribution.support)).mean(axis=0)
    betas = betas_of(rewards)
    thin = [beta for beta in betas if _divergence(rewards, beta) > np.log(max(rollouts / 10, 1))]
    found: dict[str, Any] = {
        "support": [float(support[0]), float(support[-1])],
        "bins": len(support),
        "marginal_entropy": float(-(masses * np.log(np.maximum(masses, 1e-30))).sum()),
        "betas_without_data": thin,
    }
    if not data.validation:
        return found

    def score(params: Params, batch: Any) -> Any:
        cast = objectives.cast(lm, params)
        hidden = lm.hidden(cast, batch["tokens"], mask=batch["mask"])
        own = lm.head(cast, hidden)
        prefixes, drawn = _learned(batch, batch["loss_mask"])
        target = losses.two_hot(batch["reward"], support=points)
        entropy = -(target[:, None] * own).sum(axis=-1)
        value = jax.nn.logsumexp(own[..., None, :] + support / jnp.asarray(betas)[:, None], axis=-1)
        ratio = jnp.exp(batch["reward"][:, None, None] / jnp.asarray(betas) - value)
        count = prefixes.sum(axis=1)
        given = {
            "entropy": jnp.where(prefixes, entropy, 0).sum(axis=1) / count,
            "ratio": jnp.where(prefixes[..., None], ratio, 0).sum(axis=1) / count[:, None],
        }
        if head.kind == "q":  # what decoding reads
            after = lm.laws_after(cast, hidden[:, :-1], batch["tokens"][:, 1:, None])[..., 0, :]
            each = jnp.where(drawn, -(target[:, None] * after).sum(axis=-1), 0).sum(axis=1)
            given["after"] = each / drawn.sum(axis=1)
        return given

    got = functions.evaluate(score, params, data.validation, collate, batch_size)
    mean, half = functions.interval(got["entropy"])
    ratios = {
        f"{beta:g}": round(float(r), 3) if np.isfinite(r) else None
        for beta, r in zip(betas, got["ratio"].mean(axis=0), strict=True)
    }
    if head.kind == "q":
        found["cross_entropy_after_tokens"] = float(got["after"].mean())
    return found | {"cross_entropy": mean, "cross_entropy_95": half, "mean_ratio": ratios}


def betas_of(rewards: np.ndarray) -> list[float]:
    """The betas at which a fit is measured, in units of reward, rounded to four digits that count."""
    spread = 1.0 if is_flat_on_host(rewards) else float(rewards.std())
    return [float(f"{factor * spread:.4g}") for factor in FACTORS]


def _divergence(rewards: np.ndarray, beta: float) -> float:
    """D2 of the tilted law to the base, 2·(V_soft(beta/2) − V_soft(beta))/beta, of samples [nats]."""

    def log_mean(scale: float) -> float:
        x = rewards * scale / beta
        return float(np.log(np.exp(x - x.max()).mean()) + x.max())

    return log_mean(2.0) - 2 * log_mean(1.0)
