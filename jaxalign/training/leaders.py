"""Leaders of Stackelberg shaping: a reward model, a shaping network, a threshold head, and what each delivers."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.flax import save

from jaxalign import _hosts, _io, gibbs, models, shaping
from jaxalign.training import LossAux, adapters, followers, objectives
from jaxalign.training import job as functions
from jaxalign.training.shaping_data import ShapingOptions, collate_groups, collate_prompts
from jaxalign.training.step import Loss
from jaxalign.training.training_job import Job
from jaxalign.types import Array, Params

NETWORK = "network.safetensors"


def prompt_thresholds(lm: models.LanguageModel, params: Params, batch: Any) -> jax.Array:
    """m(x) [b] of a threshold head at the last token of each prompt, in units of utility."""
    return objectives.rewards_of(lm, objectives.cast(lm, params), batch)


def amortised_loss(lm: models.LanguageModel, *, gain: float) -> Loss:
    """Makes the expectile loss of the head's threshold over all roll-outs of each prompt.

    Args:
      lm: the model with a reward head.
      gain: bound / beta of the shaped reward [per unit of utility].

    Returns:
      The loss of batches {"tokens", "mask" [b,P], "utility" [b,n]}. Metric: error, the mean distance to the exact
      threshold.
    """

    def loss(params: Params, batch: Any, frozen: Params) -> tuple[Array, LossAux]:
        found = prompt_thresholds(lm, params, batch)
        exact = shaping.optimal_threshold(batch["utility"], gain=gain)
        each = shaping.expectile_loss(
            jnp.broadcast_to(found[:, None], batch["utility"].shape), utility=batch["utility"], gain=gain
        )
        error = jnp.abs(found - exact).mean()
        return each.mean(), LossAux(jnp.asarray(found.shape[0]), {"error": error})

    return loss


def compare_leaders(delivered: dict[str, np.ndarray]) -> dict[str, Any]:
    """Compares leaders on the same prompts.

    Args:
      delivered: name -> utility [prompts], the leader in question first.

    Returns:
      Mean and 95 % half-width of each, and of the first one's gain over each other, paired by prompt.
    """
    out: dict[str, Any] = {}
    names = list(delivered)
    for name in names:
        mean, half = functions.interval(delivered[name])
        out |= {f"utility_{name}": mean, f"utility_{name}_95": half}
    for name in names[1:]:
        mean, half = functions.interval(delivered[names[0]] - delivered[name])
        out |= {f"gain_over_{name}": mean, f"gain_over_{name}_95": half}
    return out


def delivered_utilities(
    rewards: dict[str, np.ndarray], utility: np.ndarray, *, bound: float, beta: float
) -> dict[str, np.ndarray]:
    """Measures what reward tables deliver at the same KL weight.

    Args:
      rewards: name -> reward [prompts,n] of each roll-out.
      utility: true utility [prompts,n] of each roll-out.
      bound: of the rewards.
      beta: KL weight of the follower [units of reward per nat].

    Returns:
      Name -> utility [prompts], of each table, of the base ("base": the mean) and of the threshold on the true utility
      ("optimum": the most that any reward within the bound gives).
    """
    base = np.zeros_like(utility)
    found = {
        name: np.asarray(shaping.leader_utility(base, reward, utility=utility, beta=beta))
        for name, reward in rewards.items()
    }
    best = shaping.optimal_threshold(utility, gain=bound / beta)
    return found | {"base": utility.mean(axis=-1), "optimum": np.asarray(best)}


def mean_figures(values: dict[str, np.ndarray]) -> dict[str, float | None]:
    """Gives the mean of each and its 95 % half-width, as NAME and NAME_95.

    Args:
      values: name -> numbers [prompts].

    Returns:
      The figures.
    """
    out: dict[str, float | None] = {}
    for name, each in values.items():
        out[name], out[f"{name}_95"] = functions.interval(each)
    return out


def _validation(data: functions.Data) -> np.ndarray:
    """Utilities [prompts,n] of the held-out prompts' roll-outs. ValueError where there are none."""
    if len(data.validation) < 2:
        raise ValueError(f"validation: expected at least 2 held-out prompts, found {len(data.validation)}")
    return np.asarray([row.utility for row in data.validation], np.float32)


def train_reward_model(
    job: Job,
    options: ShapingOptions,
    started: functions.StartedModel,
    data: functions.Data,
    follower: followers.Follower | None = None,
    *,
    adapter: models.Lora | None = None,
) -> dict[str, Any]:
    """Trains a transformer's reward in [0, bound] as the leader.

    Args:
      job: its folder is written, its options say how to train.
      options: the bound, and the KL weight of the follower.
      started: the reward model, which is written with its new parameters.
      data: prompts with their roll-outs; at least two held-out prompts.
      follower: what draws, where options.follower is one of `followers.DRAWN`.
      adapter: is trained with the head in place of all weights; None: all weights.

    Returns:
      The summary: utility that it delivers through the closed form and the follower's KL, beside its start, the base,
      the true utility paid as it is, and the optimum; with a follower that draws, what it delivers before and after.

    Raises:
      ValueError: fewer than two held-out prompts.
    """
    utility, length = _validation(data), job.config.rows.max_length
    pad = lambda rows: collate_groups(rows, length)  # noqa: E731
    # One shape, so that one program is compiled.
    whole = [max(data.validation, key=lambda row: len(row.prompt) + max(map(len, row.responses)))]
    score = lambda params, batch: objectives.group_rewards(started.lm, objectives.cast(started.lm, params), batch)  # noqa: E731

    def evaluate(params: Params) -> np.ndarray:
        found: np.ndarray = job.evaluate(
            score, params, data.validation, lambda rows: collate_groups(rows, length, whole)
        )
        return found

    start = adapters.at_start(adapter, started, seed=job.config.run.seed)
    before, began = evaluate(start), time.monotonic()
    drawn: _Drawn | None = None
    if follower is not None:
        drawn = _Drawn(follower, job, data)
        drawn.answer("before", start)
        began = time.monotonic()
        params = job.fit(
            started,
            data,
            followers.loss_of_draws(follower),
            drawn.prompts,
            frozen=follower.base,
            adapter=adapter,
            redraw=drawn.redraw,
        )
    else:
        loss = objectives.stackelberg(started.lm, beta=options.beta)
        if options.follower == "trained":
            loss = followers.trained(
                started.lm, beta=options.beta, steps=options.follower_steps, step_size=options.follower_step_size
            )
        params = job.fit(started, data, loss, pad, adapter=adapter)
    seconds, after = time.monotonic() - began, evaluate(params)
    # The start is bound·sigmoid(score); the score itself, spread over [0, bound] by the range of a prompt's roll-outs:
    share = np.clip(before / options.bound, 1e-6, 1 - 1e-6)
    raw = np.log(share / (1 - share))
    spread = np.asarray(shaping.minmax(raw, reference=raw, bound=options.bound))
    paid = {"leader": after, "start": before, "start_minmax": spread, "raw": utility}
    delivered = delivered_utilities(paid, utility, bound=options.bound, beta=options.beta)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    ess = np.asarray(shaping.effective_samples(after, beta=options.beta))
    summary = compare_leaders(delivered) | mean_figures(
        {f"kl_{name}": _kl_of(reward / options.beta) for name, reward in paid.items()}
    )
    summary |= {"parameters": size, "effective_samples": float(ess.mean()), "training_seconds": seconds}
    if adapter is not None:
        summary["trained_parameters"] = sum(leaf.size for leaf in jax.tree.leaves((params["lora"], params["head"])))
    if drawn is not None:
        drawn.answer("after", params)
        summary |= drawn.summary(utility.mean(axis=-1))
    warn_of_few(ess, utility.shape[1])
    return job.finish(started, params, data, summary)


def _kl_of(logit: np.ndarray) -> np.ndarray:
    """KL [prompts] of softmax(logit [prompts,n]) to equal weights, in nats."""
    return np.asarray(gibbs.kl(jax.nn.log_softmax(logit), jnp.full(logit.shape, -np.log(logit.shape[-1]))))


class _Drawn:
    """A follower that draws, beside a training: the batches that it draws, and what it delivers on held-out prompts."""

    def __init__(self, follower: followers.Follower, job: Job, data: functions.Data) -> None:
        self.follower, self.job, self.rows = follower, job, list(data.validation)
        # One width for all prompts, so that one program draws, and one learns.
        self.longest = [max((*data.train, *data.validation), key=lambda row: len(row.prompt))]
        self.found: dict[str, followers.Delivered] = {}
        self.steps = self.tokens = 0

    def prompts(self, rows: list[Any]) -> dict[str, np.ndarray]:
        """The prompts of a batch."""
        return collate_prompts(rows, self.job.config.rows.max_length, self.longest)

    def redraw(self, params: Params, step: int, batch: Any) -> Any:
        """`followers.redraw`, counted."""
        rows = followers.redraw(self.follower, params, step, batch)
        self.steps, self.tokens = self.steps + 1, self.tokens + int(rows["response_mask"].sum())
        return rows

    def answer(self, name: str, params: Params) -> None:
        """Draws for the held-out prompts, with draws that training does not have, the same ones each time."""
        self._measure(name, functools.partial(followers.redraw, self.follower, params))
        if self.follower.raw is not None and "raw" not in self.found:
            self._measure("raw", functools.partial(followers.redraw_raw, self.follower))

    def _measure(self, name: str, draw: Callable[[int, Any], dict[str, Array]]) -> None:
        self.found[name] = found = self._delivered(draw)
        print(f"leader, {name}: utility {found.utility.mean():.4g}, KL {found.kl.mean():.4g} nats", flush=True)

    def _delivered(self, draw: Callable[[int, Any], dict[str, Array]]) -> followers.Delivered:
        size, parts = self.job.config.optimizer.batch_size, []
        for i in range(0, len(self.rows), size):
            part = self.rows[i : i + size]
            full = part + [part[-1]] * (size - len(part))
            batch = jax.tree.map(jnp.asarray, self.prompts(full))
            parts.append([x[: len(part)] for x in followers.delivered(draw(2**30 + i, batch))])
        return followers.Delivered(*(np.concatenate(x) for x in zip(*parts, strict=True)))

    def summary(self, base: np.ndarray) -> dict[str, Any]:
        """Utility and KL before, after and with the utility paid as it is; the gains of the trained leader, paired by
        prompt, over these and over the base [prompts]; tokens and steps of this process."""
        last = self.found["after"].utility
        values: dict[str, np.ndarray] = {}
        for name, one in self.found.items():
            values |= {f"follower_utility_{name}": one.utility, f"follower_kl_{name}": one.kl}
        values["follower_utility_gain"] = last - self.found["before"].utility
        values["follower_utility_gain_over_base"] = last - base
        if "raw" in self.found:
            values["follower_utility_gain_over_raw"] = last - self.found["raw"].utility
        cost = {"training_steps": self.steps, "tokens_drawn": self.tokens}
        return mean_figures(values) | cost | {"candidates_read": self.tokens * self.follower.options.candidates}


def warn_of_few(effective: np.ndarray, samples: int) -> None:
    """Says where the closed form on n samples rests on fewer than n/8 of them.

    Args:
      effective: effective samples of each prompt.
      samples: n.
    """
    if effective.mean() < samples / 8:
        print(
            f"leader: {effective.mean():.2f} effective samples of {samples}, below an eighth: what the closed form "
            "gives on them, and far more its gradient, is too small (more --samples, or a lower --bound)",
            flush=True,
        )


def train_network(
    job: Job, options: ShapingOptions, started: functions.StartedModel, data: functions.Data
) -> dict[str, Any]:
    """Trains a monotone shaping function of the utility as the leader.

    Half of a prompt's roll-outs serve as reference for the statistics, the other half is weighed.

    Args:
      job: its folder is written, its options say how to train.
      options: the bound, and the KL weight of the follower.
      started: its parameters are not used.
      data: prompts with their roll-outs; at least two held-out prompts.

    Returns:
      The summary: utility that the network delivers, beside a sampled threshold, the base and the optimum.

    Raises:
      ValueError: fewer than two held-out prompts.
    """
    utility, length = _validation(data), job.config.rows.max_length
    network = shaping.MonotoneShaping(options.bound)
    reference, weighed = utility[:, ::2], utility[:, 1::2]
    start = network.init(jax.random.key(job.config.run.seed), weighed, reference=reference)

    def loss(params: Params, batch: Any, frozen: Params) -> tuple[Array, LossAux]:
        known, weighed = batch["utility"][:, ::2], batch["utility"][:, 1::2]
        reward = network.apply(params, weighed, reference=known)
        assert isinstance(reward, jax.Array)
        delivered = shaping.leader_utility(jnp.zeros_like(weighed), reward, utility=weighed, beta=options.beta)
        ess = shaping.effective_samples(reward, beta=options.beta)
        metrics = {"utility": delivered.mean(), "effective_samples": ess.mean()}
        return -delivered.mean(), LossAux(jnp.asarray(weighed.shape[0]), metrics)

    pad = lambda rows: collate_prompts(rows, length)  # noqa: E731
    params = job.fit(started._replace(params=start), data, loss, pad)
    reward = np.asarray(network.apply(params, weighed, reference=reference))
    gain = options.bound / options.beta
    sampled = shaping.threshold_reward(
        weighed, threshold=shaping.optimal_threshold(reference, gain=gain), bound=options.bound
    )
    delivered = delivered_utilities(
        {"leader": reward, "sampled_threshold": np.asarray(sampled)}, weighed, bound=options.bound, beta=options.beta
    )
    ess = np.asarray(shaping.effective_samples(reward, beta=options.beta))
    flat = {"/".join(str(k.key) for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    with _hosts.together():
        if _hosts.is_first():
            with _io.whole_file(job.out / NETWORK) as sink:
                sink.write(save(flat, metadata={"bound": str(options.bound), "beta": str(options.beta)}))
    summary = {"rows": len(data.train), "validation_rows": len(data.validation)} | compare_leaders(delivered)
    summary["effective_samples"] = float(ess.mean())
    warn_of_few(ess, weighed.shape[1])
    _io.write_json(job.out / "summary.json", summary)
    functions.report(job.out, summary, job.following, product=job.product)
    return summary


def train_threshold(
    job: Job, options: ShapingOptions, started: functions.StartedModel, data: functions.Data
) -> dict[str, Any]:
    """Trains a head that gives each prompt's threshold from its last token.

    Args:
      job: its folder is written, its options say how to train.
      options: the bound, and the KL weight of the follower.
      started: the model with the head, which is written with its new parameters.
      data: prompts with their roll-outs; at least two held-out prompts.

    Returns:
      The summary: utility that its thresholds deliver, beside those of a constant, and its error.

    Raises:
      ValueError: fewer than two held-out prompts.
    """
    utility, length = _validation(data), job.config.rows.max_length
    gain = options.bound / options.beta
    pad = lambda rows: collate_prompts(rows, length)  # noqa: E731
    params = job.fit(started, data, amortised_loss(started.lm, gain=gain), pad)
    score = lambda params, batch: prompt_thresholds(started.lm, params, batch)  # noqa: E731
    found = job.evaluate(score, params, data.validation, pad)
    exact = np.asarray(shaping.optimal_threshold(utility, gain=gain))
    constant = np.median(shaping.optimal_threshold(np.asarray([row.utility for row in data.train]), gain=gain))
    shaped = {
        name: np.asarray(shaping.threshold_reward(utility, threshold=m, bound=options.bound))
        for name, m in (("leader", found), ("constant", np.full_like(found, constant)))
    }
    error, half = functions.interval(np.abs(found - exact))
    delivered = delivered_utilities(shaped, utility, bound=options.bound, beta=options.beta)
    summary = compare_leaders(delivered) | {
        "threshold_error": error,
        "threshold_error_95": half,
        "threshold_error_of_a_constant": float(np.abs(constant - exact).mean()),
    }
    return job.finish(started, params, data, summary)
