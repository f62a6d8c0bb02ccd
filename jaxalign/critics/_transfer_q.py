"""Transfer Q*: the value of a candidate is what an aligned baseline earns when it goes on from there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign._arrays import at_least_float32, per_row, where_rows, write
from jaxalign._builders import cached
from jaxalign._checks import check_count, check_part, check_positive, fields_of
from jaxalign._parts import (
    called,
    check_array,
    check_policy_argument,
    check_reward_argument,
    start_policy,
    step_policy,
)
from jaxalign.critics._model_critics import chosen_token
from jaxalign.critics._rollouts import BaselineState, LastScores, TransferQState, draw, step_key
from jaxalign.prompts import prompt_index, prompts_for
from jaxalign.rewards import prefixes
from jaxalign.shapes import Candidates, Scores
from jaxalign.types import Array, ArrayLike, Critic, Params, Policy, Prompts, Reward, State, StepOutput, TokenBatch

_BLOCK = 256  # candidates at a time where the whole vocabulary is scored


class TransferQParams(NamedTuple):
    """Parameters of `transfer_q`."""

    reward: Params
    """Those of the reward."""
    baseline: Params = None
    """Those of the baseline; None where lookahead = 0."""
    baseline_reward: Params = None
    """Those of the baseline's reward, for indirect transfer."""
    beta: ArrayLike | None = None
    """The baseline's KL weight > 0, a scalar or one per prompt [B], for indirect transfer."""


def transfer_q(
    baseline: Policy,
    reward: Reward,
    *,
    num_samples: int,
    eos_ids: int | Sequence[int] | None = None,
    lookahead: int | None = None,
    baseline_reward: Reward | None = None,
    chunk: int | None = None,
) -> Critic:
    """Transfer Q*: q(s,z) = E_{y~pi_BL(.|sz)}[r(x,y)] by roll-outs of an aligned baseline (arXiv 2405.20495). Level.

    Direct transfer, the baseline is aligned with r: q = mean_i r(x, s·z·y_i). Indirect transfer, it is the optimum
    pi_BL ∝ pi_ref·exp(r_BL/beta) of another reward: q = Σ_i w_i·r_i with w = softmax_i((r_i − r_BL,i)/beta),
    normalised for each (s,z); consistent, with a bias of O(1/num_samples). `effective_rollouts` tells what is left of
    them. The optimum's own value V_TQ exceeds the soft value by beta·KL of the future: the tilt at the same beta is
    greedier than the optimum.

    params: TransferQParams(reward, baseline), or a dict of these names; for indirect transfer also baseline_reward and
    beta.

    Args:
      baseline: any Policy, a tilt or a DPO model too. Its prompt is encoded once; its state goes along with the text
        and is repeated for candidates and roll-outs.
      reward: of the whole text [prompt, prefix, z, roll-out]. One that keeps a prefix (`rewards.from_model`) reads
        prompt and prefix once, and then [z, roll-out] alone; others read the whole text.
      num_samples: n per candidate. Roll-out i of a candidate depends on the rng of `init`, the prompt's index, the
        position, the candidate's token and i alone: a tilt by this critic is one fixed policy for each rng.
      eos_ids: a candidate among them ends the text, which is scored as it is; None: the baseline's own.
      lookahead: tokens of a roll-out at most, after which the partial text is scored: a biased value. None: up to
        max_new_tokens; 0: q = r(sz), no baseline is run.
      baseline_reward: r_BL, which makes the transfer indirect.
      chunk: candidates at a time, which bounds memory (B·chunk·n states); all when None, 256 of a whole vocabulary.

    Returns:
      A level Critic. Its q is NaN, so that the fault surfaces, for a candidate beyond max_new_tokens, for one that the
      baseline cannot follow (outside the candidates of a tilt), and for a baseline without a distribution. Gradients
      reach the rewards' parameters and beta, not the drawn tokens.

    Raises:
      ValueError: an argument of another kind, num_samples or chunk < 1, lookahead < 0, an EOS outside the vocabulary,
        no eos_ids where the baseline has none, two vocabularies; on the host before tracing, missing params, beta <= 0,
        and what baseline and rewards check; while tracing, a reward of another shape than one number per text.
    """
    check_policy_argument("baseline", baseline)
    check_reward_argument("reward", reward)
    if baseline_reward is not None:
        check_reward_argument("baseline_reward", baseline_reward)
    if eos_ids is None:
        if baseline.eos_ids is None:
            raise ValueError("eos_ids: expected the ids that end a response, since the baseline's are unknown")
        eos_ids = baseline.eos_ids
    ends = (int(eos_ids),) if isinstance(eos_ids, int) else tuple(int(i) for i in eos_ids)
    return _transfer_q(baseline, reward, ends, num_samples, lookahead, baseline_reward, chunk)


@cached
def _transfer_q(
    baseline: Policy,
    reward: Reward,
    eos_ids: tuple[int, ...],
    num_samples: int,
    lookahead: int | None,
    baseline_reward: Reward | None,
    chunk: int | None,
) -> Critic:
    rewards = {"reward": reward} if baseline_reward is None else {"reward": reward, "baseline_reward": baseline_reward}
    kept = {name: prefixes.prefix_reward(one) for name, one in rewards.items()}
    indirect = baseline_reward is not None
    vocab_size = _check_arguments(baseline, rewards, eos_ids, num_samples, lookahead, chunk)

    required = ("baseline",) * (lookahead != 0) + ("baseline_reward", "beta") * indirect

    def fields(params: Params) -> TransferQParams:
        return fields_of(params, TransferQParams, required=required)

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> State:
        params = fields(params)
        below, draws = jax.random.split(rng)
        texts = {name: prompts_for(prompts, name) for name in rewards}
        index = prompt_index(texts["reward"])
        texts = {name: text._replace(index=index) for name, text in texts.items()}
        batch = index.shape[0]
        stream = jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(draws, i), (2,), jnp.uint32))(index)
        started = None
        if lookahead != 0:
            own = prompts_for(prompts, "baseline")
            inner, output = start_policy(baseline, params.baseline, below, own, max_new_tokens)
            started = BaselineState(inner, output.log_prob)
        return TransferQState(
            rewards=tuple(kept[name].init(getattr(params, name), text, max_new_tokens) for name, text in texts.items()),
            response=jnp.zeros((batch, max_new_tokens), jnp.int32),
            length=jnp.zeros(batch, jnp.int32),
            stream=stream,
            beta=per_row(params.beta, batch, name="beta") if indirect else None,
            baseline=started,
            scores=None,
        )

    def score(
        params: Params, rng: Array, state: TransferQState, output: StepOutput, candidates: Candidates | None
    ) -> tuple[Scores, State]:
        del rng  # the streams were fixed at init
        params = fields(params)
        batch, vocab = output.log_prob.shape
        before, known = _scored_before(state.scores, candidates, batch)
        tokens, width = candidates, chunk
        if tokens is None:
            tokens = jnp.broadcast_to(jnp.arange(vocab, dtype=jnp.int32), (batch, vocab))
            width = chunk or _BLOCK
        count = tokens.shape[1]
        width = count if width is None else min(width, count)

        def block(tokens: Array) -> tuple[Array, Array]:
            values = _roll_out(params, state, tokens, known)
            if indirect:
                assert state.beta is not None
                return _weighted(values[0], values[1], state.beta)
            mean = values[0].mean(axis=-1)
            return mean, jnp.full_like(mean, values[0].shape[-1])

        if width == count:
            q, effective = block(tokens)
        else:
            # The last block may run over the end: its surplus candidates are scored and cut.
            padded = jnp.pad(tokens, ((0, 0), (0, -count % width)), mode="edge").reshape(batch, -1, width)
            parts = jax.lax.map(block, jnp.moveaxis(padded, 1, 0))
            q, effective = (jnp.moveaxis(part, 0, 1).reshape(batch, -1)[:, :count] for part in parts)
        if before is not None:
            q, effective = where_rows(known, (before.q, before.effective), (q, effective))
        return q, state._replace(scores=LastScores(candidates, q, effective, None))

    def advance(params: Params, proposal: TransferQState, choice: Array) -> State:
        params = fields(params)
        scores, token, moves = proposal.scores, choice, choice >= 0
        if scores is not None:
            # Advanced twice without a score between, a choice is a token.
            token = chosen_token(scores.candidates if scores.unmoved is None else None, choice)
            scores = scores._replace(unmoved=(True if scores.unmoved is None else scores.unmoved) & ~moves)
        moved = proposal.baseline
        if moved is not None:
            inner, output = step_policy(baseline, params.baseline, step_key(proposal), moved.state, token)
            moved = BaselineState(inner, jnp.where(moves[:, None], output.log_prob, moved.log_prob))
        joined = []
        for (name, one), state in zip(kept.items(), proposal.rewards, strict=True):
            text, real = jnp.maximum(token, 0)[:, None, None], moves[:, None, None]
            scored = one.score(getattr(params, name), state, text, real)[1]
            joined.append(one.commit(getattr(params, name), state, scored, jnp.where(moves, 0, -1)))
        place = jnp.where(moves, proposal.length, proposal.response.shape[1])
        response = write(proposal.response, place, token)
        return proposal._replace(
            rewards=tuple(joined),
            response=response,
            length=proposal.length + moves,
            baseline=moved,
            scores=scores,
        )

    def _roll_out(params: TransferQParams, state: TransferQState, tokens: Array, known: Array) -> list[Array]:
        """The rewards [B,K,n], of each reward, of the texts that go on from candidates [B,K], in at least float32; rows
        that are `known` [B] are not rolled out, and have undefined rewards."""
        batch, count = tokens.shape
        limit = state.response.shape[1]
        steps = limit - 1 if lookahead is None else min(lookahead, limit - 1)
        n = num_samples if steps else 1
        lost = jnp.broadcast_to((state.length >= limit)[:, None, None], (batch, count, n))
        text, real = tokens[:, :, None, None], jnp.broadcast_to(~known[:, None, None, None], (batch, count, 1, 1))
        if steps:
            drawn = draw(baseline, params.baseline, state, tokens, known, n=n, steps=steps, eos_ids=eos_ids)
            each = (batch, count, n, 1)
            text = jnp.concatenate([jnp.broadcast_to(text, each), drawn.tokens], axis=-1)
            real = jnp.concatenate([jnp.broadcast_to(real, each), drawn.mask], axis=-1)
            lost |= drawn.lost
        text, real = (x.reshape(batch, count * n, -1) for x in (text, real))
        values = []
        for (name, one), prefix in zip(kept.items(), state.rewards, strict=True):
            found = one.score(getattr(params, name), prefix, text, real)[0]
            check_rewards(name, rewards[name], found, (batch, count * n))
            values.append(jnp.where(lost, jnp.nan, at_least_float32(found).reshape(batch, count, n)))
        return values

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        params = fields(params)
        for name, one in rewards.items():
            text = prompts_for(prompts, name)
            if not isinstance(text, TokenBatch):
                raise ValueError(f"prompts[{name!r}]: expected one TokenBatch, found {type(text).__name__}")
            check_reward = getattr(one, "check", None)
            if check_reward is not None:
                check_reward(getattr(params, name), text, max_new_tokens)
        if indirect:
            check_positive("beta", params.beta)
            per_row(params.beta, prompt_index(prompts_for(prompts, "reward")).shape[0], name="beta")
        if lookahead != 0:
            check_part(baseline, params, prompts, max_new_tokens, "baseline")

    return Critic(init, score, advance, "level", check, vocab_size)


def effective_rollouts(proposal: TransferQState) -> Array:
    """Gives the effective number of roll-outs behind each q of a proposal of `transfer_q`.

    It is 1/Σ w² of the weights of indirect transfer, between 1 (they have degenerated, q is one roll-out's reward) and
    n; n for direct transfer.

    Args:
      proposal: as `critic.score` gave it; the state of a tilt holds that of its last scores as `state.critic`.

    Returns:
      [B,K].

    Raises:
      ValueError: a state that has not been scored.
    """
    if proposal.scores is None:
        raise ValueError("effective_rollouts: expected a proposal of `score`, found a state that has not been scored")
    return proposal.scores.effective


def check_rewards(name: str, reward: Reward, found: Array, shape: tuple[int, ...]) -> None:
    """ValueError unless a reward gave one floating-point number per text."""
    check_array(f"transfer_q: {name} ({called(reward)})", found, shape, "one reward per text")


def _scored_before(
    scores: LastScores | None, candidates: Candidates | None, batch: int
) -> tuple[LastScores | None, Array]:
    """(the last scores, None where there are none that could hold; rows [B] for which they still hold: they did not
    move, and are asked about the same candidates)."""
    none = jnp.zeros(batch, bool)
    if scores is None or scores.unmoved is None or (candidates is None) != (scores.candidates is None):
        return None, none
    if candidates is None or scores.candidates is None:
        return scores, scores.unmoved
    if candidates.shape != scores.candidates.shape:
        return None, none
    return scores, scores.unmoved & (candidates == scores.candidates).all(axis=1)


def _weighted(reward: Array, baseline_reward: Array, beta: Array) -> tuple[Array, Array]:
    """(Σ w·r, 1/Σ w²) [B,K] of rewards [B,K,n], w = softmax((r − r_BL)/beta) over the roll-outs, beta [B]."""
    weight = jax.nn.softmax((reward - baseline_reward) / beta[:, None, None], axis=-1)
    # A response that the reward forbids (−inf) has weight 0.
    q = jnp.where(weight == 0, 0, weight * jnp.where(weight == 0, 0, reward)).sum(axis=-1)
    return q, 1 / (weight**2).sum(axis=-1)


def _check_arguments(
    baseline: Policy,
    rewards: dict[str, Reward],
    eos_ids: tuple[int, ...],
    num_samples: int,
    lookahead: int | None,
    chunk: int | None,
) -> int | None:
    """The one vocabulary of all parts, None where none has one."""
    for name, value, least in (("num_samples", num_samples, 1), ("lookahead", lookahead, 0), ("chunk", chunk, 1)):
        if value is not None or name == "num_samples":
            check_count(name, value, least=least)
    if host := [name for name, reward in rewards.items() if getattr(reward, "on_host", False)]:
        raise ValueError(
            f"transfer_q: {host[0]}: expected a reward over the baseline's vocabulary, found one that reads "
            "whole texts through its own tokenizer; decoding.best_of_n takes it"
        )
    parts = [baseline, *rewards.values()]
    sizes = sorted({size for size in (getattr(part, "vocab_size", None) for part in parts) if size is not None})
    if len(sizes) > 1:
        raise ValueError(
            f"transfer_q: expected one vocabulary of baseline and rewards, found {sizes} tokens "
            "(models.match_vocabulary cuts appended rows; rewards.from_text decodes and re-encodes)"
        )
    vocab_size = sizes[0] if sizes else None
    if any(i < 0 or (vocab_size is not None and i >= vocab_size) for i in eos_ids):
        raise ValueError(f"eos_ids: expected ids in [0, {vocab_size}), found {eos_ids}")
    return vocab_size
