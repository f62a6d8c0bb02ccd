"""One iteration of train.rl: roll-outs of the policy as it stands, and the updates on them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _hosts, advantages, models, training
from jaxalign.decoding import BestOfNInfo
from jaxalign.prompts import bucket
from jaxalign.training import adapters, policy_gradient, rl_rewards
from jaxalign.training.rl_options import RLOptions
from jaxalign.types import Params, Policy, TokenBatch

BAD_IN_A_ROW = 3
"""Iterations with a reward that is not finite, after which training stops."""


class RLState(NamedTuple):
    """What an iteration changes."""

    step: jax.Array
    """Iterations so far []."""
    train: training.TrainState
    """Of the optimizer."""
    beta: jax.Array
    """KL weight []."""
    dropped: jax.Array
    """Iterations with a reward that was not finite, in all and in a row [2]."""


class Learner(NamedTuple):
    """What an iteration is made of."""

    options: RLOptions
    """How many responses are drawn, and how they are learned from."""
    seed: int
    """Of all draws."""
    accumulate: int
    """Micro-batches that each minibatch is run in."""
    target_kl: float
    """KL to hold by changing beta [nats per response]; 0: beta is fixed."""
    lm: models.LanguageModel
    """The model that is aligned."""
    reference: models.LanguageModel
    """The model without heads."""
    policy: Policy
    """Of `lm`."""
    reward: rl_rewards.Composed
    """What is maximised."""
    method: policy_gradient.Method
    """The settings of the algorithm."""
    assemble: Callable[[Params, Params], Params]
    """(what is trained, frozen) -> the model's parameters: an adapter with the weights under it."""


def draw(learner: Learner, params: Params, frozen: Params, rng: jax.Array, prompts: TokenBatch) -> BestOfNInfo:
    """Draws the policy's own responses and scores them.

    Args:
      learner: what an iteration is made of.
      params: what is trained.
      frozen: {"reference", "reward"}.
      rng: a key; consumed.
      prompts: B prompts, left-padded.

    Returns:
      Samples and rewards [B,n].
    """
    own = weights(learner.lm, learner.assemble, params, frozen)
    both = {"policy": own, "reward": frozen["reward"]}
    return policy_gradient.collect(
        learner.policy,
        learner.reward.reward,
        both,
        rng,
        prompts,
        samples=learner.options.samples,
        max_new_tokens=learner.options.max_new_tokens,
        eos_ids=learner.lm.config.eos_ids,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def weights(
    lm: models.LanguageModel, assemble: Callable[[Params, Params], Params], params: Params, frozen: Params
) -> Params:
    """The model's parameters in the type that it computes in."""
    return adapters.held(lm, assemble(params, frozen))


def read_both(learner: Learner) -> policy_gradient.ReadBoth | None:
    """What the exact KL is read by; None for the estimates of it."""
    if learner.method.kl != "exact":
        return None
    read = policy_gradient.of_models(learner.lm, learner.reference)
    return lambda params, frozen, rows: read(params, frozen["reference"], rows)


def first_part(learner: Learner, params: Params, frozen: Params, prompts: TokenBatch, beta: jax.Array) -> Any:
    """The first batch that an iteration learns from, of whole responses: a dry run reads its shapes.

    Args:
      learner, params, frozen: as in `draw`.
      prompts: B prompts, left-padded.
      beta: KL weight [].

    Returns:
      Leaves [A,b,...] of `policy_gradient.split`.
    """
    draws, order = jax.random.split(jax.random.key(learner.seed))
    drawn, options = draw(learner, params, frozen, draws, prompts), learner.options
    read_model, read_reference = policy_gradient.of_model(learner.lm), policy_gradient.of_model(learner.reference)
    reference = lambda frozen, rows: read_reference(frozen["reference"], rows)[0]  # noqa: E731
    whole, both = learner.assemble(params, frozen), read_both(learner)
    rows, _ = policy_gradient.prepare(
        learner.method, read_model, reference, whole, frozen, prompts, drawn, beta, both=both
    )
    return policy_gradient.split(rows, order, minibatches=options.minibatches, accumulate=learner.accumulate)[0]


def make_iteration(
    learner: Learner,
    update: training.TrainStep,
    *,
    after: Callable[[dict[str, float]], None] | None = None,
    count: Callable[[Sequence[int], Sequence[int]], float] | None = None,
) -> training.StepFunction[RLState]:
    """Makes the step of `training.fit`: one roll-out and the updates on it.

    Args:
      learner: what an iteration is made of.
      update: the optimizer's step on a part of the responses.
      after: called with the seconds of roll-out and update, which waits for both: benchmarks.
      count: lengths of prompts and of responses [tokens] -> operations, told as the metric "flops"; None: not told.

    Returns:
      (state, batch of `rl.collate_prompts` with one part, frozen) -> (state, metrics).
    """
    options = learner.options
    read_model, read_reference = policy_gradient.of_model(learner.lm), policy_gradient.of_model(learner.reference)
    reference = lambda frozen, rows: read_reference(frozen["reference"], rows)[0]  # noqa: E731
    both = read_both(learner)

    # Not the key of new weights or adapters.
    streams = jax.random.fold_in(jax.random.key(learner.seed), 3)

    @functools.partial(jax.jit, static_argnums=6)
    def prepare(
        params: Params, frozen: Params, prompts: TokenBatch, drawn: Any, beta: jax.Array, rng: jax.Array, length: int
    ) -> Any:
        """Gives (parts of every pass, metrics), of the first `length` tokens of each response."""
        whole, drawn = learner.assemble(params, frozen), policy_gradient.trim(drawn, length)
        rows, metrics = policy_gradient.prepare(
            learner.method, read_model, reference, whole, frozen, prompts, drawn, beta, both=both
        )
        counts = {"minibatches": options.minibatches, "accumulate": learner.accumulate}
        if options.passes * options.minibatches > 1:
            own = (lambda rows: both(whole, frozen, rows)[0]) if both else (lambda rows: read_model(whole, rows)[0])
            count = options.minibatches * learner.accumulate
            rows["old"] = policy_gradient.own_log_prob(own, rows, batches=count)
        order = [jax.random.fold_in(rng, i) for i in range(options.passes)]
        return [part for key in order for part in policy_gradient.split(rows, key, **counts)], metrics

    def iteration(state: RLState, batch: Any, frozen: Params) -> tuple[RLState, dict[str, Any]]:
        started = time.perf_counter()
        part = jax.tree.map(lambda x: x[0], batch)
        prompts = TokenBatch(part["prompt_tokens"], part["prompt_mask"], part["index"])
        rng, order = jax.random.split(jax.random.fold_in(streams, int(_hosts.host_value(state.step))))
        drawn = draw(learner, state.train.params, frozen, rng, prompts)
        # The one wait of an iteration: whether every reward is a number, and how long the longest response is.
        rewards, mask, asked = _hosts.host_value((drawn.reward, drawn.samples.mask, part["prompt_mask"]))
        rolled = time.perf_counter()
        if not np.isfinite(rewards).all():
            return _drop(state, rewards, _hosts.host_value(part["row"]))
        length = min(bucket(int(mask.sum(axis=-1).max())), mask.shape[-1])
        parts, metrics = prepare(state.train.params, frozen, prompts, drawn, state.beta, order, length)
        train, sums = state.train, []
        for rows in parts:
            train, found = update(train, rows, frozen)
            sums.append(found)
        means = sums[0] if len(sums) == 1 else jax.tree.map(lambda *x: sum(x) / len(x), *sums)
        # The policy has not moved at the first update, whose ratios are 1 by construction: this is 0.
        means = means | {"clipped_first": sums[0]["clipped"]}
        means["mismatch_max"] = functools.reduce(jnp.maximum, [found["mismatch_max"] for found in sums])
        beta = state.beta
        if learner.target_kl:
            beta = advantages.adapt_beta(beta, kl=metrics["kl"], target=learner.target_kl).astype(jnp.float32)
        if after is not None:
            jax.block_until_ready(train)
            after({"rollout": rolled - started, "update": time.perf_counter() - rolled, "tokens": float(mask.sum())})
        dropped = state.dropped.at[1].set(0)
        metrics = means | metrics | {"beta": state.beta, "dropped": dropped[0], "tokens": mask.sum()}
        if count is not None:
            metrics["flops"] = count(asked.sum(axis=-1).tolist(), mask.sum(axis=-1).ravel().tolist())
        return RLState(state.step + 1, train, beta, dropped), metrics

    return iteration


def _drop(state: RLState, rewards: np.ndarray, index: np.ndarray) -> tuple[RLState, dict[str, Any]]:
    """Counts an iteration without an update. FloatingPointError at the third in a row, which names the prompts."""
    dropped = state.dropped + 1
    step, in_a_row = (int(n) for n in _hosts.host_value((state.step, dropped[1])))
    bad = sorted({int(i) for i in index[~np.isfinite(rewards).all(axis=1)]})
    print(f"rl: dropped iteration {step + 1}: rewards that are not finite for prompts {bad}", flush=True)
    if in_a_row >= BAD_IN_A_ROW:
        raise FloatingPointError(
            f"reward: expected finite numbers, found others in {BAD_IN_A_ROW} batches in a row, the last for "
            f"prompts {bad}"
        )
    return RLState(state.step + 1, state.train, state.beta, dropped), {"dropped": dropped[0], "tokens": 0}
