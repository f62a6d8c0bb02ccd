"""Methods for eval.decode and eval.compare: one builder per way of decoding.

A builder binds models and numbers into an `engine.Method`: how to draw, which KL to report and how it is called, and
how many tokens pass through models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import critics, decoding, gibbs, metrics, models, policies, rewards
from jaxalign.evaluation.engine import Extra, Judge, Method, sampled_kl
from jaxalign.evaluation.loading import Model
from jaxalign.types import Array, Completions, Critic, Params, Policy, Reward, TokenBatch

Cost = Callable[[int, int], float]
"""(tokens of the prompt, of the response) -> tokens that pass through models for each token drawn."""


class Setting(NamedTuple):
    """What the methods of a run share. base, params: its policy and parameters; proxy: the reward that methods may use,
    None without one; reward_lm: its model, for methods that differentiate it."""

    lm: models.LanguageModel
    base: Policy
    params: Params
    max_new_tokens: int
    temperature: float
    proxy: Judge | None
    reward_lm: models.LanguageModel | None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.lm.config.eos_ids

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of every decoder."""
        value = 1.0 if self.temperature == 1 else jnp.asarray(self.temperature, jnp.float32)
        return {"max_new_tokens": self.max_new_tokens, "eos_ids": self.eos_ids, "temperature": value}

    @property
    def judge(self) -> Judge:
        """The proxy. ValueError where there is none."""
        if self.proxy is None:
            raise ValueError("reward: expected a reward model that the method selects by, found none")
        return self.proxy

    def tempered(self, bound: str) -> str:
        """A bound to the base is one to the tempered base at another temperature."""
        return bound if self.temperature == 1 else f"{bound}, to the tempered base"


def critic_of(kind: str, lm: models.LanguageModel) -> tuple[Critic, int]:
    """(critic, tokens that pass through its model for each token; 0: as many as there are candidates)."""
    wide = lm.config.head is not None and lm.config.head.kind == "q"
    if kind == "args":
        return critics.args(lm), 0
    if kind == "value":
        return critics.value(lm), int(wide)
    if kind == "follower":
        return critics.follower(lm), int(wide)
    return critics.genarm(lm), 1


def sampled(
    setting: Setting,
    name: str,
    beta: float | None,
    policy: Policy,
    params: Params,
    *,
    per_token: float | Cost = 1.0,
) -> Method:
    """Ancestral sampling from any Policy. per_token: tokens that pass through models for each token drawn."""

    def draw(rng: Array, prompts: TokenBatch) -> tuple[Completions, Extra]:
        return decoding.sample(policy, params, rng, prompts, **setting.options), {}

    kind, kl = "sum of exact per-step KL", sampled_kl
    if setting.temperature == 0:
        kind, kl = "mean -log pi_ref(y)", surprise
    check = functools.partial(_check, policy, params, setting.max_new_tokens)

    def forwards(prompt: int, length: int, told: dict[str, float]) -> float:
        return length * (per_token(prompt, length) if callable(per_token) else per_token)

    return Method(name, beta, draw, kl, kind, check, policy, forwards)


def surprise(host: Completions, told: Extra, b: int) -> float:
    """−log pi_ref(y), the KL of a point mass."""
    return -float(host.log_prob_ref[b].sum())


def _check(policy: Policy, params: Params, max_new_tokens: int, prompts: TokenBatch) -> None:
    assert policy.check is not None
    policy.check(params, prompts, max_new_tokens)


def best_of_n(setting: Setting, n: int) -> Method:
    """Best of n of the base by the proxy."""
    judge = setting.judge
    both = {"policy": setting.params, "reward": judge.params}

    def draw(rng: Array, prompts: TokenBatch) -> tuple[Completions, Extra]:
        found = decoding.best_of_n(setting.base, judge.reward, both, rng, prompts, n=n, **setting.options)
        return found.best, {}

    bound = metrics.best_of_n_kl_bound(n)
    kind = "bound log n - (n-1)/n" if setting.temperature == 1 else "bound, to the tempered base"
    return _of_base(
        setting,
        f"best_of_{n}",
        None,
        draw,
        kind,
        kl=lambda host, told, b: bound,
        trace=("best_of_n", n),
        forwards=lambda prompt, length, told: n * (prompt + 2 * length),
    )


def blockwise(
    setting: Setting,
    name: str,
    critic: Critic,
    critic_params: Params,
    *,
    candidates: int,
    block: int,
    per_token: float | Cost = 1.0,
) -> Method:
    """Blocks of the base, selected by a critic that steps beside it; per_token: of the critic, for one candidate."""
    both = {"policy": setting.params, "critic": critic_params}

    def draw(rng: Array, prompts: TokenBatch) -> tuple[Completions, Extra]:
        options = setting.options | {"candidates": candidates, "block": block}
        return decoding.blockwise(setting.base, critic, both, rng, prompts, **options), {}

    def kl(host: Completions, told: Extra, b: int) -> float:
        return float(metrics.blockwise_kl_bound(np.asarray(host.mask[b]), block_size=block, num_samples=candidates))

    def forwards(prompt: int, length: int, told: dict[str, float]) -> float:
        each = per_token(prompt, length) if callable(per_token) else (per_token or 1.0)
        return candidates * length * (1 + each)

    return _of_base(
        setting,
        f"blockwise_{candidates}x{block} {name}",
        None,
        draw,
        setting.tempered("bound ceil(|y|/M) (log K - (K-1)/K)"),
        kl=kl,
        trace=("blockwise", critic, candidates, block),
        forwards=forwards,
    )


def smc(
    setting: Setting, name: str, beta: float, proposal: Policy, params: Params, *, particles: int, per_token: float
) -> Method:
    """One particle of SMC towards the response-level optimum at beta, proposed by any Policy."""
    judge = setting.judge
    three = {"policy": params, "reward": judge.params, "beta": jnp.asarray(beta, jnp.float32)}
    options = {name: value for name, value in setting.options.items() if name != "temperature"}

    def draw(rng: Array, prompts: TokenBatch) -> tuple[Completions, Extra]:
        found = decoding.smc(proposal, judge.reward, three, rng, prompts, particles=particles, **options)
        told = {"estimated_kl": found.kl, "ess": found.ess, "log_z": found.log_z, "resamplings": found.resamplings}
        told["truncated_support"] = found.truncated_support
        return found.pick, told

    return Method(
        name,
        beta,
        draw,
        lambda host, told, b: float(told["estimated_kl"][b]),
        "estimate E[r]/beta - log Z",
        functools.partial(_check, proposal, params, setting.max_new_tokens),
        ("smc", proposal, particles),
        lambda prompt, length, told: particles * ((per_token + 1) * length + prompt),
    )


def quest(setting: Setting, betas: Sequence[float], *, moves: int, samples: int) -> list[Method]:
    """The last state of a chain of QUEST. Its law after finitely many moves is not known; the KL reported is that of
    the stationary law, E[r]/beta − log Z, both from the same weighted base samples: at most log of their number."""
    judge = setting.judge
    both = {"policy": setting.params, "reward": judge.params}
    known: dict[bytes, Array] = {}  # rewards of base samples, which serve every beta

    def base_rewards(rng: Array, prompts: TokenBatch) -> Array:
        name = np.asarray(prompts.tokens).tobytes() + np.asarray(prompts.index).tobytes()
        if name not in known:
            options = setting.options | {"n": samples, "chunk": 8}
            drawn = decoding.best_of_n(setting.base, judge.reward, both, jax.random.fold_in(rng, 2), prompts, **options)
            known[name] = drawn.reward
        return known[name]

    def at(beta: float) -> Method:
        three = both | {"beta": jnp.asarray(beta, jnp.float32)}

        def draw(rng: Array, prompts: TokenBatch) -> tuple[Completions, Extra]:
            chain = decoding.quest(setting.base, judge.reward, three, rng, prompts, moves=moves, **setting.options)
            return chain.last, {"accept_rate": chain.accept_rate}

        def measure(rng: Array, prompts: TokenBatch, told: Extra) -> Extra:
            even = jnp.full(samples, -np.log(samples))
            reward = base_rewards(rng, prompts)
            return {"stationary_kl": gibbs.kl(gibbs.log_policy(even, reward, beta=beta), even)}

        made = _of_base(
            setting,
            f"quest_{moves}",
            beta,
            draw,
            setting.tempered(f"of the stationary law, from {samples} samples, at most log {samples}"),
            kl=lambda host, told, b: float(told["stationary_kl"][b]),
            trace=("quest", moves),
            forwards=lambda prompt, length, told: (moves + 1) * (prompt + 2 * length),
        )
        return made._replace(measure=measure)

    return [at(beta) for beta in betas]


def cards(setting: Setting, beta: float, *, goal: float, entropy: float, tries: int) -> Method:
    """Segments of the base that pass the proxy's goal."""
    judge = setting.judge
    params = {"policy": setting.params, "reward": judge.params, "beta": jnp.asarray(beta, jnp.float32)}
    params |= {name: jnp.asarray(value, jnp.float32) for name, value in (("threshold", goal), ("entropy", entropy))}

    def draw(rng: Array, prompts: TokenBatch) -> tuple[Completions, Extra]:
        found = decoding.cards(setting.base, judge.reward, params, rng, prompts, tries=tries, **setting.options)
        told = {"segments": found.segments, "tries": found.tries, "capped": found.capped, "steps": found.steps}
        told["kl_bound"] = found.kl_bound
        return found.completions, told

    def forwards(prompt: int, length: int, told: dict[str, float]) -> float:
        return told["steps"] + told["tries"] * (prompt + length / 2)

    return _of_base(
        setting,
        "cards",
        beta,
        draw,
        setting.tempered("estimated bound, sum over segments of -log(share that passes)"),
        kl=lambda host, told, b: float(told["kl_bound"][b]),
        trace=("cards", tries),
        forwards=forwards,
    )


def nudge(setting: Setting, counts: Sequence[int], *, entropy: float, top_k: int) -> list[Method]:
    """GGRO: greedy text of the base in segments, each begun by the token that the proxy's gradient proposes; for each
    number of forms per segment."""
    judge, lm = setting.judge, setting.reward_lm
    if lm is None:
        raise ValueError("reward: expected a reward model, whose gradient GGRO takes, found a program")
    gain = rewards.token_gradient(lm)  # one for all: a new one is a new trace
    both = {"policy": setting.params, "reward": judge.params}
    options: dict[str, Any] = {"max_new_tokens": setting.max_new_tokens, "eos_ids": setting.eos_ids, "top_k": top_k}

    def at(candidates: int) -> Method:
        def draw(rng: Array, prompts: TokenBatch) -> tuple[Completions, Extra]:
            found = decoding.ggro(
                setting.base, None, gain, both, rng, prompts, candidates=candidates, threshold=entropy, **options
            )
            told = {name: getattr(found, name) for name in ("segments", "tokens", "scored", "gradients")}
            return found.completions, {f"nudge_{name}": value for name, value in told.items()}

        return _of_base(
            setting,
            f"ggro_{candidates}",
            None,
            draw,
            "mean -log pi_ref(y)",
            kl=surprise,
            trace=("ggro", gain, top_k),
            forwards=_nudge_forwards,
        )

    return [at(candidates) for candidates in counts]


def _nudge_forwards(prompt: int, length: int, told: dict[str, float]) -> float:
    del length
    # The reward reads the prompt once and then each form alone; the way back to one embedding costs about as much.
    share = told["nudge_gradients"] / max(told["nudge_scored"], 1)
    return prompt + told["nudge_tokens"] * (2 + share)


def _of_base(
    setting: Setting, name: str, beta: float | None, draw: Any, kind: str, *, kl: Any, trace: Hashable, forwards: Any
) -> Method:
    check = functools.partial(_check, setting.base, setting.params, setting.max_new_tokens)
    return Method(name, beta, draw, kl, kind, check, trace, forwards)


def tilted(
    setting: Setting,
    name: str,
    critic: Critic,
    critic_params: Params,
    betas: Sequence[float],
    *,
    top_k: int | None,
    per_token: float | Cost,
) -> list[Method]:
    """A tilt of the base at each beta; one Policy, so one trace. per_token: of the critic; 0: one a candidate."""
    policy = policies.tilt(setting.base, critic, top_k=top_k)
    each = per_token or top_k or setting.lm.vocab_size
    cost: float | Cost = (lambda prompt, length: 1 + each(prompt, length)) if callable(each) else 1 + each
    out = []
    for beta in betas:
        used = beta if critic.beta is None else critic.beta
        params = {"policy": setting.params, "critic": critic_params, "beta": jnp.asarray(used, jnp.float32)}
        out.append(sampled(setting, name, beta, policy, params, per_token=cost))
    return out


def transfer(setting: Setting, baseline: Model, *, rollouts: int, lookahead: int | None) -> tuple[Critic, Params]:
    """Direct transfer from an aligned model, scored by the proxy."""
    lm, params = baseline
    judge = setting.judge
    reward: Reward = judge.reward if setting.reward_lm is None else rewards.from_model(setting.reward_lm)
    critic = critics.transfer_q(
        policies.language_model(lm), reward, eos_ids=setting.eos_ids, rollouts=rollouts, lookahead=lookahead
    )
    return critic, {"baseline": params, "reward": judge.params}


def transfer_cost(*, top_k: int, rollouts: int, lookahead: int | None) -> Cost:
    """Each candidate steps the baseline, is rolled out for half the response on average (or the look-ahead), and the
    reward reads it with each roll-out, after a prefix that it keeps."""

    def cost(prompt: int, length: int) -> float:
        del prompt
        ahead = length / 2 if lookahead is None else min(lookahead, length / 2)
        texts = rollouts if ahead else 1
        return top_k * ((1 if ahead else 0) + texts * (ahead + 1 + ahead))

    return cost
