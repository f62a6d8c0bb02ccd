"""Sequential Monte Carlo: weighted responses of the response-level optimum, from any proposal policy."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import rollout
from jaxalign._arrays import is_supported, repeat_rows, take_rows
from jaxalign._checks import is_concrete
from jaxalign._parts import start_policy
from jaxalign._programs import tells_programs
from jaxalign.decoding import _kl, resampling
from jaxalign.decoding.requests import (
    Decode,
    EosIds,
    Tokenizer,
    check_scores,
    check_values,
    count,
    number,
    open_params,
    open_request,
    optional_reward,
    score_completions,
    streams,
    uniform_per_prompt,
)
from jaxalign.prompts import prompt_index
from jaxalign.types import Array, ArrayLike, Completions, Decoded, Params, Policy, Prompts, Reward, TextReward

_ESS_THRESHOLD = 0.5


class SMCParams(NamedTuple):
    """Parameters of `smc`; a dict of the same names is accepted."""

    policy: Params
    """The proposal's."""
    reward: Params
    """The reward's."""
    beta: ArrayLike
    """The target's KL weight [reward], a scalar or [B], > 0; a tilt's own may differ."""
    ess_threshold: ArrayLike | None = None
    """A prompt is resampled below this share of num_particles, a scalar or [B] in [0, 1]; None: 0.5. 0 never
    resamples."""


class SMCInfo(NamedTuple):
    """The particles of each prompt and their weights."""

    samples: Completions
    """[B,N,T], each particle's own history."""
    reward: Array
    """[B,N] of each."""
    log_weight: Array
    """[B,N], whose mean in the linear domain is the estimate of Z."""
    log_z: Array
    """[B], the logarithm of that mean."""
    ess: Array
    """[B] = (Σw)²/Σw², in [1, N]; 0 where every weight is 0."""
    resamplings: Array
    """[B]: how often the prompt was resampled."""
    truncated_support: Array
    """[B] bool: a particle met a token that the base can draw and the proposal cannot, so that Z and the target are
    those of the kept responses alone."""


@tells_programs
def smc(
    policy: Policy,
    reward: Reward | TextReward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    num_particles: int,
    max_new_tokens: int,
    eos_ids: EosIds = None,
    temperature: ArrayLike = 1.0,
    scheme: resampling.Resampling = resampling.systematic,
    when: resampling.ResamplingRule = resampling.ess_below,
    tokenizer: Tokenizer | Decode | None = None,
) -> Decoded[SMCInfo]:
    """Gives N weighted responses of pi*(y) ∝ pi_ref(y)·exp(r(y)/beta), proposed by any policy: a tilt, a nest of them,
    or the base itself.

    Over a whole response the weight is that of importance sampling,

        log w(y) = Σ_t [log pi_ref(y_t|s_t) − log pi(y_t|s_t)] + r(y)/beta,

    and it comes in parts: log_norm of each step before its token is drawn (for a tilt, how much the candidates promise
    together), and at the end what Σ log_norm lacks, r/beta − q_T/beta for a level critic and r/beta − Σ q/beta for an
    increment. Between the steps a prompt whose effective sample size falls below ess_threshold·N is resampled. A
    finished particle draws nothing and stays in the population. E[exp(log_z)] = Z = E_ref[exp(r/beta)] whatever the
    proposal, N and the resampling, as long as the proposal can draw what the base can; with the exact soft value at
    this beta every weight is Z. Weighted means over particles tend to those of pi* as N grows; with N = 1 this is
    importance sampling.

    Args:
      policy: the proposal; its log_prob_ref is the base (`policies.with_reference` for a DPO or RL model). With top-k,
        top-p or candidates the target is pi* on the kept responses, Z included, and truncated_support says so.
      params: SMCParams, or {"policy", "reward", "beta"} and if wanted {"ess_threshold"}.
      rng: consumed. A prompt's particles depend on rng and its index alone at one batch size and width; `in_chunks`
        holds them at every other.
      prompts: as `best_of_n`; encoded once, the state repeated N times. A resampling copies the N states.
      num_particles: N >= 1.
      temperature: of the proposal. The weights account for it, so that the target is the same at each one.
      scheme: how a population is resampled, a function of `resampling`: systematic, stratified, multinomial, residual.
      when: whether it is, a function of `resampling`: ess_below, always, never.
      reward, max_new_tokens, eos_ids, tokenizer: as `best_of_n`.

    Returns:
      Decoded: one particle per prompt drawn by the weights [B,T]; as KL the estimate E[r]/beta − log Z under the
      weights, that of the target to the base; SMCInfo.

    Raises:
      ValueError: num_particles < 1, beta <= 0, an ess_threshold outside [0, 1], a reward that is NaN (−inf forbids a
        response), and those of `best_of_n`.
    """
    n = count("num_particles", num_particles)
    defaults = {"ess_threshold": _ESS_THRESHOLD}
    given = open_params(params, ("policy", "reward", "beta"), {**defaults, **optional_reward(reward)})
    below = number("ess_threshold", given["ess_threshold"])
    if is_concrete(below) and not np.all((np.asarray(below) >= 0) & (np.asarray(below) <= 1)):
        raise ValueError(f"ess_threshold: expected a value in [0, 1], found {np.asarray(below)}")
    request = open_request(
        policy,
        reward,
        given,
        rng,
        prompts,
        max_new_tokens,
        eos_ids,
        temperature,
        per_prompt=("beta", "ess_threshold"),
        tokenizer=tokenizer,
    )
    found: Decoded[SMCInfo] = _smc(
        request.policy,
        request.reward,
        request.params,
        rng,
        request.prompts,
        n,
        request.max_new_tokens,
        request.eos_ids,
        scheme,
        when,
    )
    check_scores(found.info.reward)
    return found


class _Memory(NamedTuple):
    log_weight: Array  # [B·N], the sum of log_norm since the last resampling, and the mean weight of all before, less
    # the prompt's log_norm before the first token: of a sharp tilt it is so large that small weights would be lost
    resamplings: Array  # [B]
    truncated: Array  # [B]


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6, 7, 8, 9))
def _smc(
    policy: Policy,
    reward: Reward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    n: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    scheme: resampling.Resampling,
    when: resampling.ResamplingRule,
) -> Decoded[SMCInfo]:
    start, draws, moves, coins = jax.random.split(rng, 4)
    index = prompt_index(prompts)
    batch = index.shape[0]

    def each(x: Array) -> Array:
        return x.reshape((batch, n, *x.shape[1:]))

    def resample(t: Array, frame: rollout.Frame, memory: _Memory) -> tuple[rollout.Frame, _Memory]:
        """The weight of the step, and a resampling where it is due."""
        output, active = frame.output, ~frame.finished
        promised = jnp.where(t == 0, output.log_norm - first, output.log_norm)
        log_weight = each(memory.log_weight + jnp.where(active, promised, 0))
        lost = is_supported(output.log_prob_ref) & ~is_supported(output.log_prob)
        truncated = memory.truncated | each(active & lost.any(axis=-1)).any(axis=1)
        due = when(t, log_weight, params["ess_threshold"])
        key = jax.random.fold_in(coins, t)
        ancestor = scheme(jax.vmap(lambda i: jax.random.fold_in(key, i))(index), log_weight)
        check_values(ancestor, (batch, n), "scheme")
        ancestor = jnp.where(due[:, None], ancestor, jnp.arange(n))
        mean = jax.nn.logsumexp(log_weight, axis=1, keepdims=True) - jnp.log(n)
        log_weight = jnp.where(due[:, None], mean, log_weight).reshape(-1)
        flat = (jnp.arange(batch)[:, None] * n + ancestor).reshape(-1)

        def move(frame: rollout.Frame) -> rollout.Frame:
            records = {name: value[:, flat] for name, value in frame.records.items()}
            state, output, finished = take_rows((frame.state, frame.output, frame.finished), flat)
            return rollout.Frame(state, output, finished, records)

        # A copy of every state: only where a prompt needs it.
        frame = jax.lax.cond(due.any(), move, lambda frame: frame, frame)
        return frame, _Memory(log_weight, memory.resamplings + due, truncated)

    state, output = start_policy(policy, params["policy"], start, prompts["policy"], max_new_tokens)
    state, output = repeat_rows((state, output), n)
    # The same for all particles of a prompt, which begin in one state.
    first = jnp.where(jnp.isfinite(output.log_norm), output.log_norm, 0)
    memory = _Memory(jnp.zeros(batch * n, output.log_prob.dtype), jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool))
    rolled = rollout.rollout(
        policy,
        params["policy"],
        draws,
        state,
        output,
        steps=max_new_tokens,
        eos_ids=eos_ids,
        rows=streams(index, jnp.arange(n, dtype=jnp.int32)),
        last_step=False,
        step_rng=moves,
        hooks=rollout.Hooks(before_draw=resample),
        memory=memory,
    )
    drawn, memory = rolled.completions, rolled.memory

    score = each(score_completions(reward, params["reward"], repeat_rows(prompts["reward"], n), drawn))
    beta = params["beta"]
    # Differences first: r/beta of 1e7 has no digits left for the weights, whose KL would read 0.
    top = score.max(axis=1)
    top = jnp.where(jnp.isfinite(top), top, 0)
    scaled = (score - top[:, None]) / beta[:, None]
    promised = jnp.where(jnp.arange(max_new_tokens) == 0, drawn.log_norm - first[:, None], drawn.log_norm)
    rest = (drawn.log_prob_ref - drawn.log_prob - promised).sum(axis=1)
    log_weight = each(memory.log_weight + rest) + scaled
    log_mean = jax.nn.logsumexp(log_weight, axis=1) - jnp.log(n)
    ess = resampling.effective_size(log_weight)
    share = jnp.where(ess[:, None] == 0, 0, jax.nn.softmax(log_weight, axis=1))
    kl = jnp.where(share == 0, 0, share * scaled).sum(axis=1) - log_mean
    samples: Completions = jax.tree.map(each, drawn)
    coin = uniform_per_prompt(coins, max_new_tokens, index)
    chosen = rollout.draw(jnp.where(ess[:, None] == 0, 0, log_weight), coin)
    pick: Completions = jax.tree.map(lambda x: x[jnp.arange(batch), chosen], samples)
    log_weight, log_z = log_weight + (top / beta)[:, None], log_mean + top / beta
    info = SMCInfo(samples, score, log_weight, log_z, ess, memory.resamplings, memory.truncated)
    return Decoded(pick, _kl.gibbs_estimate(kl), info)
