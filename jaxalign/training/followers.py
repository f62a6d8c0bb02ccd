"""Followers of a leader that is trained: what answers its reward, and the loss through that answer.

closed_form weighs the base's roll-outs (`objectives.stackelberg`). trained climbs a few gradient steps over them.
tokens and smc draw anew at every step, from the base tilted by the leader's reward of the partial text.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import critics, decoding, gibbs, models, policies, rewards, shaping
from jaxalign._arrays import repeat_rows
from jaxalign.data import encoded
from jaxalign.data.text_options import TextOptions, ending_ids
from jaxalign.decoding.requests import score_completions
from jaxalign.rewards import prefixes
from jaxalign.training import objectives, rollouts, tilted_texts
from jaxalign.training.job import StartedModel
from jaxalign.training.options import MeshOptions, RolloutOptions, RunOptions
from jaxalign.training.shaping_data import ShapingOptions
from jaxalign.training.step import Loss, LossAux
from jaxalign.types import Array, Critic, Params, Policy, Reward, State, StepOutput, TokenBatch

DRAWN = ("tokens", "smc")
"""Followers that draw at every step."""


class Follower(NamedTuple):
    """A follower that draws from the base, tilted by the leader's reward."""

    options: ShapingOptions
    """Which follower, its KL weight and its candidates."""
    lm: models.LanguageModel
    """The leader's reward model."""
    policy: Policy
    """The tilt."""
    base_lm: models.LanguageModel
    """The base."""
    base: Params
    """Its parameters."""
    utility: Reward
    """The true utility."""
    utility_params: Params
    """Its parameters."""
    samples: int
    """Responses of each prompt."""
    max_new_tokens: int
    """Their limit [tokens]."""
    eos_ids: tuple[int, ...]
    """The ids that end one."""
    seed: int
    """Of all draws."""
    raw: tuple[Policy, Reward, Params] | None = None
    """The base tilted by the true utility of the partial text, that utility, and its parameters; None: not compared
    with."""


def check_drawing(options: ShapingOptions, mesh: MeshOptions, run: RunOptions) -> None:
    """Checks that a follower that draws can.

    Args:
      options: which follower.
      mesh: micro-batches and devices.
      run: whether it is a dry run.

    Raises:
      ValueError: several micro-batches or devices, or a dry run, with a follower that draws at every step.
    """
    if options.follower in DRAWN:
        for name, value, expected in (
            ("accumulate", mesh.accumulate, 1),
            ("mesh", mesh.mesh, ""),
            ("dry_run", run.dry_run, False),
        ):
            if value != expected:
                raise ValueError(
                    f"{name}: expected {expected!r} with --follower {options.follower}, which draws at every step, "
                    f"found {value!r}"
                )


def tilted_base(critic: Critic, base: models.LanguageModel, *, candidates: int) -> Policy:
    """Gives the base tilted by what is paid for the partial text: `critics.args` of a reward model, or `paid_by`.

    Args:
      critic: of candidates.
      base: of the same vocabulary.
      candidates: next tokens that are scored, the most probable ones.

    Returns:
      The Policy, whose params are {"policy", "critic", "beta"}.
    """
    return policies.tilt(policies.language_model(base), critic, top_k=min(candidates, base.vocab_size))


def paid_by(reward: Reward) -> Critic:
    """Gives the critic that pays any reward at each token: its number for the partial text.

    Args:
      reward: of whole texts; one that keeps a prefix reads it once.

    Returns:
      A level Critic of candidates.
    """
    kept = prefixes.prefix_reward(reward)

    def init(params: Params, rng: Array, prompts: Any, max_new_tokens: int) -> State:
        del rng
        return kept.init(params, prompts, max_new_tokens)

    def score(
        params: Params, rng: Array, state: State, output: StepOutput, candidates: Array | None
    ) -> tuple[Array, State]:
        del rng, output
        if candidates is None:
            raise ValueError("candidates: expected a tilt with top_k, found one of the whole vocabulary")
        texts = candidates[..., None]
        q, proposal = kept.score(params, state, texts, jnp.ones(texts.shape, bool))
        return q, (state, proposal)

    def advance(params: Params, proposal: State, choice: Array) -> State:
        state, found = proposal
        moved: State = kept.commit(params, state, found, choice)
        return moved

    return Critic(init, score, advance, "level")


def open_follower(
    options: ShapingOptions,
    rolled: RolloutOptions,
    started: StartedModel,
    prompts: Sequence[encoded.Prompt],
    *,
    run: RunOptions,
    text: TextOptions,
    model: str,
) -> Follower:
    """Opens what a follower that draws is made of: the base and the true utility.

    Args:
      options: which follower, its KL weight and candidates.
      rolled: of the roll-outs: the base, the reward, how many responses of which length.
      started: the reward model that leads.
      prompts: all prompts, in the order of their rows.
      run: its seed and type.
      text: how the prompts became tokens.
      model: folder of the model that leads, or of its tokenizer.

    Returns:
      A Follower.

    Raises:
      ValueError: as `rollouts.load_base` and `rollouts.open_reward`.
    """
    base, params = rollouts.load_base(rolled.base, started.tokenizer, dtype=run.dtype, model=model)
    sources = [prompt.source for prompt in prompts]
    opened = functools.partial(
        rollouts.open_reward, rolled.reward, base, started.tokenizer, dtype=run.dtype, sources=sources, text=text
    )
    utility, own = opened(between_programs=True)
    raw = None
    if options.compare_raw:
        reward, raw_params = opened()
        raw = tilted_base(paid_by(reward), base, candidates=options.candidates), reward, raw_params
    return Follower(
        options,
        started.lm,
        tilted_base(critics.args(started.lm), base, candidates=options.candidates),
        base,
        params,
        utility,
        own,
        rolled.samples,
        rolled.max_new_tokens,
        ending_ids(text, started.tokenizer, base.eos_ids, sources),
        run.seed,
        raw,
    )


def redraw(follower: Follower, params: Params, step: int, batch: dict[str, Array]) -> dict[str, Array]:
    """Draws from the follower of the leader as it stands, and scores the responses.

    Args:
      follower: what draws.
      params: the leader's.
      step: of the training, by which the draws are seeded.
      batch: {"tokens", "mask" [b,P], "index" [b]} of prompts.

    Returns:
      {"tokens", "mask" [b,n,L] of whole texts, "utility", "log_weight", "kl" [b,n], "prompt_tokens", "prompt_mask"
      [b,P], "index" [b], "response", "response_mask" [b,n,T]}. kl is the follower's to its base, in nats: by tokens the
      sum over a response's steps, of particles the estimate for their prompt.

    Raises:
      ValueError: a utility that is NaN.
    """
    critic = _cast(follower.lm, params)
    return _draw(follower, follower.policy, rewards.from_model(follower.lm), critic, step, batch)


def redraw_raw(follower: Follower, step: int, batch: dict[str, Array]) -> dict[str, Array]:
    """`redraw` where the leader pays the true utility of the partial text as it is.

    Args:
      follower: with `raw`.
      step: by which the draws are seeded.
      batch: as of `redraw`.

    Returns:
      As `redraw`.

    Raises:
      ValueError: a utility that is NaN.
    """
    assert follower.raw is not None
    policy, reward, params = follower.raw
    return _draw(follower, policy, reward, params, step, batch)


def _draw(
    follower: Follower, policy: Policy, reward: Reward, critic: Params, step: int, batch: dict[str, Array]
) -> dict[str, Array]:
    n, options = follower.samples, follower.options
    prompts = TokenBatch(batch["tokens"], batch["mask"], batch["index"])
    beta = jnp.asarray(options.beta, jnp.float32)
    own = {"policy": follower.base, "critic": critic, "beta": beta}
    rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(follower.seed), 5), step)
    limits: dict[str, Any] = {"max_new_tokens": follower.max_new_tokens, "eos_ids": follower.eos_ids}
    if options.follower == "smc":
        weighed = {"policy": own, "reward": critic, "beta": beta}
        found = decoding.smc(policy, reward, weighed, rng, prompts, num_particles=n, **limits)
        samples, log_weight = found.info.samples, found.info.log_weight
        kl = jnp.broadcast_to(found.kl.value[:, None], log_weight.shape)
    else:
        samples = decoding.sample(policy, own, rng, prompts, num_samples=n, **limits)
        log_weight = jnp.zeros(samples.mask.shape[:2], jnp.float32)
        assert samples.kl is not None
        kl = samples.kl.sum(axis=-1)
    flat = jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), samples)
    texts = repeat_rows(prompts, n)
    score = score_completions if rewards.on_host(follower.utility) else _score
    utility = score(follower.utility, follower.utility_params, texts, flat).reshape(log_weight.shape)
    bad = np.isnan(np.asarray(utility)).any(axis=1)
    if bad.any():
        raise ValueError(f"reward: expected numbers, found NaN for prompts {np.asarray(prompts.index)[bad].tolist()}")
    tokens, mask, _ = decoding.join(texts, flat)
    each = {"tokens": tokens, "mask": mask, "response": flat.tokens, "response_mask": flat.mask}
    rows = {name: x.reshape((*log_weight.shape, x.shape[-1])) for name, x in each.items()}
    rows |= {"utility": utility, "log_weight": log_weight, "kl": kl, "index": batch["index"]}
    return rows | {"prompt_tokens": batch["tokens"], "prompt_mask": batch["mask"]}


_cast = jax.jit(objectives.cast, static_argnums=0)
_score = jax.jit(score_completions, static_argnums=0)


class Delivered(NamedTuple):
    """What a follower gave for prompts."""

    utility: np.ndarray
    """[b], the mean over responses, or over particles by their weights."""
    kl: np.ndarray
    """[b], of the follower to its base [nats]."""


def delivered(rows: dict[str, Array]) -> Delivered:
    """What the responses of `redraw` are worth, and their KL."""
    weight = jax.nn.softmax(rows["log_weight"], axis=1)
    return Delivered(*(np.asarray((weight * rows[name]).sum(axis=1)) for name in ("utility", "kl")))


def loss_of_draws(follower: Follower) -> Loss:
    """Makes the loss whose gradient is minus the leader's through a follower that draws.

    tokens: the score function, unbiased, of log-probabilities in parallel (`tilted_texts.tilted_log_prob`). smc: of
    weighted particles (`shaping.smc`), biased by O(1/n).

    Args:
      follower: what draws.

    Returns:
      The loss of batches of `redraw`; frozen: the base's parameters. Metrics: utility, effective_samples, kl.
    """
    lm, options = follower.lm, follower.options

    def loss(params: Params, batch: Any, frozen: Params) -> tuple[Array, LossAux]:
        utility, log_weight = batch["utility"], batch["log_weight"]
        leader = objectives.cast(lm, params)
        share = jax.nn.softmax(log_weight, axis=1)
        weight, size = jnp.asarray(utility.shape[0]), (1 / (share**2).sum(axis=1)).mean()
        kl = (share * batch["kl"]).sum(axis=1).mean()
        metrics = {"utility": (share * utility).sum(axis=1).mean(), "effective_samples": size, "kl": kl}
        if options.follower == "smc":
            reward = objectives.group_rewards(lm, leader, batch)
            found = shaping.smc(reward, log_weight=log_weight, utility=utility, beta=options.beta)
            return -found.utility.mean(), LossAux(weight, metrics)
        n = utility.shape[1]
        texts = TokenBatch(batch["prompt_tokens"], batch["prompt_mask"], batch["index"])
        tokens, mask = (batch[name].reshape(-1, batch[name].shape[-1]) for name in ("response", "response_mask"))
        log_prob = tilted_texts.tilted_log_prob(
            lm,
            leader,
            follower.base_lm,
            frozen,
            repeat_rows(texts, n),
            tokens,
            mask,
            beta=options.beta,
            top_k=min(options.candidates, follower.base_lm.vocab_size),
        ).reshape(utility.shape)
        return -shaping.score_function(log_prob, utility=utility), LossAux(weight, metrics)

    return loss


def trained(lm: models.LanguageModel, *, beta: float, steps: int, step_size: float) -> Loss:
    """Makes the loss −E[u] under a follower that trains a few steps on the roll-outs.

    The follower is a policy over a prompt's roll-outs. From the base it climbs E[r] − beta·KL by gradient steps on its
    logits; the leader's gradient goes through them (`shaping.unrolled`).

    Args:
      lm: the reward model.
      beta: KL weight of the follower [units of reward per nat].
      steps: of its training.
      step_size: of each [nats per unit of reward].

    Returns:
      The loss of batches {"tokens", "mask" [b,n,L], "utility" [b,n]}. Metrics: utility, effective_samples.
    """
    unroll = functools.partial(shaping.unrolled, steps=steps, step_size=step_size)

    def inner(theta: Array, reward: Array) -> Array:
        log_policy = jax.nn.log_softmax(theta)
        even = jnp.full_like(theta, -np.log(theta.shape[-1]))
        return (gibbs.utility(log_policy, reward) - beta * gibbs.kl(log_policy, even)).sum()

    def loss(params: Params, batch: Any, frozen: Params = None) -> tuple[Array, LossAux]:
        reward, utility = objectives.group_rewards(lm, objectives.cast(lm, params), batch), batch["utility"]
        both = {"leader": reward, "follower": jnp.zeros_like(reward)}

        def delivered(theta: Array, _: Array) -> Array:
            return gibbs.utility(jax.nn.log_softmax(theta), utility).mean()

        def size(theta: Array, _: Array) -> Array:
            return jnp.exp(-jax.nn.logsumexp(2 * jax.nn.log_softmax(theta), axis=-1)).mean()

        found = unroll(inner, delivered, both)
        ess = jax.lax.stop_gradient(unroll(inner, size, both))
        return -found, LossAux(jnp.asarray(reward.shape[0]), {"utility": found, "effective_samples": ess})

    return loss
