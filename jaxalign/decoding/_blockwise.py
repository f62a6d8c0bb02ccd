"""Blockwise decoding: several continuations of a few tokens, of which a critic's best is kept, block after block."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import mdp, rollout
from jaxalign._arrays import at_least_float32, drop_weak_types, repeat_rows, take_rows, where_rows
from jaxalign._checks import check_below, is_concrete, same_prompts
from jaxalign._parts import (
    advance_critic,
    check_critic_argument,
    check_policy_argument,
    check_same_vocabulary,
    score_critic,
    start_critic,
    start_policy,
    step_policy,
)
from jaxalign._programs import tells_programs
from jaxalign.decoding import _kl
from jaxalign.decoding.requests import (
    POLICY,
    Decode,
    EosIds,
    Tokenizer,
    check_request,
    count,
    open_params,
    open_prompts,
    streams,
    with_temperature,
)
from jaxalign.prompts import prompt_index, prompts_for
from jaxalign.types import Array, ArrayLike, Completions, Critic, Decoded, Params, Policy, Prompts, State, StepOutput

_CRITIC = 2**31 - 1  # folded into a step's key for the critic, so that the policy draws as it does in `sample`


class BlockwiseParams(NamedTuple):
    """Parameters of `blockwise`; a dict of the same names is accepted."""

    policy: Params
    """The policy's."""
    critic: Params
    """The critic's."""


class BlockwiseInfo(NamedTuple):
    """The score and the number of blocks of each response."""

    score: Array
    """[B], the critic's of the whole response."""
    blocks: Array
    """[B], begun: ⌈|y|/block_size⌉."""


@tells_programs
def blockwise(
    policy: Policy,
    critic: Critic,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    num_samples: int,
    block_size: int,
    max_new_tokens: int,
    eos_ids: EosIds = None,
    temperature: ArrayLike = 1.0,
    tokenizer: Tokenizer | Decode | None = None,
) -> Decoded[BlockwiseInfo]:
    """Repeats {draw K continuations of M tokens from the policy, keep the one of highest critic score} until the kept
    one ends: blockwise best-of-K (arXiv 2310.17022).

    A continuation is cut at its EOS, and the last block at max_new_tokens; its score is the critic's of its last token:
    V of the state that a block reaches, at EOS or the limit the score of the whole response. An increment critic scores
    by its sum. The first among equals is kept. The prompt is encoded once; the kept continuation's states, of policy
    and critic, are taken and repeated, never computed again. Any Critic will do; it scores the drawn token as its only
    candidate, so a map over candidates (`critics.shaped_over_candidates`) has nothing to rank.

    Args:
      critic: any Critic of the policy's vocabulary; its score chooses.
      params: BlockwiseParams, or {"policy", "critic"}; prompts may mirror it.
      rng: consumed. Candidate j of a prompt draws token t by rng, t, the prompt's index and j alone. So num_samples = 1
        is `sample`, and block_size >= max_new_tokens draws the samples of `best_of_n`.
      num_samples: K >= 1 continuations per prompt.
      block_size: M >= 1 tokens; more than max_new_tokens: as many.
      policy, prompts, max_new_tokens, eos_ids, temperature, tokenizer: as `sample`.

    Returns:
      Decoded: the kept tokens [B,T], whose log_prob, log_prob_ref, log_norm and kl are those of the policy that drew
      them, not of the selection; the bound KL(kept‖policy) <= E⌈|y|/M⌉·(log K − (K−1)/K), for each response
      (`metrics.blockwise_kl_bound`); BlockwiseInfo.

    Raises:
      ValueError: num_samples or block_size < 1, policy and critic over different vocabularies, scores of another shape
        than [B,K], a score that is NaN, and those of `sample`.
    """
    n, block_size = count("num_samples", num_samples), count("block_size", block_size)
    check_policy_argument("policy", policy)
    check_critic_argument("critic", critic)
    check_same_vocabulary("blockwise", policy, critic)
    given = open_params(params, BlockwiseParams._fields)
    prompts = same_prompts(open_prompts(prompts, tokenizer))
    inner, scored = prompts_for(prompts, "policy"), prompts_for(prompts, "critic")
    own = given["policy"]
    inner, max_new_tokens, ids = check_request(policy, own, rng, inner, max_new_tokens, eos_ids, path=POLICY)
    check_below(critic, given["critic"], scored, max_new_tokens, "['critic']")
    tempered, policy_params, inner = with_temperature(policy, given["policy"], inner, temperature)
    both, arrays = {"policy": inner, "critic": scored}, {"policy": policy_params, "critic": given["critic"]}
    found: Decoded[BlockwiseInfo]
    found, broken = _blockwise(
        tempered,
        critic,
        drop_weak_types(arrays),
        rng,
        both,
        n,
        min(block_size, max_new_tokens),
        max_new_tokens,
        ids,
        tempered is not policy,
    )
    if is_concrete(broken) and bool(broken.any()):
        rows = np.flatnonzero(np.asarray(broken)).tolist()
        raise ValueError(f"critic: expected scores that are numbers, found NaN for prompts {rows}")
    return found


class Pair(NamedTuple):
    """The state of a policy and the critic that scores its tokens."""

    policy: State
    critic: State
    output: StepOutput  # the policy's, of which the next token is drawn
    score: Array  # [B], the sum of an increment critic's scores


class _Carry(NamedTuple):
    begin: Array  # tokens before this block
    state: Pair
    finished: Array  # [B]
    kept: dict[str, Array]  # fields of Completions, each [B,T]
    broken: Array  # [B], a score was NaN
    total: Array  # [B], the score of what is kept


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6, 7, 8, 9))
def _blockwise(
    policy: Policy,
    critic: Critic,
    params: Params,
    rng: Array,
    prompts: Prompts,
    n: int,
    block: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    tempered: bool,
) -> tuple[Decoded[BlockwiseInfo], Array]:
    """(what was decoded, whether a score was NaN [B])."""
    start, draws = jax.random.split(rng)
    index = prompt_index(prompts)
    batch = index.shape[0]
    rows = streams(index, jnp.arange(n, dtype=jnp.int32))
    pair = paired(policy, critic)
    state, output = pair.init(params, start, prompts, max_new_tokens)

    def one(carry: _Carry) -> _Carry:
        """One block of every row that is not finished."""
        begin, finished = carry.begin, carry.finished
        repeated = repeat_rows(carry.state, n)
        rolled = rollout.rollout(
            pair,
            params,
            draws,
            repeated,
            repeated.output,
            steps=block,
            eos_ids=eos_ids,
            finished=jnp.repeat(finished, n),
            rows=rows,
            last_step=False,
            begin=begin,
            limits=jnp.minimum(block, max_new_tokens - begin),
        )
        ends, drawn = rolled.state, rolled.completions
        # The last tokens are not fed yet: the critic scores them all, and the winner alone steps on.
        last = jnp.maximum(mdp.last_index(drawn.mask), 0)
        token = jnp.take_along_axis(drawn.tokens, last[:, None], axis=1)[:, 0]
        key = rollout.step_key(draws, begin + block - 1)
        q, proposal = score_token(critic, params, key, ends, token)
        score = (q + ends.score if critic.kind == "increment" else q).reshape(batch, n)
        broken = carry.broken | (jnp.isnan(score).any(axis=1) & ~finished)
        best = jnp.argmax(score, axis=1)
        taken = take_rows((ends, proposal, drawn, token), jnp.arange(batch) * n + best)
        ends, proposal, drawn, token = taken
        frozen = drawn.finished | (begin + block >= max_new_tokens)
        choice = jnp.where(frozen, -1, 0)
        scorer = advance_critic(critic, params["critic"], proposal, choice, before=carry.state.critic)
        inner, output = step_policy(policy, params["policy"], key, ends.policy, jnp.where(frozen, -1, token))
        total = jnp.take_along_axis(score, best[:, None], axis=1)[:, 0].astype(carry.state.score.dtype)
        kept = {
            name: jax.lax.dynamic_update_slice(old, getattr(drawn, name), (0, begin))
            for name, old in carry.kept.items()
        }
        return _Carry(
            begin + block,
            Pair(inner, scorer, output, total),
            drawn.finished,
            kept,
            broken,
            jnp.where(finished, carry.total, total),
        )

    room = -(-max_new_tokens // block) * block
    kept = rollout.no_records((batch, room), output.log_prob.dtype)
    none = jnp.zeros(batch, bool)
    carry = _Carry(jnp.zeros((), jnp.int32), state, none, kept, none, state.score)
    carry = jax.lax.while_loop(lambda c: (c.begin < max_new_tokens) & ~c.finished.all(), one, carry)
    fields = {name: value[:, :max_new_tokens] for name, value in carry.kept.items()}
    completions = Completions(**fields, finished=carry.finished, truncated=~carry.finished)
    blocks = -(-completions.mask.sum(axis=1) // block)
    kl = _kl.blockwise_bound(blocks, n, output.log_prob.dtype, tempered=tempered)
    return Decoded(completions, kl, BlockwiseInfo(carry.total, blocks)), carry.broken


def score_token(critic: Critic, params: Params, key: Array, state: Pair, token: Array) -> tuple[Array, State]:
    """(q [B] of one token a row, proposal)."""
    rng = jax.random.fold_in(key, _CRITIC)
    q, proposal = score_critic(
        critic, params["critic"], rng, state.critic, state.output, jnp.maximum(token, 0)[:, None]
    )
    return at_least_float32(q[:, 0]), proposal


def paired(policy: Policy, critic: Critic) -> Policy:
    """The policy, unchanged, in one state with the critic's."""

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[Pair, StepOutput]:
        inner, output = start_policy(policy, params["policy"], rng, prompts["policy"], max_new_tokens)
        key = jax.random.fold_in(rng, _CRITIC)
        scorer = start_critic(critic, params["critic"], key, prompts["critic"], max_new_tokens)
        return Pair(inner, scorer, output, jnp.zeros_like(at_least_float32(output.log_norm))), output

    def step(params: Params, rng: Array, state: Pair, token: Array) -> tuple[Pair, StepOutput]:
        frozen = token < 0
        q, proposal = score_token(critic, params, rng, state, token)
        choice = jnp.where(frozen, -1, 0)
        scorer = advance_critic(critic, params["critic"], proposal, choice, before=state.critic)
        inner, output = step_policy(policy, params["policy"], rng, state.policy, token)
        # The output of a frozen row is undefined, and its last token is still to be scored.
        output = where_rows(frozen, state.output, output)
        score = state.score
        if critic.kind == "increment":
            score = jnp.where(frozen, score, score + q).astype(score.dtype)
        return Pair(inner, scorer, output, score), output

    return Policy(init, step)
