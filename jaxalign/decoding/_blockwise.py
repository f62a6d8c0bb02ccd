"""Blockwise decoding: several continuations of a few tokens, of which a critic's best is kept, block after block."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import mdp, rollout
from jaxalign._arrays import at_least_float32, drop_weak_types, repeat_rows, take_rows, where_rows
from jaxalign._checks import check_same_vocabulary, entry, is_concrete, same_prompts
from jaxalign.decoding._sampling import check_request, streams, with_temperature
from jaxalign.prompts import prompt_index, prompts_for
from jaxalign.types import Array, ArrayLike, Completions, Critic, Params, Policy, Prompts, State, StepOutput

_JUDGE = 2**31 - 1  # folded into a step's key for the critic, so that the policy draws as it does in `sample`


def blockwise(
    policy: Policy,
    critic: Critic,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    candidates: int,
    block: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    temperature: ArrayLike = 1.0,
) -> Completions:
    """Blockwise best-of-K (arXiv 2310.17022): repeat {draw K continuations of M tokens from the policy,
    keep the one of highest critic score} until the kept one ends.

    A continuation is cut at its EOS, and the last block at max_new_tokens; its score is the critic's of its last token:
    V of the state that a block reaches, at EOS or the limit the score of the whole response. An increment critic scores
    by its sum. The first among equals is kept. The prompt is encoded once; the kept continuation's states, of policy
    and critic, are taken and repeated, never computed again. Any Critic will do; it steps beside the policy with the
    drawn token as its only candidate, so a map over candidates (`critics.shaped_over_candidates`) has nothing to rank.

    Args:
      params: {"policy", "critic"}; prompts may mirror it.
      rng: consumed. Candidate j of a prompt draws token t by rng, t, the prompt's index and j alone. So candidates = 1
        is `sample`, and block >= max_new_tokens draws the samples of `best_of_n`.
      candidates: K >= 1 continuations per prompt. block: M >= 1 tokens.
      max_new_tokens, eos_ids, temperature: as `sample`.

    Returns:
      Completions [B,T] of the kept tokens. log_prob, log_prob_ref, log_norm and kl are those of the policy that drew
      them, not of the selection. KL(kept‖policy) <= E⌈|y|/M⌉·(log K − (K−1)/K): `metrics.blockwise_kl_bound`.

    Raises:
      ValueError: candidates or block < 1, policy and critic over different vocabularies, a score that is NaN, and those
        of `sample`.
    """
    for name, value in (("candidates", candidates), ("block", block)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, found {value}")
    check_same_vocabulary("blockwise", policy, critic)
    prompts = same_prompts(prompts)
    inner, judged = prompts_for(prompts, "policy"), prompts_for(prompts, "critic")
    own, judge = entry(params, "policy"), entry(params, "critic")
    inner, eos_ids = check_request(policy, own, inner, max_new_tokens, eos_ids)
    if critic.check is not None:
        critic.check(judge, judged, max_new_tokens)
    tempered, own, inner = with_temperature(policy, own, inner, temperature)
    both, arrays = {"policy": inner, "critic": judged}, {"policy": own, "critic": judge}
    length = min(block, max_new_tokens)
    completions, broken = _blockwise(
        tempered, critic, drop_weak_types(arrays), rng, both, candidates, length, max_new_tokens, eos_ids
    )
    if is_concrete(broken) and bool(broken.any()):
        rows = np.flatnonzero(np.asarray(broken)).tolist()
        raise ValueError(f"critic: expected scores that are numbers, found NaN for prompts {rows}")
    return completions


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6, 7, 8))
def _blockwise(
    policy: Policy,
    critic: Critic,
    params: Params,
    rng: Array,
    prompts: Prompts,
    candidates: int,
    block: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
) -> tuple[Completions, Array]:
    """(completions, whether a score was NaN [B])."""
    start, draws = jax.random.split(rng)
    index = prompt_index(prompts)
    batch = index.shape[0]
    named = streams(index, jnp.arange(candidates, dtype=jnp.int32))
    pair = _beside(policy, critic)
    state, output = pair.init(params, start, prompts, max_new_tokens)

    def one(carry: Any) -> Any:
        """One block of every row that is not finished."""
        begin, state, finished, kept, broken = carry
        repeated = repeat_rows(state, candidates)
        ends, _, drawn = rollout.rollout(
            pair,
            params,
            draws,
            repeated,
            repeated["output"],
            steps=block,
            eos_ids=eos_ids,
            finished=jnp.repeat(finished, candidates),
            rows=named,
            last_step=False,
            begin=begin,
            limits=jnp.minimum(block, max_new_tokens - begin),
        )
        # The last tokens are not fed yet: the critic scores them all, and the winner alone steps on.
        last = jnp.maximum(mdp.last_index(drawn.mask), 0)
        token = jnp.take_along_axis(drawn.tokens, last[:, None], axis=1)[:, 0]
        key = rollout.step_key(draws, begin + block - 1)
        q, proposal = _judge(critic, params, key, ends, token)
        score = (q + ends["score"] if critic.kind == "increment" else q).reshape(batch, candidates)
        broken = broken | (jnp.isnan(score).any(axis=1) & ~finished)
        best = jnp.argmax(score, axis=1)
        taken = take_rows((ends, proposal, drawn, token), jnp.arange(batch) * candidates + best)
        ends, proposal, drawn, token = taken
        still = drawn.finished | (begin + block >= max_new_tokens)
        judge = critic.advance(params["critic"], proposal, jnp.where(still, -1, 0))
        inner, output = policy.step(params["policy"], key, ends["policy"], jnp.where(still, -1, token))
        total = jnp.take_along_axis(score, best[:, None], axis=1)[:, 0].astype(state["score"].dtype)
        state = {"policy": inner, "critic": judge, "output": output, "score": total}
        kept = {name: jax.lax.dynamic_update_slice(old, getattr(drawn, name), (0, begin)) for name, old in kept.items()}
        return begin + block, state, drawn.finished, kept, broken

    room = -(-max_new_tokens // block) * block
    dtypes = {"tokens": jnp.int32, "mask": jnp.bool_}
    dtypes |= dict.fromkeys(("log_prob", "log_prob_ref", "log_norm", "kl"), output.log_prob.dtype)
    kept = {name: jnp.zeros((batch, room), dtype) for name, dtype in dtypes.items()}
    none = jnp.zeros(batch, bool)
    carry = (jnp.zeros((), jnp.int32), state, none, kept, none)
    carry = jax.lax.while_loop(lambda c: (c[0] < max_new_tokens) & ~c[2].all(), one, carry)
    finished, kept, broken = carry[2:]
    fields = {name: value[:, :max_new_tokens] for name, value in kept.items()}
    return Completions(**fields, finished=finished, truncated=~finished), broken


def _judge(critic: Critic, params: Params, key: Array, state: State, token: Array) -> tuple[Array, State]:
    """(q [B] of one token a row, proposal)."""
    rng = jax.random.fold_in(key, _JUDGE)
    q, proposal = critic.score(params["critic"], rng, state["critic"], state["output"], jnp.maximum(token, 0)[:, None])
    return at_least_float32(q[:, 0]), proposal


def _beside(policy: Policy, critic: Critic) -> Policy:
    """The policy, unchanged, with the critic's state beside it. state {"policy", "critic", "output": the policy's, of
    which the next token is drawn, "score" [B]: sum of an increment critic's scores}."""

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        inner, output = policy.init(params["policy"], rng, prompts["policy"], max_new_tokens)
        key = jax.random.fold_in(rng, _JUDGE)
        judge = critic.init(params["critic"], key, prompts["critic"], max_new_tokens)
        score = jnp.zeros_like(at_least_float32(output.log_norm))
        return {"policy": inner, "critic": judge, "output": output, "score": score}, output

    def step(params: Params, rng: Array, state: State, token: Array) -> tuple[State, StepOutput]:
        still = token < 0
        q, proposal = _judge(critic, params, rng, state, token)
        judge = critic.advance(params["critic"], proposal, jnp.where(still, -1, 0))
        inner, output = policy.step(params["policy"], rng, state["policy"], token)
        # The output of a row that stands still is undefined, and its last token is still to be scored.
        output = where_rows(still, state["output"], output)
        score = state["score"]
        if critic.kind == "increment":
            score = jnp.where(still, score, score + q).astype(score.dtype)
        return {"policy": inner, "critic": judge, "output": output, "score": score}, output

    return Policy(init, step)
