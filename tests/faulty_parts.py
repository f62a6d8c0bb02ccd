"""Parts with one planted fault each, and the law that it breaks: (law, part). Sound forms of each keep all laws.

The sound policy is a table of the last token, tilted towards even tokens by `beta`; the sound critic counts tokens; the
sound reward sums weights of tokens. Each fault changes one line of them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign._arrays import per_row
from jaxalign.prompts import any_prompts, prompt_index
from jaxalign.types import CheckedReward, Completions, Critic, Policy, PrefixReward, StepOutput
from tests.conftest import VOCAB

EVEN = jnp.where(jnp.arange(VOCAB) % 2 == 0, 1.0, 0.0)


class PolicyState(NamedTuple):
    """State of `policy`."""

    token: jax.Array
    length: jax.Array
    beta: jax.Array


def policy_params():
    logits = jax.random.normal(jax.random.key(3), (VOCAB, VOCAB))
    return {"policy": {"table": logits, "beta": jnp.asarray(0.7)}}


def last_tokens(batch):
    at = jnp.where(batch.mask, jnp.arange(batch.mask.shape[1]), -1).max(axis=1)
    return jnp.take_along_axis(batch.tokens, at[:, None], axis=1)[:, 0], at + 1


def policy(fault: str = "") -> Policy:
    def output(params, state):
        beta = params["policy"]["beta"] if fault == "beta read at each step" else state.beta
        beta = per_row(beta, state.token.shape[0], name="beta")
        ref = jax.nn.log_softmax(
            params["policy"]["table"][state.token] + jnp.sin(state.length[:, None] + jnp.arange(VOCAB))
        )
        logits = ref + EVEN / beta[:, None]
        if fault == "rows mixed":
            logits = logits + 0.1 * jnp.mean(state.token) * EVEN
        norm = jax.nn.logsumexp(logits, axis=-1)
        log_prob = logits - norm[:, None]
        if fault == "not normalised":
            log_prob = log_prob + 0.1
        if fault == "not finite":
            log_prob = jnp.where(log_prob < -4, -jnp.inf, log_prob)
        if fault == "gradient not finite":
            zero = jax.lax.stop_gradient(params["policy"]["table"]).sum() * 0 + (params["policy"]["table"] * 0).sum()
            log_prob = log_prob + jnp.sqrt(zero)
        if fault == "log_norm of another sign":
            norm = -norm
        return StepOutput(log_prob, ref, norm)

    def init(params, rng, prompts, max_new_tokens):
        batch = any_prompts(prompts) if fault != "one batch only" else prompts
        token, length = last_tokens(batch)
        if fault == "columns counted":
            length = jnp.full_like(length, batch.tokens.shape[1])
        elif fault == "last column read":
            token = batch.tokens[:, -1]
            length = batch.mask.sum(axis=1)
        else:
            length = batch.mask.sum(axis=1)
        beta = jnp.asarray(params["policy"]["beta"])
        if fault == "beta of row 0":
            beta = jnp.broadcast_to(jnp.ravel(beta)[0], token.shape)
        elif fault != "beta without a batch":
            beta = per_row(beta, token.shape[0], name="beta")
        state = PolicyState(token, length, beta)
        if fault == "random key kept":
            return {"own": state, "key": jax.random.split(rng, token.shape[0])}, output(params, state)
        return state, output(params, state)

    def step(params, rng, state, token):
        if fault == "random key kept":
            return state, output(params, state["own"])
        frozen = token < 0
        moved = jnp.where(frozen, state.token, token)
        length = state.length + ~frozen
        if fault == "frozen rows counted":
            length = state.length + 1
        if fault == "frozen rows begin again":
            length = jnp.where(frozen, 0, length)
        if fault == "dtype changes":
            length = length.astype(jnp.float32)
        state = PolicyState(moved, length, state.beta)
        if fault == "structure changes":
            return (state,), output(params, state)
        if fault == "rows by place":
            place = jnp.arange(token.shape[0])
            return state, output(params, state._replace(length=state.length + place))
        return state, output(params, state)

    def log_prob(params, prompts, tokens, mask):
        state, first = init(params, jax.random.key(0), prompts, tokens.shape[1])
        outs, states = [first], state
        for t in range(tokens.shape[1] - 1):
            states, out = step(params, None, states, tokens[:, t])
            outs.append(out)
        take = lambda name: jnp.stack(  # noqa: E731
            [jnp.take_along_axis(getattr(o, name), tokens[:, t, None], axis=1)[:, 0] for t, o in enumerate(outs)], 1
        )
        norm = jnp.stack([o.log_norm for o in outs], 1)
        if fault == "parallel form one token late":
            norm = jnp.roll(norm, 1, axis=1)
        values = [jnp.where(mask, x, 0) for x in (take("log_prob"), take("log_prob_ref"), norm)]
        done = jnp.zeros(tokens.shape[0], bool)
        return Completions(tokens, mask, *values, None, done, ~done)

    def verify(params, rng, state, tokens, mask, below=None):
        states, outputs = [state], []
        for t in range(tokens.shape[1]):
            moved, out = step(params, rng, states[-1], jnp.where(mask[:, t], tokens[:, t], -1))
            states.append(moved)
            outputs.append(out)
        if fault == "block one token late":
            outputs = outputs[-1:] + outputs[:-1]
        return tuple(jax.tree.map(lambda *x: jnp.stack(x, axis=1), *each) for each in (outputs, states))

    def accept(params, proposal, count):
        count = count + (count > 0) if fault == "one token too many accepted" else count
        return jax.tree.map(lambda x: x[jnp.arange(x.shape[0]), jnp.minimum(count, x.shape[1] - 1)], proposal)

    ends = [0] if fault == "eos ids in a list" else (0,)
    return Policy(init, step, log_prob, None, VOCAB, ends, verify, accept)


POLICY_FAULTS = {
    "beta without a batch": 1,
    "random key kept": 1,
    "rows by place": 1,
    "frozen rows counted": 2,
    "frozen rows begin again": 2,
    "beta read at each step": 3,
    "beta of row 0": 3,
    "one batch only": 4,
    "not normalised": 5,
    "log_norm of another sign": 5,
    "dtype changes": 6,
    "structure changes": 6,
    "eos ids in a list": 6,
    "columns counted": 7,
    "last column read": 7,
    "rows mixed": 8,
    "gradient not finite": 9,
    "parallel form one token late": 10,
    "not finite": 13,
    "block one token late": 18,
    "one token too many accepted": 18,
}


def policy_increments(params, prompts, tokens):
    return jnp.broadcast_to(EVEN / params["policy"]["beta"], (tokens.shape[0], VOCAB))


# Critics -------------------------------------------------------------------------------------------------------------


class CriticState(NamedTuple):
    """State of `critic`."""

    total: jax.Array
    chosen: jax.Array
    scale: jax.Array


def critic_params():
    return {"critic": {"weight": jax.random.normal(jax.random.key(5), (VOCAB,)), "scale": jnp.asarray(0.8)}}


def critic(kind: str, fault: str = "") -> Critic:
    """Level: the sum of the weights of the text so far, q included. Increment: the weight of the token."""

    def init(params, rng, prompts, max_new_tokens):
        batch = any_prompts(prompts) if fault != "one batch only" else prompts
        tokens, mask, _ = batch
        total = jnp.where(mask, params["critic"]["weight"][tokens], 0).sum(axis=1)
        if fault == "padding read":
            total = params["critic"]["weight"][tokens].sum(axis=1)
        if fault == "rows mixed":
            total = total - total.mean()
        scale = jnp.asarray(params["critic"]["scale"])
        if fault == "scale of row 0":
            scale = jnp.ravel(scale)[0]
        if fault != "scale without a batch":
            scale = per_row(scale, total.shape[0], name="scale")
        if fault == "one row at init":
            total = total[:1]
        return CriticState(total, jnp.zeros((batch.tokens.shape[0], 0)), scale)

    def score(params, rng, state, output, candidates):
        tokens = jnp.arange(VOCAB)[None] if candidates is None else candidates
        if fault == "candidates taken for columns" and candidates is not None:
            tokens = jnp.arange(candidates.shape[1])[None]
        weight = jnp.broadcast_to(params["critic"]["weight"][tokens], (state.total.shape[0], tokens.shape[1]))
        scale = (
            per_row(params["critic"]["scale"], state.total.shape[0], name="scale")
            if fault == "scale read at each step"
            else state.scale
        )
        base = state.total[:, None] if kind == "level" else jnp.tanh(state.total)[:, None]
        if fault == "sums in place of increments":
            base = state.total[:, None]
        if fault == "increments in place of sums":
            base = jnp.zeros_like(base)
        if fault == "rows by place":
            base = base + jnp.arange(state.total.shape[0])[:, None]
        q = (base + weight) * scale[:, None]
        if fault == "not finite":
            q = jnp.where(weight < 0, -jnp.inf, q)
        if fault == "gradient not finite":
            q = q + jnp.sqrt((params["critic"]["weight"] * 0).sum())
        if fault == "one score a row":
            return q[:, 0], state
        proposal = state._replace(chosen=weight)
        if fault == "choice among all" and candidates is not None:
            every = jnp.broadcast_to(params["critic"]["weight"], (state.total.shape[0], VOCAB))
            proposal = state._replace(chosen=every)
        if fault == "proposal changes":
            dtype = jnp.float32 if state.chosen.shape[1] == 0 else jnp.float16
            proposal = proposal._replace(chosen=weight.astype(dtype))
        return q, proposal

    def advance(params, proposal, choice):
        new = jnp.take_along_axis(proposal.chosen, jnp.maximum(choice, 0)[:, None], axis=1)[:, 0]
        if fault == "frozen rows moved among candidates" and proposal.chosen.shape[1] < VOCAB:
            return proposal._replace(total=proposal.total + new)
        if fault == "frozen rows moved":
            return proposal._replace(total=proposal.total + new)
        if fault == "one frozen row freezes all":
            return proposal._replace(total=proposal.total + jnp.where((choice < 0).any(), 0, new))
        if fault == "one row after advance":
            return proposal._replace(total=proposal.total[:1] + new[:1])
        if fault == "dtype changes in advance":
            return proposal._replace(total=(proposal.total + new).astype(jnp.float16))
        return proposal._replace(total=proposal.total + jnp.where(choice >= 0, new, 0))

    return Critic(init, score, advance, kind, None, VOCAB)


def text_score(kind: str):
    """What `critic(kind)` should give a text, by other means."""

    def score(params, prompts, tokens):
        weight = params["critic"]["weight"]
        total = jnp.where(prompts.mask, weight[prompts.tokens], 0).sum(axis=1)
        if kind == "level":
            return (total + weight[tokens].sum(axis=1)) * params["critic"]["scale"]
        found = jnp.zeros_like(total)
        for token in tokens.T:
            found, total = found + (jnp.tanh(total) + weight[token]) * params["critic"]["scale"], total + weight[token]
        return found

    return score


CRITIC_FAULTS = {
    "scale without a batch": 1,
    "one score a row": 1,
    "one row at init": 1,
    "one row after advance": 1,
    "rows by place": 1,
    "frozen rows moved": 2,
    "frozen rows moved among candidates": 2,
    "one frozen row freezes all": 2,
    "scale of row 0": 3,
    "scale read at each step": 3,
    "one batch only": 4,
    "proposal changes": 6,
    "dtype changes in advance": 6,
    "padding read": 7,
    "rows mixed": 8,
    "gradient not finite": 9,
    "candidates taken for columns": 11,
    "choice among all": 11,
    "sums in place of increments": 12,
    "increments in place of sums": 12,
    "not finite": 13,
}


# Rewards -------------------------------------------------------------------------------------------------------------


def reward_params():
    return {"weight": jax.random.normal(jax.random.key(6), (VOCAB,)), "table": jnp.linspace(1.0, 2.0, 5)}


def reward(fault: str = ""):
    """The sum of the weights of a text's tokens, times its prompt's entry of a table; with a prefix form."""

    def score(params, tokens, mask, prompt_length, index):
        weight, rows = params["weight"][tokens], jnp.arange(tokens.shape[0])
        real = mask if fault != "everything read" else jnp.ones_like(mask)
        total = jnp.where(real, weight, 0).sum(axis=1)
        if fault == "places by column":
            total = (jnp.where(mask, weight, 0) * jnp.arange(mask.shape[1])).sum(axis=1)
        if fault == "response by column":
            total = jnp.where(mask & (jnp.arange(mask.shape[1]) >= prompt_length[:, None]), weight, 0).sum(axis=1)
        if fault == "rows compared":
            total = total - total.mean()
        if fault == "infinite":
            total = jnp.log(total * 0)
        found = total * params["table"][rows if fault == "rows for index" else index]
        if fault == "a column of numbers":
            return found[:, None]
        if fault == "one number for all":
            return found.sum()
        return found.astype(jnp.int32) if fault == "integers" else found

    def begin(params, prompts, max_new_tokens):
        total = jnp.where(prompts.mask, params["weight"][prompts.tokens], 0).sum(axis=1)
        return total, params["table"][prompt_index(prompts)]

    def segments(params, state, tokens, mask):
        added = jnp.where(mask, params["weight"][tokens], 0).sum(axis=2)
        if fault == "prefix forgotten":
            return added * state[1][:, None], added
        return (state[0][:, None] + added) * state[1][:, None], added

    def commit(params, state, proposal, choice):
        new = jnp.take_along_axis(proposal, jnp.maximum(choice, 0)[:, None], axis=1)[:, 0]
        if fault == "commit of nothing":
            return state
        if fault == "frozen prefix moved":
            return state[0] + new, state[1]
        return state[0] + jnp.where(choice >= 0, new, 0), state[1]

    return CheckedReward(score, prefix=PrefixReward(begin, segments, commit))


REWARD_FAULTS = {
    "frozen prefix moved": 2,
    "places by column": 7,
    "response by column": 7,
    "rows compared": 8,
    "infinite": 13,
    "a column of numbers": 14,
    "one number for all": 14,
    "integers": 14,
    "everything read": 15,
    "rows for index": 16,
    "prefix forgotten": 17,
    "commit of nothing": 17,
}
