"""Sequential Monte Carlo: weighted responses of the response-level optimum, from any proposal policy."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import rollout
from jaxalign._arrays import drop_weak_types, is_supported, repeat_rows, take_rows
from jaxalign._checks import is_concrete
from jaxalign.decoding._best_of_n import check_scores, open_request, score_completions
from jaxalign.decoding._sampling import streams
from jaxalign.prompts import prompt_index
from jaxalign.types import Array, ArrayLike, Completions, Params, Policy, Prompts, Reward, State, StepOutput


class Particles(NamedTuple):
    """completions: Completions [B,N,T], each particle's own history; reward [B,N]; log_weight [B,N], whose mean in the
    linear domain is the estimate of Z; log_z [B], its logarithm; ess [B] = (Σw)²/Σw², in [1, N], 0 where every weight
    is 0; kl [B], E[r]/beta − log Z under the weights: the KL of the target to the base, estimated; resamplings [B];
    truncated_support [B]: a particle met a token that the base can draw and the proposal cannot, so that Z and the
    target are those of the kept responses alone; pick: Completions [B,T], one particle drawn by the weights."""

    completions: Completions
    reward: Array
    log_weight: Array
    log_z: Array
    ess: Array
    kl: Array
    resamplings: Array
    truncated_support: Array
    pick: Completions


def smc(
    policy: Policy,
    reward: Reward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    particles: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    resample_below: ArrayLike = 0.5,
) -> Particles:
    """N weighted responses of pi*(y) ∝ pi_ref(y)·exp(r(y)/beta), proposed by any policy: a tilt, a nest of them, or the
    base itself.

    Over a whole response the weight is that of importance sampling,

        log w(y) = Σ_t [log pi_ref(y_t|s_t) − log pi(y_t|s_t)] + r(y)/beta,

    and it comes in parts: log_norm of each step before its token is drawn (for a tilt, how much the candidates promise
    together), and at the end what Σ log_norm lacks, r/beta − q_T/beta for a level critic and r/beta − Σ q/beta for an
    increment. Between the steps a prompt whose effective sample size falls below resample_below·N is resampled
    (systematic). A finished particle stands still and stays in the population. E[exp(log_z)] = Z = E_ref[exp(r/beta)]
    whatever the proposal, N and the resampling, as long as the proposal can draw what the base can; with the exact soft
    value at this beta every weight is Z. Weighted means over particles tend to those of pi* as N grows; with N = 1 this
    is importance sampling.

    Args:
      policy: the proposal; its log_prob_ref is the base (`policies.with_reference` for a DPO or RL model). With top-k,
        top-p or candidates the target is pi* on the kept responses, Z included, and truncated_support says so.
      params: {"policy", "reward", "beta": scalar or [B] > 0}. This beta is the target's; a tilt's own may differ.
      rng: consumed. A prompt's particles depend on rng and its index alone.
      prompts: as `best_of_n`; encoded once, the state repeated N times. A resampling copies the N states.
      particles: N >= 1.
      resample_below: scalar in [0, 1]; 0 never resamples.

    ValueError: particles < 1, beta <= 0, a fraction outside [0, 1], a reward that is NaN (−inf forbids a response), and
    those of `best_of_n`.
    """
    if particles < 1:
        raise ValueError(f"particles: expected at least 1, found {particles}")
    if np.ndim(resample_below) != 0:
        raise ValueError(f"resample_below: expected a scalar, found shape {np.shape(resample_below)}")
    if is_concrete(resample_below) and not 0 <= float(np.asarray(resample_below)) <= 1:
        raise ValueError(f"resample_below: expected a value in [0, 1], found {resample_below}")
    asked = open_request(policy, reward, params, prompts, max_new_tokens, eos_ids, per_prompt=("beta",))
    arrays = asked.params | {"resample_below": jnp.asarray(resample_below, jnp.result_type(float))}
    found = _smc(policy, reward, drop_weak_types(arrays), rng, asked.prompts, particles, max_new_tokens, asked.eos_ids)
    check_scores(found.reward)
    return found


def effective_size(log_weight: Array) -> Array:
    """(Σw)²/Σw² [...] of log-weights [...,N]: N for equal ones, 1 where one has all the mass, 0 where none has any."""
    weight = _relative(log_weight)
    total, squares = weight.sum(axis=-1), (weight**2).sum(axis=-1)
    return jnp.where(squares == 0, 0, total**2 / jnp.where(squares == 0, 1, squares))


def systematic(log_weight: Array, uniform: Array) -> Array:
    """Ancestors [B,N] of log-weights [B,N] by systematic resampling, uniform [B] in [0,1): a particle with share p of
    the mass has ⌊N·p⌋ or ⌈N·p⌉ children, N·p in the mean; one without mass has none."""
    weight = _relative(log_weight)
    n = weight.shape[-1]
    cumulative = jnp.cumsum(weight, axis=-1)
    target = (jnp.arange(n) + uniform[:, None]) / n * cumulative[:, -1:]
    index = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(cumulative, target)
    last = jnp.where(weight > 0, jnp.arange(n), 0).max(axis=-1, keepdims=True)
    return jnp.minimum(index, last).astype(jnp.int32)


def _relative(log_weight: Array) -> Array:
    """Weights up to a common factor, the largest 1; all 0 where no weight has mass."""
    top = log_weight.max(axis=-1, keepdims=True)
    return jnp.exp(log_weight - jnp.where(top == -jnp.inf, 0, top))


class _Carry(NamedTuple):
    t: Array
    state: State
    output: StepOutput
    finished: Array  # [B·N]
    log_weight: Array  # [B·N], the sum of log_norm since the last resampling, and the mean weight of all before
    records: dict[str, Array]  # each [B·N,T]
    resamplings: Array  # [B]
    truncated: Array  # [B]


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6, 7))
def _smc(
    policy: Policy,
    reward: Reward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    n: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
) -> Particles:
    start, draws, moves, coins = jax.random.split(rng, 4)
    index = prompt_index(prompts)
    batch = index.shape[0]
    rows = streams(index, jnp.arange(n, dtype=jnp.int32))

    def uniform(number: ArrayLike) -> Array:
        """One uniform number per prompt."""
        key = jax.random.fold_in(coins, number)
        return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(index)

    def each(x: Array) -> Array:
        return x.reshape((batch, n, *x.shape[1:]))

    def choose(carry: _Carry) -> tuple[_Carry, Array]:
        """The weight of the step, a resampling where it is due, and the next token of each particle."""
        active = ~carry.finished
        log_weight = each(carry.log_weight + jnp.where(active, carry.output.log_norm, 0))
        lost = is_supported(carry.output.log_prob_ref) & ~is_supported(carry.output.log_prob)
        truncated = carry.truncated | each(active & lost.any(axis=-1)).any(axis=1)
        due = effective_size(log_weight) < params["resample_below"] * n
        ancestor = jnp.where(due[:, None], systematic(log_weight, uniform(carry.t)), jnp.arange(n))
        mean = jax.nn.logsumexp(log_weight, axis=1, keepdims=True) - jnp.log(n)
        log_weight = jnp.where(due[:, None], mean, log_weight).reshape(-1)
        flat = (jnp.arange(batch)[:, None] * n + ancestor).reshape(-1)
        population = (carry.state, carry.output, carry.finished, carry.records)
        # A copy of every state: only where a prompt needs it.
        state, output, finished, records = jax.lax.cond(
            due.any(), lambda tree: take_rows(tree, flat), lambda tree: tree, population
        )
        token = rollout.draw_rows(output.log_prob, jax.random.fold_in(draws, carry.t), rows)
        new = rollout.record(output, token, ~finished)
        records = {name: value.at[:, carry.t].set(new[name].astype(value.dtype)) for name, value in records.items()}
        finished = finished | rollout.is_eos(token, eos_ids)
        resamplings = carry.resamplings + due
        return _Carry(carry.t + 1, state, output, finished, log_weight, records, resamplings, truncated), token

    def body(carry: _Carry) -> _Carry:
        key = jax.random.fold_in(moves, carry.t)
        carry, token = choose(carry)
        state, output = policy.step(params["policy"], key, carry.state, jnp.where(carry.finished, -1, token))
        return carry._replace(state=state, output=output)

    state, output = policy.init(params["policy"], start, prompts["policy"], max_new_tokens)
    state, output = repeat_rows((state, output), n)
    dtype = output.log_prob.dtype
    records = rollout.no_records((batch * n, max_new_tokens), dtype)
    zero = jnp.zeros(batch * n, dtype)
    none, no = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool)
    carry = _Carry(jnp.zeros((), jnp.int32), state, output, zero > 0, zero, records, none, no)
    carry = jax.lax.while_loop(lambda c: (c.t < max_new_tokens - 1) & ~c.finished.all(), body, carry)
    carry, _ = choose(carry)  # the last token needs no further state; standing particles draw nothing

    drawn = Completions(**carry.records, finished=carry.finished, truncated=~carry.finished)
    score = each(score_completions(reward, params["reward"], repeat_rows(prompts["reward"], n), drawn))
    paid = score / params["beta"][:, None]
    rest = (drawn.log_prob_ref - drawn.log_prob - drawn.log_norm).sum(axis=1)
    log_weight = each(carry.log_weight + rest) + paid
    log_z = jax.nn.logsumexp(log_weight, axis=1) - jnp.log(n)
    ess = effective_size(log_weight)
    share = jnp.where(ess[:, None] == 0, 0, jax.nn.softmax(log_weight, axis=1))
    kl = jnp.where(share == 0, 0, share * paid).sum(axis=1) - log_z
    drawn = jax.tree.map(each, drawn)
    chosen = rollout.draw(jnp.where(ess[:, None] == 0, 0, log_weight), uniform(max_new_tokens))
    pick: Completions = jax.tree.map(lambda x: x[jnp.arange(batch), chosen], drawn)
    return Particles(drawn, score, log_weight, log_z, ess, kl, carry.resamplings, carry.truncated, pick)
