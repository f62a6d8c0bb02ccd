"""Large numbers: what depends on differences alone does not change under a large common offset, and equal numbers,
whose mean is rounded in float32, give exactly nothing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import advantages, decoding, gibbs, infalign, losses, metrics, policies, shaping, tree
from tests import exact

OFFSETS = (0.1, 100.3, 1000.3, 1e6, -3.7e4)


def equal_groups(seed: int, count: int = 500) -> jax.Array:
    """[count, 7] float32: groups of equal numbers between 1e-3 and 1e7 in size, of either sign."""
    rng = np.random.default_rng(seed)
    size = 10 ** rng.uniform(-3, 7, (count, 1)) * rng.choice([-1, 1], (count, 1))
    return jnp.asarray(np.broadcast_to(size, (count, 7)), jnp.float32)


def own_reference(f):
    return lambda x: f(x, reference=x)


CENTRED = {
    "leave_one_out": advantages.leave_one_out,
    "group_relative": advantages.group_relative,
    "meanstd": own_reference(shaping.meanstd),
    "minmax": own_reference(functools.partial(shaping.minmax, bound=1.0)),
    "score_function": lambda x: jax.grad(lambda l: shaping.score_function(l, utility=x))(jnp.zeros_like(x)) * x.size,
    "statistics": lambda x: shaping.statistics(x)[2],
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", CENTRED)
def test_equal_numbers_of_any_size_give_exactly_nothing(name, compiled):
    f = jax.jit(CENTRED[name]) if compiled else CENTRED[name]
    np.testing.assert_array_equal(f(equal_groups(0)), 0)


@pytest.mark.parametrize("name", ["group_relative", "meanstd", "minmax", "statistics"])
def test_a_group_whose_range_is_rounding_is_not_scaled_up(name):
    """Neighbours in float32: divided by their own deviation they would give numbers of size 1."""
    base = equal_groups(1)
    group = base.at[:, ::2].set(jnp.nextafter(base[:, ::2], jnp.inf))
    assert (group.max(axis=1) > group.min(axis=1)).all()
    found = CENTRED[name](group)
    if name == "statistics":  # not divided: the differences themselves
        np.testing.assert_allclose(found, 0, atol=2e-7 * float(jnp.abs(base).max()))
        scale = shaping.statistics(group)[1]
        np.testing.assert_array_equal(scale, 1)
    else:
        np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("name", CENTRED)
def test_an_offset_changes_nothing(name, offset):
    """Differences of whole 64ths are exact in float32 beside each of the offsets, so that only the function rounds."""
    inner = jnp.asarray(np.random.default_rng(2).integers(-64, 65, (50, 8)) / 16, jnp.float32)
    offset = jnp.round(jnp.float32(offset) * 16) / 16
    np.testing.assert_allclose(CENTRED[name](inner + offset), CENTRED[name](inner), atol=2e-6, rtol=2e-6)


TREE = tree.Tree(3, 3, eos_id=0)
BASE, REWARD = tree.policy(TREE), tree.reward(TREE)
LEVEL = policies.tilt(BASE, tree.critic(TREE, "level"))
TOP_2 = policies.tilt(BASE, tree.critic(TREE, "level"), top_k=2)
INCREMENT = policies.tilt(BASE, tree.critic(TREE, "increment"))


def sixteenths(x: jax.Array) -> jax.Array:
    """Rounded so that sums with the offsets of these tests are exact in float32."""
    return jnp.round(x * 16) / 16


@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("policy", [LEVEL, TOP_2, INCREMENT], ids=["level", "top 2", "increment"])
def test_a_tilt_keeps_the_base_beside_scores_of_any_level(policy, beta):
    """q + 1e6: at beta 0.1 q/beta is 1e7, where a float32 holds whole numbers alone."""
    base, _ = exact.tables(TREE, 3)
    q = sixteenths(jax.random.normal(jax.random.key(1), (TREE.num_states, TREE.vocab_size)))
    law = exact.log_law(TREE, policy, {"policy": base, "critic": q, "beta": beta})
    raised = exact.log_law(TREE, policy, {"policy": base, "critic": q + 1e6, "beta": beta})
    np.testing.assert_allclose(np.exp(raised), np.exp(law), atol=2e-6)


def test_the_weights_of_a_level_tilt_keep_their_digits_after_the_first_token():
    base, _ = exact.tables(TREE, 3)
    q = sixteenths(jax.random.normal(jax.random.key(1), (TREE.num_states, TREE.vocab_size)))
    found, raised = (
        np.asarray(exact.completions(TREE, LEVEL, {"policy": base, "critic": q + c, "beta": 0.1}).log_norm)
        for c in (0, 1e6)
    )
    np.testing.assert_allclose(raised[:, 1:], found[:, 1:], atol=1e-5)
    np.testing.assert_allclose(raised[:, 0], found[:, 0] + 1e7, atol=2)  # its own last place


@pytest.mark.parametrize("function", ["optimal_log_prob", "optimal_policy", "tilted_policy"])
def test_exact_laws_of_a_process_keep_the_base_beside_rewards_of_any_level(function):
    base, reward = exact.tables(TREE, 3)
    reward = sixteenths(reward)
    if function == "tilted_policy":
        q = sixteenths(jax.random.normal(jax.random.key(1), base.shape))
        law, raised = (tree.tilted_policy(base, q + c, beta=0.1) for c in (0, 1e6))
    else:
        law, raised = (getattr(tree, function)(TREE, base, reward + c, beta=0.1) for c in (0, 1e6))
    np.testing.assert_allclose(np.exp(raised), np.exp(law), atol=2e-6)


def particles(policy, params, reward, beta):
    return decoding.smc(
        policy,
        REWARD,
        {"policy": params, "reward": reward, "beta": beta},
        jax.random.key(0),
        tree.prompts(64),
        num_particles=8,
        max_new_tokens=TREE.horizon,
        eos_ids=(0,),
    )


@pytest.mark.parametrize("proposal", ["base", "level"])
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_smc_weights_and_kl_do_not_depend_on_the_level_of_the_reward(proposal, beta):
    """r + 1e6 (r/beta up to 1e7), beside a proposal whose scores have the same level."""
    base, reward = exact.tables(TREE, 4)
    reward, q = sixteenths(reward), sixteenths(jax.random.normal(jax.random.key(2), base.shape))

    def found(level):
        if proposal == "base":
            return particles(BASE, base, reward + level, beta)
        return particles(LEVEL, {"policy": base, "critic": q + level, "beta": 2 * beta}, reward + level, beta)

    plain, raised = found(0.0), found(1e6)
    np.testing.assert_array_equal(raised.completions.tokens, plain.completions.tokens)
    np.testing.assert_allclose(raised.kl.value, plain.kl.value, atol=2e-5)
    np.testing.assert_allclose(raised.info.ess, plain.info.ess, rtol=2e-5)
    np.testing.assert_allclose(raised.info.log_z, plain.info.log_z + 1e6 / beta, atol=2)  # its own last place


@pytest.mark.parametrize("scale", [1e3, 1e7, 1e12])
def test_smc_kl_of_sharp_weights_is_that_of_the_few_particles_that_count(scale):
    """One reward of 0 or `scale`/beta: the weights are even on the best m of n particles, and the KL is log(n/m)."""
    base, _ = exact.tables(TREE, 4)
    reward = jnp.where(jnp.arange(TREE.num_responses) % 3 == 0, 1.0, 0.0) * scale
    found = particles(BASE, base, reward, 1.0)
    best = np.asarray(found.info.reward).max(axis=1, keepdims=True)
    share = (np.asarray(found.info.reward) == best).mean(axis=1)
    assert (share < 1).any()
    np.testing.assert_allclose(found.kl.value, -np.log(share), atol=1e-5)


GROUP = jnp.asarray(np.random.default_rng(3).integers(-64, 65, (5, 8)) / 16, jnp.float32)
OTHER = jnp.asarray(np.random.default_rng(4).integers(-64, 65, (5, 8)) / 16, jnp.float32)
LOG_BASE = jax.nn.log_softmax(jnp.asarray(np.random.default_rng(5).normal(size=(5, 8)), jnp.float32))
MASK = jnp.asarray(np.arange(8) < np.array([[8], [7], [3], [1], [5]]))

# Each of numbers with a common offset c; the offset is taken off what moves with it, exactly.
SHIFTED = {
    "gibbs.log_policy": lambda c: jnp.exp(gibbs.log_policy(LOG_BASE, GROUP + c, beta=0.2)),
    "gibbs.log_partition": lambda c: gibbs.log_partition(LOG_BASE, GROUP + c, beta=1.0) - c,
    "gibbs.kl": lambda c: gibbs.kl(gibbs.log_policy(LOG_BASE, GROUP + c, beta=0.2), LOG_BASE),
    "gibbs.match_kl": lambda c: gibbs.match_kl(LOG_BASE, GROUP + c, kl=0.3),
    "gibbs.match_kl, gradient": lambda c: jax.grad(lambda r: gibbs.match_kl(LOG_BASE, r, kl=0.3).sum())(GROUP + c),
    "shaping.leader_utility": lambda c: shaping.leader_utility(LOG_BASE, GROUP + c, utility=OTHER, beta=0.2),
    "shaping.effective_samples": lambda c: shaping.effective_samples(GROUP + c, beta=0.2),
    "shaping.optimal_threshold": lambda c: shaping.optimal_threshold(GROUP + c, log_base=LOG_BASE, gain=3.0) - c,
    "shaping.optimal_threshold, gradient": lambda c: jax.grad(
        lambda g: shaping.optimal_threshold(GROUP + c, log_base=LOG_BASE, gain=g).sum()
    )(3.0),
    "shaping.expectile_loss": lambda c: shaping.expectile_loss(GROUP + c, utility=OTHER + c, gain=1.0),
    "shaping.preference_as_reward": lambda c: shaping.preference_as_reward(GROUP + c, reference=OTHER + c),
    "shaping.mean_sigmoid": lambda c: shaping.mean_sigmoid(GROUP + c, reference=OTHER + c, bound=1.0, sharpness=1.0),
    "shaping.meanstd": lambda c: shaping.meanstd(GROUP + c, reference=OTHER + c),
    "shaping.minmax": lambda c: shaping.minmax(GROUP + c, reference=OTHER + c, bound=1.0),
    "shaping.cap": lambda c: shaping.cap(GROUP + c, reference=OTHER + c, bound=2.0),
    "infalign.calibrate": lambda c: infalign.calibrate(GROUP + c, reference=OTHER + c),
    "infalign.calibrate, smooth": lambda c: infalign.calibrate(GROUP + c, reference=OTHER + c, width=0.5),
    "infalign.ranks": lambda c: infalign.ranks(GROUP + c),
    "infalign.match_kl": lambda c: infalign.match_kl(lambda x: jnp.round(x * 64) / 64 + c, kl=0.3),
    "losses.bradley_terry": lambda c: losses.bradley_terry(GROUP[0] + c, OTHER[0] + c),
    "losses.dpo": lambda c: losses.dpo(
        GROUP[0] + c, OTHER[0] - c, chosen_log_prob_ref=OTHER[1] + c, rejected_log_prob_ref=GROUP[1] - c, beta=0.1
    ),
    "losses.fudge": lambda c: losses.fudge(GROUP + c, reward=OTHER[:, 0] + c, mask=MASK),
    "losses.td": lambda c: losses.td(GROUP + c, reward=OTHER[:, 0] + c, mask=MASK),
    "losses.soft_value": lambda c: losses.soft_value(GROUP + c, reward=OTHER[:, 0] + c, mask=MASK, beta=2.0),
    "losses.last_and_pairs": lambda c: losses.last_and_pairs(GROUP + c, reward=OTHER[:, 0] + c, mask=MASK),
    "losses.clipped_value": lambda c: losses.clipped_value(
        GROUP + c, old_value=OTHER + c, returns=GROUP[::-1] + c, mask=MASK, clip=0.2
    ),
    "losses.kl_penalty": lambda c: losses.kl_penalty(
        GROUP / 8 + c, log_prob_ref=OTHER / 8 + c, mask=MASK, estimator="k3"
    ),
    "metrics.mean_interval": lambda c: metrics.mean_interval(np.asarray(GROUP[0] + c)).half_width,
    "metrics.best_of_n_curve": lambda c: metrics.best_of_n_curve(np.asarray(GROUP + c)) - c,
    "metrics.selection_win_rates": lambda c: np.stack(
        metrics.selection_win_rates(np.asarray(GROUP + c), base_reward=np.asarray(OTHER + c))
    ),
}
# The last place of the result itself, where that moves with the offset.
MOVES = {"gibbs.log_partition", "shaping.optimal_threshold", "shaping.mean_sigmoid"}


@pytest.mark.parametrize("offset", [1e4, -1e4, 65536.0])
@pytest.mark.parametrize("name", SHIFTED)
def test_functions_of_differences_do_not_see_a_common_offset(name, offset):
    """To 1e-5 in float32, sums of the arguments being exact: to 1e6 the 128ths of two of them would be rounded."""
    exact_to = 8 * np.finfo(np.float32).eps * abs(offset) if name in MOVES else 1e-5
    np.testing.assert_allclose(SHIFTED[name](offset), SHIFTED[name](0.0), rtol=1e-5, atol=exact_to)
