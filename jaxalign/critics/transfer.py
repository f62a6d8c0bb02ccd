"""Transfer Q*: the value of a candidate is what an aligned baseline earns when it goes on from there."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import loop, mdp
from jaxalign.checks import check_part, check_positive, entry
from jaxalign.types import (
    Array,
    Critic,
    Params,
    Policy,
    Prompts,
    Reward,
    State,
    StepOutput,
    TokenBatch,
    at_least_float32,
    is_supported,
    per_row,
    prompt_index,
    prompts_for,
    repeat_rows,
)

_BLOCK = 256  # candidates at a time where the whole vocabulary is scored


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
      reward: of the whole text [prompt, prefix, z, roll-out].
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
    indirect = baseline_reward is not None
    vocab_size = _check_arguments(baseline, rewards, eos_ids, rollouts, lookahead, chunk)

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> State:
        below, draws = jax.random.split(rng)
        texts = {name: prompts_for(prompts, name) for name in rewards}
        index = prompt_index(texts["reward"])
        batch = index.shape[0]
        stream = jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(draws, i), (2,), jnp.uint32))(index)
        state: dict[str, Any] = {
            "prompts": {name: TokenBatch(text.tokens, text.mask.astype(bool), index) for name, text in texts.items()},
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
        proposal = {name: leaf for name, leaf in state.items() if name not in ("candidates", "effective")}
        batch, vocab = output.log_prob.shape
        tokens, width = candidates, chunk
        if tokens is None:
            tokens = jnp.broadcast_to(jnp.arange(vocab, dtype=jnp.int32), (batch, vocab))
            width = chunk or _BLOCK
        else:
            proposal["candidates"] = candidates
        count = tokens.shape[1]
        width = count if width is None else min(width, count)

        def block(tokens: Array) -> tuple[Array, Array]:
            paid = _roll_out(params, proposal, tokens)
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
        return q, proposal | {"effective": effective}

    def advance(params: Params, proposal: State, choice: Array) -> State:
        token = choice
        if "candidates" in proposal:
            picked = jnp.take_along_axis(proposal["candidates"], jnp.maximum(choice, 0)[:, None], axis=-1)[:, 0]
            token = jnp.where(choice < 0, -1, picked)
        state = {name: leaf for name, leaf in proposal.items() if name not in ("candidates", "effective")}
        if lookahead != 0:
            inner, output = baseline.step(params["baseline"], _key(state), state["baseline"]["state"], token)
            log_prob = jnp.where(choice[:, None] < 0, state["baseline"]["log_prob"], output.log_prob)
            state["baseline"] = {"state": inner, "log_prob": log_prob}
        response = _write(state["response"], state["length"], token[:, None], (choice >= 0)[:, None])
        return state | {"response": response, "length": state["length"] + (choice >= 0)}

    def _roll_out(params: Params, state: State, tokens: Array) -> dict[str, Array]:
        """The rewards [B,K,n] of the texts that go on from candidates [B,K], in at least float32."""
        batch, count = tokens.shape
        limit = state["response"].shape[1]
        steps = limit - 1 if lookahead is None else min(lookahead, limit - 1)
        n = rollouts if steps else 1
        rows = {name: state[name] for name in ("prompts", "response", "length")}
        rows = repeat_rows(rows, count)
        token, at = tokens.reshape(-1), rows["length"]
        rows["response"] = _write(rows["response"], at, token[:, None], jnp.ones((batch * count, 1), bool))
        rows["length"], lost = at + 1, at >= limit
        if steps:
            ended = loop.is_eos(token, eos_ids) | (at + 1 >= limit)
            # Drawn tokens carry no gradient, and the loop that draws them has none.
            model, below = jax.lax.stop_gradient((params["baseline"], state["baseline"]))
            before, key = repeat_rows(below["state"], count), _key(state)

            def step(model: Params, number: Array, inner: State, token: Array) -> tuple[State, StepOutput]:
                return baseline.step(model, jax.random.fold_in(key, jax.random.bits(number)), inner, token)

            after, output = baseline.step(model, key, before, jnp.where(ended, -1, token))
            likely = is_supported(jnp.take_along_axis(below["log_prob"], tokens, axis=1)).reshape(-1)
            lost |= _stood_still(~(ended | likely), before, after)
            after, output, rows, ended, lost = repeat_rows((after, output, rows, ended, lost), n)
            _, _, drawn = loop.rollout(
                baseline._replace(step=step),
                model,
                jax.random.key(0),  # the rows' streams tell the draws apart
                after,
                output,
                steps=steps,
                eos_ids=eos_ids,
                finished=ended,
                rows=_streams(state, tokens, n),
                limits=limit - rows["length"],
                last_step=False,
            )
            places = rows["length"][:, None] + jnp.arange(steps)
            rows["response"] = _write(rows["response"], places, drawn.tokens, drawn.mask)
            rows["length"] = rows["length"] + drawn.mask.sum(axis=1)
            lost |= jnp.isnan(drawn.log_prob).any(axis=1)
        real = jnp.arange(limit) < rows["length"][:, None]
        paid = {}
        for name, judge in rewards.items():
            prompts = rows["prompts"][name]
            text = mdp.concatenate(prompts, rows["response"], real)
            found = at_least_float32(judge(params[name], *text, prompts.index))
            paid[name] = jnp.where(lost, jnp.nan, found).reshape(batch, count, n)
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


def _weighted(reward: Array, baseline_reward: Array, beta: Array) -> tuple[Array, Array]:
    """(Σ w·r, 1/Σ w²) [B,K] of rewards [B,K,n], w = softmax((r − r_BL)/beta) over the roll-outs, beta [B]."""
    weight = jax.nn.softmax((reward - baseline_reward) / beta[:, None, None], axis=-1)
    # A response that the reward forbids (−inf) has weight 0.
    q = jnp.where(weight == 0, 0, weight * jnp.where(weight == 0, 0, reward)).sum(axis=-1)
    return q, 1 / (weight**2).sum(axis=-1)


def _write(response: Array, place: Array, tokens: Array, real: Array) -> Array:
    """response [N,T] with tokens [N,m] at place [N] or [N,m] where real [N,m]; what lies beyond T is dropped."""
    place = jnp.where(real, place.reshape(place.shape[0], -1), response.shape[1])
    return response.at[jnp.arange(response.shape[0])[:, None], place].set(tokens, mode="drop")


def _key(state: State) -> Array:
    """A key for the baseline's own steps, another at each position."""
    words = jnp.append(state["stream"][0], state["length"][0].astype(jnp.uint32))
    key = jax.random.key(1)
    for i in range(3):
        key = jax.random.fold_in(key, words[i])
    return key


def _streams(state: State, tokens: Array, n: int) -> Array:
    """What names each roll-out's draws [B·K·n,5]: its prompt's stream, the position, the candidate and its number."""
    parts = (state["stream"][:, 0], state["stream"][:, 1], state["length"])
    named = [part[:, None, None] for part in parts] + [tokens[:, :, None], jnp.arange(n)[None, None, :]]
    words = jnp.broadcast_arrays(*(part.astype(jnp.uint32) for part in named))
    return jnp.stack(words, axis=-1).reshape(-1, len(words))


def _stood_still(asked: Array, before: State, after: State) -> Array:
    """Where `asked` [N], whether no leaf of the row's state has changed; the states are read if any row asks."""

    def compare() -> Array:
        still = [
            (old == new).reshape(old.shape[0], -1).all(axis=1)
            for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        ]
        return asked & jnp.stack(still).all(axis=0) if still else asked

    return jax.lax.cond(asked.any(), compare, lambda: jnp.zeros_like(asked))


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
