"""One builder per way of decoding: it binds models and numbers into an `engine.Method`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import decoding, gibbs, policies, rewards
from jaxalign._checks import check_language_model, is_concrete
from jaxalign.evaluation import functions
from jaxalign.evaluation.engine import Drawn, Forwards, Method, Stepwise
from jaxalign.evaluation.options import drop_stages
from jaxalign.evaluation.settings import Setting, default_threshold
from jaxalign.evaluation.specs import Spec
from jaxalign.evaluation.tilts import summed, tilt, trained_beta
from jaxalign.types import KL, Array, Decoded, Params, Policy, TokenBatch


def _check(policy: Policy, params: Params, max_new_tokens: int, prompts: TokenBatch) -> None:
    assert policy.check is not None
    policy.check(params, prompts, max_new_tokens)


def _sampled(
    setting: Setting,
    name: str,
    beta: float | None,
    policy: Policy,
    params: Params,
    cost: Callable[[int, int], float] = lambda prompt, length: 1,
    *,
    tilt_beta: float | None = None,
) -> Method:
    """Ancestral sampling from any Policy. cost(prompt, length): tokens through models for each token drawn; tilt_beta:
    of a tilt of the base."""

    policy = policies.with_sampling(policy, setting.sampling)
    kl = decoding.surprisal if setting.greedy else decoding.sum_of_steps

    def draw(rng: Array, prompts: TokenBatch, /) -> Drawn:
        drawn = decoding.sample(policy, params, rng, prompts, **setting.limits)
        return Decoded(drawn, kl(drawn), None)

    whole = setting.sampling == policies.Sampling()
    stepwise = Stepwise(policy, params, setting.limits, kl, tilt_beta if whole and not setting.greedy else None)
    draft = None if setting.draft == "below" and policy.below is None else setting.draft
    if draft is not None:
        return _through_draft(setting, name, beta, stepwise, cost, draft)
    check = functools.partial(_check, policy, params, setting.options.max_new_tokens)
    forwards: Forwards = lambda prompt, length, info: length * cost(prompt, length)  # noqa: E731
    return Method(name, beta, draw, check, policy, forwards, stepwise=stepwise)


def _through_draft(
    setting: Setting,
    name: str,
    beta: float | None,
    stepwise: Stepwise,
    cost: Callable[[int, int], float],
    draft: tuple[Policy, Params] | Literal["below"],
) -> Method:
    """Ancestral sampling through a draft: the same law, and other draws. stepwise: the policy, which is not drawn from
    step by step."""
    policy, params = stepwise.policy, stepwise.params
    if policy.verify is None:
        raise ValueError(
            f"draft: expected methods that read several tokens in one pass, found {name}, which would be slower "
            "(frequencies that depend on the text's length)"
        )
    tokens, most = setting.options.draft_tokens, setting.options.max_new_tokens
    proposes, own = (draft, None) if draft == "below" else draft
    both = {"target": params} if draft == "below" else {"target": params, "draft": own}

    def draw(rng: Array, prompts: TokenBatch, /) -> Drawn:
        found = decoding.speculative(policy, proposes, both, rng, prompts, draft_tokens=tokens, **setting.limits)
        return found._replace(kl=decoding.surprisal(found.completions)) if setting.greedy else found

    def check(prompts: TokenBatch, /) -> None:
        _check(policy, params, most, prompts)
        if isinstance(proposes, Policy):
            _check(proposes, own, most, prompts)

    def forwards(prompt: int, length: int, info: Mapping[str, float], /) -> float:
        # A round reads G + 1 tokens with the target and steps the draft as often; a base that drafts is not read again.
        return info["rounds"] * (tokens + 1) * (cost(prompt, length) + (draft != "below"))

    return Method(name, beta, draw, check, (policy, proposes, tokens), forwards, stepwise=stepwise)


def _of_base(
    setting: Setting, name: str, beta: float | None, draw: Any, *, trace: Hashable, forwards: Forwards
) -> Method:
    """A method that draws from the base."""
    check = functools.partial(_check, setting.proposal, setting.params, setting.options.max_new_tokens)
    return Method(name, beta, draw, check, trace, forwards)


def _base(setting: Setting, spec: Spec) -> list[Method]:
    return [_sampled(setting, spec.name, None, setting.base, setting.params)]


def _policy(setting: Setting, spec: Spec) -> list[Method]:
    """An aligned model, whose KL is to the base, which is read beside it."""
    lm, params = setting.loaded[spec.name]
    check_language_model(spec.name, lm, spec.target)
    aligned = policies.with_reference(policies.language_model(lm), setting.base)
    both = {"policy": params, "reference": setting.params}
    return [_sampled(setting, spec.name, None, aligned, both)]


def _tilt(setting: Setting, spec: Spec) -> list[Method]:
    """A tilt of the base at each beta: one Policy, so one trace."""
    part = summed(setting, spec.terms)
    if setting.draft is not None and part.critic.verify is None:
        raise ValueError(
            f"draft: expected critics that score every token at once (genarm, Q heads), found {spec.name}, which reads "
            "one token at a time and would be slower"
        )
    policy, params_at, cost = tilt(setting, part)
    if part.strength not in (None, "beta"):  # n or nats: a method of its own in tables, since it is no beta
        return [_sampled(setting, f"{spec.name}@{s:g}", None, policy, params_at(s), cost) for s in spec.strengths]
    betas = spec.strengths or (trained_beta(setting, spec.terms),)
    out = []
    for beta in betas:
        params = params_at(beta)
        out.append(_sampled(setting, spec.name, beta, policy, params, cost, tilt_beta=float(params["beta"])))
    return out


def _best_of_n(setting: Setting, spec: Spec) -> list[Method]:
    """Best of n of the base by the proxy."""
    scorer = setting.reward
    both = {"policy": setting.params, "reward": scorer.params}

    def at(n: int) -> Method:
        stages = drop_stages(setting.options, n)

        def draw(rng: Array, prompts: TokenBatch, /) -> Drawn:
            return decoding.best_of_n(
                setting.proposal, scorer.reward, both, rng, prompts, num_samples=n, drop=stages, **setting.limits
            )

        def forwards(prompt: int, length: int, info: Mapping[str, float], /) -> float:
            left, begin, total = n, 0, 0.0
            for end, keep in (*stages, (length, 0)):  # what is left draws to the end and is scored from the prompt on
                end = min(end, length)
                total += left * (prompt + end + max(end - begin, 0))
                begin, left = end, keep
            return total

        return _of_base(setting, f"best_of_{n}", None, draw, trace=("best_of_n", n, stages), forwards=forwards)

    return [at(int(n)) for n in spec.strengths]


def _blockwise(setting: Setting, spec: Spec) -> list[Method]:
    """Blocks of the base, selected by a critic that steps with it."""
    part = summed(setting, spec.terms)
    if part.at is not None:
        raise ValueError(f"method: expected {part.strength} in the reading, as soft(beta=0.5), found {spec.text!r}")
    both = {"policy": setting.params, "critic": part.params}

    def at(n: int, block_size: int) -> Method:
        def draw(rng: Array, prompts: TokenBatch, /) -> Drawn:
            return decoding.blockwise(
                setting.proposal,
                part.critic,
                both,
                rng,
                prompts,
                num_samples=n,
                block_size=block_size,
                **setting.limits,
            )

        return _of_base(
            setting,
            f"blockwise_{n}x{block_size} {spec.name.partition(':')[2]}",
            None,
            draw,
            trace=("blockwise", part.critic, n, block_size),
            forwards=lambda prompt, length, info: n * length * (1 + part.cost(prompt, length, 1)),
        )

    return [at(int(k), block) for block in setting.options.block_size for k in spec.strengths]


def _beam(setting: Setting, spec: Spec) -> list[Method]:
    """Beams of the base, selected block by block by a critic that steps with it."""
    part = summed(setting, spec.terms)
    if part.at is not None:
        raise ValueError(f"method: expected {part.strength} in the reading, as soft(beta=0.5), found {spec.text!r}")
    both, n = {"policy": setting.params, "critic": part.params}, setting.options.continuations

    def at(width: int, block: int) -> Method:
        def draw(rng: Array, prompts: TokenBatch, /) -> Drawn:
            return decoding.beam(
                setting.proposal,
                part.critic,
                both,
                rng,
                prompts,
                width=width,
                num_samples=n,
                block_size=block,
                **setting.limits,
            )

        return _of_base(
            setting,
            f"beam_{width}x{n}x{block} {spec.name.partition(':')[2]}",
            None,
            draw,
            trace=("beam", part.critic, width, n, block),
            forwards=lambda prompt, length, info: width * n * length * (1 + part.cost(prompt, length, 1)),
        )

    return [at(int(width), block) for block in setting.options.block_size for width in spec.strengths]


def _re_control(setting: Setting, spec: Spec) -> list[Method]:
    """The base's hidden states, edited by a value head on them."""
    lm, params = setting.loaded[spec.name]
    body, own = (jax.tree.leaves(p["transformer"]) for p in (setting.params, params))
    known = is_concrete(body, own)  # a dry run has shapes alone
    if len(body) != len(own) or (known and not all(np.array_equal(a, b) for a, b in zip(body, own, strict=True))):
        raise ValueError(
            f"{spec.name}: expected a head on the base's own hidden states (train.value --frozen), found another model"
        )
    value = policies.head_value(lm)
    edited = policies.re_control(setting.base, setting.lm.logits, value, num_steps=setting.options.gradient_steps)

    def params_at(size: float) -> Params:
        return {"policy": setting.params, "value": params, "step_size": jnp.asarray(size, jnp.float32)}

    return [_sampled(setting, spec.name, size, edited, params_at(size)) for size in spec.strengths]


def _ggro(setting: Setting, spec: Spec) -> list[Method]:
    """Greedy text of the base in segments, each begun by the token that the proxy's gradient proposes; for each number
    of candidates per segment."""
    scorer, lm, options = setting.reward, setting.reward_lm, setting.options
    if lm is None:
        raise ValueError(
            f"reward: expected the folder of a reward model, whose gradient ggro reads, found {options.reward!r}"
        )
    tail, ends = rewards.template_tail(setting.reader, lm)
    label = rewards.split_label(options.reward)[1]
    gradient = rewards.token_gradient(lm, label=label, tail=tail, ends=ends)
    params = {
        "policy": setting.params,
        "reward": scorer.params,
        "entropy_threshold": options.entropy_threshold,
    }
    top_k = setting.lm.vocab_size if options.top_k == 0 else (options.top_k or 10)

    def at(n: int) -> Method:
        def draw(rng: Array, prompts: TokenBatch, /) -> Drawn:
            return decoding.ggro(
                setting.base, None, gradient, params, rng, prompts, num_samples=n, top_k=top_k, **setting.untempered
            )

        return _of_base(setting, f"ggro_{n}", None, draw, trace=("ggro", gradient, top_k), forwards=_ggro_forwards)

    return [at(int(n)) for n in spec.strengths]


def _ggro_forwards(prompt: int, length: int, info: Mapping[str, float], /) -> float:
    # The reward reads the prompt once and then each candidate text alone; the way back to one embedding costs about as
    # much as the way there.
    share = info["gradient_passes"] / max(info["reward_passes"], 1)
    return prompt + info["policy_steps"] * (2 + share)


def _smc(setting: Setting, spec: Spec) -> list[Method]:
    """One particle of SMC towards the response-level optimum at beta, proposed by the base or by its tilt at the same
    beta. Candidates of a scalar head cut the target, as truncated_support in the responses tells."""
    scorer, n = setting.reward, setting.options.num_particles
    proposal = setting.base
    params_at: Callable[[float], Params] = lambda beta: setting.params  # noqa: E731
    cost: Callable[[int, int], float] = lambda prompt, length: 1.0  # noqa: E731
    if spec.terms:
        part = summed(setting, spec.terms)
        if part.strength not in (None, "beta"):
            raise ValueError(f"method: expected {part.strength} in the reading of a proposal, found {spec.text!r}")
        proposal, params_at, cost = tilt(setting, part)

    def at(beta: float) -> Method:
        own = params_at(beta)
        three = {"policy": own, "reward": scorer.params, "beta": jnp.asarray(beta, jnp.float32)}

        def draw(rng: Array, prompts: TokenBatch, /) -> Drawn:
            return decoding.smc(proposal, scorer.reward, three, rng, prompts, num_particles=n, **setting.untempered)

        return Method(
            spec.name,
            beta,
            draw,
            functools.partial(_check, proposal, own, setting.options.max_new_tokens),
            ("smc", proposal, n),
            lambda prompt, length, info: n * ((cost(prompt, length) + 1) * length + prompt),
        )

    return [at(beta) for beta in spec.strengths]


def _quest(setting: Setting, spec: Spec) -> list[Method]:
    """The last state of a chain of QUEST. Its law after finitely many moves is not known; the KL reported is that of
    the stationary law, E[r]/beta − log Z, both from the same weighted base samples: at most log of their number."""
    scorer, num_steps, samples = setting.reward, setting.options.num_steps, setting.options.num_samples
    both = {"policy": setting.params, "reward": scorer.params}
    known: dict[bytes, Array] = {}  # rewards of base samples, which serve every beta

    def base_rewards(rng: Array, prompts: TokenBatch) -> Array:
        name = np.asarray(prompts.tokens).tobytes() + np.asarray(prompts.index).tobytes()
        if name not in known:
            chunk = 8 if samples % 8 == 0 else None
            key = jax.random.fold_in(rng, 2)
            drawn = decoding.best_of_n(
                setting.proposal, scorer.reward, both, key, prompts, num_samples=samples, chunk=chunk, **setting.limits
            )
            known[name] = drawn.info.reward
        return known[name]

    def at(beta: float) -> Method:
        three = both | {"beta": jnp.asarray(beta, jnp.float32)}

        def draw(rng: Array, prompts: TokenBatch, /) -> Drawn:
            return decoding.quest(
                setting.proposal, scorer.reward, three, rng, prompts, num_steps=num_steps, **setting.limits
            )

        def measure(rng: Array, prompts: TokenBatch, drawn: Drawn, /) -> Drawn:
            even = jnp.full(samples, -np.log(samples))
            kl = gibbs.kl(gibbs.log_policy(even, base_rewards(rng, prompts), beta=beta), even)
            formula = f"of the stationary law, from {samples} samples, at most log {samples}"
            return drawn._replace(kl=KL(kl, "stationary_estimate", formula, drawn.kl.reference))

        made = _of_base(
            setting,
            f"quest_{num_steps}",
            beta,
            draw,
            trace=("quest", num_steps),
            forwards=lambda prompt, length, info: (num_steps + 1) * (prompt + 2 * length),
        )
        return made._replace(measure=measure)

    return [at(beta) for beta in spec.strengths]


def _cards(setting: Setting, spec: Spec) -> list[Method]:
    """Segments of the base that pass the proxy's threshold."""
    scorer, options = setting.reward, setting.options
    threshold = default_threshold(setting) if options.reward_threshold is None else options.reward_threshold
    params = {"policy": setting.params, "reward": scorer.params}
    given = {"reward_threshold": threshold, "entropy_threshold": options.entropy_threshold}
    params |= {name: jnp.asarray(value, jnp.float32) for name, value in given.items()}

    def at(beta: float) -> Method:
        own = params | {"beta": jnp.asarray(beta, jnp.float32)}

        def draw(rng: Array, prompts: TokenBatch, /) -> Drawn:
            return decoding.cards(
                setting.proposal, scorer.reward, own, rng, prompts, max_tries=options.max_tries, **setting.limits
            )

        return _of_base(
            setting,
            "cards",
            beta,
            draw,
            trace=("cards", options.max_tries),
            forwards=lambda prompt, length, info: info["policy_steps"] + info["tries"] * (prompt + length / 2),
        )

    return [at(beta) for beta in spec.strengths]


METHODS: dict[str, Callable[[Setting, Spec], list[Method]]] = {
    "base": _base,
    "policy": _policy,
    "tilt": _tilt,
    "best_of_n": _best_of_n,
    "blockwise": _blockwise,
    "beam": _beam,
    "re_control": _re_control,
    "ggro": _ggro,
    "smc": _smc,
    "quest": _quest,
    "cards": _cards,
    "function": functions.build,
}
"""Name in `specs.KINDS` -> builder(setting, spec): the methods of one spec, one per strength."""
