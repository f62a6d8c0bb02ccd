"""Train the leader of Stackelberg reward shaping, through the follower's closed form, on roll-outs of a base:

python -m train.shaping --leader reward_model --base DIR --model REWARD_DIR --prompts FILE --reward GOLD --out DIR
python -m train.shaping --leader network --base DIR --prompts FILE --reward GOLD --out DIR
python -m train.shaping --amortise --base DIR --prompts FILE --reward GOLD --out DIR

The true utility u of every roll-out is --reward (a folder, or MODULE:FUNCTION). The follower weighs the roll-outs of a
prompt by softmax(r/beta); the leader maximises the sum of weight·u over its reward r in [0, bound].

reward_model: r = bound·sigmoid(head) of a transformer, trained end to end; afterwards it needs no true utility.
network: r is a monotone function of u and of the prompt's statistics.
--amortise: a head on the prompt's last token learns the threshold by expectile regression: none need be sampled.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.flax import save_file

from jaxalign import _io, commands, models, shaping
from jaxalign.data import preferences
from jaxalign.training import LossAux, objectives, rollouts
from jaxalign.training import job as common
from jaxalign.training.step import Loss
from jaxalign.types import Array, Params

NETWORK = "network.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(rollouts.Options):
    """Options of train.shaping."""

    leader: Literal["reward_model", "network"] = "reward_model"
    """What is trained: a transformer's reward, or a shaping function of the utility."""
    amortise: bool = False
    """Train a head for the threshold in place of a leader."""
    bound: float = 3.0
    """Bound B of the reward [units of reward]."""
    beta: float = 1.0
    """KL weight of the follower [units of reward per nat]."""
    samples: int = 16
    """Roll-outs per prompt."""
    batch_size: int = 8
    """Prompts per optimizer step, each with all its roll-outs."""


class Group(NamedTuple):
    """A prompt and its roll-outs. prompt: token ids, by which rows are split; responses: theirs; utility: of each."""

    prompt: list[int]
    responses: list[list[int]]
    utility: list[float]


def check(config: Config) -> None:
    """ValueErrors that name the option."""
    rollouts.check(config)
    for name in ("bound", "beta"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}: expected a finite value > 0, found {getattr(config, name)}")
    if config.samples < 2:
        raise ValueError(f"samples: expected at least 2 roll-outs to weigh against each other, found {config.samples}")


def groups(found: list[rollouts.Rollout]) -> list[Group]:
    """One row per prompt."""
    return [
        Group(rows[0].prompt, [row.response for row in rows], [row.reward for row in rows])
        for rows in rollouts.by_prompt(found).values()
    ]


def collate(config: Config, rows: list[Group]) -> dict[str, np.ndarray]:
    """{"tokens", "mask", "loss_mask" [b,n,L], "utility" [b,n]}, right-padded."""
    texts = [preferences.TextTokens(row.prompt, r, "roll-out") for row in rows for r in row.responses]
    length = common.row_length(config, [len(text.prompt) + len(text.response) for text in texts])
    flat = preferences.pad_texts(texts, length=length)
    each = {name: values.reshape(len(rows), -1, *values.shape[1:]) for name, values in flat.items()}
    return each | {"utility": np.asarray([row.utility for row in rows], np.float32)}


def collate_prompts(config: Config, rows: list[Group]) -> dict[str, np.ndarray]:
    """{"tokens", "mask" [b,P], "utility" [b,n]}: the prompts alone, right-padded."""
    length = common.row_length(config, [len(row.prompt) for row in rows])
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row.prompt)], mask[i, : len(row.prompt)] = row.prompt, True
    return {"tokens": tokens, "mask": mask, "utility": np.asarray([row.utility for row in rows], np.float32)}


def thresholds(lm: models.LanguageModel, params: Params, batch: Any) -> jax.Array:
    """m(x) [b] of a threshold head at the last token of each prompt, in units of utility."""
    return objectives.rewards_of(lm, objectives.cast(lm, params), batch)


def amortised(lm: models.LanguageModel, *, gain: float) -> Loss:
    """The expectile loss of the head's threshold over all roll-outs of each prompt."""

    def loss(params: Params, batch: Any, frozen: Params) -> tuple[Array, LossAux]:
        found = thresholds(lm, params, batch)
        exact = shaping.optimal_threshold(batch["utility"], gain=gain)
        each = shaping.expectile_loss(
            jnp.broadcast_to(found[:, None], batch["utility"].shape), utility=batch["utility"], gain=gain
        )
        error = jnp.abs(found - exact).mean()
        return each.mean(), LossAux(jnp.asarray(found.shape[0]), {"error": error})

    return loss


def compare(config: Config, delivered: dict[str, np.ndarray]) -> dict[str, Any]:
    """Mean utility delivered on held-out prompts per leader, and the first one's gain over each other, paired."""
    out: dict[str, Any] = {}
    names = list(delivered)
    for name in names:
        mean, half = common.interval(delivered[name])
        out |= {f"utility_{name}": mean, f"utility_{name}_95": half}
    for name in names[1:]:
        mean, half = common.interval(delivered[names[0]] - delivered[name])
        out |= {f"gain_over_{name}": mean, f"gain_over_{name}_95": half}
    return out


def utilities(config: Config, rewards: dict[str, np.ndarray], utility: np.ndarray) -> dict[str, np.ndarray]:
    """Utility delivered [prompts] by each reward table [prompts,n] at the same beta, over the roll-outs of a prompt;
    beside it the base's mean and the threshold on the true utility, the most that any reward within the bound gives."""
    base = np.zeros_like(utility)
    found = {
        name: np.asarray(shaping.leader_utility(base, reward, utility=utility, beta=config.beta))
        for name, reward in rewards.items()
    }
    best = shaping.optimal_threshold(utility, gain=config.bound / config.beta)
    return found | {"base": utility.mean(axis=-1), "optimum": np.asarray(best)}


def run(config: Config) -> dict[str, Any]:
    """Rolls out, trains, writes the run folder, gives its summary."""
    if not (config.model or config.architecture):
        config = dataclasses.replace(config, model=config.base)
    check(config)
    out = _io.open_run(config.out, config, inputs=rollouts.inputs(config))
    following = (
        f"python -m eval.decode --model {config.base} --reward {out / 'model'} --method best_of_n@16 "
        "--prompts FILE --out DIR"
    )
    if config.amortise or config.leader != "reward_model":
        following = "docs/stackelberg.md"
    done = common.finished(out)
    if done is not None:
        network = config.leader == "network" and not config.amortise
        common.report(out, done, following, product=NETWORK if network else "model")
        return done
    bound = config.bound if config.leader == "reward_model" and not config.amortise else None
    begin = common.start(config, lambda _: models.Head("reward", bound=bound))
    found = groups(rollouts.roll_out(config, out, begin.tokenizer, stage="shaping"))
    data = common.split(preferences.Loaded(found, 0, []), config)
    job = _amortise if config.amortise else {"reward_model": _reward_model, "network": _network}[config.leader]
    return job(config, out, begin, data, following)


def _validation(config: Config, data: common.Data) -> np.ndarray:
    """Utilities [prompts,n] of the held-out prompts' roll-outs. ValueError where there are none."""
    if len(data.validation) < 2:
        raise ValueError(f"validation: expected at least 2 held-out prompts, found {len(data.validation)}")
    return np.asarray([row.utility for row in data.validation], np.float32)


def _reward_model(
    config: Config, out: pathlib.Path, begin: common.Start, data: common.Data, following: str
) -> dict[str, Any]:
    utility = _validation(config, data)
    pad = lambda rows: collate(config, rows)  # noqa: E731
    score = lambda params, batch: objectives.group_rewards(begin.lm, objectives.cast(begin.lm, params), batch)  # noqa: E731
    before = common.evaluate(score, begin.params, data.validation, pad, config.batch_size)
    loss = objectives.stackelberg(begin.lm, beta=config.beta)
    params = common.run(config, begin, data, loss, pad, stage="leader", out=out)
    after = common.evaluate(score, params, data.validation, pad, config.batch_size)
    # The start is bound·sigmoid(score); the score itself, spread over [0, bound] by the range of a prompt's roll-outs:
    share = np.clip(before / config.bound, 1e-6, 1 - 1e-6)
    raw = np.log(share / (1 - share))
    spread = np.asarray(shaping.minmax(raw, reference=raw, bound=config.bound))
    delivered = utilities(config, {"leader": after, "start": before, "start_minmax": spread}, utility)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    ess = np.asarray(shaping.effective_samples(after, beta=config.beta))
    summary = compare(config, delivered) | {"parameters": size, "effective_samples": float(ess.mean())}
    return common.finish(out, begin, params, data, summary, following)


def _network(
    config: Config, out: pathlib.Path, begin: common.Start, data: common.Data, following: str
) -> dict[str, Any]:
    """Half of a prompt's roll-outs serve as reference for the statistics, the other half is weighed."""
    utility = _validation(config, data)
    network = shaping.MonotoneShaping(config.bound)
    reference, weighed = utility[:, ::2], utility[:, 1::2]
    start = network.init(jax.random.key(config.seed), weighed, reference=reference)

    def loss(params: Params, batch: Any, frozen: Params) -> tuple[Array, LossAux]:
        known, asked = batch["utility"][:, ::2], batch["utility"][:, 1::2]
        reward = network.apply(params, asked, reference=known)
        assert isinstance(reward, jax.Array)
        delivered = shaping.leader_utility(jnp.zeros_like(asked), reward, utility=asked, beta=config.beta)
        ess = shaping.effective_samples(reward, beta=config.beta)
        metrics = {"utility": delivered.mean(), "effective_samples": ess.mean()}
        return -delivered.mean(), LossAux(jnp.asarray(asked.shape[0]), metrics)

    pad = lambda rows: collate_prompts(config, rows)  # noqa: E731
    params = common.run(config, begin._replace(params=start), data, loss, pad, stage="leader", out=out)
    reward = np.asarray(network.apply(params, weighed, reference=reference))
    gain = config.bound / config.beta
    sampled = shaping.threshold_reward(
        weighed, threshold=shaping.optimal_threshold(reference, gain=gain), bound=config.bound
    )
    delivered = utilities(config, {"leader": reward, "sampled_threshold": np.asarray(sampled)}, weighed)
    ess = np.asarray(shaping.effective_samples(reward, beta=config.beta))
    flat = {"/".join(str(k.key) for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    temporary = out / f".{NETWORK}"
    save_file(flat, temporary, metadata={"bound": str(config.bound), "beta": str(config.beta)})
    temporary.replace(out / NETWORK)
    summary = {"rows": len(data.train), "validation_rows": len(data.validation)} | compare(config, delivered)
    summary["effective_samples"] = float(ess.mean())
    _io.write_json(out / "summary.json", summary)
    common.report(out, summary, following, product=NETWORK)
    return summary


def _amortise(
    config: Config, out: pathlib.Path, begin: common.Start, data: common.Data, following: str
) -> dict[str, Any]:
    utility = _validation(config, data)
    gain = config.bound / config.beta
    pad = lambda rows: collate_prompts(config, rows)  # noqa: E731
    params = common.run(config, begin, data, amortised(begin.lm, gain=gain), pad, stage="threshold", out=out)
    score = lambda params, batch: thresholds(begin.lm, params, batch)  # noqa: E731
    found = common.evaluate(score, params, data.validation, pad, config.batch_size)
    exact = np.asarray(shaping.optimal_threshold(utility, gain=gain))
    constant = np.median(shaping.optimal_threshold(np.asarray([row.utility for row in data.train]), gain=gain))
    paid = {
        name: np.asarray(shaping.threshold_reward(utility, threshold=m, bound=config.bound))
        for name, m in (("leader", found), ("constant", np.full_like(found, constant)))
    }
    error, half = common.interval(np.abs(found - exact))
    summary = compare(config, utilities(config, paid, utility)) | {
        "threshold_error": error,
        "threshold_error_95": half,
        "threshold_error_of_a_constant": float(np.abs(constant - exact).mean()),
    }
    return common.finish(out, begin, params, data, summary, following)


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)
