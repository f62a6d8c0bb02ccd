"""One builder per way of decoding: it binds models and numbers into an `engine.Method`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import decoding, gibbs, metrics, policies, rewards
from jaxalign.evaluation import functions
from jaxalign.evaluation.engine import Drawn, Forwards, Method
from jaxalign.evaluation.loading import check_language_model
from jaxalign.evaluation.settings import Setting, default_threshold
from jaxalign.evaluation.specs import Spec
from jaxalign.evaluation.tilts import summed, tilt, trained_beta
from jaxalign.types import KL, Array, Completions, Decoded, Params, Policy, TokenBatch


def _check(policy: Policy, params: Params, max_new_tokens: int, prompts: TokenBatch) -> None:
    assert policy.check is not None
    policy.check(params, prompts, max_new_tokens)


def _surprisal(drawn: Completions) -> KL:
    """The KL of a deterministic decoder."""
    return KL(-drawn.log_prob_ref.sum(axis=1), "surprisal")


def _sampled(
    setting: Setting,
    name: str,
    beta: float | None,
    policy: Policy,
    params: Params,
    cost: Callable[[int, int], float] = lambda prompt, length: 1,
) -> Method:
    """Ancestral sampling from any Policy. cost(prompt, length): tokens through models for each token drawn."""

    def draw(rng: Array, prompts: TokenBatch, /) -> Drawn:
        drawn = decoding.sample(policy, params, rng, prompts, **setting.limits)
        if setting.options.temperature == 0:
            return Decoded(drawn, _surprisal(drawn), None)
        assert drawn.kl is not None
        return Decoded(drawn, KL(drawn.kl.sum(axis=1), "exact"), None)

    check = functools.partial(_check, policy, params, setting.options.max_new_tokens)
    return Method(name, beta, draw, check, policy, lambda prompt, length, info: length * cost(prompt, length))


def _of_base(
    setting: Setting, name: str, beta: float | None, draw: Any, *, trace: Hashable, forwards: Forwards
) -> Method:
    """A method that draws from the base."""
    check = functools.partial(_check, setting.base, setting.params, setting.options.max_new_tokens)
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
    policy, params_at, cost = tilt(setting, part)
    betas = spec.strengths or (trained_beta(setting, spec.terms),)
    return [_sampled(setting, spec.name, beta, policy, params_at(beta), cost) for beta in betas]


def _best_of_n(setting: Setting, spec: Spec) -> list[Method]:
    """Best of n of the base by the proxy."""
    scorer = setting.reward
    both = {"policy": setting.params, "reward": scorer.params}

    def at(n: int) -> Method:
        def draw(rng: Array, prompts: TokenBatch, /) -> Drawn:
            found = decoding.best_of_n(setting.base, scorer.reward, both, rng, prompts, n=n, **setting.limits)
            bound = jnp.full(found.reward.shape[0], metrics.best_of_n_kl_bound(n))
            return Decoded(found.best, KL(bound, f"bound{setting.tempered}"), None)

        return _of_base(
            setting,
            f"best_of_{n}",
            None,
            draw,
            trace=("best_of_n", n),
            forwards=lambda prompt, length, info: n * (prompt + 2 * length),
        )

    return [at(int(n)) for n in spec.strengths]


def _blockwise(setting: Setting, spec: Spec) -> list[Method]:
    """Blocks of the base, selected by a critic that steps beside it."""
    part = summed(setting, spec.terms)
    both = {"policy": setting.params, "critic": part.params}

    def at(candidates: int, block: int) -> Method:
        def draw(rng: Array, prompts: TokenBatch, /) -> Drawn:
            drawn = decoding.blockwise(
                setting.base, part.critic, both, rng, prompts, candidates=candidates, block=block, **setting.limits
            )
            bound = [
                metrics.blockwise_kl_bound(row, block_size=block, num_samples=candidates)
                for row in np.asarray(drawn.mask)
            ]
            return Decoded(drawn, KL(jnp.asarray(bound), f"bound{setting.tempered}"), None)

        return _of_base(
            setting,
            f"blockwise_{candidates}x{block} {spec.name.partition(':')[2]}",
            None,
            draw,
            trace=("blockwise", part.critic, candidates, block),
            forwards=lambda prompt, length, info: candidates * length * (1 + part.cost(prompt, length, 1)),
        )

    return [at(int(k), block) for block in setting.options.block_size for k in spec.strengths]


def _re_control(setting: Setting, spec: Spec) -> list[Method]:
    """The base's hidden states, edited by a value head on them."""
    lm, params = setting.loaded[spec.name]
    body, own = (jax.tree.leaves(p["transformer"]) for p in (setting.params, params))
    if len(body) != len(own) or not all(np.array_equal(a, b) for a, b in zip(body, own, strict=True)):
        raise ValueError(
            f"{spec.name}: expected a head on the base's own hidden states (train.value --frozen), found another model"
        )
    value = policies.head_value(lm)
    edited = policies.re_control(setting.base, setting.lm.logits, value, steps=setting.options.gradient_steps)

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
    gain = rewards.token_gradient(lm)
    both = {"policy": setting.params, "reward": scorer.params}
    top_k = setting.lm.vocab_size if options.top_k == 0 else (options.top_k or 10)

    def at(candidates: int) -> Method:
        def draw(rng: Array, prompts: TokenBatch, /) -> Drawn:
            found = decoding.ggro(
                setting.base,
                None,
                gain,
                both,
                rng,
                prompts,
                candidates=candidates,
                threshold=options.entropy_threshold,
                top_k=top_k,
                **setting.untempered,
            )
            info = {name: getattr(found, name) for name in ("segments", "tokens", "scored", "gradients")}
            return Decoded(found.completions, _surprisal(found.completions), info)

        return _of_base(setting, f"ggro_{candidates}", None, draw, trace=("ggro", gain, top_k), forwards=_ggro_forwards)

    return [at(int(n)) for n in spec.strengths]


def _ggro_forwards(prompt: int, length: int, info: Mapping[str, float], /) -> float:
    # The reward reads the prompt once and then each candidate text alone; the way back to one embedding costs about as
    # much as the way there.
    share = info["gradients"] / max(info["scored"], 1)
    return prompt + info["tokens"] * (2 + share)


def _smc(setting: Setting, spec: Spec) -> list[Method]:
    """One particle of SMC towards the response-level optimum at beta, proposed by the base or by its tilt at the same
    beta. Candidates of a scalar head cut the target, as truncated_support in the responses tells."""
    scorer, n = setting.reward, setting.options.num_particles
    proposal = setting.base
    params_at: Callable[[float], Params] = lambda beta: setting.params  # noqa: E731
    cost: Callable[[int, int], float] = lambda prompt, length: 1.0  # noqa: E731
    if spec.terms:
        proposal, params_at, cost = tilt(setting, summed(setting, spec.terms))

    def at(beta: float) -> Method:
        own = params_at(beta)
        three = {"policy": own, "reward": scorer.params, "beta": jnp.asarray(beta, jnp.float32)}

        def draw(rng: Array, prompts: TokenBatch, /) -> Drawn:
            found = decoding.smc(proposal, scorer.reward, three, rng, prompts, particles=n, **setting.untempered)
            info = {name: getattr(found, name) for name in ("ess", "log_z", "resamplings", "truncated_support")}
            return Decoded(found.pick, KL(found.kl, "estimate"), info)

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
    scorer, moves, samples = setting.reward, setting.options.num_steps, setting.options.num_samples
    both = {"policy": setting.params, "reward": scorer.params}
    known: dict[bytes, Array] = {}  # rewards of base samples, which serve every beta

    def base_rewards(rng: Array, prompts: TokenBatch) -> Array:
        name = np.asarray(prompts.tokens).tobytes() + np.asarray(prompts.index).tobytes()
        if name not in known:
            chunk = 8 if samples % 8 == 0 else None
            key = jax.random.fold_in(rng, 2)
            drawn = decoding.best_of_n(
                setting.base, scorer.reward, both, key, prompts, n=samples, chunk=chunk, **setting.limits
            )
            known[name] = drawn.reward
        return known[name]

    def at(beta: float) -> Method:
        three = both | {"beta": jnp.asarray(beta, jnp.float32)}

        def draw(rng: Array, prompts: TokenBatch, /) -> Drawn:
            chain = decoding.quest(setting.base, scorer.reward, three, rng, prompts, moves=moves, **setting.limits)
            unknown = KL(jnp.full(chain.accept_rate.shape, jnp.nan), "estimate")
            return Decoded(chain.last, unknown, {"accept_rate": chain.accept_rate})

        def measure(rng: Array, prompts: TokenBatch, drawn: Drawn, /) -> Drawn:
            even = jnp.full(samples, -np.log(samples))
            kl = gibbs.kl(gibbs.log_policy(even, base_rewards(rng, prompts), beta=beta), even)
            return drawn._replace(kl=KL(kl, f"estimate, of the stationary law{setting.tempered}"))

        made = _of_base(
            setting,
            f"quest_{moves}",
            beta,
            draw,
            trace=("quest", moves),
            forwards=lambda prompt, length, info: (moves + 1) * (prompt + 2 * length),
        )
        return made._replace(measure=measure)

    return [at(beta) for beta in spec.strengths]


def _cards(setting: Setting, spec: Spec) -> list[Method]:
    """Segments of the base that pass the proxy's threshold."""
    scorer, options = setting.reward, setting.options
    threshold = default_threshold(setting) if options.reward_threshold is None else options.reward_threshold
    params = {"policy": setting.params, "reward": scorer.params}
    given = {"threshold": threshold, "entropy": options.entropy_threshold}
    params |= {name: jnp.asarray(value, jnp.float32) for name, value in given.items()}

    def at(beta: float) -> Method:
        own = params | {"beta": jnp.asarray(beta, jnp.float32)}

        def draw(rng: Array, prompts: TokenBatch, /) -> Drawn:
            found = decoding.cards(
                setting.base, scorer.reward, own, rng, prompts, tries=options.max_tries, **setting.limits
            )
            info = {name: getattr(found, name) for name in ("segments", "tries", "capped", "steps")}
            return Decoded(found.completions, KL(found.kl_bound, f"estimate of a bound{setting.tempered}"), info)

        return _of_base(
            setting,
            "cards",
            beta,
            draw,
            trace=("cards", options.max_tries),
            forwards=lambda prompt, length, info: info["steps"] + info["tries"] * (prompt + length / 2),
        )

    return [at(beta) for beta in spec.strengths]


METHODS: dict[str, Callable[[Setting, Spec], list[Method]]] = {
    "base": _base,
    "policy": _policy,
    "tilt": _tilt,
    "best_of_n": _best_of_n,
    "blockwise": _blockwise,
    "re_control": _re_control,
    "ggro": _ggro,
    "smc": _smc,
    "quest": _quest,
    "cards": _cards,
    "function": functions.build,
}
"""Name in `specs.KINDS` -> builder(setting, spec): the methods of one spec, one per strength."""
