"""One entry per Policy and Critic of the library: the laws of the algebra are held against each.

A `Case` is a policy over 11 tokens with its params; `inner` names what it transforms, and `increment` gives what the
transform adds to log_prob − log_prob_ref + log_norm at the token just drawn (law 5).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import critics, models, policies, rewards, tree
from jaxalign.types import Critic, Params, Policy
from tests.conftest import EOS, VOCAB
from tests.conftest import tiny_lm as two_layers

TREE = tree.Tree(VOCAB, 3, eos_id=0)
BETA = jnp.array([0.5, 1.0, 4.0, 0.8, 1.3])


def tiny_lm(seed: int, head: str | None = None, dtype: str = "float32"):
    """One layer: the laws are about the algebra, and each case is compiled several times."""
    return two_layers(seed, head, dtype, num_layers=1)


class Case(NamedTuple):
    policy: Policy
    params: Params


def adapter(lm, seed: int, rank: int = 2) -> tuple[models.Lora, Params]:
    """(spec, a random adapter of lm, which changes its distribution visibly)."""
    spec = models.Lora(rank, alpha=2.0 * rank)
    shapes = jax.eval_shape(functools.partial(models.lora.init, lm=lm, spec=spec), jax.random.key(0))
    draw = np.random.default_rng(seed)
    return spec, jax.tree.map(lambda x: jnp.asarray(0.4 * draw.normal(size=x.shape), x.dtype), shapes)


def stacked_adapters(dtype: str = "float32") -> Case:
    """Two adapters of the base, one of rank 1."""
    lm, params = tiny_lm(0, dtype=dtype)
    parts = [adapter(lm, 1), adapter(lm, 2, rank=1)]
    stacked = jax.jit(models.lora.stack, static_argnums=1)(
        [part for _, part in parts], tuple(spec for spec, _ in parts)
    )
    weights = jnp.array([0.6, 0.9])
    return Case(policies.adapters(lm, 2), {"policy": params, "adapters": stacked, "weights": weights})


class CriticCase(NamedTuple):
    critic: Critic
    params: Params
    needs_hidden: bool = False


def table(seed: int) -> jax.Array:
    return jax.nn.log_softmax(jax.random.normal(jax.random.key(seed), (TREE.num_states, VOCAB)))


def base_lm(dtype: str = "float32") -> Case:
    lm, params = tiny_lm(0, dtype=dtype)
    return Case(policies.language_model(lm), params)


def tabular() -> Case:
    return Case(tree.policy(TREE), table(0))


def weighted_tokens(params, tokens, mask, prompt_length, index):
    """A reward that every part of a text changes: the sum of its tokens' weights [V] by place."""
    return (jnp.where(mask, params[tokens], 0) * jnp.arange(1, mask.shape[1] + 1)).sum(axis=1) / 10


def critic_cases(dtype: str = "float32") -> dict[str, CriticCase]:
    reward_lm, reward_params = tiny_lm(1, "reward", dtype)
    value_lm, value_params = tiny_lm(2, "value", dtype)
    q_lm, q_params = tiny_lm(3, "q", dtype)
    arm_lm, arm_params = tiny_lm(4, None, dtype)
    args = critics.args(reward_lm)
    value = critics.value(value_lm)
    arm = critics.genarm(arm_lm)
    bound = critics.map_scores(args, lambda p, q, log_prob, index: p["scale"][index][:, None] * jnp.tanh(q))
    other = jax.tree.map(lambda x: x * 0.9, arm_params)
    return {
        "args": CriticCase(args, reward_params),
        "value_scalar": CriticCase(value, value_params),
        "value_q": CriticCase(critics.value(q_lm), q_params),
        "hidden_value": CriticCase(critics.hidden_value(q_lm.head, vocab_size=VOCAB), q_params, True),
        "genarm": CriticCase(arm, arm_params),
        "weighted_levels": CriticCase(
            critics.weighted_sum([args, value]),
            {"critics": (reward_params, value_params), "weights": jnp.array([0.7, -0.4])},
        ),
        "weighted_increments": CriticCase(
            critics.weighted_sum([arm, arm]), {"critics": (arm_params, other), "weights": jnp.array([0.5, 0.8])}
        ),
        "map_scores": CriticCase(bound, {"critic": reward_params, "map": {"scale": jnp.linspace(0.5, 1.5, 5)}}),
        "tabular_level": CriticCase(tree.critic(TREE, "level"), table(5) * 0.7),
        "tabular_increment": CriticCase(tree.critic(TREE, "increment"), table(6)),
        "transfer_q": CriticCase(  # of a reward that keeps a prefix, and of one that reads the whole text
            critics.transfer_q(
                policies.language_model(arm_lm),
                rewards.from_model(reward_lm),
                eos_ids=EOS,
                num_samples=2,
                baseline_reward=weighted_tokens,
            ),
            {"baseline": arm_params, "reward": reward_params, "baseline_reward": table(8)[1], "beta": BETA},
        ),
    }


def tabular_transfer() -> CriticCase:
    """Transfer Q* on a table: the critic alone is held to its laws with a model's states, a tilt by it with these."""
    critic = critics.transfer_q(tree.policy(TREE), weighted_tokens, eos_ids=EOS, num_samples=2)
    return CriticCase(critic, {"baseline": table(9), "reward": table(8)[0]})


def policy_cases(dtype: str = "float32") -> dict[str, Case]:
    """Every Policy builder, and a tilt by every critic over the whole vocabulary and over candidates."""
    lm = base_lm(dtype)
    other = tiny_lm(7, dtype=dtype)
    cases = {
        "language_model": lm,
        "tabular": tabular(),
        "temperature": Case(policies.temperature(lm.policy), {"policy": lm.params, "temperature": BETA}),
        "top_k": Case(policies.top_k(lm.policy, 4), lm.params),
        "top_p": Case(policies.top_p(lm.policy), {"policy": lm.params, "top_p": jnp.linspace(0.3, 0.9, 5)}),
        "with_reference": Case(
            policies.with_reference(lm.policy, policies.language_model(other[0])),
            {"policy": lm.params, "reference": other[1]},
        ),
        "adapters": stacked_adapters(dtype),
    }
    value_lm, value_params = tiny_lm(2, "value", dtype)
    cases["re_control"] = Case(
        policies.re_control(lm.policy, tiny_lm(0, dtype=dtype)[0].logits, policies.head_value(value_lm), num_steps=3),
        {"policy": lm.params, "value": value_params, "step_size": BETA / 20},
    )
    q_lm, q_params = tiny_lm(3, "q", dtype)
    cases["re_control_expected"] = Case(
        policies.re_control_expected(lm.policy, tiny_lm(0, dtype=dtype)[0].logits, critics.value(q_lm), num_steps=3),
        {"policy": lm.params, "critic": q_params, "step_size": BETA / 20},
    )
    for name, case in (critic_cases(dtype) | {"transfer_q": tabular_transfer()}).items():
        for k in (None, 4):
            tilted = policies.tilt(lm.policy, case.critic, top_k=k)
            cases[f"tilt_{name}_{k or 'all'}"] = Case(
                tilted, {"policy": lm.params, "critic": case.params, "beta": BETA}
            )
    inner, outer = cases["tilt_value_q_all"], critic_cases(dtype)["genarm"]
    cases["nested"] = Case(
        policies.tilt(inner.policy, outer.critic),
        {"policy": inner.params, "critic": outer.params, "beta": jnp.asarray(2.0)},
    )
    inner = cases["tilt_genarm_4"]
    level = critic_cases(dtype)["args"]
    cases["nested_candidates"] = Case(
        policies.tilt(inner.policy, level.critic, top_k=3),
        {"policy": inner.params, "critic": level.params, "beta": BETA},
    )
    return cases


CRITICS = [
    "args",
    "value_scalar",
    "value_q",
    "hidden_value",
    "genarm",
    "weighted_levels",
    "weighted_increments",
    "map_scores",
    "tabular_level",
    "tabular_increment",
    "transfer_q",
]
POLICIES = [
    "language_model",
    "tabular",
    "temperature",
    "top_k",
    "top_p",
    "with_reference",
    "adapters",
    "re_control",
    "re_control_expected",
    *(f"tilt_{name}_{k}" for name in CRITICS for k in ("all", 4)),
    "nested",
    "nested_candidates",
]
# The laws of policies are held against every transform, and against a tilt by each kind of critic: scored one candidate
# at a time, all at once, as an increment, by roll-outs, and by a combinator. Law 5 is held against every critic.
CHECKED = [
    name
    for name in POLICIES
    if not name.startswith("tilt_")
    or name in ("tilt_args_4", "tilt_value_q_all", "tilt_genarm_all", "tilt_transfer_q_4", "tilt_map_scores_all")
]
