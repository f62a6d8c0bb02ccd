"""The loop of GGRO: forms of a segment, the best of which is accepted, in all rows at once."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign._arrays import is_supported, where_rows
from jaxalign.decoding import _segments
from jaxalign.decoding._ggro_scores import Gain, judge_of
from jaxalign.prompts import prompt_index
from jaxalign.rollout import token_value
from jaxalign.types import Array, Completions, Params, Policy, Prompts, Reward, State


class Nudged(NamedTuple):
    """completions: Completions [B,T]; reward [B] of each; segment [B,T]: the number of the segment of each token, −1
    after the end; nudged [B,T]: True where a token was forced; segments [B]; floor, kept [B,M]: of each segment, the
    reward with its greedy form and with the form that was kept (0 beyond the last).

    Costs of each row, [B]: tokens: policy steps, of all candidates; scored: reward passes; gradients: gain passes. A
    batch judges its forms in rounds, each of at least half of the rows that are not done; the others write on."""

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


class Plan(NamedTuple):
    steps: int
    eos_ids: tuple[int, ...]
    top_k: int
    rule: str
    shortest: int


class _State(NamedTuple):
    """Where each row stands, all [B,...]. text: what is accepted, before the segment that is searched, and judge the
    judge's state there; found: the form that is being written, token its next one to feed (−1: it was judged); best:
    its best form so far, with the judge's proposal, score its reward, floor that of the greedy form, form the best's
    number; made: forms so far; pick: the next form's first token, an index of the top_k; tried [B,k]: those that were;
    bad: a NaN was seen; out: fields of `Nudged`. round []: number of the attempt."""

    round: Array
    text: _segments.Text
    judge: State
    found: _segments.Text
    token: Array
    best: _segments.Text
    proposal: State
    score: Array
    floor: Array
    form: Array
    made: Array
    pick: Array
    tried: Array
    bad: Array
    out: dict[str, Array]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 6))
def search(
    policy: Policy, reward: Reward | None, gain: Gain, params: Params, rng: Array, prompts: Prompts, plan: Plan
) -> tuple[Nudged, Array]:
    start, moves, proposals = jax.random.split(rng, 3)
    index = prompt_index(prompts)
    batch, steps = index.shape[0], plan.steps
    rows, columns, zero = jnp.arange(batch), jnp.arange(steps), jnp.zeros(batch, jnp.int32)
    most = -(-steps // plan.shortest)  # segments
    judge = judge_of(reward, gain)
    rules = _segments.Rules(params["threshold"], plan.shortest, plan.eos_ids)

    def read(text: _segments.Text, found: _segments.Text) -> tuple[Array, Array]:
        """The last segment of `found`, which begins where `text` ends: (tokens [B,T], mask [B,T])."""
        places = jnp.minimum(text.length[:, None] + columns, steps - 1)
        return jnp.take_along_axis(found.tokens, places, axis=1), columns < (found.length - text.length)[:, None]

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

    def attempt(carry: _State) -> _State:
        """Writes until half of the rows have a form, and judges those; rows whose search is over accept their best."""
        text, out, going = carry.text, carry.out, ~carry.text.done
        top, choices = jax.lax.top_k(text.output.log_prob, carry.tried.shape[1])
        allowed, picked = is_supported(top), jnp.arange(top.shape[1]) == carry.pick[:, None]
        fresh = carry.token < 0
        begun, token = rules.write(text, text.length, token_value(choices, carry.pick), going & fresh)
        found, token = _segments.proceed(
            policy,
            params["policy"],
            jax.random.fold_in(moves, carry.round),
            where_rows(fresh, begun, carry.found),
            text.length,
            jnp.where(fresh, token, carry.token),
            rules,
            unfinished=going.sum() // 2,
        )
        ready = going & (token < 0)
        made = carry.made + ready
        more = ready & (made < params["candidates"])
        segment, real = read(text, found)
        value, scores, proposal = judge.score(params, carry.judge, segment, real & ready[:, None], choices, more.any())
        lost = jnp.isnan(value) | jnp.isnan(jnp.where(allowed, scores, 0)).any(axis=1)
        first = carry.made == 0
        better = ready & (first | (value > carry.score))
        best, proposal = where_rows(better, (found, proposal), (carry.best, carry.proposal))
        score, floor = jnp.where(better, value, carry.score), jnp.where(ready & first, value, carry.floor)
        form = jnp.where(better, carry.made, carry.form)
        tried = carry.tried | (picked & ready[:, None])
        pick = jnp.where(ready, propose(scores, allowed, carry.pick, made, out["segments"]), carry.pick)
        over = ready & (~more | jnp.take_along_axis(tried, pick[:, None], axis=1)[:, 0])
        at = jnp.where(over, out["segments"], most)
        inside = over[:, None] & (columns >= text.length[:, None]) & (columns < best.length[:, None])
        out = {
            "reward": jnp.where(over, score, out["reward"]),
            "segment": jnp.where(inside, out["segments"][:, None], out["segment"]),
            "nudged": out["nudged"] | (inside & (columns == text.length[:, None]) & (form > 0)[:, None]),
            "segments": out["segments"] + over,
            "floor": out["floor"].at[rows, at].set(floor, mode="drop"),
            "kept": out["kept"].at[rows, at].set(score, mode="drop"),
            "tokens": out["tokens"] + jnp.where(ready, _segments.fed(text, found), 0),
            "scored": out["scored"] + ready,
            "gradients": out["gradients"] + more,
        }
        return _State(
            carry.round + 1,
            where_rows(over, best, text),
            judge.commit(params, carry.judge, proposal, jnp.where(over, 0, -1)),
            found,
            token,
            best,
            proposal,
            score,
            floor,
            form,
            jnp.where(over, 0, made),
            jnp.where(over, 0, pick),  # first the greedy form: the most probable token
            tried & ~over[:, None],
            carry.bad | (ready & lost),
            out,
        )

    state, output = policy.init(params["policy"], start, prompts["policy"], steps)
    text = _segments.empty(state, output, steps)
    k, no = min(plan.top_k, output.log_prob.shape[-1]), jnp.zeros(batch, bool)
    choice = jnp.zeros((batch, k), jnp.int32)
    judged = judge.init(params, prompts["reward"], steps)
    kinds = jax.eval_shape(judge.score, params, judged, *read(text, text), choice, jnp.asarray(True))
    paid, _, proposal = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), kinds)
    out = dict.fromkeys(("segments", "tokens", "scored", "gradients"), zero)
    out |= dict.fromkeys(("floor", "kept"), jnp.zeros((batch, most), paid.dtype))
    out |= {"reward": paid, "nudged": jnp.zeros((batch, steps), bool)}
    out |= {"segment": jnp.full((batch, steps), -1, jnp.int32)}
    tried = jnp.zeros((batch, k), bool)
    begin = _State(
        jnp.zeros((), jnp.int32),
        text,
        judged,
        text,
        zero - 1,
        text,
        proposal,
        paid,
        paid,
        zero,
        zero,
        zero,
        tried,
        no,
        out,
    )
    # Rows are never in step: each is at its own token of its own form, and none waits for another's search.
    found = jax.lax.while_loop(lambda carry: ~carry.text.done.all(), attempt, begin)
    text = found.text
    mask, ref = columns < text.length[:, None], text.log_prob_ref
    # A point mass at each token: log 1, and its KL to the base.
    completions = Completions(
        text.tokens, mask, jnp.zeros_like(ref), ref, text.log_norm, -ref, text.finished, ~text.finished
    )
    return Nudged(completions, **found.out), found.bad
