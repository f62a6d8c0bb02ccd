"""Critics of a run from their folders, alone or summed: what tilts, proposes and selects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax.numpy as jnp

from jaxalign import critics, models, policies, rewards
from jaxalign._checks import check_language_model
from jaxalign.evaluation.readings import parse_reading
from jaxalign.evaluation.settings import Setting
from jaxalign.evaluation.specs import Term
from jaxalign.types import Critic, Params, Policy


class Cost(Protocol):
    """Tokens that pass through a critic's models for each token of a response of `length` tokens to a prompt of
    `prompt` tokens, when it scores k candidates."""

    def __call__(self, prompt: int, length: int, k: int, /) -> float: ...


class Part(NamedTuple):
    """A critic, ready to use."""

    critic: Critic
    """The Critic."""
    params: Params
    """Its parameters."""
    cost: Cost
    """What it costs."""
    whole: bool
    """Whether it gives the scores of the whole vocabulary at once."""
    at: Callable[[float], Params] | None = None
    """Strength -> parameters, of a critic that takes the strength itself; None where the tilt does."""
    strength: str | None = None
    """What such a strength is: beta, n or nats."""


def once(prompt: int, length: int, k: int, /) -> float:
    """The cost of a critic that reads each token once."""
    return 1.0


def each_candidate(prompt: int, length: int, k: int, /) -> float:
    """The cost of a critic that reads each candidate."""
    return float(k)


def _by_head(build: Callable[[models.LanguageModel], Critic]) -> Callable[[Setting, Term], Part]:
    """A critic that reads a model's head: a Q head gives all scores at once, a scalar one a candidate's."""

    def part(setting: Setting, term: Term) -> Part:
        lm, params = setting.loaded[term.role]
        whole = lm.config.head is not None and lm.config.head.kind == "q"
        return Part(build(lm), params, once if whole else each_candidate, whole)

    return part


def _args(setting: Setting, term: Term) -> Part:
    lm, params = setting.loaded[term.role]
    tail, ends = rewards.template_tail(setting.reader, lm, name=term.role)
    return Part(critics.args(lm, tail=tail, ends=ends), params, each_candidate, False)


def _genarm(setting: Setting, term: Term) -> Part:
    lm, params = setting.loaded[term.role]
    check_language_model(term.role, lm, term.folder)
    return Part(critics.genarm(lm), params, once, True)


def _transfer(setting: Setting, term: Term) -> Part:
    """Direct transfer from an aligned model, scored by the proxy."""
    lm, params = setting.loaded[term.role]
    check_language_model(term.role, lm, term.folder)
    scorer, options = setting.reward, setting.options
    critic = critics.transfer_q(
        policies.language_model(lm),
        scorer.plain,
        eos_ids=setting.lm.config.eos_ids,
        num_samples=options.rollouts,
        lookahead=options.lookahead,
    )

    def cost(prompt: int, length: int, k: int, /) -> float:
        # Each candidate steps the baseline and is rolled out for half the response on average (or the look-ahead); the
        # reward reads it with each roll-out, after a prefix that it keeps.
        ahead = length / 2 if options.lookahead is None else min(options.lookahead, length / 2)
        texts = options.rollouts if ahead else 1
        return k * ((1 if ahead else 0) + texts * (ahead + 1 + ahead))

    return Part(critic, {"baseline": params, "reward": scorer.params}, cost, False)


def _distribution(setting: Setting, term: Term) -> Part:
    """A head of laws, read as the method says."""
    lm, params = setting.loaded[term.role]
    reading = parse_reading(term.reading)
    critic = critics.distribution(lm, reading.read)
    whole = lm.config.head is not None and lm.config.head.kind == "q"

    def at(strength: float) -> Params:
        own = {} if reading.strength is None else {reading.strength: jnp.asarray(strength, jnp.float32)}
        fixed = {name: jnp.asarray(value, jnp.float32) for name, value in reading.numbers.items()}
        return critics.DistributionParams(params, fixed | own)

    takes = at if reading.strength is not None else None
    return Part(critic, at(1.0), once if whole else each_candidate, whole, takes, reading.strength)


CRITICS: dict[str, Callable[[Setting, Term], Part]] = {
    "args": _args,
    "value": _by_head(critics.value),
    "follower": _by_head(critics.follower),
    "distribution": _distribution,
    "genarm": _genarm,
    "transfer": _transfer,
}
"""Name in `specs.CRITICS` -> builder(setting, term)."""


def summed(setting: Setting, terms: Sequence[Term]) -> Part:
    """The weighted sum of critics; the critic itself where there is one, of weight 1.

    Raises:
      ValueError: of each critic's builder, and of `critics.weighted_sum`: critics of two kinds or for two betas.
    """
    parts = [CRITICS[term.critic](setting, term) for term in terms]
    if len(parts) == 1 and terms[0].weight == 1:
        return parts[0]
    for term, part in zip(terms, parts, strict=True):
        if part.at is not None:
            raise ValueError(
                f"method: expected {part.strength} in the reading of a sum, as soft(beta=0.5), found {term.reading!r}"
            )

    def cost(prompt: int, length: int, k: int, /) -> float:
        return sum(part.cost(prompt, length, k) for part in parts)

    weights = jnp.asarray([term.weight for term in terms], jnp.float32)
    params = {"critics": tuple(part.params for part in parts), "weights": weights}
    critic = critics.weighted_sum([part.critic for part in parts])
    return Part(critic, params, cost, all(part.whole for part in parts))


def trained_beta(setting: Setting, terms: Sequence[Term]) -> float:
    """The beta that a method without strengths has: that of a follower's head, or that a reading's text gives, or 1."""
    for term in terms:
        head = setting.loaded[term.role][0].config.head
        if term.critic == "follower" and head is not None and head.follower is not None:
            return head.follower.beta
        if term.critic == "distribution" and "beta" in parse_reading(term.reading).numbers:
            return parse_reading(term.reading).numbers["beta"]
    return 1.0


def tilt(setting: Setting, part: Part) -> tuple[Policy, Callable[[float], Params], Callable[[int, int], float]]:
    """The base tilted by a critic.

    Returns:
      (the Policy, strength -> its parameters, cost(prompt, length) per token of the base and the critic). A critic that
      brings its own beta is tilted at that one.
    """
    top_k = setting.candidates(whole=part.whole)
    policy = policies.tilt(setting.base, part.critic, top_k=top_k)
    read = top_k or setting.lm.vocab_size

    def params_at(beta: float) -> Params:
        used = beta if part.critic.beta is None else part.critic.beta
        own = part.params if part.at is None else part.at(beta)
        return {"policy": setting.params, "critic": own, "beta": jnp.asarray(used, jnp.float32)}

    return policy, params_at, lambda prompt, length: 1 + part.cost(prompt, length, read)
