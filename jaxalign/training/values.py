"""Values of prefixes: options, rows and figures of the training of value models on roll-outs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxalign import _hosts, models, shaping
from jaxalign._checks import check_language_model
from jaxalign.data import encoded, preferences
from jaxalign.training import adapters, dry_run, hidden_states, law_sources, laws, objectives, rollouts
from jaxalign.training import job as functions
from jaxalign.training.options import RolloutOptions, check_finite, check_rollout_options
from jaxalign.training.step import Loss, LossAux
from jaxalign.training.training_job import Job
from jaxalign.types import Array, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueOptions:
    """What a value model learns."""

    responses: str = ""
    """In place of --prompts: rows of "prompt" and "response" by any policy, of any form of data (docs/data.md), such as
    responses.jsonl of eval.decode; each is scored as a whole text, EOS added."""
    objective: Literal["fudge", "cd_q", "td", "pairs", "soft", "exceedance", "distribution"] = "fudge"
    """fudge: the roll-out's reward at every prefix; cd_q: exact mean over the base's next tokens (Q head); td: the next
    prefix's value; pairs: the reward at the last token, and neighbours alike; soft: beta·log E exp(reward/beta);
    exceedance: a classifier of the utility's exceeding the threshold; distribution: the law of the reward, which
    serves every beta, threshold, bound and n (docs/methods/distribution.md)."""
    head: Literal["scalar", "q"] = "scalar"
    """scalar: one value a prefix; q: the value of every next token at once."""
    head_size: int = 0
    """Width of the head's hidden layers; 0: the model's."""
    head_layers: int = 1
    """Hidden layers of the head."""
    activation: Literal["silu", "relu", "gelu", "tanh"] = "silu"
    """Between the head's layers."""
    frozen: bool = False
    """Train the head alone, on the base's hidden states: the value of each state that a token is drawn from, the
    prompt's included, for policies.re_control; or the laws of --objective distribution."""
    store_states: bool = True
    """With --frozen: compute the base's hidden states once, into states/ of the run folder (tokens x width numbers), in
    place of once at each step."""
    bound: float = 0.0
    """Bound B of the shaped reward [units of reward]; 0: the reward as it is."""
    beta: float = 0.0
    """KL weight that the head is for [units of reward per nat]; with --bound and with --objective soft."""
    sharpness: float = 0.0
    """Shaped reward B·sigmoid(sharpness·(u − m)) [per unit of reward]; 0: B·1[u > m]."""
    pair_weight: float = 1.0
    """Weight of the pair term of --objective pairs [1]."""
    bins: int = 49
    """Support points of --objective distribution, an even grid over the rewards."""
    atoms: str = ""
    """With --objective distribution: the only rewards that there are, as in 0,1; "": a grid."""
    rank: int = 16
    """With --objective distribution and a Q head: numbers a token is embedded by."""
    targets: Literal["rollouts", "bellman"] = "rollouts"
    """What --objective distribution learns: the rewards of the roll-outs, or by a Q head the mean law after the base's
    next tokens, also from --responses of another policy."""


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


def check_value_options(options: ValueOptions, rolled: RolloutOptions, *, model: str) -> None:
    """Checks the values of options that need no file.

    Args:
      options: of the value model.
      rolled: of its roll-outs.
      model: folder of the model that is trained.

    Raises:
      ValueError: it names the option, what was expected and what was found.
    """
    check_rollout_options(rolled)
    if bool(rolled.prompts) == bool(options.responses):
        found = "both" if rolled.prompts else "neither"
        raise ValueError(f"prompts: expected either --prompts or --responses, found {found}")
    for name, value in (("bound", options.bound), ("rollouts", rolled.rollouts)):
        if options.responses and value:
            raise ValueError(f"{name}: expected --prompts, of which roll-outs are made, found --responses")
    if options.objective == "cd_q" and options.head != "q":
        raise ValueError("head: expected q for --objective cd_q, whose target is a mean over the vocabulary")
    check_finite(options, "bound", "beta", "sharpness", "pair_weight")
    if options.head_layers < 1:
        raise ValueError(f"head_layers: expected at least 1, found {options.head_layers}")
    if options.frozen and options.head != "scalar":
        raise ValueError("head: expected scalar with --frozen, found q")
    if options.frozen and (options.bound or options.objective not in ("fudge", "td", "pairs", "distribution")):
        raise ValueError("objective: expected fudge, td, pairs or distribution, and no --bound, with --frozen")
    if options.frozen and model != rolled.base:
        raise ValueError("model: expected the base with --frozen, whose hidden states are edited")
    if options.objective == "exceedance" and not options.bound:
        raise ValueError(
            "bound: expected a value > 0 for --objective exceedance, which is for a shaped reward, found 0"
        )
    if (options.bound or options.objective == "soft") and not options.beta:
        raise ValueError("beta: expected a value > 0 with --bound and with --objective soft, found 0")
    _check_laws(options)
    if options.bound and rolled.samples < 2:
        raise ValueError(f"samples: expected at least 2 for a threshold per prompt, found {rolled.samples}")
    if options.objective == "exceedance" and options.sharpness:
        raise ValueError("sharpness: expected 0 for --objective exceedance; --objective soft serves a soft threshold")


def _check_laws(options: ValueOptions) -> None:
    if options.objective != "distribution":
        if options.targets != "rollouts" or options.atoms:
            name = "atoms" if options.atoms else "targets"
            raise ValueError(f"{name}: expected --objective distribution, found {options.objective}")
        return
    for name in ("bound", "beta", "sharpness"):
        if getattr(options, name):
            raise ValueError(f"{name}: expected none with --objective distribution, which is for all, at decoding")
    if options.targets == "bellman" and options.head != "q":
        raise ValueError("head: expected q for --targets bellman, whose target is a mean over the vocabulary")
    for name, least in (("bins", 2), ("rank", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"{name}: expected at least {least}, found {getattr(options, name)}")
    if options.atoms and len(laws.atoms_of(options.atoms)) < 2:
        raise ValueError(f"atoms: expected at least two rewards, as in 0,1, found {options.atoms!r}")


def value_rows(options: ValueOptions, found: list[rollouts.Rollout]) -> list[ValueRow]:
    """Makes rows to learn values from; with --bound each reward is shaped by its prompt's threshold.

    Args:
      options: bound, beta and sharpness are read.
      found: all roll-outs of each prompt, of which its threshold is solved.

    Returns:
      A row for each roll-out, in the order of prompts.
    """
    if not options.bound:
        return [ValueRow(r.prompt, r.response, r.reward, r.reward, 0.0) for r in found]
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
        points = laws.atoms_of(options.atoms) or tuple(np.linspace(0, 1, options.bins).tolist())
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
      options: objective, bins and atoms are read.
      started: the model.
      rows: all rows that there are to learn from.

    Returns:
      The model to train.
    """
    if options.objective != "distribution" or dry_run.is_abstract(started.params):
        return started
    return laws.for_rewards(
        started, [row.utility for row in rows], bins=options.bins, atoms=laws.atoms_of(options.atoms)
    )


def about_laws(
    options: ValueOptions, rolled: RolloutOptions, started: functions.StartedModel
) -> dict[str, dict[str, Any]] | None:
    """What is written beside a head of laws, by the name of its file: what the laws are of. None for another head."""
    if options.objective != "distribution" or dry_run.is_abstract(started.params):
        return None
    of_base = not options.responses or options.targets == "bellman"
    given = bool(options.responses)
    about = law_sources.made_with(rolled, started.tokenizer, responses=given, of_base=of_base, clipped=0.0)
    return {law_sources.FILE: about}


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
      exceedance is the utility, which its classifier compares with the threshold.
    """
    classify = options.objective == "exceedance"

    def collate(rows: list[ValueRow]) -> dict[str, np.ndarray]:
        texts = [encoded.TextTokens(row.prompt, row.response, "roll-out") for row in rows]
        length = functions.row_length([len(row.prompt) + len(row.response) for row in rows], max_length)
        rewards = [row.utility if classify else row.reward for row in rows]
        more = {"reward": rewards, "threshold": [row.threshold for row in rows]}
        arrays = {name: np.asarray(values, np.float32) for name, values in more.items()}
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
    collate: Callable[[list[ValueRow]], dict[str, np.ndarray]],
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
      collate: pads rows, as `collate_values` gives it.
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

    def of_head(params: Params, batch: Any, frozen: Params) -> tuple[Array, LossAux]:
        return loss({**frozen, **params}, batch, None)

    return {**body, **job.fit(alone, data, of_head, collate, frozen=body)}


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
        summary |= laws.measure(lm, params, data, collate, rewards=utility, rollouts=len(rows), batch_size=batch_size)
    if data.validation:
        measured = functions.evaluate(score, params, data.validation, collate, batch_size)
        mean, half = functions.interval(measured["error"])
        # Of the target's variance; the share that a prefix cannot know is never explained.
        variance = measured["target"].var()
        explained = 1 - float(measured["error"].mean() / variance) if variance > 0 else None
        summary |= {"squared_error": mean, "squared_error_95": half, "explained_variance": explained}
    return summary
