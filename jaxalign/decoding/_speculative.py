"""Speculation: a cheap draft proposes tokens, and the target verifies several of them in one pass. The responses have
the target's law, whatever the draft."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import rollout
from jaxalign._arrays import NEGATIVE, drop_weak_types, is_supported, where_rows, write
from jaxalign._blocks import Walk, accept_policy, at, light, merged, split, verify_policy, walked
from jaxalign._checks import ParamsError, entry, same_prompts
from jaxalign._parts import check_policy_argument, check_same_vocabulary, start_policy, step_policy
from jaxalign.decoding import _kl
from jaxalign.decoding.requests import (
    Decode,
    EosIds,
    Tokenizer,
    check_request,
    count,
    open_params,
    open_prompts,
    with_temperature,
)
from jaxalign.prompts import prompt_index, prompts_for
from jaxalign.shapes import LogProbs
from jaxalign.types import Array, ArrayLike, Completions, Decoded, Params, Policy, Prompts, State, StepOutput


class SpeculativeParams(NamedTuple):
    """Parameters of `speculative`; a dict of the same names is accepted."""

    target: Params
    """The target's."""
    draft: Params = None
    """The draft's; none with draft="below"."""


class SpeculativeInfo(NamedTuple):
    """How much was saved."""

    rounds: Array
    """[B], passes of the target over a block of tokens; plain decoding makes one for each token but the first."""
    drafted: Array
    """[B], tokens that the draft proposed."""
    accepted: Array
    """[B], those of them that are in the response."""
    accept_rate: Array
    """[B], accepted/drafted; 0 where nothing was drafted."""


def speculative(
    target: Policy,
    draft: Policy | Literal["below"],
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    draft_tokens: int,
    max_new_tokens: int,
    eos_ids: EosIds = None,
    temperature: ArrayLike = 1.0,
    tokenizer: Tokenizer | Decode | None = None,
) -> Decoded[SpeculativeInfo]:
    """Samples from the target with the help of a draft (arXiv 2211.17192; arXiv 2302.01318). A round draws G tokens
    from the draft, reads them with the target in one pass, accepts each in turn with probability

        min(1, pi(z|s)/d(z|s)),

    and draws the token at the first refusal from max(pi − d, 0) normalised, or, where all were accepted, one more token
    from pi. The law of the responses is that of `sample` from the target for any draft, which alone decides how many
    tokens a round makes: Σ_j Pr(the first j accepted) + 1, at most G + 1. A step is accepted with probability
    1 − TV(pi, d).

    Caches are not rewound but written once tokens are accepted; those of the draft, whose steps append, are shortened.
    A target whose parts all verify blocks in one pass saves time (`types.Policy.verify`: language models, their
    truncations, tilts by critics that score every token at once). Any other target is stepped through each block: the
    law is the same, and nothing is saved.

    Args:
      target: what is sampled from; often a tilt.
      draft: a Policy over the same tokens; "below": the policy that the target tilts, whose steps then serve both and
        whose cache is kept once.
      params: SpeculativeParams, or {"target", "draft"}.
      rng: consumed. A prompt's response depends on rng and its index alone at one batch size and width; `in_chunks`
        holds it at every other. It is not the response of `sample` with the same rng, but one of the same law.
      prompts: as `sample`; a dict {"target", "draft"} gives the two their own.
      draft_tokens: G >= 1, tokens drawn from the draft in a round.
      max_new_tokens, eos_ids, tokenizer: as `sample`.
      temperature: as `sample`, put on target and draft. At 0 a draft's token is accepted where it is the target's most
        probable one, and the responses are the greedy ones of the target.

    Returns:
      Decoded: the responses [B,T], whose log_prob, log_prob_ref, log_norm and kl are the target's, the exact KL of each
      step summed, and SpeculativeInfo.

    Raises:
      ValueError: draft_tokens < 1, two vocabularies, another number of prompts for the draft, draft="below" with a
        target that is no tilt or with a temperature, and those of `sample`.
    """
    check_policy_argument("target", target)
    number = count("draft_tokens", draft_tokens)
    prompts = same_prompts(open_prompts(prompts, tokenizer))
    required = ("target",) if draft == "below" else ("target", "draft")
    given = open_params(params, required, {"draft": None} if draft == "below" else {})
    mine = prompts_for(prompts, "target")
    mine, steps, ids = check_request(target, given["target"], rng, mine, max_new_tokens, eos_ids, path="['target']")
    if draft == "below":
        _check_below(target, given, temperature)
        assert target.below is not None
        other, theirs = target.below, None
    else:
        check_policy_argument("draft", draft)
        check_same_vocabulary("draft", target, draft)
        theirs = prompts_for(prompts, "draft")
        theirs, _, _ = check_request(draft, given["draft"], rng, theirs, steps, ids, path="['draft']")
        other, given["draft"], theirs = with_temperature(draft, given["draft"], theirs, temperature)
    target, given["target"], mine = with_temperature(target, given["target"], mine, temperature)
    both = {"target": mine, "draft": theirs}
    task = _Task(target, other, draft == "below", number, steps, ids)
    completions, info = _speculative(task, drop_weak_types(given), rng, both)
    return Decoded(completions, _kl.sum_of_steps(completions), info)


def _check_below(target: Policy, given: dict[str, Params], temperature: ArrayLike) -> None:
    if target.below is None:
        raise ValueError('draft: expected a Policy, found "below" with a target that is no tilt (policies.tilt)')
    if given["draft"] is not None:
        raise ParamsError("expected no entry 'draft' with draft=\"below\", found one")
    if not (isinstance(temperature, int | float) and temperature == 1):
        raise ValueError(f'temperature: expected 1 with draft="below", found {temperature}')


# The algebra of a round -----------------------------------------------------------------------------------------------


def log_accept(log_prob: Array, log_draft: Array) -> Array:
    """log of the ratio pi(z)/d(z) of drawn tokens, elementwise, whose minimum with 1 is the probability of accepting z;
    NEGATIVE where pi(z) = 0."""
    return jnp.where(is_supported(log_prob), log_prob - log_draft, NEGATIVE)


def accepts(uniform: Array, ratio: Array) -> Array:
    """Whether a token with this `log_accept` is accepted by a uniform number in [0, 1), elementwise. The number may be
    0, whose logarithm is below every ratio; a token of probability zero is not accepted by it either."""
    return is_supported(ratio) & (jnp.log(uniform) < ratio)


def log_residual(log_prob: LogProbs, log_draft: LogProbs) -> LogProbs:
    """log of max(pi − d, 0) [B,V], not normalised: the law of the token where one was refused. Where there is no mass,
    refusals have probability 0, and it is log pi."""
    mass = jnp.maximum(jnp.exp(log_prob) - jnp.exp(log_draft), 0)
    some = (mass > 0).any(axis=-1, keepdims=True)
    residual = jnp.where(mass > 0, jnp.log(jnp.where(mass > 0, mass, 1)), NEGATIVE)
    return jnp.where(some, residual, log_prob)


# The loop -------------------------------------------------------------------------------------------------------------


_DRAFT, _ACCEPT, _OTHER = range(3)  # what a uniform number is for


class _Carry(NamedTuple):
    round: Array
    target: State
    draft: State  # None where it is a part of the target's
    pending: Array  # [B], the last token, which neither has read; -1 at the start and in rows that have ended
    length: Array  # [B], tokens so far, the pending one included
    finished: Array  # [B]
    records: dict[str, Array]  # [B,T]
    rounds: Array  # [B]
    drafted: Array  # [B]
    accepted: Array  # [B]


class _Drafted(NamedTuple):
    """Leaves [B,S,...] with S = G + 1; the last token and the last log_prob are not drawn from."""

    tokens: Array  # [B,S], -1 behind an end or the limit
    log_prob: Array  # [B,S,V], of the draft before each
    read: Array  # [B,S], the pending token and those that both models read; -1 for none
    outputs: StepOutput | None  # of the draft after each of `read`, where the target verifies with them


class _Task(NamedTuple):
    """What a decoding is made of: static, and the same in every round."""

    target: Policy
    draft: Policy
    below: bool  # the draft is the policy that the target tilts
    draft_tokens: int
    max_new_tokens: int
    eos_ids: tuple[int, ...]


@functools.partial(jax.jit, static_argnums=0)
def _speculative(
    task: _Task, params: dict[str, Params], rng: Array, prompts: dict[str, Prompts]
) -> tuple[Completions, SpeculativeInfo]:
    begin, beside, draws, moves = jax.random.split(rng, 4)
    index, steps = prompt_index(prompts["target"]), task.max_new_tokens
    zeros = jnp.zeros_like(index, jnp.int32)
    state, first = start_policy(task.target, params["target"], begin, prompts["target"], steps)
    first = first._replace(hidden=None)
    coins = _coins(draws, index, steps)
    records = rollout.no_records((index.shape[0], steps), first.log_prob.dtype)
    carry = _Carry(zeros[0], state, None, zeros - 1, zeros, zeros > 0, records, zeros, zeros, zeros)
    if task.below:  # what the policy below said of the first token is not kept: it is drawn from the target
        first_draft = None
        token = rollout.draw(first.log_prob, coins[_OTHER, :, 0])
        carry = _written(task, carry, split(first, index.shape[0]), token[:, None], zeros, zeros < 1)
    else:
        state, output = start_policy(task.draft, params["draft"], beside, prompts["draft"], steps)
        carry, first_draft = carry._replace(draft=state), output.log_prob

    def body(carry: _Carry) -> _Carry:
        return _round(task, params, carry, coins, jax.random.fold_in(moves, carry.round), first, first_draft)

    carry = jax.lax.while_loop(lambda carry: _live(task, carry).any(), body, carry)
    completions = Completions(**carry.records, finished=carry.finished, truncated=~carry.finished)
    rate = carry.accepted / jnp.maximum(carry.drafted, 1)
    return completions, SpeculativeInfo(carry.rounds, carry.drafted, carry.accepted, rate)


def _live(task: _Task, carry: _Carry) -> Array:
    return ~carry.finished & (carry.length < task.max_new_tokens)


def _coins(rng: Array, index: Array, steps: int) -> Array:
    """Uniform numbers [purpose,B,T]: one for each purpose and position of a row, of its prompt's stream, whatever the
    other rows do. One serves twice where a draft's token was discarded, which earlier positions alone decide."""

    def one(purpose: Array, row: Array, place: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(rng, purpose), row), place)
        return jax.random.uniform(key)

    over_rows = jax.vmap(jax.vmap(one, in_axes=(None, None, 0)), in_axes=(None, 0, None))
    return jax.vmap(over_rows, in_axes=(0, None, None))(jnp.arange(3), index, jnp.arange(steps))


def _coin(coins: Array, position: Array) -> Array:
    """coins [B,T] at positions [B,...]; those past the end are arbitrary."""
    rows = jnp.arange(coins.shape[0]).reshape(-1, *(1,) * (position.ndim - 1))
    return coins[rows, jnp.minimum(position, coins.shape[1] - 1)]


def _round(
    task: _Task,
    params: dict[str, Params],
    carry: _Carry,
    coins: Array,
    rng: Array,
    first: StepOutput,
    first_draft: Array | None,
) -> _Carry:
    """Drafts, verifies, accepts. first, first_draft: what target and draft say of the first token."""
    one, two = jax.random.split(rng)
    live, fresh = _live(task, carry), carry.pending < 0
    drafted, walk = _draft(task, params, carry, coins[_DRAFT], one, first_draft)

    def in_front(tree: State) -> State:
        """Leaves [B,S,...] without their first entry in rows that have no pending token, so that a row's real tokens
        stand in front; the last entry of these rows is undefined."""
        return where_rows(fresh, jax.tree.map(lambda x: jnp.roll(x, -1, axis=1), tree), tree)

    block = in_front(drafted.read)
    walk = walk._replace(each=in_front(walk.each))
    below = (in_front(drafted.outputs), walk) if task.below else None
    outputs, proposal = verify_policy(
        task.target, params["target"], two, carry.target, jnp.maximum(block, 0), block >= 0, below
    )
    # The output before each drafted token, and the one after the last.
    before = jax.tree.map(lambda x, y: jnp.concatenate([x[:, None], y[:, :-1]], axis=1), first, _plain(outputs))
    before = where_rows(fresh, before, _plain(outputs))

    drawn, place = drafted.tokens >= 0, jnp.arange(drafted.tokens.shape[1])
    position = carry.length[:, None] + place
    ratio = log_accept(
        rollout.token_value(before.log_prob, drafted.tokens), rollout.token_value(drafted.log_prob, drafted.tokens)
    )
    passed = drawn & accepts(_coin(coins[_ACCEPT], position), ratio)
    accepted = jnp.cumprod(passed, axis=1).sum(axis=1, dtype=jnp.int32)
    drafts = drawn.sum(axis=1, dtype=jnp.int32)
    refused = accepted < drafts
    law, law_draft = at((before.log_prob, drafted.log_prob), accepted)
    law = jnp.where(refused[:, None], log_residual(law, law_draft), law)
    other = rollout.draw(law, _coin(coins[_OTHER], carry.length + accepted))
    tokens = jnp.where(place == accepted[:, None], other[:, None], drafted.tokens)
    moved = _written(task, carry, before, tokens, accepted, live)

    # What stands before the last token has been read; the last one is pending.
    kept = jnp.minimum(accepted + ~fresh, (block >= 0).sum(axis=1))
    kept = jnp.where(moved.pending >= 0, kept, 0)
    return moved._replace(
        round=carry.round + 1,
        target=accept_policy(task.target, params["target"], proposal, kept),
        draft=None if task.below else accept_policy(task.draft, params["draft"], walk, kept),
        rounds=carry.rounds + live,
        drafted=carry.drafted + drafts,
        accepted=carry.accepted + accepted,
    )


def _draft(
    task: _Task,
    params: dict[str, Params],
    carry: _Carry,
    coins: Array,
    rng: Array,
    first_draft: Array | None,
) -> tuple[_Drafted, Walk]:
    """G tokens of the draft, and its states on the way."""
    policy_params = entry(params["target"], "policy") if task.below else params["draft"]
    begin = carry.target.policy if task.below else carry.draft

    def step(
        walk: tuple[State, Array, Array], number: Array
    ) -> tuple[tuple[State, Array, Array], tuple[_Drafted, State]]:
        state, token, going = walk
        state, output = step_policy(task.draft, policy_params, jax.random.fold_in(rng, number), state, token)
        log_prob = output.log_prob
        if first_draft is not None:
            log_prob = jnp.where(((carry.pending < 0) & (number == 0))[:, None], first_draft, log_prob)
        position = carry.length + number
        going &= (number < task.draft_tokens) & (position < task.max_new_tokens)
        proposed = jnp.where(going, rollout.draw(log_prob, _coin(coins, position)), -1)
        # Nothing is read behind an end or the last token.
        going &= ~rollout.is_eos(proposed, task.eos_ids) & (position < task.max_new_tokens - 1)
        found = _Drafted(proposed, log_prob, token, output if task.below else None)
        return (state, jnp.where(going, proposed, -1), going), (found, light(state))

    walk = begin, carry.pending, _live(task, carry)
    (last, _, _), (found, each) = jax.lax.scan(step, walk, jnp.arange(task.draft_tokens + 1))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found), walked(light(begin), each, last)


def _written(task: _Task, carry: _Carry, outputs: StepOutput, tokens: Array, accepted: Array, live: Array) -> _Carry:
    """The carry with the first accepted [B] of tokens [B,S] and the one after them, unless the row has ended before it.

    outputs: of the target before each token, [B,S,...]."""
    batch, width = tokens.shape
    place, most = jnp.arange(width), task.max_new_tokens
    position = carry.length[:, None] + place
    ends = rollout.is_eos(tokens, task.eos_ids)
    ended = jnp.cumsum(ends, axis=1) - ends  # ends before each
    new = live[:, None] & (place <= accepted[:, None]) & (position < most) & (ended == 0)
    fields = split(rollout.record(merged(outputs), tokens.reshape(-1), new.reshape(-1)), batch)
    column = jnp.where(new, position, most)
    records = {
        name: write(carry.records[name], column, value.astype(carry.records[name].dtype))
        for name, value in fields.items()
    }
    length = carry.length + new.sum(axis=1, dtype=carry.length.dtype)
    finished = carry.finished | (new & ends).any(axis=1)
    moved = carry._replace(records=records, length=length, finished=finished)
    return moved._replace(pending=jnp.where(_live(task, moved), at(tokens, accepted), -1))


def _plain(outputs: StepOutput) -> StepOutput:
    return outputs._replace(hidden=None)
