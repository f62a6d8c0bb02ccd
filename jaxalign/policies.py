"""Policies: the language model, the tilt by a critic, and the transforms of a next-token distribution.

Every function here takes Policies (or a model) and gives a Policy; build it once and reuse it, since a new closure is
a new trace.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import mdp, models
from jaxalign.checks import check_has_logits, check_positive, check_prompt_fits, entry, is_concrete
from jaxalign.types import (
    NEGATIVE,
    Array,
    Completions,
    Critic,
    Params,
    Policy,
    Prompts,
    State,
    StepOutput,
    TokenBatch,
    at_least_float32,
    is_supported,
    per_row,
    prompt_index,
    prompts_for,
    where_rows,
)


def language_model(lm: Any) -> Policy:
    """pi(z|s) = softmax(logits(s))_z of a language model; it is its own base. params: the model's.

    `lm` is what `models.load` gives, or anything with its `prefill`, `step`, `hidden`, `logits` and `max_length`.
    The prompt is encoded once; the state is the model's cache with room for max_new_tokens. ValueError for a sequence
    classifier, which has no vocabulary logits.
    """
    check_has_logits("language_model", lm)

    def output(params: Params, hidden: Array) -> StepOutput:
        log_prob = jax.nn.log_softmax(lm.logits(params, hidden))
        return StepOutput(log_prob, log_prob, jnp.zeros(hidden.shape[:1], log_prob.dtype), hidden)

    def init(params: Params, rng: Array, prompts: TokenBatch, max_new_tokens: int) -> tuple[State, StepOutput]:
        del rng
        capacity = prompts.tokens.shape[1] + max_new_tokens
        hidden, cache = lm.prefill(params, prompts.tokens, prompts.mask, capacity)
        return cache, output(params, hidden)

    def step(params: Params, rng: Array, state: State, token: Array) -> tuple[State, StepOutput]:
        del rng
        hidden, cache = lm.step(params, state, token)
        return cache, output(params, hidden)

    def log_prob(params: Params, prompts: TokenBatch, tokens: Array, mask: Array) -> Completions:
        joined, joined_mask, prompt_length = mdp.concatenate(prompts, tokens, mask)
        hidden = lm.hidden(params, joined, mask=joined_mask)
        # Token t of a response is predicted at position prompt_length + t - 1 of the compacted row.
        position = prompt_length[:, None] - 1 + jnp.arange(tokens.shape[1])
        position = jnp.minimum(position, joined.shape[1] - 1)
        hidden = jnp.take_along_axis(hidden, position[:, :, None], axis=1)
        value = jnp.where(mask, models.token_log_prob(lm, params, hidden, tokens), 0)
        zero = jnp.zeros_like(value)
        rows = jnp.zeros(tokens.shape[:1], bool)
        return Completions(tokens, mask, value, value, zero, zero, rows, ~rows, ~rows)

    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        check_prompt_fits(lm, prompts, max_new_tokens)

    return Policy(init, step, log_prob, check, lm.vocab_size)


def with_reference(policy: Policy, reference: Policy) -> Policy:
    """`policy` with log_prob_ref of another model beside it: a DPO or RL model is not its own base.

    params {"policy", "reference"}. The KL of a decoder is then against the reference. log_norm is the policy's own.
    """
    _check_same_vocabulary("with_reference", policy, reference)

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        one, other = jax.random.split(rng)
        inner, output = policy.init(params["policy"], one, prompts_for(prompts, "policy"), max_new_tokens)
        beside, base = reference.init(params["reference"], other, prompts_for(prompts, "reference"), max_new_tokens)
        return {"policy": inner, "reference": beside}, output._replace(log_prob_ref=base.log_prob)

    def step(params: Params, rng: Array, state: State, token: Array) -> tuple[State, StepOutput]:
        one, other = jax.random.split(rng)
        inner, output = policy.step(params["policy"], one, state["policy"], token)
        beside, base = reference.step(params["reference"], other, state["reference"], token)
        return {"policy": inner, "reference": beside}, output._replace(log_prob_ref=base.log_prob)

    def log_prob(params: Params, prompts: Prompts, tokens: Array, mask: Array) -> Completions:
        assert policy.log_prob is not None
        assert reference.log_prob is not None
        own = policy.log_prob(params["policy"], prompts_for(prompts, "policy"), tokens, mask)
        base = reference.log_prob(params["reference"], prompts_for(prompts, "reference"), tokens, mask)
        # The exact KL needs both distributions at every position; the parallel form keeps neither.
        return own._replace(log_prob_ref=base.log_prob, kl=None)

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        _check(policy, params, prompts, max_new_tokens, "policy")
        _check(reference, params, prompts, max_new_tokens, "reference")

    parallel = policy.log_prob is not None and reference.log_prob is not None
    return Policy(init, step, log_prob if parallel else None, check, policy.vocab_size)


def tilt(policy: Policy, critic: Critic, *, top_k: int | None = None) -> Policy:
    """The aligned policy pi'(z|s) ∝ pi(z|s)·exp(q(s,z)/beta) on the candidates.

    params {"policy", "critic", "beta": scalar or [B], > 0}. Candidates are the top_k of log_prob, or the whole
    vocabulary. With l = log pi + q/beta on the candidates:

        log_prob' = l − logsumexp(l), NEGATIVE outside      log_norm' = log_norm + logsumexp(l) − previous

    previous = q/beta of the token chosen last for a level critic (0 at the start), 0 for an increment critic; so the
    sum of log_norm over a response is its sequential Monte Carlo weight under any critic. With the exact soft value,
    log_norm is log Z at the first token and 0 after.
    """
    _check_same_vocabulary("tilt", policy, critic)
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1 candidate or None, found {top_k}")
    if top_k is not None and policy.vocab_size is not None and top_k > policy.vocab_size:
        raise ValueError(f"top_k: expected at most the vocabulary's {policy.vocab_size} tokens, found {top_k}")

    def propose(params: Params, rng: Array, state: dict[str, Any], output: StepOutput, still: Array | None) -> Any:
        """Scores the next candidates and completes the state; rows that stand still keep candidates and scores."""
        candidates = None
        if top_k is not None:
            if top_k > output.log_prob.shape[-1]:
                raise ValueError(f"top_k: expected at most {output.log_prob.shape[-1]} tokens, found {top_k}")
            candidates = jax.lax.top_k(output.log_prob, top_k)[1].astype(jnp.int32)
            if still is not None:
                candidates = where_rows(still, state["candidates"], candidates)
        q, proposal = critic.score(params["critic"], rng, state["critic"], output, candidates)
        q = at_least_float32(q) / state["beta"][:, None]
        if still is not None:
            q = where_rows(still, state["q"], q)
        log_prob = output.log_prob
        if candidates is not None:
            log_prob = jnp.take_along_axis(log_prob, candidates, axis=-1)
        logit = log_prob + q
        norm = jax.nn.logsumexp(logit, axis=-1)
        tilted = logit - norm[:, None]
        if candidates is not None:
            outside = jnp.full(output.log_prob.shape, NEGATIVE, tilted.dtype)
            tilted = jax.vmap(lambda row, index, value: row.at[index].set(value))(outside, candidates, tilted)
        new = {"policy": state["policy"], "critic": proposal, "beta": state["beta"], "q": q}
        new["previous"] = state["previous"]
        if candidates is not None:
            new["candidates"] = candidates
        log_norm = output.log_norm + norm - state["previous"]
        return new, output._replace(log_prob=tilted, log_norm=log_norm)

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        below, beside, scoring = jax.random.split(rng, 3)
        inner, output = policy.init(params["policy"], below, prompts_for(prompts, "policy"), max_new_tokens)
        judge = critic.init(params["critic"], beside, prompts_for(prompts, "critic"), max_new_tokens)
        beta = per_row(params["beta"], output.log_prob.shape[0], name="beta")
        state = {"policy": inner, "critic": judge, "beta": beta, "previous": jnp.zeros_like(output.log_norm)}
        return propose(params, scoring, state, output, None)

    def step(params: Params, rng: Array, state: State, token: Array) -> tuple[State, StepOutput]:
        below, scoring = jax.random.split(rng)
        choice = token
        if top_k is not None:
            hit = (state["candidates"] == token[:, None]) & (token >= 0)[:, None]
            choice = jnp.where(hit, jnp.arange(top_k), -1).max(axis=-1)
        still = choice < 0  # no token, or one of probability zero
        previous = state["previous"]
        if critic.kind == "level":
            chosen = jnp.take_along_axis(state["q"], jnp.maximum(choice, 0)[:, None], axis=-1)[:, 0]
            previous = jnp.where(still, previous, chosen)
        judge = critic.advance(params["critic"], state["critic"], choice)
        inner, output = policy.step(params["policy"], below, state["policy"], jnp.where(still, -1, token))
        state = {**state, "policy": inner, "critic": judge, "previous": previous}
        return propose(params, scoring, state, output, still)

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        check_positive("beta", entry(params, "beta"))
        per_row(params["beta"], prompt_index(prompts).shape[0], name="beta")
        found = params["beta"]
        if critic.beta is not None and is_concrete(found) and np.any(np.asarray(found) != critic.beta):
            raise ValueError(
                f"beta: expected {critic.beta:g}, the only one that this critic's scores are for, found "
                f"{np.asarray(found)}"
            )
        _check(policy, params, prompts, max_new_tokens, "policy")
        _check(critic, params, prompts, max_new_tokens, "critic")

    return Policy(init, step, None, check, policy.vocab_size or critic.vocab_size)


def temperature(policy: Policy) -> Policy:
    """pi'(z|s) ∝ pi(z|s)^{1/temperature}; 0 is greedy (the first of equal tokens).

    params {"policy", "temperature": scalar or [B], >= 0}. The increments below are tempered with it, so that
    log_norm' = log_norm/temperature + logsumexp(log pi/temperature) is the weight for the tempered target. Greedy
    is the truncation to one token: log_norm' = log_norm + max log pi.
    """

    def apply(value: Array, output: StepOutput) -> StepOutput:
        greedy = value <= 0
        divisor = jnp.where(greedy, 1, value).astype(output.log_prob.dtype)
        scaled = output.log_prob / divisor[:, None]
        norm = jax.nn.logsumexp(scaled, axis=-1)
        best = jnp.argmax(output.log_prob, axis=-1)
        only = jnp.where(jnp.arange(scaled.shape[-1]) == best[:, None], 0, NEGATIVE)
        # NEGATIVE/temperature is no longer far enough down to count as outside the support.
        scaled = jnp.where(is_supported(output.log_prob), scaled - norm[:, None], NEGATIVE)
        log_prob = jnp.where(greedy[:, None], only, scaled).astype(output.log_prob.dtype)
        log_norm = jnp.where(greedy, output.log_norm + output.log_prob.max(axis=-1), output.log_norm / divisor + norm)
        return output._replace(log_prob=log_prob, log_norm=log_norm)

    return _per_prompt("temperature", policy, apply, lambda value: value >= 0, "a value >= 0")


def top_p(policy: Policy) -> Policy:
    """The nucleus: the smallest set of most probable tokens whose mass reaches p, renormalised; never empty.

    params {"policy", "top_p": scalar or [B] in (0, 1]}. log_norm' = log_norm + log(kept mass).
    """

    def apply(value: Array, output: StepOutput) -> StepOutput:
        vocab = output.log_prob.shape[-1]
        few = min(vocab, _NUCLEUS)
        covered = jnp.exp(jax.lax.top_k(output.log_prob, few)[0]).sum(axis=-1) >= value
        # Sorting a whole vocabulary costs more than a step of a small model, and is rarely needed.
        keep = jax.lax.cond(
            covered.all() | (few == vocab),
            lambda: _nucleus(output.log_prob, value, few),
            lambda: _wide_nucleus(output.log_prob, value),
        )
        # The whole mass may round to less than 1, and to more before the last token.
        return _truncate(output, keep | ((value >= 1)[:, None] & is_supported(output.log_prob)))

    return _per_prompt("top_p", policy, apply, lambda value: (value > 0) & (value <= 1), "a value in (0, 1]")


_NUCLEUS = 256  # tokens that are looked at before the whole vocabulary is sorted


def _nucleus(log_prob: Array, p: Array, k: int) -> Array:
    """Tokens [B,V] among the k most probable that are kept: while the mass before them is short of p [B]."""
    top, order = jax.lax.top_k(log_prob, k)
    mass = jnp.exp(top)
    kept = (jnp.cumsum(mass, axis=-1) - mass < p[:, None]).at[:, 0].set(True)
    return jax.vmap(lambda o, keep: jnp.zeros(log_prob.shape[-1], bool).at[o].set(keep))(order, kept)


def _wide_nucleus(log_prob: Array, p: Array) -> Array:
    """As `_nucleus` over the whole vocabulary, without a sort: the probability of the last token kept is bisected.

    Non-negative floats are ordered as their bit patterns are, so that as many halvings as a float has bits end at the
    largest probability v with mass(>= v) >= p; of the tokens at v the first by id are kept while mass is missing.
    """
    prob = jnp.exp(log_prob)
    code = jnp.int64 if prob.dtype == jnp.float64 else jnp.int32
    bits = jax.lax.bitcast_convert_type(prob, code)

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket  # mass(bits >= low) >= p, or low = 0; mass(bits >= high) < p
        middle = low + (high - low) // 2
        enough = jnp.where(bits >= middle[:, None], prob, 0).sum(axis=-1) >= p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    start = jnp.zeros(p.shape, code), bits.max(axis=-1) + 1
    edge = jax.lax.fori_loop(0, jnp.iinfo(code).bits, halve, start)[0][:, None]
    above, level = bits > edge, jnp.where(bits == edge, prob, 0)
    missing = p - jnp.where(above, prob, 0).sum(axis=-1)
    return above | ((bits == edge) & (jnp.cumsum(level, axis=-1) - level < missing[:, None]))


def top_k(policy: Policy, k: int) -> Policy:
    """The k most probable tokens, renormalised (equal ones: lower ids first). params: the policy's own.

    log_norm' = log_norm + log(kept mass). ValueError when k is not in [1, V].
    """
    if k < 1 or (policy.vocab_size is not None and k > policy.vocab_size):
        raise ValueError(f"k: expected 1 to the vocabulary's {policy.vocab_size} tokens, found {k}")

    def apply(output: StepOutput) -> StepOutput:
        kept = jax.lax.top_k(output.log_prob, k)[1]
        keep = jax.vmap(lambda index: jnp.zeros(output.log_prob.shape[-1], bool).at[index].set(True))(kept)
        return _truncate(output, keep)

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        state, output = policy.init(params, rng, prompts, max_new_tokens)
        return state, apply(output)

    def step(params: Params, rng: Array, state: State, token: Array) -> tuple[State, StepOutput]:
        state, output = policy.step(params, rng, state, token)
        return state, apply(output)

    return Policy(init, step, None, policy.check, policy.vocab_size)


def _truncate(output: StepOutput, keep: Array) -> StepOutput:
    """Keeps the tokens of `keep` [B,V] and renormalises; the kept mass enters log_norm."""
    log_kept = jax.nn.logsumexp(jnp.where(keep, output.log_prob, NEGATIVE), axis=-1)
    log_prob = jnp.where(keep, output.log_prob - log_kept[:, None], NEGATIVE)
    return output._replace(log_prob=log_prob, log_norm=output.log_norm + log_kept)


def _per_prompt(name: str, policy: Policy, apply: Any, valid: Any, expected: str) -> Policy:
    """A transform of the output by one number per prompt, params {"policy", name}, kept in the state (law 3)."""

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        inner, output = policy.init(params["policy"], rng, prompts_for(prompts, "policy"), max_new_tokens)
        value = per_row(params[name], output.log_prob.shape[0], name=name)
        return {"policy": inner, name: value}, apply(value, output)

    def step(params: Params, rng: Array, state: State, token: Array) -> tuple[State, StepOutput]:
        # A token that this transform gave probability zero is sent down all the same: the state below keeps its law.
        inner, output = policy.step(params["policy"], rng, state["policy"], token)
        return {"policy": inner, name: state[name]}, apply(state[name], output)

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        value = entry(params, name)
        if is_concrete(value) and not np.all(valid(np.asarray(value))):
            raise ValueError(f"{name}: expected {expected}, found {np.asarray(value)}")
        per_row(value, prompt_index(prompts).shape[0], name=name)
        _check(policy, params, prompts, max_new_tokens, "policy")

    return Policy(init, step, None, check, policy.vocab_size)


def _check(part: Policy | Critic, params: Params, prompts: Prompts, max_new_tokens: int, name: str) -> None:
    entry(params, name)
    if part.check is not None:
        part.check(entry(params, name), prompts_for(prompts, name), max_new_tokens)


def _check_same_vocabulary(name: str, left: Policy | Critic, right: Policy | Critic) -> None:
    if left.vocab_size is not None and right.vocab_size is not None and left.vocab_size != right.vocab_size:
        raise ValueError(
            f"{name}: expected one vocabulary, found {left.vocab_size} and {right.vocab_size} tokens "
            "(models.match_vocabulary cuts appended rows)"
        )
