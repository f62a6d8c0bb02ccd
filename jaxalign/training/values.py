"""Values of prefixes: options, rows and figures of the training of value models on roll-outs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxalign import models, shaping
from jaxalign.data import encoded, preferences
from jaxalign.training import job, objectives, rollouts
from jaxalign.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueOptions(rollouts.RolloutOptions):
    """Options of a job that trains a value model."""

    prompts: str = ""
    """File of prompts: .txt, .jsonl or .jsonl.gz; each is answered by the base."""
    responses: str = ""
    """In place of --prompts: rows of "prompt" and "response" by any policy, of any form of data (docs/data.md), such as
    responses.jsonl of eval.decode; each is scored as a whole text, EOS added."""
    objective: Literal["fudge", "cd_q", "td", "pairs", "soft", "exceedance"] = "fudge"
    """fudge: the roll-out's reward at every prefix; cd_q: exact mean over the base's next tokens (Q head); td: the next
    prefix's value; pairs: the reward at the last token, and neighbours alike; soft: beta·log E exp(reward/beta);
    exceedance: a classifier of the utility's exceeding the threshold."""
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
    prompt's included, for policies.re_control."""
    bound: float = 0.0
    """Bound B of the shaped reward [units of reward]; 0: the reward as it is."""
    beta: float = 0.0
    """KL weight that the head is for [units of reward per nat]; with --bound and with --objective soft."""
    sharpness: float = 0.0
    """Shaped reward B·sigmoid(sharpness·(u − m)) [per unit of reward]; 0: B·1[u > m]."""
    pair_weight: float = 1.0
    """Weight of the pair term of --objective pairs [1]."""


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


def check_value_options(config: ValueOptions) -> None:
    """Checks the values of options that need no file.

    Args:
      config: the options.

    Raises:
      ValueError: it names the option, what was expected and what was found.
    """
    rollouts.check(config)
    if bool(config.prompts) == bool(config.responses):
        found = "both" if config.prompts else "neither"
        raise ValueError(f"prompts: expected either --prompts or --responses, found {found}")
    for name in ("bound", "rollouts"):
        if config.responses and getattr(config, name):
            raise ValueError(f"{name}: expected --prompts, of which roll-outs are made, found --responses")
    if config.objective == "cd_q" and config.head != "q":
        raise ValueError("head: expected q for --objective cd_q, whose target is a mean over the vocabulary")
    for name in ("bound", "beta", "sharpness", "pair_weight"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name}: expected a finite value >= 0, found {getattr(config, name)}")
    if config.head_layers < 1:
        raise ValueError(f"head_layers: expected at least 1, found {config.head_layers}")
    if config.frozen and config.head != "scalar":
        raise ValueError("head: expected scalar with --frozen, found q")
    if config.frozen and (config.bound or config.objective not in ("fudge", "td", "pairs")):
        raise ValueError("objective: expected fudge, td or pairs, and no --bound, with --frozen")
    if config.frozen and config.model != config.base:
        raise ValueError("model: expected the base with --frozen, whose hidden states are edited")
    if config.objective == "exceedance" and not config.bound:
        raise ValueError(
            "bound: expected a value > 0 for --objective exceedance, which is for a shaped reward, found 0"
        )
    if (config.bound or config.objective == "soft") and not config.beta:
        raise ValueError("beta: expected a value > 0 with --bound and with --objective soft, found 0")
    if config.bound and config.samples < 2:
        raise ValueError(f"samples: expected at least 2 for a threshold per prompt, found {config.samples}")
    if config.objective == "exceedance" and config.sharpness:
        raise ValueError("sharpness: expected 0 for --objective exceedance; --objective soft serves a soft threshold")


def value_rows(config: ValueOptions, found: list[rollouts.Rollout]) -> list[ValueRow]:
    """Makes rows to learn values from; with --bound each reward is shaped by its prompt's threshold.

    Args:
      config: bound, beta and sharpness are read.
      found: all roll-outs of each prompt, of which its threshold is solved.

    Returns:
      A row for each roll-out, in the order of prompts.
    """
    if not config.bound:
        return [ValueRow(r.prompt, r.response, r.reward, r.reward, 0.0) for r in found]
    groups = list(rollouts.by_prompt(found).values())
    utility = np.asarray([[row.reward for row in rows] for rows in groups], np.float32)
    threshold = shaping.optimal_threshold(utility, gain=config.bound / config.beta)
    if config.sharpness:
        paid = shaping.soft_threshold_reward(
            utility, threshold=threshold, bound=config.bound, sharpness=config.sharpness
        )
    else:
        paid = shaping.threshold_reward(utility, threshold=threshold, bound=config.bound)
    return [
        ValueRow(row.prompt, row.response, r, row.reward, m)
        for rows, rewards, m in zip(groups, np.asarray(paid).tolist(), np.asarray(threshold).tolist(), strict=True)
        for row, r in zip(rows, rewards, strict=True)
    ]


def value_head(config: ValueOptions, body: models.Config) -> models.Head:
    """The head that the options ask for on a model.

    Args:
      config: head, its size, layers and activation; objective, beta and bound say what a follower decodes by.
      body: the model's config, whose hidden size is the default of --head-size.

    Returns:
      A head of scalars or of the values of every next token.
    """
    exact: Any = "exceedance" if config.objective == "exceedance" else "soft"
    follower = models.Follower(exact, beta=config.beta, bound=config.bound) if log_weight(config) else None
    kind: Any = "q" if config.head == "q" else "value"
    return models.Head(
        kind,
        hidden_size=config.head_size or body.hidden_size,
        num_hidden=config.head_layers,
        activation=config.activation,
        follower=follower,
    )


def log_weight(config: ValueOptions) -> bool:
    """True where the head gives the exact log weight of a shaped reward, which a follower decodes by."""
    return config.objective == "exceedance" or (config.objective == "soft" and bool(config.bound))


def collate_values(config: ValueOptions) -> Callable[[list[ValueRow]], dict[str, np.ndarray]]:
    """Gives the function that pads b rows: {"tokens", "mask", "loss_mask" [b,L], "reward", "threshold" [b]}.

    The reward of --objective exceedance is the utility, which its classifier compares with the threshold.
    """
    classify = config.objective == "exceedance"

    def collate(rows: list[ValueRow]) -> dict[str, np.ndarray]:
        texts = [encoded.TextTokens(row.prompt, row.response, "roll-out") for row in rows]
        length = job.row_length(config, [len(row.prompt) + len(row.response) for row in rows])
        paid = [row.utility if classify else row.reward for row in rows]
        more = {"reward": paid, "threshold": [row.threshold for row in rows]}
        arrays = {name: np.asarray(values, np.float32) for name, values in more.items()}
        return preferences.pad_texts(texts, length=length) | arrays

    return collate


def measure_values(
    config: ValueOptions,
    lm: models.LanguageModel,
    params: Params,
    rows: list[ValueRow],
    split: job.Data,
) -> dict[str, Any]:
    """The figures of summary.json.

    Args:
      config: objective, bound, frozen and batch_size are read.
      lm: the model with its head.
      params: its trained parameters.
      rows: all rows.
      split: the same, of which the validation rows are measured.

    Returns:
      Number of roll-outs, mean and deviation of their reward and, with validation rows, squared error of the values
      and the share of the target's variance that they explain.
    """
    classify, collate = config.objective == "exceedance", collate_values(config)

    def score(params: Params, batch: Any) -> Any:
        cast = objectives.cast(lm, params)
        hidden = lm.hidden(cast, batch["tokens"], mask=batch["mask"])
        found = objectives.values_of(lm, cast, hidden, batch["tokens"])
        drawn = batch["loss_mask"]
        if config.frozen:
            found, drawn = found[:, :-1], drawn[:, 1:]
        target = batch["reward"][:, None]
        if classify:
            target = (target > batch["threshold"][:, None]).astype(found.dtype)
            found = 1 / (1 + jnp.exp(-found))
        error = jnp.where(drawn, (found - target) ** 2, 0).sum(-1)
        return {"error": error / drawn.sum(-1), "target": target[:, 0]}

    paid, utility = (np.asarray([getattr(row, name) for row in rows]) for name in ("reward", "utility"))
    summary: dict[str, Any] = {
        "rollouts": len(rows),
        "reward": float(utility.mean()),
        "reward_deviation": float(utility.std()),
    }
    if config.bound:
        summary |= {"shaped_reward": float(paid.mean()), "threshold": float(np.mean([r.threshold for r in rows]))}
        summary["exceed"] = float(np.mean([row.utility > row.threshold for row in rows]))
    if split.validation:
        measured = job.evaluate(score, params, split.validation, collate, config.batch_size)
        mean, half = job.interval(measured["error"])
        # Of the target's variance; the share that a prefix cannot know is never explained.
        variance = measured["target"].var()
        explained = 1 - float(measured["error"].mean() / variance) if variance > 0 else None
        summary |= {"squared_error": mean, "squared_error_95": half, "explained_variance": explained}
    return summary
