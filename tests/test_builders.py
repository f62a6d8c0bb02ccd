"""Builders of policies and critics: equal calls give one object, and calls inside an expression compile once."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from jaxalign import critics, decoding, models, policies, pools, rewards, tree
from jaxalign._builders import cached
from tests import cases
from tests.conftest import EOS, PROMPTS, VOCAB, needs_jit, padded

TRACES = [0]
COMPILED = "/jax/core/compile/backend_compile_duration"


def _count(event: str, duration: float, **_: object) -> None:
    TRACES[0] += event == COMPILED


jax.monitoring.register_event_duration_secs_listener(_count)

LM, PARAMS = cases.tiny_lm(0)
REWARD, REWARD_PARAMS = cases.tiny_lm(1, "reward")
VALUE, VALUE_PARAMS = cases.tiny_lm(2, "value")
LAWS = models.with_head(VALUE, models.Head("q", distribution=models.Distribution((0.0, 1.0, 2.0))))
LAWS_PARAMS = LAWS.init(jax.random.key(3))
Q, Q_PARAMS = cases.tiny_lm(3, "q")
SHAPED = dataclasses.replace(Q.config.head, follower=models.Follower("soft", beta=1.0, bound=1.0))
FOLLOWER = models.with_head(Q, SHAPED)


def halved(map_params, q, log_prob, index):
    return q / 2


def logits(params, tokens, mask):
    return LM.apply(params, tokens, mask=mask).logits


def base():
    """The base policy of an equal model, which is another object at each call."""
    return policies.language_model(models.LanguageModel(LM.config, LM.dtype))


POLICIES = {
    "language_model": lambda: (base(), PARAMS),
    "tilt": lambda: (
        policies.tilt(base(), critics.args(REWARD), top_k=3),
        policies.TiltParams(PARAMS, REWARD_PARAMS, 1.0),
    ),
    "temperature": lambda: (policies.temperature(base()), policies.TemperatureParams(PARAMS, jnp.asarray(0.7))),
    "with_sampling": lambda: (policies.with_sampling(base(), policies.Sampling(0.7, 3, 0.9)), PARAMS),
    "top_p": lambda: (policies.top_p(base()), policies.TopPParams(PARAMS, 0.7)),
    "top_k": lambda: (policies.top_k(base(), 3), PARAMS),
    "with_reference": lambda: (
        policies.with_reference(base(), base()),
        policies.ReferenceParams(PARAMS, PARAMS),
    ),
    "from_apply": lambda: (policies.from_apply(logits, vocab_size=VOCAB, eos_ids=EOS), PARAMS),
    "min_p": lambda: (policies.min_p(base()), policies.MinPParams(PARAMS, 0.1)),
    "typical": lambda: (policies.typical(base()), policies.TypicalParams(PARAMS, 0.7)),
    "mix": lambda: (policies.mix([base(), base()]), policies.PoliciesParams([PARAMS, PARAMS], jnp.ones(2))),
    "product": lambda: (policies.product([base(), base()]), policies.PoliciesParams([PARAMS, PARAMS], jnp.ones(2))),
    "kl_budget": lambda: (
        policies.kl_budget(base(), critics.genarm(LM)),
        policies.KLBudgetParams(PARAMS, PARAMS, 0.1),
    ),
    "adapters": lambda: (policies.adapters(LM, 2), cases.stacked_adapters().params),
    "re_control": lambda: (
        policies.re_control(base(), LM.logits, policies.head_value(VALUE), num_steps=1),
        policies.ReControlParams(PARAMS, VALUE_PARAMS, 0.1),
    ),
    "re_control_expected": lambda: (
        policies.re_control_expected(base(), LM.logits, critics.value(Q), num_steps=1),
        policies.ReControlExpectedParams(PARAMS, Q_PARAMS, 0.1),
    ),
    "head_value": lambda: (
        policies.re_control(base(), LM.logits, policies.head_value(VALUE), num_steps=1, max_norm=0.5),
        policies.ReControlParams(PARAMS, VALUE_PARAMS, 0.1),
    ),
}
CRITICS = {
    "args": lambda: (critics.args(REWARD), REWARD_PARAMS),
    "value": lambda: (critics.value(VALUE), VALUE_PARAMS),
    "hidden_value": lambda: (critics.hidden_value(Q.head, vocab_size=VOCAB), Q_PARAMS),
    "genarm": lambda: (critics.genarm(LM), PARAMS),
    "follower": lambda: (critics.follower(FOLLOWER), Q_PARAMS),
    "distribution": lambda: (
        critics.distribution(LAWS, critics.reads.soft()),
        critics.DistributionParams(LAWS_PARAMS, {"beta": jnp.asarray(0.5)}),
    ),
    "from_policy": lambda: (critics.from_policy(base()), PARAMS),
    "from_apply": lambda: (critics.from_apply(logits, kind="increment", vocab_size=VOCAB), PARAMS),
    "increment_of": lambda: (critics.increment_of(critics.value(Q)), Q_PARAMS),
    "pool": lambda: (
        critics.pool([critics.value(Q), critics.value(Q)], pools.minimum),
        critics.PoolParams([Q_PARAMS, Q_PARAMS]),
    ),
    "level_of": lambda: (critics.level_of(critics.genarm(LM)), PARAMS),
    "weighted_sum": lambda: (
        critics.weighted_sum([critics.args(REWARD), critics.value(VALUE)]),
        critics.WeightedSumParams([REWARD_PARAMS, VALUE_PARAMS], jnp.array([0.5, 0.5])),
    ),
    "map_scores": lambda: (
        critics.map_scores(critics.args(REWARD), halved),
        critics.MapScoresParams(REWARD_PARAMS, None),
    ),
    "shaped_over_candidates": lambda: (
        critics.shaped_over_candidates(critics.args(REWARD), beta=1.0),
        critics.ShapedParams(REWARD_PARAMS, 1.0),
    ),
    "transfer_q": lambda: (
        critics.transfer_q(base(), cases.weighted_tokens, eos_ids=list(EOS), num_samples=1),
        critics.TransferQParams(reward=cases.table(8)[0], baseline=PARAMS),
    ),
}


def tilted(name):
    critic, params = CRITICS[name]()
    return policies.tilt(base(), critic, top_k=3), policies.TiltParams(PARAMS, params, 1.0)


def builders(package: types.ModuleType) -> set[str]:
    """The functions of a package that build something, by its face."""
    no_builders = {"from_equinox", "from_nnx", "from_torch", "linear_value", "read_generation_config"}
    no_builders |= {"effective_rollouts", "laws", "look_up", "reads"}
    return {name for name in package.__all__ if not isinstance(getattr(package, name), type)} - no_builders


def test_every_builder_is_counted_here():
    assert builders(policies) == set(POLICIES)
    assert builders(critics) == set(CRITICS)


@needs_jit
@pytest.mark.parametrize("name", [*POLICIES, *CRITICS])
def test_three_calls_with_builders_inside_compile_once(name):
    prompts, counts = padded(PROMPTS), []
    jax.clear_caches()  # "args" is the program of "tilt"
    for seed in range(3):
        key = jax.random.key(seed)
        before = TRACES[0]
        policy, params = POLICIES[name]() if name in POLICIES else tilted(name)
        decoding.sample(policy, params, key, prompts, max_new_tokens=2, eos_ids=EOS)
        counts.append(TRACES[0] - before)
    assert counts[0] > 0
    assert counts[1:] == [0, 0], counts


@pytest.mark.parametrize("name", [*POLICIES, *CRITICS])
def test_equal_calls_give_one_object(name):
    build = POLICIES.get(name) or CRITICS[name]
    assert build()[0] is build()[0]


def test_a_builder_whose_argument_has_no_hash_builds_anew():
    built = []

    @cached
    def build(value):
        built.append(value)
        return tuple(value)

    assert build([1, 2]) == build([1, 2]) == (1, 2)
    assert build((1, 2)) is build((1, 2))
    assert built == [[1, 2], [1, 2], (1, 2)]


def test_numbers_of_other_types_are_other_calls():
    """1 and 1.0 and True are equal, but closures over them need not behave alike."""

    @cached
    def build(value):
        return [value]

    assert build(1) is not build(1.0)
    assert build(1) is not build(True)


# eos_ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*POLICIES, *CRITICS])
def test_a_policy_passes_on_the_ids_that_end_a_response(name):
    policy, _ = POLICIES[name]() if name in POLICIES else tilted(name)
    assert policy.eos_ids == LM.config.eos_ids


def test_a_tree_knows_its_eos():
    assert policies.top_k(tree.policy(tree.Tree(4, 2, eos_id=3)), 2).eos_ids == (3,)
    assert policies.temperature(tree.policy(tree.Tree(4, 2, eos_id=None))).eos_ids == ()


def test_transfer_q_ends_its_roll_outs_at_the_baselines_eos():
    reward = rewards.from_model(REWARD)
    own = critics.transfer_q(base(), reward, num_samples=1)
    assert own is critics.transfer_q(base(), reward, num_samples=1, eos_ids=LM.config.eos_ids)
    assert critics.transfer_q(base(), reward, num_samples=1, eos_ids=3) is critics.transfer_q(
        base(), reward, num_samples=1, eos_ids=[3]
    )
    with pytest.raises(ValueError, match="eos_ids: expected the ids that end a response"):
        critics.transfer_q(base()._replace(eos_ids=None), reward, num_samples=1)
