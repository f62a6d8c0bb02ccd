"""Train a value model for controlled decoding on its own roll-outs:

python -m train.value --base DIR --prompts prompts.jsonl --reward DIR --out runs/value

The base answers every prompt; a reward model (--reward DIR) or a program (--reward module:function) scores the answers;
the model learns the value of each prefix. Roll-outs are written in numbered shards: an interrupted run goes on with the
first shard that is missing, and no prompt is lost or repeated.

With --bound the reward is shaped first (Stackelberg): bound above each prompt's threshold, which is solved from its
roll-outs, and 0 below. The exact heads for decoding by tokens are then

python -m train.value --objective exceedance --bound 3 --beta 1 --samples 16 … --out runs/exceedance
python -m train.value --objective soft --bound 3 --beta 1 --sharpness 2 … --out runs/soft

which eval.decode takes as --method follower:DIR, at that beta.

The exact mean of cd_q learns the base's value from anybody's responses, since its target needs no draw of the base:

python -m train.value --objective cd_q --head q --responses responses.jsonl …

The other objectives learn from --responses the value of whoever wrote them. A response without EOS ("truncated") is
scored as it stands: its last kept token is terminal.

RE-Control's value network, a head on the base's own hidden states for policies.re_control, is

python -m train.value --objective td --frozen --activation relu --head-layers 2 … --out runs/edit
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxalign import _io, commands, models, shaping
from jaxalign.data import preferences
from jaxalign.training import job, objectives, responses, rollouts
from jaxalign.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(rollouts.Options):
    """Options of train.value."""

    prompts: str = ""
    """File of prompts: .txt, .jsonl or .jsonl.gz; each is answered by the base."""
    responses: str = ""
    """In place of --prompts: file of "prompt" and "response" rows by any policy (.jsonl, .jsonl.gz, .parquet), such as
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


class Row(NamedTuple):
    """A roll-out and what its values are learned from. reward: shaped where asked; utility: as it was paid; threshold:
    of its prompt, 0 without shaping."""

    prompt: list[int]
    response: list[int]
    reward: float
    utility: float
    threshold: float


def check(config: Config) -> None:
    """ValueErrors that name the option."""
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


def shaped(config: Config, found: list[rollouts.Rollout]) -> list[Row]:
    """Rows for training: rewards shaped by each prompt's threshold, from all of its roll-outs."""
    if not config.bound:
        return [Row(r.prompt, r.response, r.reward, r.reward, 0.0) for r in found]
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
        Row(row.prompt, row.response, r, row.reward, m)
        for rows, rewards, m in zip(groups, np.asarray(paid).tolist(), np.asarray(threshold).tolist(), strict=True)
        for row, r in zip(rows, rewards, strict=True)
    ]


def run(config: Config) -> dict[str, Any]:
    """Rolls out, trains, writes the run folder, gives its summary."""
    if not (config.model or config.architecture):
        config = dataclasses.replace(config, model=config.base)
    check(config)
    out = _io.open_run(config.out, config, inputs=[*rollouts.inputs(config), config.responses])
    log_weight = config.objective == "exceedance" or (config.objective == "soft" and bool(config.bound))
    method = f"follower:{out / 'model'}" if log_weight else f"value:{out / 'model'}@1"
    if config.frozen:
        method = f"re_control:{out / 'model'}@1"
    following = f"python -m eval.decode --model {config.base} --method {method} --prompts FILE --out DIR"
    done = job.finished(out)
    if done is not None:
        job.report(out, done, following)
        return done
    exact: Any = "exceedance" if config.objective == "exceedance" else "soft"
    follower = models.Follower(exact, beta=config.beta, bound=config.bound) if log_weight else None
    kind: Any = "q" if config.head == "q" else "value"
    begin = job.start(
        config,
        lambda body: models.Head(
            kind,
            hidden_size=config.head_size or body.hidden_size,
            num_hidden=config.head_layers,
            activation=config.activation,
            follower=follower,
        ),
    )
    if config.responses:
        eos_id = job.eos_of(begin.tokenizer)
        found = responses.scored(config, config.responses, begin.tokenizer, eos_id=eos_id)
    else:
        found = preferences.Loaded(rollouts.roll_out(config, out, begin.tokenizer, stage="value"), 0, [])
    rows = shaped(config, found.rows)
    split = job.split(found._replace(rows=rows), config)
    classify = config.objective == "exceedance"

    def collate(rows: list[Row]) -> dict[str, np.ndarray]:
        texts = [preferences.TextTokens(row.prompt, row.response, "roll-out") for row in rows]
        length = job.row_length(config, [len(row.prompt) + len(row.response) for row in rows])
        paid = [row.utility if classify else row.reward for row in rows]
        more = {"reward": paid, "threshold": [row.threshold for row in rows]}
        arrays = {name: np.asarray(values, np.float32) for name, values in more.items()}
        return preferences.pad_texts(texts, length=length) | arrays

    base: Any = None
    frozen: Params = None
    if config.objective == "cd_q":
        base, frozen = models.load(config.base, dtype=config.dtype)
    loss = objectives.value(
        begin.lm,
        config.objective,
        base=base,
        beta=config.beta or None,
        pair_weight=config.pair_weight,
        before=config.frozen,
    )
    if config.frozen:
        # The body is no parameter of the run: neither gradients nor moments of it are made, and no decay reaches it.
        frozen = {"transformer": begin.params["transformer"]}
        train = lambda params, batch, frozen: loss({**frozen, **params}, batch, None)  # noqa: E731
        alone = begin._replace(params={"head": begin.params["head"]})
        params = job.run(config, alone, split, train, collate, stage="value", out=out, frozen=frozen)
        params = {**frozen, **params}
    else:
        params = job.run(config, begin, split, loss, collate, stage="value", out=out, frozen=frozen)

    def score(params: Params, batch: Any) -> Any:
        cast = objectives.cast(begin.lm, params)
        hidden = begin.lm.hidden(cast, batch["tokens"], mask=batch["mask"])
        found = objectives.values_of(begin.lm, cast, hidden, batch["tokens"])
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
    return job.finish(out, begin, params, split, summary, following)


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)
