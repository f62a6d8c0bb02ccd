"""Beam search with a critic: several kept texts per prompt, each continued by several blocks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import mdp, rewards, rollout
from jaxalign._arrays import drop_weak_types, repeat_rows, take_rows, where_rows
from jaxalign._checks import check_below, is_concrete, same_prompts
from jaxalign._parts import (
    advance_critic,
    check_critic_argument,
    check_policy_argument,
    check_same_vocabulary,
    step_policy,
)
from jaxalign._programs import tells_programs
from jaxalign.decoding import _kl
from jaxalign.decoding._blockwise import Pair, paired, score_token
from jaxalign.decoding.requests import (
    POLICY,
    Decode,
    EosIds,
    Tokenizer,
    check_request,
    check_reward,
    check_scores,
    count,
    open_params,
    open_prompts,
    open_reward,
    optional_reward,
    score_completions,
    streams,
    with_temperature,
)
from jaxalign.prompts import prompt_index, prompts_for
from jaxalign.types import (
    Array,
    ArrayLike,
    Completions,
    Critic,
    Decoded,
    Params,
    Policy,
    Prompts,
    Reward,
    StepOutput,
    TextReward,
)


class BeamParams(NamedTuple):
    """Parameters of `beam`; a dict of the same names is accepted."""

    policy: Params
    """The policy's."""
    critic: Params
    """The critic's."""
    reward: Params = None
    """The reward's, where one chooses among the beams at the end."""


class BeamInfo(NamedTuple):
    """What the search kept at its end, and by what it chose."""

    samples: Completions
    """[B,G·W,T], the beams, those of a group side by side."""
    score: Array
    """[B,G·W], the critic's of each whole response."""
    reward: Array | None
    """[B,G·W] of each, by which the response was chosen; None where the score chose."""
    blocks: Array
    """[B,G·W], blocks that each response was made of."""


@tells_programs
def beam(
    policy: Policy,
    critic: Critic,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    width: int,
    num_samples: int,
    block_size: int,
    boundary: Sequence[int] = (),
    groups: int = 1,
    reward: Reward | TextReward | None = None,
    max_new_tokens: int,
    eos_ids: EosIds = None,
    temperature: ArrayLike = 1.0,
    tokenizer: Tokenizer | Decode | None = None,
) -> Decoded[BeamInfo]:
    """Repeats {draw N continuations of each of W beams, keep the W of highest critic score} until the beams end: beam
    search with a process reward (arXiv 2408.03314); several groups are diverse verifier tree search.

    A prompt begins with W·N continuations. A continuation ends after block_size tokens, at a token of `boundary` (a
    newline, for a critic that reads steps of a derivation), at its EOS or at the limit; its score is the critic's of
    its last token, as in `blockwise`, which is this search with one beam. A beam that has ended stands once among those
    that are compared, by the score of its whole response, and is continued no further. The first among equals are kept.
    Groups search side by side and do not compare; the best of all beams at the end is the response.

    A step costs G·W·N rows of policy and critic. States are taken and repeated, never computed again.

    Args:
      critic: any Critic of the policy's vocabulary that scores a partial text by itself.
      params: BeamParams, or {"policy", "critic"} and with a reward {"reward"}; prompts may mirror it.
      rng: consumed. Continuation j of group g draws by rng, the token's place in its block, the number of blocks before
        it, the prompt's index and its number among G·W·N alone: a group does not change the others.
      width: W >= 1 beams a group.
      num_samples: N >= 1 continuations of each beam.
      block_size: M >= 1, tokens of a continuation at most.
      boundary: ids of tokens that end a continuation; () for none.
      groups: G >= 1 searches of each prompt.
      reward: chooses among the G·W responses at the end; None: the critic's score does.
      policy, prompts, max_new_tokens, eos_ids, temperature, tokenizer: as `sample`.

    Returns:
      Decoded: the chosen response [B,T], whose log_prob, log_prob_ref, log_norm and kl are those of the policy that
      drew it, not of the selection; the bound KL(chosen‖policy) <= E[log(G·W) + b·log N], b the blocks of the response
      (for one beam in one group that of `blockwise`); BeamInfo.

    Raises:
      ValueError: counts below 1, boundary ids outside the vocabulary, policy and critic over different vocabularies,
        scores of another shape than [B,K], a score or reward that is NaN, and those of `sample`.
    """
    sizes = {"width": width, "num_samples": num_samples, "block_size": block_size, "groups": groups}
    w, n, block, g = (count(name, value) for name, value in sizes.items())
    check_policy_argument("policy", policy)
    check_critic_argument("critic", critic)
    check_same_vocabulary("beam", policy, critic)
    chooser = None if reward is None else open_reward(reward, tokenizer)
    optional = {"reward": None} if reward is None else optional_reward(reward)
    given = open_params(params, ("policy", "critic", *(() if optional else ("reward",))), optional)
    prompts = same_prompts(open_prompts(prompts, tokenizer))
    inner, scored = prompts_for(prompts, "policy"), prompts_for(prompts, "critic")
    own = given["policy"]
    inner, max_new_tokens, ids = check_request(policy, own, rng, inner, max_new_tokens, eos_ids, path=POLICY)
    check_below(critic, given["critic"], scored, max_new_tokens, "['critic']")
    ends = _boundary(policy, boundary)
    both = {"policy": inner, "critic": scored}
    if chooser is not None:
        if rewards.on_host(chooser):
            raise ValueError("reward: expected one over the policy's vocabulary, found one that reads whole texts")
        both["reward"] = prompts_for(prompts, "reward")
        check_reward(chooser, given["reward"], both["reward"], max_new_tokens, policy.vocab_size)
    tempered, policy_params, both["policy"] = with_temperature(policy, own, inner, temperature)
    arrays = {"policy": policy_params, "critic": given["critic"], "reward": given["reward"]}
    found: Decoded[BeamInfo]
    found, broken = _beam(
        tempered,
        critic,
        chooser,
        drop_weak_types(arrays),
        rng,
        both,
        _Sizes(g, w, n, min(block, max_new_tokens), max_new_tokens),
        ids,
        ends,
        tempered is not policy,
    )
    if is_concrete(broken) and bool(broken.any()):
        rows = np.flatnonzero(np.asarray(broken)).tolist()
        raise ValueError(f"critic: expected scores that are numbers, found NaN for prompts {rows}")
    if found.info.reward is not None:
        check_scores(found.info.reward)
    return found


def _boundary(policy: Policy, boundary: Sequence[int]) -> tuple[int, ...]:
    if isinstance(boundary, str) or np.ndim(boundary) != 1:
        raise ValueError(f"boundary: expected a sequence of ids, found {boundary!r}")
    ids = tuple(count("boundary", i, least=-(2**62)) for i in boundary)
    if any(i < 0 or (policy.vocab_size is not None and i >= policy.vocab_size) for i in ids):
        raise ValueError(f"boundary: expected ids in [0, {policy.vocab_size}), found {ids}")
    return ids


class _Sizes(NamedTuple):
    groups: int
    width: int
    samples: int
    block: int
    tokens: int


class _Carry(NamedTuple):
    """The beams, of R = B·G·W rows."""

    number: Array  # blocks so far
    state: Pair
    length: Array  # [R], tokens so far
    finished: Array  # [R], by an EOS
    done: Array  # [R], finished or at the limit
    kept: dict[str, Array]  # fields of Completions, each [R,T+M]
    total: Array  # [R], the score of the text so far
    blocks: Array  # [R]
    broken: Array  # [B], a score was NaN


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 6, 7, 8, 9))
def _beam(
    policy: Policy,
    critic: Critic,
    reward: Reward | None,
    params: Params,
    rng: Array,
    prompts: Prompts,
    sizes: _Sizes,
    eos_ids: tuple[int, ...],
    boundary: tuple[int, ...],
    tempered: bool,
) -> tuple[Decoded[BeamInfo], Array]:
    """(what was decoded, whether a score was NaN [B])."""
    start, draws = jax.random.split(rng)
    index = prompt_index(prompts)
    batch, beams = index.shape[0], sizes.groups * sizes.width
    rows = streams(index, jnp.arange(beams * sizes.samples, dtype=jnp.int32))
    copy = jnp.tile(jnp.arange(sizes.samples) > 0, batch * beams)  # all but the first continuation of a beam
    pair = paired(policy, critic)
    fed = _fed(pair)
    state, output = pair.init(params, start, prompts, sizes.tokens)
    state = repeat_rows(state, beams)

    def one(carry: _Carry) -> _Carry:
        """One block of every beam that is not done."""
        repeated, length, done, kept, before, blocks = repeat_rows(
            (carry.state, carry.length, carry.done, carry.kept, carry.total, carry.blocks), sizes.samples
        )
        begin = carry.number * sizes.block
        limits = jnp.minimum(sizes.block, sizes.tokens - length)
        rolled = rollout.rollout(
            fed,
            params,
            draws,
            _Fed(repeated, limits - 1),
            repeated.output,
            steps=sizes.block,
            eos_ids=(*eos_ids, *boundary),
            finished=done,
            rows=rows,
            last_step=False,
            begin=begin,
            limits=limits,
        )
        ends, drawn = rolled.state.pair, rolled.completions
        # The last tokens are not fed yet: the critic scores them all, and those that are kept step on.
        last = jnp.maximum(mdp.last_index(drawn.mask), 0)
        token = jnp.take_along_axis(drawn.tokens, last[:, None], axis=1)[:, 0]
        key = rollout.step_key(draws, begin + sizes.block - 1)
        q, proposal = score_token(critic, params, key, ends, token)
        score = (q + ends.score if critic.kind == "increment" else q).astype(before.dtype)
        score = jnp.where(done, before, score)
        broken = carry.broken | (jnp.isnan(score) & ~done).reshape(batch, -1).any(axis=1)
        # What is past a row's mask is 0, as all of `kept` is past its length.
        kept = {name: _write(old, getattr(drawn, name), length) for name, old in kept.items()}
        length = length + drawn.mask.sum(axis=1)
        finished = jnp.repeat(carry.finished, sizes.samples) | (~done & rollout.is_eos(token, eos_ids))
        blocks = blocks + ~done
        chosen = _best(score, done & copy, batch * sizes.groups, sizes.width)
        taken = take_rows((ends, proposal, token, length, finished, kept, score, blocks), chosen)
        ends, proposal, token, length, finished, kept, score, blocks = taken
        frozen = finished | (length >= sizes.tokens)
        scorer = advance_critic(critic, params["critic"], proposal, jnp.where(frozen, -1, 0), before=carry.state.critic)
        inner, output = step_policy(policy, params["policy"], key, ends.policy, jnp.where(frozen, -1, token))
        state = Pair(inner, scorer, where_rows(frozen, ends.output, output), score)
        return _Carry(carry.number + 1, state, length, finished, frozen, kept, score, blocks, broken)

    room = sizes.tokens + sizes.block
    kept = rollout.no_records((batch * beams, room), output.log_prob.dtype)
    zero = jnp.zeros(batch * beams, jnp.int32)
    carry = _Carry(
        jnp.zeros((), jnp.int32), state, zero, zero > 0, zero > 0, kept, state.score, zero, jnp.zeros(batch, bool)
    )
    carry = jax.lax.while_loop(lambda c: ~c.done.all(), one, carry)
    fields = {name: value[:, : sizes.tokens] for name, value in carry.kept.items()}
    drawn = Completions(**fields, finished=carry.finished, truncated=~carry.finished)
    each: Any = jax.tree.map(lambda x: x.reshape((batch, beams, *x.shape[1:])), (drawn, carry.total, carry.blocks))
    samples, score, blocks = each
    values = None
    if reward is not None:
        values = score_completions(reward, params["reward"], repeat_rows(prompts["reward"], beams), drawn)
        values = values.reshape(batch, beams)
    pick = jnp.argmax(score if values is None else values, axis=1)
    best: Completions = jax.tree.map(lambda x: x[jnp.arange(batch), pick], samples)
    used = jnp.take_along_axis(blocks, pick[:, None], axis=1)[:, 0]
    if beams == 1:
        kl = _kl.blockwise_bound(used, sizes.samples, output.log_prob.dtype, tempered=tempered)
    else:
        kl = _kl.beam_bound(used, beams, sizes.samples, output.log_prob.dtype, tempered=tempered)
    return Decoded(best, kl, BeamInfo(samples, score, values, blocks)), carry.broken


class _Fed(NamedTuple):
    pair: Pair
    left: Array  # tokens that are still fed


def _fed(pair: Policy) -> Policy:
    """The pair, which is not fed the last token of a block: rows have blocks of their own lengths, and a row that is at
    its limit before the others would step."""

    def step(params: Params, rng: Array, state: _Fed, token: Array) -> tuple[_Fed, StepOutput]:
        moved, output = pair.step(params, rng, state.pair, jnp.where(state.left > 0, token, -1))
        return _Fed(moved, state.left - (token >= 0)), output

    return pair._replace(step=step)


def _write(old: Array, new: Array, at: Array) -> Array:
    """old [R,L] with new [R,M] from column at [R] on."""
    written: Array = jax.vmap(lambda row, part, i: jax.lax.dynamic_update_slice(row, part, (i,)))(old, new, at)
    return written


def _best(score: Array, copy: Array, searches: int, width: int) -> Array:
    """The rows [searches·width] of highest score of each search, in their order; the first among equals, and copies of
    one text after all others."""
    score, copy = score.reshape(searches, -1), copy.reshape(searches, -1)
    order = jnp.lexsort((-score, copy), axis=-1)[:, :width]
    return (jnp.sort(order, axis=1) + score.shape[1] * jnp.arange(searches)[:, None]).reshape(-1)
