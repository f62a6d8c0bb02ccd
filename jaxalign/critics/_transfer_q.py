"""Transfer Q*: the value of a candidate is what an aligned baseline earns when it goes on from there."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxalign._arrays import at_least_float32, per_row, where_rows
from jaxalign._checks import check_part, check_positive, entry
from jaxalign.critics._rollouts import draw, step_key
from jaxalign.prompts import prompt_index, prompts_for
from jaxalign.rewards import prefixes
from jaxalign.types import Array, Critic, Params, Policy, Prompts, Reward, State, StepOutput, TokenBatch

_BLOCK = 256  # candidates at a time where the whole vocabulary is scored
_SCORES = ("candidates", "q", "effective", "still")  # of the last candidates; `still` [B]: the row did not move since


def transfer_q(
    baseline: Policy,
    reward: Reward,
    *,
    eos_ids: tuple[int, ...],
    rollouts: int,
    lookahead: int | None = None,
    baseline_reward: Reward | None = None,
    chunk: int | None = None,
) -> Critic:
    """Transfer Q*: q(s,z) = E_{y~pi_BL(.|sz)}[r(x,y)] by roll-outs of an aligned baseline (arXiv 2405.20495). Level.

    Direct transfer, the baseline is aligned with r: q = mean_i r(x, s·z·y_i). Indirect transfer, it is the optimum
    pi_BL ∝ pi_ref·exp(r_BL/beta) of another reward: q = Σ_i w_i·r_i with w = softmax_i((r_i − r_BL,i)/beta),
    normalised for each (s,z); consistent, with a bias of O(1/rollouts). `effective_rollouts` tells what is left of
    them. The optimum's own value V_TQ exceeds the soft value by beta·KL of the future: the tilt at the same beta is
    greedier than the optimum.

    params {"baseline", "reward"}; for indirect transfer also {"baseline_reward", "beta": scalar or [B], > 0}.

    Args:
      baseline: any Policy, a tilt or a DPO model too. Its prompt is encoded once; its state goes along with the text
        and is repeated for candidates and roll-outs.
      reward: of the whole text [prompt, prefix, z, roll-out]. One that keeps a prefix (`rewards.from_model`) reads
        prompt and prefix once, and then [z, roll-out] alone; others read the whole text.
      eos_ids: a candidate among them ends the text, which is scored as it is.
      rollouts: n per candidate. Roll-out i of a candidate depends on the rng of `init`, the prompt's index, the
        position, the candidate's token and i alone: a tilt by this critic is one fixed policy for each rng.
      lookahead: tokens of a roll-out at most, after which the partial text is scored: a biased value. None: up to
        max_new_tokens; 0: q = r(sz), no baseline is run.
      baseline_reward: r_BL, which makes the transfer indirect.
      chunk: candidates at a time, which bounds memory (B·chunk·n states); all when None, 256 of a whole vocabulary.

    NaN, so that it shows: a candidate beyond max_new_tokens, one that the baseline cannot follow (outside the
    candidates of a tilt), and a baseline without a distribution. Gradients reach the rewards' parameters and beta, not
    the drawn tokens.

    Raises:
      ValueError: rollouts or chunk < 1, lookahead < 0, an EOS outside the vocabulary, two vocabularies; on the host
        before tracing, missing params, beta <= 0, and what baseline and rewards check.
    """
    eos_ids = tuple(int(i) for i in eos_ids)
    rewards = {"reward": reward} if baseline_reward is None else {"reward": reward, "baseline_reward": baseline_reward}
    kept = {name: prefixes.prefix_reward(judge) for name, judge in rewards.items()}
    indirect = baseline_reward is not None
    vocab_size = _check_arguments(baseline, rewards, eos_ids, rollouts, lookahead, chunk)

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> State:
        below, draws = jax.random.split(rng)
        texts = {name: prompts_for(prompts, name) for name in rewards}
        index = prompt_index(texts["reward"])
        texts = {name: text._replace(index=index) for name, text in texts.items()}
        batch = index.shape[0]
        stream = jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(draws, i), (2,), jnp.uint32))(index)
        state: dict[str, Any] = {
            "rewards": {name: kept[name].init(params[name], text, max_new_tokens) for name, text in texts.items()},
            "response": jnp.zeros((batch, max_new_tokens), jnp.int32),
            "length": jnp.zeros(batch, jnp.int32),
            "stream": stream,
        }
        if indirect:
            state["beta"] = per_row(params["beta"], batch, name="beta")
        if lookahead != 0:
            inner, output = baseline.init(params["baseline"], below, prompts_for(prompts, "baseline"), max_new_tokens)
            state["baseline"] = {"state": inner, "log_prob": output.log_prob}
        return state

    def score(params: Params, rng: Array, state: State, output: StepOutput, candidates: Array | None) -> Any:
        del rng  # the streams were fixed at init
        batch, vocab = output.log_prob.shape
        before, known = _standing(state, candidates, batch)
        proposal = {name: leaf for name, leaf in state.items() if name not in _SCORES}
        tokens, width = candidates, chunk
        if tokens is None:
            tokens = jnp.broadcast_to(jnp.arange(vocab, dtype=jnp.int32), (batch, vocab))
            width = chunk or _BLOCK
        else:
            proposal["candidates"] = candidates
        count = tokens.shape[1]
        width = count if width is None else min(width, count)

        def block(tokens: Array) -> tuple[Array, Array]:
            paid = _roll_out(params, proposal, tokens, known)
            if indirect:
                return _weighted(paid["reward"], paid["baseline_reward"], state["beta"])
            mean = paid["reward"].mean(axis=-1)
            return mean, jnp.full_like(mean, paid["reward"].shape[-1])

        if width == count:
            q, effective = block(tokens)
        else:
            # The last block may run over the end: its surplus candidates are scored and cut.
            padded = jnp.pad(tokens, ((0, 0), (0, -count % width)), mode="edge").reshape(batch, -1, width)
            parts = jax.lax.map(block, jnp.moveaxis(padded, 1, 0))
            q, effective = (jnp.moveaxis(part, 0, 1).reshape(batch, -1)[:, :count] for part in parts)
        scores = {"q": q, "effective": effective}
        if before is not None:
            scores = where_rows(known, before, scores)
        return scores["q"], proposal | scores

    def advance(params: Params, proposal: State, choice: Array) -> State:
        token = choice
        if "candidates" in proposal and "still" not in proposal:
            picked = jnp.take_along_axis(proposal["candidates"], jnp.maximum(choice, 0)[:, None], axis=-1)[:, 0]
            token = jnp.where(choice < 0, -1, picked)
        moves = choice >= 0
        state = proposal | ({"still": proposal.get("still", True) & ~moves} if "q" in proposal else {})
        if lookahead != 0:
            inner, output = baseline.step(params["baseline"], step_key(state), state["baseline"]["state"], token)
            log_prob = jnp.where(moves[:, None], output.log_prob, state["baseline"]["log_prob"])
            state["baseline"] = {"state": inner, "log_prob": log_prob}
        joined = {}
        for name, judge in kept.items():
            text, real = jnp.maximum(token, 0)[:, None, None], moves[:, None, None]
            scored = judge.score(params[name], state["rewards"][name], text, real)[1]
            joined[name] = judge.commit(params[name], state["rewards"][name], scored, jnp.where(moves, 0, -1))
        place = jnp.where(moves, state["length"], state["response"].shape[1])
        response = state["response"].at[jnp.arange(token.shape[0]), place].set(token, mode="drop")
        return state | {"rewards": joined, "response": response, "length": state["length"] + moves}

    def _roll_out(params: Params, state: State, tokens: Array, known: Array) -> dict[str, Array]:
        """The rewards [B,K,n] of the texts that go on from candidates [B,K], in at least float32; those of rows that
        are `known` [B] are not rolled out, and are undefined."""
        batch, count = tokens.shape
        limit = state["response"].shape[1]
        steps = limit - 1 if lookahead is None else min(lookahead, limit - 1)
        n = rollouts if steps else 1
        lost = jnp.broadcast_to((state["length"] >= limit)[:, None, None], (batch, count, n))
        text, real = tokens[:, :, None, None], jnp.broadcast_to(~known[:, None, None, None], (batch, count, 1, 1))
        if steps:
            drawn = draw(baseline, params["baseline"], state, tokens, known, n=n, steps=steps, eos_ids=eos_ids)
            each = (batch, count, n, 1)
            text = jnp.concatenate([jnp.broadcast_to(text, each), drawn.tokens], axis=-1)
            real = jnp.concatenate([jnp.broadcast_to(real, each), drawn.mask], axis=-1)
            lost |= drawn.lost
        text, real = (x.reshape(batch, count * n, -1) for x in (text, real))
        paid = {}
        for name, judge in kept.items():
            found = at_least_float32(judge.score(params[name], state["rewards"][name], text, real)[0])
            paid[name] = jnp.where(lost, jnp.nan, found.reshape(batch, count, n))
        return paid

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        for name, judge in rewards.items():
            below, text = entry(params, name), prompts_for(prompts, name)
            if not isinstance(text, TokenBatch):
                raise ValueError(f"prompts[{name!r}]: expected one TokenBatch, found {type(text).__name__}")
            if getattr(judge, "check", None) is not None:
                judge.check(below, text, max_new_tokens)  # type: ignore[attr-defined]
        if indirect:
            check_positive("beta", entry(params, "beta"))
            per_row(params["beta"], prompt_index(prompts_for(prompts, "reward")).shape[0], name="beta")
        if lookahead != 0:
            check_part(baseline, params, prompts, max_new_tokens, "baseline")

    return Critic(init, score, advance, "level", check, vocab_size)


def effective_rollouts(proposal: State) -> Array:
    """The effective number of roll-outs behind each q [B,K] of a proposal of `transfer_q`: 1/Σ w² of the weights of
    indirect transfer, between 1 (they have degenerated, q is one roll-out's reward) and n; n for direct transfer. The
    state of a tilt holds the proposal of its last scores under "critic"."""
    return proposal["effective"]


def _standing(state: State, candidates: Array | None, batch: int) -> tuple[dict[str, Array] | None, Array]:
    """(the scores of the last candidates, None where there are none; rows [B] for which they still hold: they did not
    move, and are asked about the same candidates)."""
    if "still" not in state or (candidates is None) != ("candidates" not in state):
        return None, jnp.zeros(batch, bool)
    before, known = {name: state[name] for name in ("q", "effective")}, state["still"]
    if candidates is None:
        return before, known
    if candidates.shape != state["candidates"].shape:
        return None, jnp.zeros(batch, bool)
    return before, known & (candidates == state["candidates"]).all(axis=1)


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
    rollouts: int,
    lookahead: int | None,
    chunk: int | None,
) -> int | None:
    """The one vocabulary of all parts, None where none has one."""
    for name, value, least in (("rollouts", rollouts, 1), ("lookahead", lookahead, 0), ("chunk", chunk, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, found {value}")
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
