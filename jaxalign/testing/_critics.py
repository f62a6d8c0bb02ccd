"""The laws of a Critic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import decoding, policies
from jaxalign._arrays import is_supported, repeat_rows, take_rows, where_rows
from jaxalign._parts import advance_critic, check_critic_argument, score_critic, start_critic
from jaxalign._programs import tells_programs
from jaxalign.prompts import any_prompts
from jaxalign.shapes import PerPrompt, ResponseTokens
from jaxalign.testing import _laws
from jaxalign.testing._laws import PER_PROMPT, assert_same, errors_break
from jaxalign.testing._steps import Compiled, supported_tokens
from jaxalign.testing._verified import check_blocks
from jaxalign.types import Array, Critic, Params, Policy, Prompts, State, StepOutput, TokenBatch

_SCALE = 1.3  # of the random policy's logits, so that its second and third tokens are probable too


class TextScore(Protocol):
    """The score [B] of the responses tokens [B,t], t >= 1, as a critic should give it."""

    def __call__(self, params: Params, prompts: Prompts, tokens: ResponseTokens) -> PerPrompt: ...


class LastToken(NamedTuple):
    """State of the random policy."""

    token: Array
    """[B], the last."""
    length: Array
    """[B], tokens of the response."""


def random_policy(vocab_size: int) -> Policy:
    """Builds a policy whose distributions are a fixed, irregular function of the last token and the response's
    length."""

    def output(state: LastToken) -> StepOutput:
        place = jnp.sin(1.0 + state.token % 101 + 2.7 * state.length)[:, None]
        logits = _SCALE * jnp.sin(37.0 * place + 1.9 * jnp.arange(vocab_size))
        log_prob = jax.nn.log_softmax(logits, axis=-1)
        return StepOutput(log_prob, log_prob, jnp.zeros(log_prob.shape[0]))

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        tokens, mask, _ = any_prompts(prompts)
        last = jnp.where(mask, jnp.arange(mask.shape[1]), -1).max(axis=1)
        state = LastToken(jnp.take_along_axis(tokens, last[:, None], axis=1)[:, 0], jnp.zeros_like(last))
        return state, output(state)

    def step(params: Params, rng: Array, state: LastToken, token: Array) -> tuple[State, StepOutput]:
        state = LastToken(jnp.where(token < 0, state.token, token), state.length + (token >= 0))
        return state, output(state)

    return Policy(init, step, vocab_size=vocab_size)


class Walk(NamedTuple):
    """What a critic gave along tokens [B,T]."""

    states: list[State]
    """Before each token."""
    scores: list[Array]
    """[B,K] or [B,V], of the candidates for each token."""
    proposals: list[State]
    """After each scoring."""


class _Scorer:
    """A critic's functions, each compiled once for a shape, above the outputs of a policy."""

    def __init__(self, critic: Critic, below: Compiled, policy_params: Params) -> None:
        self.critic, self.below, self.policy_params = critic, below, policy_params
        rng, steps = below.rng, below.steps

        def init(params: Params, prompts: Prompts) -> State:
            return start_critic(critic, params, rng, prompts, steps)

        def score(params: Params, state: State, output: StepOutput, candidates: Array | None) -> tuple[Array, State]:
            return score_critic(critic, params, rng, state, output, candidates)

        def advance(params: Params, proposal: State, choice: Array) -> State:
            return advance_critic(critic, params, proposal, choice)

        self.init, self.score, self.advance = jax.jit(init), jax.jit(score), jax.jit(advance)

    def with_one_key(self) -> Critic:
        """The critic under the key of this walk, whichever a tilt gives it: one that draws gives the same scores."""
        critic, rng = self.critic, self.below.rng

        def init(params: Params, _: Array, prompts: Prompts, max_new_tokens: int) -> State:
            return critic.init(params, rng, prompts, max_new_tokens)

        def score(
            params: Params, _: Array, state: State, output: StepOutput, candidates: Array | None
        ) -> tuple[Array, State]:
            return critic.score(params, rng, state, output, candidates)

        return critic._replace(init=init, score=score)

    def outputs(self, prompts: Prompts, tokens: Array) -> list[StepOutput]:
        """The policy's outputs before each of tokens [B,T]."""
        state, output = self.below.init(self.policy_params, prompts)
        found = [output]
        for t in range(tokens.shape[1] - 1):
            state, output = self.below.step(self.policy_params, state, tokens[:, t])
            found.append(output)
        return found

    def walk(
        self, params: Params, prompts: Prompts, outputs: list[StepOutput], tokens: Array, candidates: Array | None
    ) -> Walk:
        """Scores and moves along tokens [B,T], which are column 1 of candidates [B,T,K] where these are given."""
        walk, state = Walk([], [], []), self.init(params, prompts)
        for t, output in enumerate(outputs):
            given = None if candidates is None else candidates[:, t]
            q, proposal = self.score(params, state, output, given)
            for kept, new in zip(walk, (state, q, proposal), strict=True):
                kept.append(new)
            choice = tokens[:, t] if candidates is None else jnp.ones_like(tokens[:, t])
            if t < len(outputs) - 1:
                state = self.advance(params, proposal, choice)
        return walk


@tells_programs
def check_critic(
    critic: Critic,
    params: Params,
    prompts: Prompts,
    *,
    policy: Policy | None = None,
    policy_params: Params = None,
    vocab_size: int | None = None,
    rng: Array | None = None,
    max_new_tokens: int = 4,
    num_candidates: int = 3,
    text_score: TextScore | None = None,
    per_prompt: Sequence[str] = PER_PROMPT,
    gradients: bool = True,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> None:
    """Checks that a Critic keeps laws 1-9 and 11-13 of `jaxalign.testing` above some policy.

    Args:
      critic: the critic.
      params: its parameters.
      prompts: at least two, of different lengths; five or more find more. A TokenBatch, or a form that mirrors params.
      policy, policy_params: what it tilts. None: a fixed policy over the critic's vocabulary, without hidden states.
      vocab_size: V, where neither the critic nor a policy names it.
      rng: the key of init and of each scoring; key 0 when None.
      max_new_tokens: T >= 3, the length of the responses that are scored.
      num_candidates: 2 <= K <= V, of the candidate lists.
      text_score: text_score(params, prompts, tokens [B,t]) -> [B], the score of a text by other means (law 12). None:
        the kind is taken at its word.
      per_prompt: names of entries of params, at any depth, that may be one value or one per prompt [B,...] (law 3).
      gradients: False leaves out law 9, for parts that cannot be differentiated.
      rtol, atol: tolerances of all comparisons; loosen them for 16-bit parameters.

    Raises:
      AssertionError: a law does not hold; the message gives its number and name, and what was seen in which row.
      ValueError: arguments that are none: fewer than two prompts, fewer than three tokens, no vocabulary.
    """
    check_critic_argument("critic", critic)
    prompts = _laws.opened(prompts)
    batch = any_prompts(prompts)
    vocab = vocab_size or critic.vocab_size or (policy.vocab_size if policy is not None else None)
    if vocab is None:
        raise ValueError("vocab_size: expected V, which the critic does not name, found None")
    if max_new_tokens < 3:
        raise ValueError(f"max_new_tokens: expected at least 3, found {max_new_tokens}")
    if not 2 <= num_candidates <= vocab:
        raise ValueError(f"num_candidates: expected 2 to {vocab}, found {num_candidates}")
    _laws.assert_hashable("critic", critic)
    policy = random_policy(vocab) if policy is None else policy
    below = Compiled(policy, _laws.opened_rng(rng), max_new_tokens)
    made = _Scorer(critic, below, policy_params)
    check = _Checks(made, params, prompts, batch, rtol, atol)
    check.forms()
    check.candidates(num_candidates)
    check.values_per_prompt(per_prompt)
    check.mixed_rows(repeat=False)
    check.prompts_in_other_forms(per_prompt)
    check.mixed_rows(repeat=True)
    check.frozen_rows()
    if text_score is not None:
        check.kind(text_score)
    check.tilts(num_candidates, gradients)


class _Checks:
    """The laws of one critic, on one response per prompt."""

    def __init__(
        self, made: _Scorer, params: Params, prompts: Prompts, batch: TokenBatch, rtol: float, atol: float
    ) -> None:
        self.made, self.params, self.prompts, self.batch = made, params, prompts, batch
        self.rtol, self.atol = rtol, atol
        tokens: list[Array] = []
        state, output = made.below.init(made.policy_params, batch)
        for _ in range(made.below.steps):
            tokens.append(supported_tokens(output, made.below.policy.eos_ids or ()))
            state, output = made.below.step(made.policy_params, state, tokens[-1])
        self.tokens = jnp.stack(tokens, axis=1)
        self.outputs = made.outputs(batch, self.tokens)
        self.listed: State = None  # the proposal of token 0 among candidates
        with errors_break(1, "the critic"):
            self.expected = self.walk()

    def walk(self, params: Params | None = None, candidates: Array | None = None) -> Walk:
        """The critic along the response, with other params or candidates."""
        given = self.params if params is None else params
        return self.made.walk(given, self.prompts, self.outputs, self.tokens, candidates)

    def same(self, law: int, when: str, found: object, expected: object, rows: Sequence[int] | None = None) -> None:
        """Compares within the tolerances."""
        assert_same(law, when, found, expected, rtol=self.rtol, atol=self.atol, rows=rows, whole="q")

    def forms(self) -> None:
        """Laws 1, 6 and 13."""
        for t, q in enumerate(self.expected.scores):
            _laws.assert_finite(13, f"the scores of token {t}", q, "q")
        for t, (state, proposal) in enumerate(zip(self.expected.states, self.expected.proposals, strict=True)):
            _laws.assert_no_keys("state", state)
            _laws.assert_no_keys("proposal", proposal)
            # Loops carry the proposal; the state of init may have another form than that of advance.
            _laws.assert_same_form(f"for token {t}", proposal, self.expected.proposals[0], "proposal")

    def candidates(self, count: int) -> None:
        """Law 11: K candidates, the token taken in column 1, beside the whole vocabulary."""
        vocab = self.outputs[0].log_prob.shape[-1]
        place = jnp.arange(count) * max(1, vocab // count)
        given = (self.tokens[..., None] + jnp.where(place == place[1], 0, place - place[1])) % vocab
        with errors_break(11, "candidates [B,K]"):
            found = self.walk(candidates=given)
        self.listed = found.proposals[0]
        for t, (q, every) in enumerate(zip(found.scores, self.expected.scores, strict=True)):
            when = f"the scores of candidates for token {t}"
            self.same(11, when, q, jnp.take_along_axis(every, given[:, t], axis=1))

    def values_per_prompt(self, names: Sequence[str]) -> None:
        """Law 3: as for a policy."""
        batch = self.tokens.shape[0]
        seen: list[Array] = []

        def values(change: object) -> Params:
            return _laws.map_per_prompt(change, self.params, names, batch)  # type: ignore[arg-type]

        values(lambda x: seen.append(x) or x)  # type: ignore[func-returns-value]
        if not seen:
            return
        each = values(_laws.different)
        with errors_break(3, "a value per prompt", ValueError, TypeError):
            together = self.walk(each).scores
        for row in (0, batch - 1):
            with errors_break(3, "one value for all prompts", ValueError, TypeError):
                alone = self.walk(values(lambda x, row=row: _laws.different(x)[row])).scores
            self.same(3, f"row {row}'s value alone beside an array of different values", alone, together, [row])
        equal = values(lambda x: jnp.stack([x[0]] * batch) * 0.5)
        state = self.made.init(each, self.prompts)
        found = self.made.score(equal, state, self.outputs[0], None)[0]
        self.same(3, "scores under values other than those at init", found, together[0])

    def after(self, proposal: State, choice: Array, order: Array | None = None) -> Array:
        """The scores of token 1 after choice [B] among token 0; a row of choice -1 scores token 0 again."""
        output = where_rows(choice >= 0, *self.outputs[1::-1])
        if order is not None:
            output = take_rows(output, order)
        found: Array = self.made.score(self.params, self.made.advance(self.params, proposal, choice), output, None)[0]
        return found

    def mixed_rows(self, *, repeat: bool) -> None:
        """Law 1: rows of a proposal are taken in another order, or repeated, as for a policy."""
        rows, proposal = jnp.arange(self.tokens.shape[0]), self.expected.proposals[0]
        order = rows // 2 if repeat else rows[::-1]
        mixed = take_rows(repeat_rows(proposal, 2), rows) if repeat else take_rows(proposal, order)
        when = "repeat_rows(proposal, 2)" if repeat else "take_rows of a proposal in reverse order"
        found = self.after(mixed, self.tokens[order, 0], order)
        self.same(1, f"scores after {when}", found, self.expected.scores[1][order])

    def frozen_rows(self) -> None:
        """Law 2: all rows frozen, and every second one; choices of the vocabulary and of candidates."""
        for proposal, move in ((self.expected.proposals[0], self.tokens[:, 0]), (self.listed, 1)):
            for every in (True, False):
                frozen = (jnp.arange(self.tokens.shape[0]) % 2 == 0) | every
                found = self.after(proposal, jnp.where(frozen, -1, move))
                held, moved = (np.flatnonzero(np.asarray(rows)).tolist() for rows in (frozen, ~frozen))
                self.same(2, "scores of a frozen row (choice -1)", found, self.expected.scores[0], held)
                self.same(2, "scores of a row that moves beside frozen ones", found, self.expected.scores[1], moved)

    def prompts_in_other_forms(self, names: Sequence[str]) -> None:
        """Laws 4, 7 and 8."""
        made, vocab = self.made, self.outputs[0].log_prob.shape[-1]
        order = _laws.other_rows(self.tokens.shape[0])
        index = jnp.asarray(order)
        mixed = _laws.map_per_prompt(lambda x: x[index], self.params, names, len(order))
        outputs = take_rows(self.outputs, index)
        found = made.walk(mixed, _laws.rows_of(self.prompts, order), outputs, self.tokens[index], None).scores
        self.same(8, f"scores of rows {order} of the prompts", found, take_rows(self.expected.scores, index))
        for side, extra, fill in (("right", 2, vocab - 1), ("left", 2, _laws.mixed_ids(vocab, vocab))):
            form = _laws.padded(self.prompts, side, extra, fill)
            found = made.walk(self.params, form, self.outputs, self.tokens, None).scores
            when = f"scores of prompts padded on the {side} with {extra} more columns of ids {np.unique(fill)}"
            self.same(7, when, found, self.expected.scores)
        form = _laws.mirrored(self.params, self.prompts)
        if form is not self.prompts:
            with errors_break(4, "a TokenBatch for each model", ValueError, TypeError, KeyError, AttributeError):
                found = made.walk(self.params, form, self.outputs, self.tokens, None).scores
            self.same(4, "scores of a TokenBatch for each model", found, self.expected.scores)

    def chosen(self) -> list[Array]:
        """The score [B] of the response up to each token: q of the last, or the sum of all."""
        found = [
            jnp.take_along_axis(q, token[:, None], axis=1)[:, 0]
            for q, token in zip(self.expected.scores, self.tokens.T, strict=True)
        ]
        return found if self.made.critic.kind == "level" else [sum(found[: t + 1]) for t in range(len(found))]  # type: ignore[misc]

    def kind(self, text_score: TextScore) -> None:
        """Law 12."""
        kind = self.made.critic.kind
        how = "q of the last token" if kind == "level" else "the sum of q over the tokens"
        for t, found in enumerate(self.chosen()):
            expected = text_score(self.params, self.prompts, self.tokens[:, : t + 1])
            self.same(12, f"kind {kind!r}, {how} beside text_score after {t + 1} tokens", found, expected)

    def tilts(self, count: int, gradients: bool) -> None:
        """Laws 5 and 9 of the tilts by this critic: over the vocabulary and over candidates."""
        made, total = self.made, self.chosen()
        beta = jnp.asarray(1.0 if made.critic.beta is None else made.critic.beta)
        params = policies.TiltParams(made.policy_params, self.params, beta)
        prompts = {"policy": self.batch, "critic": self.prompts}
        for top_k in (None, count):
            tilted = policies.tilt(made.below.policy, made.with_one_key(), top_k=top_k)
            when = f"the tilt (top_k={top_k})"
            run = Compiled(tilted, made.below.rng, made.below.steps)
            outputs, state = [], None
            with errors_break(5, when):
                state, output = run.init(params, prompts)
                outputs.append(output)
                for token in self.tokens.T[:-1]:
                    state, output = run.step(params, state, token)
                    outputs.append(output)
            inside, added = jnp.ones(self.tokens.shape[0], bool), jnp.zeros(self.tokens.shape[0])
            for t, (output, token) in enumerate(zip(outputs, self.tokens.T, strict=True)):
                value, ref = (
                    jnp.take_along_axis(x, token[:, None], axis=1)[:, 0] for x in (output.log_prob, output.log_prob_ref)
                )
                inside = inside & is_supported(value)
                added = added + jnp.where(inside, value - ref + output.log_norm, 0)
                sentence = f"{when}: increments up to token {t} beside the critic's scores"
                self.same(5, sentence, jnp.where(inside, added, 0), jnp.where(inside, total[t] / beta, 0))
            if top_k is not None and made.critic.verify is not None:
                check_blocks(run, params, prompts, self.same)
        if gradients:
            tilted, mask = policies.tilt(made.below.policy, made.critic), jnp.ones(self.tokens.shape, bool)

            def log_prob(given: Params) -> Array:
                below = params._replace(critic=given)
                return decoding.log_prob(tilted, below, made.below.rng, prompts, self.tokens, mask).log_prob.sum()

            _laws.check_gradients(log_prob, self.params)
