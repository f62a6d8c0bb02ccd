"""Values of prefixes: rows, heads, losses and figures of the training of value models on roll-outs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxalign import _hosts, models, shaping
from jaxalign._arrays import is_flat_on_host
from jaxalign._checks import check_language_model
from jaxalign.data import encoded, preferences
from jaxalign.training import adapters, dry_run, hidden_states, law_sources, laws, objectives, roll_in, rollouts
from jaxalign.training import job as functions
from jaxalign.training.options import RolloutOptions
from jaxalign.training.step import Loss, LossAux
from jaxalign.training.training_job import Job
from jaxalign.training.value_options import ValueOptions, number_of_bins
from jaxalign.types import Array, Params


class ValueRow(NamedTuple):
    """A roll-out and what the values of its prefixes are learned from."""

    prompt: list[int]
    """Token ids."""
    response: list[int]
    """Token ids."""
    reward: float
    """Of the whole response, shaped where that was asked for."""
    utility: float
    """The reward before it was shaped."""
    threshold: float
    """Of its prompt; 0 without shaping."""
    start: int = 0
    """How many of its first tokens the base did not write: laws before them are not learned."""


def value_rows(options: ValueOptions, found: list[rollouts.Rollout]) -> list[ValueRow]:
    """Makes rows to learn values from; with --bound each reward is shaped by its prompt's threshold, with --clip-reward
    it is clipped.

    Args:
      options: bound, beta, sharpness, and what bounds the laws' support are read.
      found: all roll-outs of each prompt, of which its threshold is solved.

    Returns:
      A row for each roll-out, in the order of prompts.

    Raises:
      ValueError: a reward beyond the support of laws, without --clip-reward.
    """
    if not options.bound:
        ends = laws.numbers_of(options.atoms) or laws.range_of(options.reward_range)
        within = laws.within(found, ends, clip=options.clip_reward) if ends else [r.reward for r in found]
        return [
            ValueRow(r.prompt, r.response, reward, r.reward, 0.0, r.start)
            for r, reward in zip(found, within, strict=True)
        ]
    groups = list(rollouts.by_prompt(found).values())
    utility = np.asarray([[row.reward for row in rows] for rows in groups], np.float32)
    threshold = shaping.optimal_threshold(utility, gain=options.bound / options.beta)
    if options.sharpness:
        shaped = shaping.soft_threshold_reward(
            utility, threshold=threshold, bound=options.bound, sharpness=options.sharpness
        )
    else:
        shaped = shaping.threshold_reward(utility, threshold=threshold, bound=options.bound)
    return [
        ValueRow(row.prompt, row.response, r, row.reward, m)
        for rows, rewards, m in zip(groups, np.asarray(shaped).tolist(), np.asarray(threshold).tolist(), strict=True)
        for row, r in zip(rows, rewards, strict=True)
    ]


def value_head(options: ValueOptions, body: models.Config) -> models.Head:
    """The head that the options ask for on a model.

    Args:
      options: head, its size, layers and activation; objective, beta and bound say what a follower decodes by.
      body: the model's config, whose hidden size is the default of --head-size.

    Returns:
      A head of scalars or of the values of every next token.
    """
    exact: Any = "exceedance" if options.objective == "exceedance" else "soft"
    follower = models.Follower(exact, beta=options.beta, bound=options.bound) if log_weight(options) else None
    kind: Any = "q" if options.head == "q" else "value"
    law = None
    if options.objective == "distribution":  # its range is that of the rewards, once there are any
        points = laws.numbers_of(options.atoms) or tuple(np.linspace(0, 1, number_of_bins(options)).tolist())
        law = models.Distribution(points, "atoms" if options.atoms else "grid", options.rank)
    return models.Head(
        kind,
        hidden_size=options.head_size or body.hidden_size,
        num_hidden=options.head_layers,
        activation=options.activation,
        follower=follower,
        distribution=law,
    )


def with_support(
    options: ValueOptions, started: functions.StartedModel, rows: list[ValueRow]
) -> functions.StartedModel:
    """Gives a head of laws the support of the rewards (`laws.for_rewards`); another head, and shapes, stay.

    Args:
      options: objective, bins, atoms and reward_range are read.
      started: the model.
      rows: all rows that there are to learn from.

    Returns:
      The model to train.
    """
    if options.objective != "distribution" or dry_run.is_abstract(started.params):
        return started
    return laws.for_rewards(
        started,
        [row.reward for row in rows],
        bins=number_of_bins(options),
        atoms=laws.numbers_of(options.atoms),
        ends=laws.range_of(options.reward_range),
    )


def inputs(options: ValueOptions) -> list[str]:
    """Files and folders that roll-ins and other rounds are read from, beside those of the roll-outs."""
    shards = [str(path) for path in roll_in.shards_of(roll_in.folders(options.earlier))]
    return [*([options.roll_in] if options.roll_in else []), *shards]


def rolls_in(options: ValueOptions) -> roll_in.RollIn:
    """What writes the first tokens of the roll-outs, and of which rounds they are read."""
    return roll_in.RollIn(options.roll_in, options.roll_in_beta, tuple(roll_in.folders(options.earlier)))


def about_laws(
    options: ValueOptions, rolled: RolloutOptions, started: functions.StartedModel, rows: list[ValueRow]
) -> dict[str, dict[str, Any]] | None:
    """What is written beside a head of laws, by the name of its file: what the laws are of. None for another head."""
    if options.objective != "distribution" or dry_run.is_abstract(started.params):
        return None
    of_base = not options.responses or options.targets == "bellman"
    given = bool(options.responses)
    clipped = _clipped(rows)
    about = law_sources.made_with(rolled, started.tokenizer, responses=given, of_base=of_base, clipped=clipped)
    return {law_sources.FILE: about}


def _clipped(rows: list[ValueRow]) -> float:
    """Share of the rows whose reward was clipped."""
    return float(np.mean([row.reward != row.utility for row in rows]))


def following(options: ValueOptions, folder: str) -> str:
    """The method of eval.decode, as --method takes it, that reads the trained model in a folder."""
    if options.objective == "distribution":
        return f"distribution:{folder}:soft@1"
    if options.frozen:
        return f"re_control:{folder}@1"
    return f"follower:{folder}" if log_weight(options) else f"value:{folder}@1"


def log_weight(options: ValueOptions) -> bool:
    """True where the head gives the exact log weight of a shaped reward, which a follower decodes by."""
    return options.objective == "exceedance" or (options.objective == "soft" and bool(options.bound))


def collate_values(options: ValueOptions, max_length: int) -> Callable[[list[ValueRow]], dict[str, np.ndarray]]:
    """Makes the function that pads rows.

    Args:
      options: the objective is read.
      max_length: longest row [tokens].

    Returns:
      A list of b rows -> {"tokens", "mask", "loss_mask" [b,L], "reward", "threshold" [b]}. The reward of --objective
      exceedance is the utility, which its classifier compares with the threshold; --objective distribution has "start"
      [b] too, the tokens that the base did not write.
    """
    classify = options.objective == "exceedance"

    def collate(rows: list[ValueRow]) -> dict[str, np.ndarray]:
        texts = [encoded.TextTokens(row.prompt, row.response, "roll-out") for row in rows]
        length = functions.row_length([len(row.prompt) + len(row.response) for row in rows], max_length)
        rewards = [row.utility if classify else row.reward for row in rows]
        more = {"reward": rewards, "threshold": [row.threshold for row in rows]}
        arrays = {name: np.asarray(values, np.float32) for name, values in more.items()}
        if options.objective == "distribution":
            arrays["start"] = np.asarray([row.start for row in rows], np.int32)
        return preferences.pad_texts(texts, length=length) | arrays

    return collate


def value_loss(options: ValueOptions, started: functions.StartedModel, *, base: str, dtype: str) -> tuple[Loss, Params]:
    """The loss of the objective.

    Args:
      options: objective, beta, pair_weight and frozen are read.
      started: the model with its head.
      base: folder of the base, which cd_q needs.
      dtype: type that the base computes in.

    Returns:
      (loss, the base's parameters, which it takes as frozen, or None).

    Raises:
      ValueError: a base of another vocabulary.
    """
    lm: models.LanguageModel | None = None
    frozen: Params = None
    if options.objective == "cd_q" or options.targets == "bellman":
        if dry_run.is_abstract(started.params):
            lm, frozen = dry_run.load_shapes(base, dtype=dtype)
        else:
            lm, frozen = models.load_beside(base, started.lm, started.tokenizer, name="base", dtype=dtype)
        check_language_model("base", lm, base)
    if options.objective == "distribution":
        return laws.laws(started.lm, base=lm), frozen
    loss = objectives.value(
        started.lm,
        options.objective,
        base=lm,
        beta=options.beta or None,
        pair_weight=options.pair_weight,
        before=options.frozen,
    )
    return loss, frozen


def fit_head(
    job: Job,
    started: functions.StartedModel,
    data: functions.Data,
    loss: Loss,
    collate: Callable[[list[Any]], dict[str, Any]],
    *,
    store: bool,
) -> Params:
    """Trains the head alone. The body is no parameter of the run: neither gradients nor moments of it are made, and no
    decay reaches it.

    Args:
      job: its options say how to train.
      started: the model.
      data: its training rows are used.
      loss: of the whole model's parameters.
      collate: pads rows, as `collate_values` and `pairs.padding` give it; the former where the states are stored.
      store: the body reads each row once, into states/ of the run folder (`hidden_states.stored_states`), and not at
        each step. Several processes read it at each step, which is printed, and so counts a dry run.

    Returns:
      Parameters of the whole model: the body's as they came, the head's float32.
    """
    body = {"transformer": started.params["transformer"]}
    alone = started._replace(params={"head": started.params["head"]})
    if store and _hosts.count() > 1:
        print("hidden states: computed at each step, since several processes share the run", flush=True)
    elif store and not dry_run.is_abstract(started.params):
        size, whole = job.config.optimizer.batch_size, adapters.held(started.lm, body)
        known = hidden_states.stored_states(job.out / "states", started.lm, whole, data.train, collate, size=size)
        numbered = data._replace(train=list(zip(data.train, range(len(data.train)), strict=True)))
        return {**body, **job.fit(alone, numbered, loss, hidden_states.with_states(collate, known))}

    read, of_read = without_lm_head(loss, body)

    def of_head(params: Params, batch: Any, frozen: Params) -> tuple[Array, LossAux]:
        return of_read({**frozen, **params}, batch, None)

    return {**body, **job.fit(alone, data, of_head, collate, frozen=read)}


def fit_all(
    job: Job,
    started: functions.StartedModel,
    data: functions.Data,
    loss: Loss,
    collate: Callable[[list[ValueRow]], dict[str, np.ndarray]],
    *,
    frozen: Params,
) -> Params:
    """Trains the head and the body, but for an lm_head of its own, which values are not read by: neither gradients nor
    moments of it are made, and no decay reaches it.

    Args:
      job, started, data, loss, collate: as in `fit_head`.
      frozen: what the loss takes as frozen.

    Returns:
      Parameters of the whole model, float32.
    """
    kept = {name: x for name, x in started.params["transformer"].items() if name == "lm_head"}
    read, of_read = without_lm_head(loss, started.params)
    found = job.fit(started._replace(params=read), data, of_read, collate, frozen=frozen)
    return {**found, "transformer": {**found["transformer"], **kept}}


def without_lm_head(loss: Loss, params: Params) -> tuple[Params, Loss]:
    """Leaves out an lm_head of its own, which values are not read by.

    Args:
      loss: of the whole model's parameters.
      params: the whole model's.

    Returns:
      (the parameters without it, the loss of these).
    """
    body = dict(params["transformer"])
    unread = body.pop("lm_head", None)
    if unread is None:
        return params, loss

    def of_read(params: Params, batch: Any, frozen: Params = None) -> tuple[Array, LossAux]:
        nothing = jnp.zeros(unread.shape, unread.dtype)  # what nothing reads is not compiled
        whole = {**params, "transformer": {**params["transformer"], "lm_head": nothing}}
        return loss(whole, batch, frozen)

    return {**params, "transformer": body}, of_read


def measure_values(
    options: ValueOptions,
    lm: models.LanguageModel,
    params: Params,
    rows: list[ValueRow],
    data: functions.Data,
    collate: Callable[[list[ValueRow]], dict[str, np.ndarray]],
    batch_size: int,
) -> dict[str, Any]:
    """The figures of summary.json.

    Args:
      options: objective, bound and frozen are read.
      lm: the model with its head.
      params: its trained parameters.
      rows: all rows.
      data: the same, of which the validation rows are measured.
      collate: pads rows, as `collate_values` gives it.
      batch_size: rows measured together.

    Returns:
      Number of roll-outs, mean and deviation of their reward and, with validation rows, squared error of the values
      and the share of the target's variance that they explain.
    """
    classify = options.objective == "exceedance"

    def score(params: Params, batch: Any) -> Any:
        cast = objectives.cast(lm, params)
        hidden = lm.hidden(cast, batch["tokens"], mask=batch["mask"])
        found = objectives.values_of(lm, cast, hidden, batch["tokens"])
        drawn = batch["loss_mask"]
        if options.frozen:
            found, drawn = found[:, :-1], drawn[:, 1:]
        target = batch["reward"][:, None]
        if classify:
            target = (target > batch["threshold"][:, None]).astype(found.dtype)
            found = 1 / (1 + jnp.exp(-found))
        error = jnp.where(drawn, (found - target) ** 2, 0).sum(-1)
        return {"error": error / drawn.sum(-1), "target": target[:, 0]}

    rewards, utility = (np.asarray([getattr(row, name) for row in rows]) for name in ("reward", "utility"))
    summary: dict[str, Any] = {
        "rollouts": len(rows),
        "reward": float(utility.mean()),
        "reward_deviation": float(utility.std()),
    }
    if options.bound:
        summary |= {"shaped_reward": float(rewards.mean()), "threshold": float(np.mean([r.threshold for r in rows]))}
        summary["exceed"] = float(np.mean([row.utility > row.threshold for row in rows]))
    if options.objective == "distribution":
        summary |= laws.measure(lm, params, data, collate, rewards=rewards, rollouts=len(rows), batch_size=batch_size)
        summary["clipped_share"] = _clipped(rows)
    if data.validation:
        measured = functions.evaluate(score, params, data.validation, collate, batch_size)
        mean, half = functions.interval(measured["error"])
        # Of the target's variance; the share that a prefix cannot know is never explained.
        targets = measured["target"]
        explained = None if is_flat_on_host(targets) else 1 - float(measured["error"].mean() / targets.var())
        summary |= {"squared_error": mean, "squared_error_95": half, "explained_variance": explained}
    return summary
