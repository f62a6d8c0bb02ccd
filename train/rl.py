"""Align a language model with a reward by KL-regularised policy gradients:

python -m train.rl --model DIR --prompts FILE --reward REWARD --beta 0.1 --out runs/rl

Maximises E[r] - beta KL(pi || pi_ref) over the model's own responses; pi_ref is the model that the run starts from,
kept beside, or the weights under the adapter with --lora-rank. The reward may be calibrated against the base's own
samples and transformed for the decoder that will be used (InfAlign: --calibration, --transform), and shaped by a
threshold (Stackelberg: --bound). rloo (arXiv 2402.14740), grpo (arXiv 2402.03300) and ppo (arXiv 1707.06347).

summary.json holds the reward and the KL to the reference on held-out prompts, before and after.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign import _io, commands, data, decoding, models, policies, training
from jaxalign.data import batches, preferences
from jaxalign.models import sharding
from jaxalign.training import adapters, job, objectives, policy_gradient, rl_rewards
from jaxalign.training.rl_iteration import Learner, State, make_iteration, read_both, weights
from jaxalign.training.step import LossAux
from jaxalign.types import Array, Params, TokenBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(rl_rewards.Options, adapters.AdapterOptions):
    """Options of train.rl."""

    prompts: str
    """File of prompts: .txt, .jsonl or .jsonl.gz."""
    algorithm: Literal["rloo", "grpo", "ppo"] = "rloo"
    """rloo: rewards against the mean of the prompt's other samples; grpo: standardised within the group; ppo:
    generalised advantages with a value head, which is trained along."""
    kl: Literal["reward", "k2", "k3", "exact"] = "reward"
    """Where the KL enters. reward: beta·log(pi/pi_ref) is taken off the reward; k2, k3: a term of the loss. k3 is the
    one of GRPO's paper; its optimum is not the Gibbs policy. exact: summed over the vocabulary at each token, with less
    noise, for a pass of the reference with each update."""
    beta: float = 0.1
    """KL weight [units of the transformed reward per nat]; with --target-kl where it starts."""
    target_kl: float = 0.0
    """KL to hold by changing beta [nats per response]; 0: beta is fixed."""
    samples: int = 8
    """Responses per prompt and iteration."""
    batch_size: int = 16
    """Prompts per iteration."""
    minibatches: int = 1
    """Optimizer steps per pass over an iteration's responses."""
    passes: int = 1
    """Passes over an iteration's responses."""
    accumulate: int = 1
    """Parts that each minibatch is run in: memory of one, gradient of all."""
    ratio_clip: float = 0.2
    """Largest change of a token's probability ratio (rloo: of a response's) that is rewarded."""
    decay: float = 0.95
    """ppo: decay of generalised advantages, in [0, 1]."""
    value_weight: float = 0.1
    """ppo: weight of the value loss."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW; small models take more."""
    validation: float = 0.1
    """Share of the prompts held out for the figures in summary.json, chosen by a hash of the prompt; 0: none."""


class Ask(NamedTuple):
    """A prompt. row: in its file, which per-prompt tables are looked up by."""

    prompt: list[int]
    row: int


def check(config: Config) -> None:
    """ValueErrors that name the option."""
    job.check_training_options(dataclasses.replace(config, accumulate=1))
    for name in ("beta", "ratio_clip"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}: expected a finite value > 0, found {getattr(config, name)}")
    if not 0 <= config.target_kl < math.inf:
        raise ValueError(f"target_kl: expected a finite value >= 0, found {config.target_kl}")
    least = 1 if config.algorithm == "ppo" else 2
    if config.samples < least:
        raise ValueError(f"samples: expected at least {least} for {config.algorithm}, found {config.samples}")
    for name in ("minibatches", "passes", "accumulate", "max_new_tokens"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected at least 1, found {getattr(config, name)}")
    responses = config.batch_size * config.samples
    if responses % (config.minibatches * config.accumulate):
        raise ValueError(
            f"minibatches: expected minibatches x accumulate to divide the {responses} responses of an iteration, "
            f"found {config.minibatches} x {config.accumulate}"
        )
    mesh = sharding.make_mesh(config.mesh)
    if mesh is not None and responses // (config.minibatches * config.accumulate) % mesh.size:
        raise ValueError(f"mesh: expected a divisor of the responses of a part, found {config.mesh!r}")
    rl_rewards.check(config)


def method_of(config: Config) -> policy_gradient.Method:
    return policy_gradient.Method(
        config.algorithm, config.kl, clip=config.ratio_clip, decay=config.decay, value_weight=config.value_weight
    )


def collate(rows: Sequence[Ask], *, length: int, count: int) -> dict[str, np.ndarray]:
    """{"prompt_tokens", "prompt_mask" [b,P], "index", "row" [b]}, left-padded to P = length. index: the row; where a
    prompt comes again in the batch, its row plus a multiple of `count`, of all prompts: equal indices draw alike."""
    seen: dict[int, int] = {}
    index = []
    for row in rows:
        index.append(row.row + count * seen.get(row.row, 0))
        seen[row.row] = seen.get(row.row, 0) + 1
    made = data.prompt_batch([row.prompt for row in rows], index=index, length=length)
    assert made.index is not None
    found = {"prompt_tokens": made.tokens, "prompt_mask": made.mask, "index": made.index}
    return {name: np.asarray(x) for name, x in found.items()} | {"row": np.asarray([row.row for row in rows], np.int32)}


def learner_of(
    config: Config, begin: job.Start, reward: rl_rewards.Composed
) -> tuple[Learner, Params, dict[str, Params]]:
    """(learner, what is trained, what is not: {"reference", "reward"})."""
    spec, lm = adapters.spec_of(config), begin.lm
    reference = models.with_head(lm, None)
    body = {"transformer": objectives.cast(lm, begin.params["transformer"])}
    policy = policies.language_model(lm)
    made = Learner(config, lm, reference, policy, reward, method_of(config), _whole if spec is None else _adapted(spec))
    if spec is None:
        return made, begin.params, {"reference": body, "reward": reward.params}
    adapter = models.lora.init(
        jax.random.fold_in(jax.random.key(config.seed), 2), models.LanguageModel(lm.config), spec
    )
    trained = {"adapter": adapter} | ({"head": begin.params["head"]} if "head" in begin.params else {})
    return made, trained, {"reference": body, "reward": reward.params}


def _whole(params: Params, frozen: Params) -> Params:
    return params


@functools.cache
def _adapted(spec: models.Lora) -> Callable[[Params, Params], Params]:
    def assemble(params: Params, frozen: Params) -> Params:
        weights = frozen["reference"] | ({"head": params["head"]} if "head" in params else {})
        return models.lora.attach(weights, params["adapter"], spec)

    return assemble


def run(config: Config) -> dict[str, Any]:
    """Trains, writes the run folder, gives its summary."""
    check(config)
    inputs = [config.prompts, config.model, config.architecture, config.tokenizer, *rl_rewards.inputs(config)]
    out = _io.open_run(config.out, config, inputs=inputs)
    following = (
        f"python -m eval.decode --model {config.model or 'BASE'} --reward REWARD --prompts FILE "
        f"--method policy:{out / 'model'} --out DIR"
    )
    done = job.finished(out)
    if done is not None:
        job.report(out, done, following)
        return done
    head = models.Head("value", hidden_size=64) if config.algorithm == "ppo" else None
    begin = job.start(config, lambda _: head)
    asked = [prompt.tokens for prompt in data.tokenize_prompts(config.prompts, begin.tokenizer)]
    longest = max(map(len, asked))
    if longest + config.max_new_tokens > config.max_length:
        raise ValueError(
            f"max_length: expected at least the longest prompt's {longest} and {config.max_new_tokens} new tokens, "
            f"found {config.max_length}"
        )
    rows = [Ask(tokens, i) for i, tokens in enumerate(asked)]
    held = job.split(preferences.Loaded(rows, 0, []), config)
    learner, trained, frozen = learner_of(config, begin, rl_rewards.build(config, begin, asked))
    pad = functools.partial(collate, length=data.bucket(longest), count=len(asked))
    before = measure(learner, trained, frozen, held.validation, pad)
    state = _train(config, learner, trained, frozen, held.train, out, pad)
    after = measure(learner, state.train.params, frozen, held.validation, pad)
    summary: dict[str, Any] = {f"{name}_before": value for name, value in before.items() if "kl" not in name} | after
    summary |= {"beta": float(state.beta), "dropped_iterations": int(state.dropped[0])}
    lm = models.with_head(begin.lm, None)
    if adapters.spec_of(config) is None:
        final = jax.device_get({"transformer": state.train.params["transformer"]})
    else:
        # Into the float32 weights: the reference may be held in bfloat16.
        masters, adapter = {"transformer": begin.params["transformer"]}, jax.device_get(state.train.params["adapter"])
        final = adapters.merged(config, models.LanguageModel(lm.config), masters, adapter, out)
    return job.finish(out, begin._replace(lm=lm), final, held, summary, following)


def _train(
    config: Config, learner: Learner, trained: Params, frozen: Params, rows: Any, out: pathlib.Path, pad: Any
) -> State:
    steps = config.steps or max(1, math.ceil(config.epochs * len(rows) / config.batch_size))
    optimizer, schedule = training.adamw(
        learning_rate=config.learning_rate,
        steps=steps * config.passes * config.minibatches,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        clip=config.clip,
    )
    state = State(
        jnp.zeros((), jnp.int32),
        training.create(jax.tree.map(jnp.array, trained), optimizer),  # a copy, which the steps may take
        jnp.asarray(config.beta, jnp.float32),
        jnp.zeros(2, jnp.int32),
    )
    loss = policy_gradient.loss(learner.method, policy_gradient.of_model(learner.lm), read_both(learner))

    def assembled(params: Params, batch: Any, frozen: Params) -> tuple[Array, LossAux]:
        return loss(learner.assemble(params, frozen), batch, frozen)

    update = training.train_step(assembled, optimizer, schedule=schedule, donate=True)
    mesh = sharding.make_mesh(config.mesh)
    place: Callable[[Any], Any] = lambda batch: batch  # noqa: E731
    if mesh is not None:
        state, frozen = jax.device_put((state, frozen), NamedSharding(mesh, PartitionSpec()))
        by_row = NamedSharding(mesh, PartitionSpec(None, "data"))
        place = lambda batch: jax.device_put(batch, by_row)  # noqa: E731
    source = batches.batches(rows, pad, batch_size=config.batch_size, seed=config.seed)
    ended: State = training.fit(
        make_iteration(learner, update),
        state,
        source,
        steps=steps,
        out=out,
        stage="rl",
        position={"seed": config.seed, "batch_size": config.batch_size, "rows": batches.fingerprint(rows)},
        frozen=frozen,
        place=place,
        donate=True,
        save_every=config.save_every,
        log_every=config.log_every,
    )
    return ended


def measure(learner: Learner, params: Params, frozen: Params, rows: Sequence[Ask], pad: Any) -> dict[str, Any]:
    """Of one response for each held-out prompt, means with 95 % half-widths: "score", the reward before any map;
    "reward", the one that is maximised; "kl", the sum of the exact per-step KL to the reference. {} without prompts.
    Prompts whose reward is not finite are left out, counted in "without_reward" and named; ValueError where all are."""
    if not rows:
        return {}
    config = learner.config
    beside = policies.with_reference(learner.policy, policies.language_model(learner.reference))
    whole = weights(learner.lm, learner.assemble, params, frozen)
    both = {"policy": whole, "reference": frozen["reference"]}
    judge, raw = jax.jit(learner.reward.reward), jax.jit(learner.reward.raw)
    parts = []
    for part in job.iterate(rows, config.batch_size):
        filled = pad(part + [part[-1]] * (config.batch_size - len(part)))
        prompts = TokenBatch(*(jnp.asarray(filled[name]) for name in ("prompt_tokens", "prompt_mask", "index")))
        rng = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1)
        options: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "eos_ids": learner.lm.config.eos_ids}
        drawn = decoding.sample(beside, both, rng, prompts, **options)
        text = decoding.join(prompts, drawn)
        assert drawn.kl is not None
        found = {
            "score": raw(learner.reward.raw_params, *text, prompts.index),
            "reward": judge(frozen["reward"], *text, prompts.index),
            "kl": drawn.kl.sum(axis=-1),
        }
        parts.append(job.first_rows(found, len(part)))
    every = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    good = np.isfinite(every["reward"]) & np.isfinite(every["score"])
    if not good.all():
        bad = [row.row for row, fine in zip(rows, good, strict=True) if not fine]
        if not good.any():
            raise ValueError(f"reward: expected finite numbers, found none for the held-out prompts {bad}")
        print(f"rl: left out: rewards that are not finite for held-out prompts {bad}", flush=True)
    out: dict[str, Any] = {"without_reward": int((~good).sum())}
    for name, values in every.items():
        mean, half = job.interval(values[good])
        out |= {name: mean, f"{name}_95": half}
    return out


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)
