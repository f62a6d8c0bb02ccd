"""The distributional critic: one head that gives the law of the reward, read for any strength and kind of tilt."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import models
from jaxalign._arrays import is_supported, per_row, where_rows
from jaxalign._blocks import at, joined
from jaxalign._builders import cached
from jaxalign._checks import fields_of
from jaxalign._parts import check_model
from jaxalign.critics import _reading, reads
from jaxalign.critics._model_critics import chosen_token, prompt_check
from jaxalign.models.blocks import Block, append_block, read_block, reads_blocks
from jaxalign.prompts import prompt_index
from jaxalign.shapes import Array, Candidates, Hidden, PerPrompt, Scores
from jaxalign.types import Critic, Params, Prompts, State, StepOutput, TokenBatch

_BLOCK = {"value": 256, "q": 1024}  # tokens per pass over the whole vocabulary


class DistributionParams(NamedTuple):
    """Parameters of `distribution`."""

    head: Params
    """Those of the model with the head."""
    read: Any
    """The numbers of the reading by name, each a scalar or one per prompt [B]: {"beta": 0.5}."""


class DistributionState(NamedTuple):
    """State and proposal of `distribution`."""

    cache: State
    """The model's cache of the text so far."""
    hidden: Hidden | None
    """[B,D], the hidden state of the text so far, which a Q head reads; None with another."""
    prompt: Scores
    """[B,K], the law of the reward from the prompt, in log-probabilities."""
    log_omega: Scores | None
    """[B,K], the weights of the support, the largest 0; None of a reward reading."""
    shift: PerPrompt
    """[B], what was taken out of the weights."""
    numbers: dict[str, PerPrompt]
    """Those of the reading, each [B]."""
    entries: State | None = None
    """In a proposal, the keys and values of the candidates, and their hidden states; None in a state, with a Q head,
    and where the whole vocabulary was scored."""
    candidates: Candidates | None = None
    """In a proposal, the candidates [B,K] that were scored; None in a state, and for the whole vocabulary."""


class VerifiedLaws(NamedTuple):
    """What a critic with a Q head read of a block of tokens."""

    state: DistributionState
    """That of the text before."""
    block: Block
    """What the model read of the tokens."""
    hidden: Array
    """[B,S+1,D], the hidden states before the block and after each of its tokens."""
    candidates: Array | None
    """[B,S+1,K], the candidates of each; None for the whole vocabulary."""


@cached
def distribution(lm: models.LanguageModel, read: reads.Read) -> Critic:
    """Reads a law of rewards as a critic: one training serves every beta, threshold, bound, budget and n. Level.

    A log-weight reading (`reads.soft`, `follower`, `shaped`, `calibrated`, `best_of`, `worst_of`, `chi_squared`, `kl`)
    gives q(s,z) = log Σ_i p_i(sz)·omega_i and is for a tilt with beta 1; if the head is right, the tokens then have the
    law pi_ref(y)·omega(r(y))/Z of whole responses. A reward reading (`reads.mean`, `exceedance`, `expected_max`,
    `quantile`, `cvar`) gives q in units of reward. A candidate without mass under the weights has q = NEGATIVE; where
    all have none, q is 0 and the tilt is the base. With a Q head it scores several tokens at once, which
    `decoding.speculative` needs to be faster; a scalar head is read at each candidate, token by token.

    params: DistributionParams(head, read), or a dict of these names.

    Args:
      lm: a model whose head gives laws (models.Distribution), of the base's vocabulary.
      read: what is read, a value of `critics.reads`.

    Returns:
      A level Critic, for beta 1 where the reading is of log weights.

    Raises:
      ValueError: a model without such a head, no reading; on the host before tracing, other numbers than the reading
        has, a number of another shape, or one that should be positive and is not.

    Source: arXiv 2502.20548 for the soft value; the other readings are derived.
    """
    check_model("distribution", lm, ("config", "vocab_size", "max_length", "prefill", "step", "head"))
    head = lm.config.head
    if head is None or head.distribution is None:
        raise ValueError(f"distribution: expected a head of laws (models.Distribution), found {head}")
    if not isinstance(read, reads.Read):
        raise ValueError(f"read: expected a value of critics.reads, as reads.soft(), found {read!r}")
    spec, by_token, atoms = head.distribution, head.kind == "q", head.distribution.mode == "atoms"
    weighs = read.log_omega is not None

    # Taken out before the points are rounded to float32, and before they are divided by a beta.
    taken = _reading.origin(spec.support) if read.relative else 0.0

    def support() -> Array:
        return jnp.asarray([point - taken for point in spec.support], jnp.result_type(float))

    def init(params: Params, rng: Array, prompts: TokenBatch, max_new_tokens: int) -> State:
        own, given = fields_of(params, DistributionParams)
        capacity = prompts.tokens.shape[1] + max_new_tokens
        hidden, cache = lm.prefill(own, prompts.tokens, prompts.mask, capacity)
        law = lm.head(own, hidden)
        numbers = {name: per_row(given[name], law.shape[0], name=name) for name in read.numbers}
        log_omega, shift = None, jnp.zeros(law.shape[0], law.dtype)
        if weighs:
            every = numbers | {name: given[name] for name in read.free}
            log_omega, shift = _reading.log_weights(read, every, support(), law, atoms=atoms)
        return DistributionState(cache, hidden if by_token else None, law, log_omega, shift.astype(law.dtype), numbers)

    def read_laws(state: DistributionState, log_p: Array) -> Array:
        """q [B,...,k] of laws [B,...,k,K]."""
        if state.log_omega is not None:
            return _reading.weigh(state.log_omega, state.shift, log_p)
        return _reading.value_of(read, state.numbers, support(), log_p, state.prompt, atoms=atoms)

    def known(q: Array) -> Array:
        """Rows in which no candidate has weighted mass say nothing: q = 0."""
        return jnp.where(is_supported(q).any(axis=-1, keepdims=True), q, 0) if weighs else q

    def over_vocabulary(params: Params, state: DistributionState, hidden: Array | None) -> Array:
        """q [B,...,V] after hidden [B,...,D], in blocks of tokens: neither their states nor their laws are held for
        all."""
        rows, vocab = state.prompt.shape[:1] if hidden is None else hidden.shape[:-1], lm.vocab_size
        width = min(max(_BLOCK[head.kind] // math.prod(rows[1:]), 1), vocab)
        ids = jnp.minimum(jnp.arange(-(-vocab // width) * width, dtype=jnp.int32), vocab - 1).reshape(-1, width)

        def block(tokens: Array) -> Array:
            if hidden is not None:
                return read_laws(state, lm.laws_after(params, hidden, tokens))
            each = jnp.broadcast_to(tokens, (*rows, width))
            return read_laws(state, lm.head(params, lm.candidates(params, state.cache, each)[0]))

        return jnp.moveaxis(jax.lax.map(block, ids), 0, -2).reshape(*rows, -1)[..., :vocab]

    def score(
        params: Params, rng: Array, state: DistributionState, output: StepOutput, candidates: Candidates | None
    ) -> tuple[Scores, State]:
        own = fields_of(params, DistributionParams).head
        if candidates is None:
            return known(over_vocabulary(own, state, state.hidden)), state
        if state.hidden is not None:
            found = lm.laws_after(own, state.hidden, candidates)
            return known(read_laws(state, found)), state._replace(candidates=candidates)
        hidden, entries = lm.candidates(own, state.cache, candidates)
        q = known(read_laws(state, lm.head(own, hidden)))
        return q, state._replace(entries=entries, candidates=candidates)

    def advance(params: Params, proposal: DistributionState, choice: Array) -> State:
        own = fields_of(params, DistributionParams).head
        if proposal.entries is not None:
            cache = lm.commit(proposal.cache, proposal.entries, choice)
            return proposal._replace(cache=cache, entries=None, candidates=None)
        hidden, cache = lm.step(own, proposal.cache, chosen_token(proposal.candidates, choice))
        moved = None if proposal.hidden is None else where_rows(choice < 0, proposal.hidden, hidden)
        return proposal._replace(cache=cache, hidden=moved, candidates=None)

    def verify(
        params: Params,
        rng: Array,
        state: DistributionState,
        outputs: StepOutput,
        candidates: Array | None,
        tokens: Array,
        mask: Array,
        choices: Array,
    ) -> tuple[Array, State]:
        del rng, outputs, choices
        own = fields_of(params, DistributionParams).head
        hidden, block = read_block(lm, own, state.cache, tokens, mask)
        before = None if candidates is None else joined(state.candidates, candidates)
        if candidates is None:
            q = over_vocabulary(own, state, hidden)
        else:
            q = read_laws(state, lm.laws_after(own, hidden, candidates))
        return known(q), VerifiedLaws(state, block, joined(state.hidden, hidden), before)

    def accept(params: Params, proposal: VerifiedLaws, count: Array) -> State:
        del params
        hidden, candidates = at((proposal.hidden, proposal.candidates), count)
        cache = append_block(lm, proposal.block, count)
        return proposal.state._replace(cache=cache, hidden=hidden, candidates=candidates)

    fits = prompt_check(lm)

    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        own, given = fields_of(params, DistributionParams)
        _reading.check_numbers(read, given)
        for name in read.numbers:
            per_row(given[name], prompt_index(prompts).shape[0], name=name)
        fits(own, prompts, max_new_tokens)

    critic = Critic(init, score, advance, "level", check, lm.vocab_size, 1.0 if weighs else None)
    return critic._replace(verify=verify, accept=accept) if by_token and reads_blocks(lm) else critic


def with_numbers(critic: Critic, numbers: dict[str, float]) -> Critic:
    """A critic of `distribution` whose params are the model's alone: the numbers of its reading are fixed."""

    def full(params: Params) -> DistributionParams:
        return DistributionParams(params, numbers)

    def init(params: Params, rng: Array, prompts: TokenBatch, max_new_tokens: int) -> State:
        return critic.init(full(params), rng, prompts, max_new_tokens)

    def score(
        params: Params, rng: Array, state: State, output: StepOutput, candidates: Candidates | None
    ) -> tuple[Scores, State]:
        return critic.score(full(params), rng, state, output, candidates)

    def advance(params: Params, proposal: State, choice: Array) -> State:
        return critic.advance(full(params), proposal, choice)

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        if critic.check is not None:
            critic.check(full(params), prompts, max_new_tokens)

    def verify(
        params: Params,
        rng: Array,
        state: State,
        outputs: StepOutput,
        candidates: Array | None,
        tokens: Array,
        mask: Array,
        choices: Array,
    ) -> tuple[Array, State]:
        assert critic.verify is not None
        return critic.verify(full(params), rng, state, outputs, candidates, tokens, mask, choices)

    def accept(params: Params, proposal: State, count: Array) -> State:
        assert critic.accept is not None
        return critic.accept(full(params), proposal, count)

    fixed = critic._replace(init=init, score=score, advance=advance, check=check)
    return fixed if critic.verify is None else fixed._replace(verify=verify, accept=accept)


def laws(lm: models.LanguageModel, params: Params, prompts: TokenBatch) -> Array:
    """Gives the law of the reward from each prompt, before any token.

    Its mean, its threshold and its whole frontier of reward against KL can be read from it.

    Args:
      lm: a model whose head gives laws.
      params: the model's.
      prompts: left-padded prompts of B rows.

    Returns:
      Log-probabilities of the support [B,K]; the points are lm.config.head.distribution.support.

    Raises:
      ValueError: a model without such a head.
    """
    check_model("laws", lm, ("config", "prefill", "head"))
    if lm.config.head is None or lm.config.head.distribution is None:
        raise ValueError(f"laws: expected a head of laws (models.Distribution), found {lm.config.head}")
    hidden, _ = lm.prefill(params, prompts.tokens, prompts.mask, prompts.tokens.shape[1] + 1)
    return lm.head(params, hidden)
