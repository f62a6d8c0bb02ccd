"""Policy gradients on a model's own responses: the learner, the training and the figures of train.rl."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _hosts, decoding, models, policies, rewards
from jaxalign._checks import check_language_model
from jaxalign.data import batches
from jaxalign.models import sharding
from jaxalign.prompts import prompt_batch
from jaxalign.training import adapters, dry_run, flops, job, policy_gradient, profiling, rl_rewards, states
from jaxalign.training._fit import fit
from jaxalign.training.options import MeshOptions, OptimizerOptions
from jaxalign.training.rl_iteration import Learner, RLState, draw, first_part, make_iteration, read_both, weights
from jaxalign.training.rl_options import RLOptions
from jaxalign.training.step import LossAux, TrainState, TrainStep, create, train_step
from jaxalign.types import Array, Params, TokenBatch


class PromptRow(NamedTuple):
    """A prompt of the file."""

    prompt: list[int]
    """Its token ids."""
    row: int
    """Its row in the file, by which per-prompt tables are looked up."""


def head_of(options: RLOptions, model: str) -> Callable[[models.Config], models.Head | None]:
    """The head that the policy learns with: PPO's value head, none otherwise.

    Args:
      options: of the algorithm.
      model: folder that the policy comes from, "" for a new one.

    Returns:
      config of the model in the folder -> its new head; a ValueError where that is no language model.
    """
    head = models.Head("value", hidden_size=64) if options.algorithm == "ppo" else None

    def wanted(config: models.Config) -> models.Head | None:
        check_language_model("model", models.LanguageModel(config), model)
        return head

    return wanted


def method_of(options: RLOptions) -> policy_gradient.Method:
    """The settings of the algorithm."""
    return policy_gradient.Method(
        options.algorithm,
        options.kl,
        clip=options.ratio_clip,
        decay=options.decay,
        value_weight=options.value_weight,
        advantage=options.advantage,
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
    options: RLOptions,
    started: job.StartedModel,
    reward: rl_rewards.Composed,
    *,
    seed: int,
    spec: models.Lora | None = None,
    accumulate: int = 1,
    target_kl: float = 0.0,
) -> tuple[Learner, Params, dict[str, Params]]:
    """Puts together what an iteration is made of.

    Args:
      options: of the algorithm.
      started: the model that is aligned.
      reward: what is maximised.
      seed: of new adapters and of all draws.
      spec: an adapter that is trained in place of all weights.
      accumulate: micro-batches that each minibatch is run in.
      target_kl: KL to hold by changing beta [nats per response]; 0: beta is fixed.

    Returns:
      (learner, what is trained, {"reference", "reward"}, which is not).
    """
    lm = started.lm
    learner = Learner(
        options,
        seed,
        accumulate,
        target_kl,
        lm,
        models.with_head(lm, None),
        policies.language_model(lm),
        reward,
        method_of(options),
        _whole if spec is None else _adapted(spec),
    )
    reference = adapters.held(lm, started.params["transformer"])
    frozen = {"reference": {"transformer": reference}, "reward": reward.params}
    if spec is None:
        return learner, started.params, frozen
    adapter = models.lora.init(jax.random.fold_in(jax.random.key(seed), 2), models.LanguageModel(lm.config), spec)
    trained = {"adapter": adapter} | ({"head": started.params["head"]} if "head" in started.params else {})
    return learner, trained, frozen


def _whole(params: Params, frozen: Params) -> Params:
    return params


@functools.cache
def _adapted(spec: models.Lora) -> Callable[[Params, Params], Params]:
    def assemble(params: Params, frozen: Params) -> Params:
        weights = frozen["reference"] | ({"head": params["head"]} if "head" in params else {})
        return models.lora.attach(weights, params["adapter"], spec)

    return assemble


def train_policy(
    learner: Learner,
    trained: Params,
    frozen: Params,
    rows: Sequence[PromptRow],
    pad: Callable[[list[PromptRow]], dict[str, np.ndarray]],
    *,
    beta: float,
    optimizer: OptimizerOptions,
    mesh: MeshOptions,
    out: pathlib.Path,
) -> RLState:
    """Trains from the run folder's last checkpoint, if there is one, to the last step.

    Args:
      learner, trained, frozen: as `learner_of` gives them; what is trained is used up.
      rows: the prompts to train on.
      pad: collates rows to a batch, as `collate_prompts`.
      beta: KL weight at the start.
      optimizer: how long and how fast; its batch is prompts of an iteration.
      mesh: devices that share each part of a minibatch.
      out: the run folder.

    Returns:
      The final state.
    """
    steps, size = optimizer.steps_for(len(rows)), optimizer.batch_size
    update, schedule = states.adamw_of(
        optimizer, steps * learner.options.passes * learner.options.minibatches, learner.lm
    )
    once = learner.options.passes * learner.options.minibatches == 1
    read = policy_gradient.of_model(learner.lm)
    loss = policy_gradient.loss(
        learner.method,
        read,
        read_both(learner),
        once=once,
        sampler_clip=learner.options.sampler_clip,
        sampler_weights=learner.options.sampler_weights,
    )

    def assembled(params: Params, batch: Any, frozen: Params) -> tuple[Array, LossAux]:
        return loss(learner.assemble(params, frozen), batch, frozen)

    devices = sharding.make_mesh(mesh.mesh)
    step = train_step(
        assembled,
        update,
        schedule=schedule,
        donate=True,
        mesh=devices,
        gradient_dtype=states.gradient_dtype(learner.lm),
    )
    if dry_run.is_abstract((trained, frozen)):
        batch = pad(dry_run.rows_of_batch(rows, size))
        begun = dry_run.apply(lambda params: create(params, update), trained)
        _tell(learner, step, begun, frozen, batch, devices, memory=mesh.device_memory)
    place: Callable[[Any], Any] = lambda batch: batch  # noqa: E731
    count, work = _counted(learner, trained, frozen, optimizer, 1 if devices is None else devices.size)
    owned = states.owned(trained, frozen)
    train = create(owned, update) if devices is None else states.on_mesh(devices, owned, update)
    state = RLState(jnp.zeros((), jnp.int32), train, jnp.asarray(beta, jnp.float32), jnp.zeros(2, jnp.int32))
    if devices is not None:
        state, frozen = sharding.shard((state, frozen), devices, others=True)
        by_row = sharding.batch_sharding(devices, ahead=1)
        place = lambda batch: _hosts.put(batch, by_row)  # noqa: E731
    source = batches.batches(rows, pad, batch_size=size, seed=learner.seed)
    with profiling.traced(out, optimizer.profile) as hooks:
        ended: RLState = fit(
            make_iteration(learner, step, count=count),
            state,
            source,
            steps=steps,
            out=out,
            stage="rl",
            position={"seed": learner.seed, "batch_size": size, "rows": batches.fingerprint(rows)},
            frozen=frozen,
            place=place,
            hooks=hooks,
            work=work,
            donate=True,
            save_every=optimizer.save_every,
            log_every=optimizer.log_every,
            track=optimizer.track,
        )
    return ended


def _counted(
    learner: Learner, trained: Params, frozen: Params, optimizer: OptimizerOptions, devices: int
) -> tuple[Callable[[Sequence[int], Sequence[int]], float] | None, flops.Work | None]:
    """The count of an iteration's operations and the peak of the devices; None where that is not known. What a batch
    asks for is known once its responses are drawn, so that the iteration counts and not `Work`."""
    peak = flops.peak_flops(jax.devices()[0].device_kind, str(learner.lm.dtype), given=optimizer.peak_tflops)
    if peak is None:
        return None, None
    options, exact = learner.options, learner.method.kl == "exact"
    several = options.passes * options.minibatches > 1
    reads = int(exact or options.algorithm == "ppo") + int(several)
    count = flops.policy_gradient_counter(
        learner.lm, trained, frozen["reference"], passes=options.passes, reads=reads, compared=exact
    )
    return count, flops.Work(lambda batch: 0.0, peak * devices)


def _tell(
    learner: Learner,
    step: TrainStep,
    state: TrainState,
    frozen: Params,
    batch: dict[str, np.ndarray],
    devices: jax.sharding.Mesh | None,
    *,
    memory: float,
) -> None:
    """Ends a dry run with the figures of an update (`dry_run.tell`) and of the roll-outs before it."""
    prompts = TokenBatch(*(jnp.asarray(batch[name]) for name in ("prompt_tokens", "prompt_mask", "index")))
    args = (*dry_run.abstract((state.params, frozen), devices), prompts)
    part = jax.eval_shape(functools.partial(first_part, learner), *args, jnp.zeros(()))
    roll_out = jax.jit(lambda params, frozen, prompts, rng: draw(learner, params, frozen, rng, prompts))
    size = dry_run.held(roll_out, *args, jax.random.key(0)) / 1e9
    print(f"rl: roll-outs: {size:.4g} GB per device, beside the optimizer's state", flush=True)
    rows, width = part["tokens"].shape[0] * part["tokens"].shape[1], part["tokens"].shape[-1] + prompts.tokens.shape[-1]
    count = flops.counter(learner.lm, state.params, frozen["reference"], compared=learner.method.kl == "exact")
    found = dry_run.estimate(step, state, part, frozen, mesh=devices, flops=count([width] * rows))
    dry_run.tell("rl", found, memory=memory)


def trained_policy(
    started: job.StartedModel, state: RLState, spec: models.Lora | None, *, base: str, out: pathlib.Path
) -> Params:
    """Gives the trained weights without a head; an adapter is written to adapter/.

    Args:
      started: the model that the run started from.
      state: the final state.
      spec: the adapter, None where all weights were trained.
      base: name of the model under the adapter, for adapter_config.json.
      out: the run folder.

    Returns:
      Parameters, as `adapters.written` gives them.
    """
    if spec is None:
        return {"transformer": state.train.params["transformer"]}
    weights, adapter = {"transformer": started.params["transformer"]}, state.train.params["adapter"]
    return adapters.written(spec, models.with_head(started.lm, None), weights, adapter, out, base=base)


def measure_policy(
    learner: Learner,
    params: Params,
    frozen: Params,
    rows: Sequence[PromptRow],
    pad: Callable[[list[PromptRow]], dict[str, np.ndarray]],
    *,
    batch_size: int,
) -> dict[str, Any]:
    """Measures one response for each held-out prompt.

    Args:
      learner, params, frozen: as `learner_of` gives them.
      rows: the held-out prompts.
      pad: collates rows to a batch, as `collate_prompts`.
      batch_size: prompts decoded together.

    Returns:
      Means with 95 % half-widths: "score", the reward before any map; "reward", the one that is maximised; "kl", the
      sum of the exact per-step KL to the reference [nats]. Prompts whose reward is not finite are left out, counted in
      "without_reward" and named on stdout. {} without prompts.

    Raises:
      ValueError: no prompt has a finite reward.
    """
    if not rows or dry_run.is_abstract((params, frozen)):
        return {}
    measured = policies.with_reference(learner.policy, policies.language_model(learner.reference))
    whole = weights(learner.lm, learner.assemble, params, frozen)
    both = {"policy": whole, "reference": frozen["reference"]}
    score, raw = rewards.compiled(learner.reward.reward), rewards.compiled(learner.reward.raw)
    parts = []
    for part in job.iterate(rows, batch_size):
        filled = pad(part + [part[-1]] * (batch_size - len(part)))
        prompts = TokenBatch(*(jnp.asarray(filled[name]) for name in ("prompt_tokens", "prompt_mask", "index")))
        rng = jax.random.fold_in(jax.random.key(learner.seed), 2**31 - 1)
        options: dict[str, Any] = {
            "max_new_tokens": learner.options.max_new_tokens,
            "eos_ids": learner.lm.config.eos_ids,
        }
        drawn = decoding.sample(measured, both, rng, prompts, **options)
        text = decoding.join(prompts, drawn)
        assert drawn.kl is not None
        assert prompts.index is not None
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
