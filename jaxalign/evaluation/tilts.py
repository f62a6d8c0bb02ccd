"""Critics of a run from their folders, alone or summed: what tilts, proposes and selects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax.numpy as jnp

from jaxalign import critics, models, policies, rewards
from jaxalign._checks import check_language_model
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


CRITICS: dict[str, Callable[[Setting, Term], Part]] = {
    "args": _args,
    "value": _by_head(critics.value),
    "follower": _by_head(critics.follower),
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

    def cost(prompt: int, length: int, k: int, /) -> float:
        return sum(part.cost(prompt, length, k) for part in parts)

    weights = jnp.asarray([term.weight for term in terms], jnp.float32)
    params = {"critics": tuple(part.params for part in parts), "weights": weights}
    critic = critics.weighted_sum([part.critic for part in parts])
    return Part(critic, params, cost, all(part.whole for part in parts))


def trained_beta(setting: Setting, terms: Sequence[Term]) -> float:
    """The beta that the head of a follower was trained for."""
    heads = (setting.loaded[term.role][0].config.head for term in terms if term.critic == "follower")
    return next(head.follower.beta for head in heads if head is not None and head.follower is not None)


def tilt(setting: Setting, part: Part) -> tuple[Policy, Callable[[float], Params], Callable[[int, int], float]]:
    """The base tilted by a critic.

    Returns:
      (the Policy, beta -> its parameters, cost(prompt, length) per token of the base and the critic). A critic that
      brings its own beta is tilted at that one.
    """
    top_k = setting.candidates(whole=part.whole)
    policy = policies.tilt(setting.base, part.critic, top_k=top_k)
    read = top_k or setting.lm.vocab_size

    def params_at(beta: float) -> Params:
        used = beta if part.critic.beta is None else part.critic.beta
        return {"policy": setting.params, "critic": part.params, "beta": jnp.asarray(used, jnp.float32)}

    return policy, params_at, lambda prompt, length: 1 + part.cost(prompt, length, read)
