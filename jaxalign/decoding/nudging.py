"""GGRO: greedy decoding in segments, each begun by the token that the reward's gradient proposes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.checks import entry, is_concrete, same_prompts
from jaxalign.decoding import segments
from jaxalign.decoding.sampling import check_request
from jaxalign.decoding.selection import check_reward
from jaxalign.loop import token_value
from jaxalign.mdp import concatenate
from jaxalign.rewards import CheckedGain
from jaxalign.types import (
    Array,
    ArrayLike,
    Completions,
    Params,
    Policy,
    Prompts,
    Reward,
    at_least_float32,
    is_supported,
    per_row,
    prompt_index,
    prompts_for,
    strong,
    where_rows,
)

Gain = Callable[..., Array]
"""(params, tokens [N,L], mask [N,L], prompt_length [N], position [N], candidates [N,K]) -> [N,K]: the first-order score
g_v of each candidate token v at column `position`, so that g_v − g_current is its gain over the token that stands
there."""


class Nudged(NamedTuple):
    """completions: Completions [B,T]; reward [B] of each; segment [B,T]: the number of the segment of each token, −1
    after the end; nudged [B,T]: True where a token was forced; segments [B]; floor, kept [B,M]: of each segment, the
    reward with its greedy form and with the form that was kept (0 beyond the last).

    Costs of each row, [B]: tokens: policy steps, of all candidates; scored: reward passes; gradients: gain passes. A
    batch takes as many rounds as its row with the most forms."""

    completions: Completions
    reward: Array
    segment: Array
    nudged: Array
    segments: Array
    floor: Array
    kept: Array
    tokens: Array
    scored: Array
    gradients: Array


def nudge(
    policy: Policy,
    reward: Reward | None,
    gain: Gain,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    candidates: int,
    threshold: ArrayLike,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    top_k: int = 25,
    temperature: ArrayLike = 0.0,
    rule: Literal["difference", "code"] = "difference",
    shortest: int = 3,
) -> Nudged:
    """Gradient-guided reward optimisation (GGRO, arXiv 2606.09635): from an accepted prefix s, up to `candidates` forms
    of the next segment are decoded greedily, and the one of highest reward r(s, segment) is accepted; until EOS.

    The first form has no nudge: the reward of a segment is never below its greedy form's. Each later one begins with
    the token of s's top_k that the gradient at the LATEST form proposes: argmax over v, or a draw from
    softmax(·/temperature), of

        difference: g_v − g_current, the first-order gain of the replacement     code: g_v, and 0 for the current token

    A proposal that was tried already ends the segment's search (a form follows from its first token). A segment ends
    before the first token, after `shortest`, whose distribution has an entropy of at least `threshold`, unless that
    token is an EOS or the last one; the next segment begins there. The reward reads partial text, without an EOS.

    Args:
      policy: any; its most probable tokens are the candidates, its greedy tokens the text. Built once, as reward and
        gain.
      reward: r, read on partial text. None: the one behind `gain`, in one pass with it.
      gain: `rewards.embedding_gain(lm)`, or any function of that form.
      params: {"policy", "reward", "gain"}; without "gain", gain reads the reward's.
      rng: consumed, by proposals at a temperature and by policies that draw. A prompt's response depends on rng and its
        index alone.
      candidates: S >= 1, forms per segment; 1 is greedy decoding.
      threshold: scalar or [B] [nats]; inf: one segment.
      top_k: k, tokens that may be forced; 1 is greedy decoding. More than the vocabulary: all of it.
      temperature: scalar or [B] >= 0, of the proposal [units of reward]; 0: the best.
      shortest: tokens >= 1 that a segment keeps at least, unless the response ends.

    Returns:
      Nudged. Given rng the response is determined, as under greedy decoding: log_prob is 0, kl = −log_prob_ref (whose
      mean is the −log pi_ref(y) to report beside the reward), log_norm = the policy's + log pi of the token.

    Raises:
      ValueError: arguments outside these ranges, a reward or gain over another vocabulary, a reward or gain that is
        NaN, and those of `sample`.
    """
    for name, value, least in (("candidates", candidates, 1), ("top_k", top_k, 1), ("shortest", shortest, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, found {value}")
    if rule not in ("difference", "code"):
        raise ValueError(f"rule: expected 'difference' or 'code', found {rule!r}")
    if is_concrete(temperature) and not np.all(np.asarray(temperature) >= 0):
        raise ValueError(f"temperature: expected a value >= 0, found {np.asarray(temperature)}")
    if is_concrete(threshold) and np.any(np.isnan(np.asarray(threshold))):
        raise ValueError("threshold: expected numbers, found NaN")
    if reward is None and not isinstance(gain, CheckedGain):
        raise ValueError("reward: expected a Reward beside a gain that is a plain function, found None")
    prompts = same_prompts(prompts)
    inner, judged = prompts_for(prompts, "policy"), prompts_for(prompts, "reward")
    own, reward_params = entry(params, "policy"), entry(params, "reward")
    gain_params = params.get("gain", reward_params)
    inner, eos_ids = check_request(policy, own, inner, max_new_tokens, eos_ids)
    if reward is not None:
        check_reward(reward, reward_params, judged, max_new_tokens, policy.vocab_size)
    check_reward(gain, gain_params, judged, max_new_tokens, policy.vocab_size)
    batch = prompt_index(judged).shape[0]
    arrays = {"policy": own, "reward": gain_params if reward is None else reward_params, "gain": gain_params}
    arrays |= {"candidates": jnp.asarray(candidates, jnp.int32)}
    arrays |= {"threshold": per_row(threshold, batch, name="threshold")}
    arrays |= {"temperature": per_row(temperature, batch, name="temperature")}
    plan = _Plan(max_new_tokens, eos_ids, top_k, rule, shortest)
    both = {"policy": inner, "reward": judged}
    found, bad = _nudge(policy, reward, gain, strong(arrays), rng, both, plan)
    if is_concrete(bad) and bool(bad.any()):
        raise ValueError(f"reward, gain: expected numbers, found NaN for prompts {np.flatnonzero(bad).tolist()}")
    return found


class _Plan(NamedTuple):
    steps: int
    eos_ids: tuple[int, ...]
    top_k: int
    rule: str
    shortest: int


class _Search(NamedTuple):
    """Where each row stands, all [B,...]. text: what is accepted, before the segment that is searched; best: its best
    form so far, score its reward, floor that of the greedy form, form the best's number; made: forms so far; pick: the
    next form's first token, an index of the top_k; tried [B,k]: those that were; bad: a NaN was seen; out: fields of
    `Nudged`. round []: forms that every row has made."""

    round: Array
    text: segments.Text
    best: segments.Text
    score: Array
    floor: Array
    form: Array
    made: Array
    pick: Array
    tried: Array
    bad: Array
    out: dict[str, Array]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 6))
def _nudge(
    policy: Policy, reward: Reward | None, gain: Gain, params: Params, rng: Array, prompts: Prompts, plan: _Plan
) -> tuple[Nudged, Array]:
    start, moves, proposals = jax.random.split(rng, 3)
    judged, index = prompts["reward"], prompt_index(prompts)
    batch, steps = index.shape[0], plan.steps
    rows, columns, zero = jnp.arange(batch), jnp.arange(steps), jnp.zeros(batch, jnp.int32)
    most = -(-steps // plan.shortest)  # segments
    extend = functools.partial(
        segments.extend,
        policy,
        params["policy"],
        threshold=params["threshold"],
        shortest=plan.shortest,
        eos_ids=plan.eos_ids,
    )

    def zeros(shape: Any) -> Array:
        return jnp.zeros(shape.shape, shape.dtype)

    def judge(begin: Array, text: segments.Text, choices: Array, more: Array) -> tuple[Array, Array]:
        """(reward [B] of the text, gain [B,k] of the choices at token `begin` [B]; zeros where no form follows)."""
        texts = concatenate(judged, text.tokens, columns < text.length[:, None])
        position = (texts[2] + begin).astype(jnp.int32)

        if reward is not None:
            value = at_least_float32(reward(params["reward"], *texts, index))
            scores = lambda: at_least_float32(gain(params["gain"], *texts, position, choices))  # noqa: E731
            return value, jax.lax.cond(more, scores, lambda: zeros(jax.eval_shape(scores)))
        assert isinstance(gain, CheckedGain)
        both = lambda: gain.with_reward(params["gain"], *texts, position, choices)  # noqa: E731
        one = lambda: (gain.reward(params["gain"], *texts, index), zeros(jax.eval_shape(both)[1]))  # noqa: E731
        return jax.tree.map(at_least_float32, jax.lax.cond(more, both, one))

    def propose(scores: Array, allowed: Array, current: Array, made: Array, number: Array) -> Array:
        """The index [B] that the gains [B,k] propose where `current` [B] stands; number [B] of the segment."""
        order = jnp.arange(scores.shape[1])
        stands = order == current[:, None]
        now = jnp.where(stands, scores, 0).sum(axis=1, keepdims=True)
        value = scores - now if plan.rule == "difference" else jnp.where(stands, 0, scores)

        def gumbel(*streams: Array) -> Array:
            return jax.random.gumbel(functools.reduce(jax.random.fold_in, streams, proposals), order.shape, value.dtype)

        warm = (params["temperature"] > 0)[:, None]
        tempered = value / jnp.where(warm, params["temperature"][:, None], 1) + jax.vmap(gumbel)(index, number, made)
        value = jnp.where(allowed, jnp.where(warm, tempered, value), -jnp.inf)
        return jnp.argmax(value, axis=1).astype(jnp.int32)

    def attempt(carry: _Search) -> _Search:
        """One more form in every row that is not done, of the segment that the row is at; rows whose search is over
        accept their best."""
        text, out, going = carry.text, carry.out, ~carry.text.done
        top, choices = jax.lax.top_k(text.output.log_prob, carry.tried.shape[1])
        allowed, picked = is_supported(top), jnp.arange(top.shape[1]) == carry.pick[:, None]
        found = extend(jax.random.fold_in(moves, carry.round), text, token_value(choices, carry.pick), going)
        made = carry.made + 1
        more = going & (made < params["candidates"])
        value, scores = judge(text.length, found, choices, more.any())
        lost = jnp.isnan(value) | jnp.isnan(jnp.where(allowed, scores, 0)).any(axis=1)
        first = carry.made == 0
        better = going & (first | (value > carry.score))
        best = where_rows(better, found, carry.best)
        score, floor = jnp.where(better, value, carry.score), jnp.where(first, value, carry.floor)
        form = jnp.where(better, carry.made, carry.form)
        tried = carry.tried | picked
        pick = propose(scores, allowed, carry.pick, made, out["segments"])
        over = going & (~more | jnp.take_along_axis(tried, pick[:, None], axis=1)[:, 0])
        at = jnp.where(over, out["segments"], most)
        inside = over[:, None] & (columns >= text.length[:, None]) & (columns < best.length[:, None])
        out = {
            "reward": jnp.where(over, score, out["reward"]),
            "segment": jnp.where(inside, out["segments"][:, None], out["segment"]),
            "nudged": out["nudged"] | (inside & (columns == text.length[:, None]) & (form > 0)[:, None]),
            "segments": out["segments"] + over,
            "floor": out["floor"].at[rows, at].set(floor, mode="drop"),
            "kept": out["kept"].at[rows, at].set(score, mode="drop"),
            "tokens": out["tokens"] + jnp.where(going, segments.fed(text, found), 0),
            "scored": out["scored"] + going,
            "gradients": out["gradients"] + more,
        }
        return _Search(
            carry.round + 1,
            where_rows(over, best, text),
            best,
            score,
            floor,
            form,
            jnp.where(over, 0, made),
            jnp.where(over, 0, pick),  # first the greedy form: the most probable token
            tried & ~over[:, None],
            carry.bad | (going & lost),
            out,
        )

    state, output = policy.init(params["policy"], start, prompts["policy"], steps)
    text = segments.empty(state, output, steps)
    k, no = min(plan.top_k, output.log_prob.shape[-1]), jnp.zeros(batch, bool)
    choice = jnp.zeros((batch, k), jnp.int32)
    paid = zeros(jax.eval_shape(lambda: judge(zero, text, choice, jnp.asarray(True)))[0])
    out = dict.fromkeys(("segments", "tokens", "scored", "gradients"), zero)
    out |= dict.fromkeys(("floor", "kept"), jnp.zeros((batch, most), paid.dtype))
    out |= {"reward": paid, "nudged": jnp.zeros((batch, steps), bool)}
    out |= {"segment": jnp.full((batch, steps), -1, jnp.int32)}
    tried = jnp.zeros((batch, k), bool)
    begin = _Search(jnp.zeros((), jnp.int32), text, text, paid, paid, zero, zero, zero, tried, no, out)
    # Rows are never in step: each is at its own segment and form, and none waits for another's search.
    found = jax.lax.while_loop(lambda carry: ~carry.text.done.all(), attempt, begin)
    text = found.text
    mask, ref = columns < text.length[:, None], text.log_prob_ref
    # A point mass at each token: log 1, and its KL to the base.
    completions = Completions(
        text.tokens, mask, jnp.zeros_like(ref), ref, text.log_norm, -ref, text.finished, ~text.finished
    )
    return Nudged(completions, **found.out), found.bad
