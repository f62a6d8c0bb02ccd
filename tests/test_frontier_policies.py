"""What the studies of trained policies and of nudging compute, on cases whose answers are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.frontier import nudging, trained
from jaxalign import decoding, infalign, tree
from tests import exact


def test_every_token_is_tried_once_by_exhaustive_nudging():
    """One segment on a tree: the best over the first tokens of what greedy decoding makes of each."""
    t = tree.Tree(4, 3, eos_id=0)
    log_policy, reward = exact.tables(t, 2)
    found = decoding.nudge(
        tree.policy(t),
        tree.reward(t),
        nudging.next_of_all,
        {"policy": log_policy, "reward": reward, "gain": None},
        jax.random.key(0),
        exact.one_prompt(1),
        candidates=5,
        threshold=np.inf,
        top_k=4,
        max_new_tokens=3,
        eos_ids=(0,),
    )
    assert int(found.scored[0]) == 4
    tokens, mask = t.responses
    table, nodes = np.asarray(log_policy), t.nodes
    greedy = table.argmax(axis=1)
    follows = [
        all(int(tokens[i, j]) == greedy[nodes[i, j]] for j in range(1, 3) if mask[i, j]) for i in range(len(tokens))
    ]
    # An end is text like any other here: the reward reads a response without its EOS where that names one.
    best = max(float(reward[i]) for i in range(len(tokens)) if follows[i])
    np.testing.assert_allclose(found.reward[0], best, rtol=1e-5)


def test_passes_count_the_prompt_once_and_gradients_twice_more():
    made = decoding.Nudged(*([None] * len(decoding.Nudged._fields)))
    found = made._replace(tokens=np.array([10.0]), scored=np.array([4.0]), gradients=np.array([2.0]))
    np.testing.assert_allclose(nudging.nudging_passes(found, np.array([3])), [10 * 3 + 3])


def test_policies_are_compared_by_all_subsets_and_predicted_at_their_own_kl():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((50, 16))
    drawn = trained.Drawn(base + 1, base, np.full((50, 16), 0.5))
    found = trained.compared(drawn, trained.Drawn(base, base, np.zeros((50, 16))), trained.Config(n=4))
    wins = (base[:, :, None] + 1 > base[:, None, :]).mean()
    np.testing.assert_allclose([found["win_rate"], found["kl"], found["gold_win_rate"]], [wins, 0.5, 0.5])
    assert found["best_of_n"] > found["win_rate"]
    row = {"kl": 0.5, "win_rate": 0.7, "best_of_n": 0.85, "worst_of_n": 0.5}
    predicted = trained._predicted("exp:10", row, 4)
    for name, value in {
        "predicted_win_rate": 0.7117,
        "predicted_best_of_n": 0.8715,
        "short_of_win_rate": 0.0117,
    }.items():
        assert predicted[name] == pytest.approx(value, abs=2e-4)
    curve = trained._curve_of("identity", np.array([0.5, 1.0]), 4)
    np.testing.assert_allclose(curve.win_rate, [0.7737, 0.8646], atol=2e-4)
    assert float(infalign.match_kl(infalign.identity, jnp.asarray(0.5))) > 0


def test_rewards_without_calibration_are_trained_at_the_beta_of_their_mean_kl():
    """Gaussian rewards: the KL of the tilt is about (sigma/beta)²/2 for a small one."""
    reward = np.random.default_rng(1).standard_normal((100, 2000))
    assert trained.beta_for(reward, 0.02) == pytest.approx(5.0, rel=0.02)
    assert trained.beta_for(3 * reward, 0.02) == pytest.approx(15.0, rel=0.02)
