"""Draws from a follower, and the gradient of the scalar that estimates what its parameters are worth."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import decoding, metrics, rewards, shaping
from jaxalign._arrays import at_least_float32, repeat_rows
from jaxalign._checks import check_positive, check_rng, fields_of
from jaxalign.bilevel import _population as populations
from jaxalign.bilevel._followers import Estimator, Follower, Parts, check_paths, entry_at, open_follower, with_entry
from jaxalign.bilevel._tokens import stepped
from jaxalign.decoding.requests import EosIds, check_request, score_completions
from jaxalign.prompts import any_prompts, prompts_for
from jaxalign.shapes import Scalar
from jaxalign.types import Array, ArrayLike, Completions, Critic, Params, Prompts, Reward, TokenBatch


class LeaderParams(NamedTuple):
    """Parameters of `leader_gradient`; a dict of the same names is accepted."""

    follower: Params
    """The Policy's or the decoder's, the leader's phi among them."""
    utility: Params = None
    """The utility's."""
    values: Params = None
    """Those of the critic of the utility, with all_tokens and togo."""


class LeaderGradient(NamedTuple):
    """What a leader gets from a follower, and its gradient."""

    value: Scalar
    """[], the estimate of U, the mean over prompts, in units of u."""
    gradient: dict[str, Params]
    """The estimate of dU/dphi: each path of `wrt` -> a tree of the entry's structure."""
    standard_error: Scalar
    """[], of the value over draws, the prompts being fixed; NaN where there is one group of best-of-n."""
    effective_samples: Scalar
    """[], independent draws (of best-of-n: groups of n; of smc_law: populations) of a prompt that the value rests on,
    the mean over prompts."""
    kl: Scalar
    """[], the follower's KL to its base as its decoder gives it, the mean over prompts, in nats."""


class _Drawn(NamedTuple):
    samples: Completions  # [B,n,T]
    score: Array  # [B,n], by which best-of-n picks
    log_weight: Array  # [B,n], of particles
    kl: Array  # [...]
    trace: populations.Trace | None = None  # of smc_law, leaves [R,...]
    keys: Array | None = None  # [R], of its populations


def leader_gradient(
    follower: Follower,
    utility: Reward,
    params: LeaderParams | Params,
    rng: Array,
    prompts: Prompts,
    *,
    wrt: str | Sequence[str],
    estimator: Estimator,
    samples: int,
    max_new_tokens: int,
    eos_ids: EosIds = None,
    temperature: ArrayLike = 1.0,
    values: Critic | None = None,
) -> LeaderGradient:
    """Estimates the gradient of a leader's utility through a follower that is sampled.

    score: any Policy by tokens; unbiased, of high variance. all_tokens: the same with values of u after each token;
    unbiased whatever they are, and of less variance the better they are. togo: values that are exact, without a sum
    over all tokens. covariance: exact draws of pi ∝ base·exp(r/beta); unbiased. closed_form: the same follower on base
    samples weighed by softmax(r/beta); biased towards 0 where few of them count. smc: weighted particles; bias
    O(1/samples). smc_law: what num_particles particles emit, in their draws and ancestors too; no bias for that law, of
    high variance. best_of_score: best-of-n in the policy that draws; unbiased. soft_pick: one of n draws, kept with
    probability softmax(r/temperature), in the scores; no bias for that rule. Top-k and top-p are held fixed: the
    gradient is that on the support that is kept.

    Args:
      follower: a Policy, or a decoder bound by functools.partial to its policy and reward.
      utility: the leader's utility u of whole responses.
      params: LeaderParams, or a dict of its names.
      rng: consumed.
      prompts: a TokenBatch [B,P], or a dict that mirrors the follower's params.
      wrt: entries of the follower's params to differentiate, as paths such as "critic" or "policy/critic"; "" for all.
      estimator: see above.
      samples: draws of each prompt, >= 2; for best-of-n a multiple of n, for smc_law of num_particles.
      max_new_tokens, eos_ids: as `decoding.sample`.
      temperature: of soft_pick's choice, > 0, in units of its scores.
      values: a level critic whose score of a token is an estimate of the expected utility after it, with all_tokens and
        togo; no gradient goes through it.

    Returns:
      A LeaderGradient. It runs on the host: the draws are one program, and their gradient another.

    Raises:
      ValueError: a follower without a derivative, an estimator that does not fit it (the message lists which does),
        too few samples, an entry of `wrt` that there is not or that the estimator holds fixed, a utility that is NaN,
        draws that rejection did not accept, and those of the decoder.
    """
    check_rng(rng)
    check_positive("temperature", temperature)
    given = fields_of(params, LeaderParams)
    paths = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    parts = open_follower(follower, estimator, samples, values)
    check_paths(given.follower, paths, estimator)
    draws, scored = jax.random.split(rng)
    limits = {"max_new_tokens": max_new_tokens, "eos_ids": eos_ids}
    keywords = {} if parts.decoder is None else {**follower.keywords, **limits}  # type: ignore[union-attr]
    drawn = _draw(parts, estimator, given.follower, draws, prompts, samples, keywords or limits)
    texts = prompts if isinstance(prompts, TokenBatch) or parts.reward is None else prompts_for(prompts, "reward")
    texts = any_prompts(texts)
    u = _utilities(utility, given.utility, texts, drawn.samples)
    own = prompts if parts.decoder is None else prompts_for(prompts, "policy")
    chosen = {path: entry_at(given.follower, path) for path in paths}
    gradient, found = _differentiate(
        parts,
        estimator,
        chosen,
        given.follower,
        given.values,
        scored,
        own,
        texts,
        drawn,
        u,
        at_least_float32(temperature),
    )
    error = jnp.sqrt(found.variance.sum()) / len(u)
    return LeaderGradient(found.value.mean(), gradient, error, found.effective.mean(), found.kl.mean())


def _draw(
    parts: Parts,
    estimator: Estimator,
    params: Params,
    rng: Array,
    prompts: Prompts,
    samples: int,
    keywords: dict[str, Any],
) -> _Drawn:
    """ValueError where rejection accepted no draw."""
    decoder: Any = parts.decoder
    if decoder is None or estimator == "closed_form":
        limits = {name: keywords[name] for name in ("max_new_tokens", "eos_ids")}
        own, inner = (params, prompts) if decoder is None else (params["policy"], prompts_for(prompts, "policy"))
        drawn = decoding.sample(parts.policy, own, rng, inner, num_samples=samples, **limits)
        none = jnp.zeros(drawn.mask.shape[:2], drawn.log_prob.dtype)
        return _Drawn(drawn, none, none, decoding.sum_of_steps(drawn).value)
    assert parts.reward is not None
    if estimator == "smc_law":
        inner = prompts_for(prompts, "policy")
        steps, given = keywords["max_new_tokens"], keywords["eos_ids"]
        checked, steps, ids = check_request(parts.policy, params["policy"], rng, inner, steps, given)
        keys = jax.random.split(rng, samples // parts.group)
        found = _run(parts, params, keys, checked, steps, ids, None)
        particles = populations.drawn(found, ids)
        none = jnp.zeros(particles.mask.shape[:2], found.log_weight.dtype)
        return _Drawn(particles, none, none, none, found.trace, keys)
    if decoder is decoding.rejection:
        found = [
            decoder(parts.policy, parts.reward, params, key, prompts, **keywords)
            for key in jax.random.split(rng, samples)
        ]
        accepted = np.stack([np.asarray(each.info.accepted) for each in found])
        if not accepted.all():
            raise ValueError(
                f"max_tries: expected all draws to be accepted, found {accepted.sum()} of {accepted.size}: the law "
                "holds for those alone"
            )
        drawn = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *(each.completions for each in found))
        none = jnp.zeros(drawn.mask.shape[:2], drawn.log_prob.dtype)
        return _Drawn(drawn, none, none, jnp.stack([each.kl.value for each in found]))
    count = "num_particles" if decoder is decoding.smc else "num_samples"
    one = decoder(parts.policy, parts.reward, params, rng, prompts, **{**keywords, count: samples})
    if decoder is decoding.smc:
        return _Drawn(one.info.samples, one.info.reward, one.info.log_weight, one.kl.value)
    bound = jnp.asarray(metrics.best_of_n_kl_bound(parts.group))
    return _Drawn(one.info.samples, one.info.reward, jnp.zeros_like(one.info.reward), bound)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _run(
    parts: Parts,
    params: Params,
    keys: Array,
    prompts: Prompts,
    steps: int,
    eos_ids: tuple[int, ...],
    trace: populations.Trace | None,
) -> populations.Population:
    """Populations, leaves [R,...]."""
    threshold = params.get("ess_threshold")

    def one(key: Array, trace: populations.Trace | None) -> populations.Population:
        return populations.population(
            parts.policy,
            params["policy"],
            key,
            prompts,
            n=parts.group,
            steps=steps,
            eos_ids=eos_ids,
            threshold=0.5 if threshold is None else threshold,
            trace=trace,
        )

    found: populations.Population = jax.vmap(one)(keys, trace)
    return found


def _utilities(utility: Reward, params: Params, texts: TokenBatch, samples: Completions) -> Array:
    """u [B,n]. ValueError: NaN, another shape."""
    batch, n = samples.mask.shape[:2]
    flat = jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), samples)
    score = score_completions if rewards.on_host(utility) else _compiled_score
    found = score(utility, params, repeat_rows(texts, n), flat).reshape(batch, n)
    bad = np.flatnonzero(np.isnan(np.asarray(found)).any(axis=1)).tolist()
    if bad:
        raise ValueError(f"utility: expected numbers, found NaN for prompts {bad}")
    return found


_compiled_score = jax.jit(score_completions, static_argnums=0)


class _Found(NamedTuple):
    value: Array  # [B]
    variance: Array  # [B], of the value over draws
    effective: Array  # [B]
    kl: Array  # [...]


def _of_draws(u: Array, kl: Array) -> _Found:
    """Of independent draws [B,n] of equal weight."""
    n = u.shape[1]
    return _Found(
        u.mean(axis=1), u.var(axis=1) * n / (n - 1) / n if n > 1 else u[:, 0] * jnp.nan, jnp.full(len(u), n), kl
    )


def _of_weights(u: Array, weight: Array, kl: Array) -> _Found:
    """Of draws [B,n] with weights of sum 1."""
    value = (weight * u).sum(axis=1)
    variance = (weight**2 * (u - value[:, None]) ** 2).sum(axis=1)
    return _Found(value, variance, 1 / (weight**2).sum(axis=1), kl)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _differentiate(
    parts: Parts,
    estimator: Estimator,
    chosen: dict[str, Params],
    params: Params,
    value_params: Params,
    rng: Array,
    prompts: Prompts,
    texts: TokenBatch,
    drawn: _Drawn,
    u: Array,
    temperature: Array,
) -> tuple[dict[str, Params], _Found]:
    batch, n = u.shape
    samples = drawn.samples

    def surrogate(chosen: dict[str, Params]) -> tuple[Array, _Found]:
        moved = params
        for path, value in chosen.items():
            moved = with_entry(moved, path, value)
        if estimator in ("all_tokens", "togo"):
            assert parts.values is not None
            critic = parts.values

            def beside(tokens: Array, mask: Array, u: Array) -> Array:
                """The scalar of sample j of every prompt."""
                given = (rng, prompts, texts, tokens, mask, u)
                return stepped(estimator, parts.policy, moved, critic, value_params, *given)

            each = jax.vmap(beside, (1, 1, 1))(samples.tokens, samples.mask, u)
            return each.mean(), _of_draws(u, drawn.kl)
        if estimator in ("score", "best_of_score"):
            own = moved if parts.decoder is None else moved["policy"]

            def score(tokens: Array, mask: Array) -> Array:
                """log pi [B] of sample j of every prompt: what is per prompt in params stays so."""
                return decoding.log_prob(parts.policy, own, rng, prompts, tokens, mask, eos_ids=()).log_prob.sum(axis=1)

            log_prob = jax.vmap(score, (1, 1), 1)(samples.tokens, samples.mask)
            if estimator == "score":
                return shaping.score_function(log_prob, utility=u), _of_draws(u, drawn.kl)
            ranked = shaping.best_of_score(log_prob, judge=drawn.score, utility=u, n=parts.group)
            value = shaping.best_of_utility(drawn.score, utility=u, n=parts.group)
            groups = drawn.score.reshape(batch, -1, parts.group)
            picks = jnp.take_along_axis(u.reshape(groups.shape), groups.argmax(axis=-1)[..., None], axis=-1)[..., 0]
            return ranked, _of_draws(picks, drawn.kl)._replace(value=value)
        flat = jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), samples)
        assert parts.reward is not None
        reward = score_completions(parts.reward, moved["reward"], repeat_rows(texts, n), flat).reshape(batch, n)
        if estimator == "smc_law":
            assert drawn.keys is not None
            again = _run(parts, moved, drawn.keys, prompts, samples.tokens.shape[2], (), drawn.trace)
            out = populations.emitted(again, reward, u, beta=jnp.asarray(moved["beta"]))
            return out.surrogate, _of_draws(out.utility, out.kl)
        if estimator == "covariance":
            found = _of_draws(u, drawn.kl)
            return shaping.covariance(reward, utility=u, beta=moved["beta"]), found
        if estimator == "closed_form":
            each = shaping.leader_utility(jnp.zeros_like(reward), reward, utility=u, beta=moved["beta"])
            weight = jax.nn.softmax(reward / jnp.asarray(moved["beta"]).reshape(-1, 1), axis=1)
            return each.mean(), _of_weights(u, weight, (weight * jnp.log(jnp.maximum(n * weight, 1e-38))).sum(axis=1))
        if estimator == "smc":
            given = {"log_weight": drawn.log_weight, "utility": u, "beta": moved["beta"]}
            estimate = shaping.smc(reward, **given)
            return estimate.utility.mean(), _of_weights(u, jax.nn.softmax(drawn.log_weight, axis=1), drawn.kl)
        groups, values = (x.reshape(batch, -1, parts.group) for x in (reward, u))
        each = shaping.leader_utility(jnp.zeros_like(groups), groups, utility=values, beta=temperature)
        return each.mean(), _of_draws(each, drawn.kl)

    gradient, found = jax.grad(surrogate, has_aux=True)(chosen)
    return gradient, found
