"""Policy gradients on a model's own responses: options, the learner, the training and the figures of train.rl."""

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

from jaxalign import decoding, models, policies
from jaxalign.data import batches
from jaxalign.models import sharding
from jaxalign.prompts import prompt_batch
from jaxalign.training import adapters, job, objectives, policy_gradient, rl_rewards
from jaxalign.training._fit import fit
from jaxalign.training.rl_iteration import Learner, State, make_iteration, read_both, weights
from jaxalign.training.step import LossAux, adamw, create, train_step
from jaxalign.types import Array, Params, TokenBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLOptions(rl_rewards.Options, adapters.AdapterOptions):
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


class PromptRow(NamedTuple):
    """A prompt of the file."""

    prompt: list[int]
    """Its token ids."""
    row: int
    """Its row in the file, by which per-prompt tables are looked up."""


def check_rl_options(config: RLOptions) -> None:
    """Checks every value that needs no file; ValueErrors name the option."""
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


def method_of(config: RLOptions) -> policy_gradient.Method:
    """The settings of the algorithm."""
    return policy_gradient.Method(
        config.algorithm, config.kl, clip=config.ratio_clip, decay=config.decay, value_weight=config.value_weight
    )


def collate_prompts(rows: Sequence[PromptRow], *, length: int, count: int) -> dict[str, np.ndarray]:
    """Collates prompts to a batch, left-padded.

    Args:
      rows: the prompts, b of them.
      length: P.
      count: number of all prompts. Equal indices draw alike: where a prompt comes again in the batch, its index is its
        row plus a multiple of `count`.

    Returns:
      {"prompt_tokens", "prompt_mask" [b,P], "index", "row" [b]}.
    """
    seen: dict[int, int] = {}
    index = []
    for row in rows:
        index.append(row.row + count * seen.get(row.row, 0))
        seen[row.row] = seen.get(row.row, 0) + 1
    made = prompt_batch([row.prompt for row in rows], index=index, length=length)
    assert made.index is not None
    found = {"prompt_tokens": made.tokens, "prompt_mask": made.mask, "index": made.index}
    return {name: np.asarray(x) for name, x in found.items()} | {"row": np.asarray([row.row for row in rows], np.int32)}


def learner_of(
    config: RLOptions, begin: job.Start, reward: rl_rewards.Composed
) -> tuple[Learner, Params, dict[str, Params]]:
    """Puts together what an iteration is made of: (learner, what is trained, {"reference", "reward"}, which is not)."""
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


def train_policy(
    config: RLOptions, learner: Learner, trained: Params, frozen: Params, rows: Any, out: pathlib.Path, pad: Any
) -> State:
    """Trains from the run folder's last checkpoint, if there is one, to the last step; gives the final state."""
    steps = config.steps or max(1, math.ceil(config.epochs * len(rows) / config.batch_size))
    optimizer, schedule = adamw(
        learning_rate=config.learning_rate,
        steps=steps * config.passes * config.minibatches,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        clip=config.clip,
    )
    state = State(
        jnp.zeros((), jnp.int32),
        create(jax.tree.map(jnp.array, trained), optimizer),  # a copy, which the steps may take
        jnp.asarray(config.beta, jnp.float32),
        jnp.zeros(2, jnp.int32),
    )
    once = config.passes * config.minibatches == 1
    read = policy_gradient.of_model(learner.lm)
    loss = policy_gradient.loss(learner.method, read, read_both(learner), once=once)

    def assembled(params: Params, batch: Any, frozen: Params) -> tuple[Array, LossAux]:
        return loss(learner.assemble(params, frozen), batch, frozen)

    update = train_step(assembled, optimizer, schedule=schedule, donate=True)
    mesh = sharding.make_mesh(config.mesh)
    place: Callable[[Any], Any] = lambda batch: batch  # noqa: E731
    if mesh is not None:
        state, frozen = jax.device_put((state, frozen), NamedSharding(mesh, PartitionSpec()))
        by_row = NamedSharding(mesh, PartitionSpec(None, "data"))
        place = lambda batch: jax.device_put(batch, by_row)  # noqa: E731
    source = batches.batches(rows, pad, batch_size=config.batch_size, seed=config.seed)
    ended: State = fit(
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


def measure_policy(
    learner: Learner, params: Params, frozen: Params, rows: Sequence[PromptRow], pad: Any
) -> dict[str, Any]:
    """Measures one response for each held-out prompt.

    Args:
      learner, params, frozen: as `learner_of` gives them.
      rows: the held-out prompts.
      pad: collates rows to a batch, as `collate_prompts`.

    Returns:
      Means with 95 % half-widths: "score", the reward before any map; "reward", the one that is maximised; "kl", the
      sum of the exact per-step KL to the reference [nats]. Prompts whose reward is not finite are left out, counted in
      "without_reward" and named on stdout. {} without prompts.

    Raises:
      ValueError: no prompt has a finite reward.
    """
    if not rows:
        return {}
    config = learner.config
    beside = policies.with_reference(learner.policy, policies.language_model(learner.reference))
    whole = weights(learner.lm, learner.assemble, params, frozen)
    both = {"policy": whole, "reference": frozen["reference"]}
    score, raw = jax.jit(learner.reward.reward), jax.jit(learner.reward.raw)
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
            "reward": score(frozen["reward"], *text, prompts.index),
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
