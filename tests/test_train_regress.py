"""train.regress as a user runs it, and its parts: targets, weights, log-ratios."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import decoding, infalign, models, policies, shaping
from jaxalign.prompts import prompt_batch
from jaxalign.training import dry_run, logging, regression, regression_rounds, regression_targets, rollouts
from jaxalign.training.regression_options import RegressionOptions, check_regression_options
from jaxalign.training.regression_targets import Samples
from tests.conftest import tiny_lm
from tests.test_train_rl import K, files, table_options
from train import calibrate, regress

__all__ = ["files"]  # a fixture

TABLE = np.sort(np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32), axis=1)


def samples(reward, prompt, *, own=False, base=True) -> Samples:
    n = len(reward)
    return Samples(np.asarray(prompt), np.asarray(reward, float), np.full(n, own), np.full(n, base))


def options(**given) -> RegressionOptions:
    return RegressionOptions(**{"table": "x", "beta": 0.2, "transform": "exp:5"} | given)


# Targets


@pytest.mark.parametrize("transform", ["identity", "exp:-10", "log"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_targets_of_a_tables_own_samples_are_normalised_without_noise(transform, tied):
    table = np.round(TABLE) if tied else TABLE
    own = samples(table.ravel(), np.repeat(np.arange(3), 6), own=True)
    found = regression_targets.targets(options(transform=transform, beta=0.02), 0.02, table, own).target
    np.testing.assert_allclose(np.exp(found.astype(float)).reshape(3, 6).mean(axis=1), 1, rtol=1e-5)
    assert found.dtype == np.float32
    if not tied and transform == "identity":
        ranks = (np.arange(6) + 0.5) / 6 / 0.02
        np.testing.assert_allclose(found.reshape(3, 6) - found[0], np.tile(ranks - ranks[0], (3, 1)), atol=1e-4)


def test_the_targets_of_fresh_samples_have_the_normaliser_that_is_asked_for():
    reward, prompt = [-9.0, 0.0, 9.0, 0.1], [0, 1, 1, 2]
    rank = np.array([(TABLE[p] < r).mean() for p, r in zip(prompt, reward, strict=True)])
    with jax.enable_x64(True):
        phi = infalign.parse_transform("exp:5")
        value = np.asarray(phi(jnp.asarray(rank))) / 0.2
        known = float(infalign.log_partition(phi, 0.2, samples=6))
        counts = np.zeros((3, 7))
        np.add.at(counts, (prompt, np.round(rank * 6).astype(int)), 1)
        posterior = np.asarray(infalign.log_partition(phi, 0.2, samples=6, counts=counts))
    for name, log_z in (("known", known), ("posterior", posterior[prompt]), ("centred", 0.0)):
        given = options(normaliser=name, loss="square")
        found = regression_targets.targets(given, 0.2, TABLE, samples(reward, prompt))
        np.testing.assert_allclose(found.target, value - log_z, rtol=1e-5, atol=1e-5)
        assert found.tied == 0
    # Draws of another policy tell nothing of the base.
    other = regression_targets.targets(options(), 0.2, TABLE, samples(reward, prompt, base=False)).target
    np.testing.assert_allclose(other, value - known, rtol=1e-5, atol=1e-5)


def test_with_ties_the_normaliser_leaves_one_out_and_prompts_that_it_moves_are_counted():
    table = np.array([[0.0, 0.0, 0.0, 0.0, 1.0, 1.0], TABLE[0]])
    reward = np.array([0.0, 1.0])
    found = regression_targets.targets(options(normaliser="known"), 0.2, table, samples(reward, [0, 0]))
    with jax.enable_x64(True):
        phi = infalign.parse_transform("exp:5")
        log_z = float(infalign.log_partition(phi, 0.2, reference=table[0]))
        value = np.asarray(phi(jnp.array([2 / 6, 5 / 6]))) / 0.2
    np.testing.assert_allclose(found.target, value - log_z, rtol=1e-5, atol=1e-5)
    assert found.tied == 1


def test_the_threshold_rewards_targets_are_two_of_each_prompt():
    beta, bound = 0.5, 1.0
    given = options(bound=bound, transform="", normaliser="known")
    own = samples(TABLE.ravel(), np.repeat(np.arange(3), 6), own=True)
    found = regression_targets.targets(given, beta, TABLE, own).target.reshape(3, 6).astype(float)
    threshold = np.asarray(shaping.optimal_threshold(jnp.asarray(TABLE), gain=bound / beta))
    above = threshold[:, None] < TABLE
    share = above.mean(axis=1)
    log_z = np.log(1 - share + share * np.exp(2.0))
    np.testing.assert_allclose(found, np.where(above, 2.0, 0.0) - log_z[:, None], rtol=1e-5)
    np.testing.assert_allclose(np.exp(found).mean(axis=1), 1, rtol=1e-5)


def test_weights_are_the_base_over_the_mixture_that_drew_and_are_cut():
    responses = [regression.Response(row, [1], 0.0, number, False) for row, number in ((0, 0), (0, 0), (0, 1), (1, 0))]
    log_ratio = np.array([[0.0, 0, 0, 0], [1.0, -60.0, 2.0, 3.0]])
    found = regression.mixture_weights(regression.Pool(responses, log_ratio, np.ones(4, bool)))
    mixture = [2 / 3 + np.exp(1.0) / 3, 2 / 3, 2 / 3 + np.exp(2.0) / 3, 1]
    np.testing.assert_allclose(found, 1 / np.array(mixture), rtol=1e-12)
    rare = [regression.Response(0, [1], 0.0, number, False) for number in [0] + [1] * 99]
    far = np.array([[0.0] * 100, [-60.0] + [0.0] * 99])
    cut = regression.mixture_weights(regression.Pool(rare, far, np.ones(100, bool)))
    assert cut[0] == regression.LARGEST_WEIGHT
    assert cut[1:] == pytest.approx(1)


def test_a_round_learns_from_all_draws_and_from_as_many_of_the_bases_samples():
    numbers = [
        (row, number) for row, number, count in ((0, 0, 10), (1, 0, 10), (0, 1, 3), (0, 2, 1)) for _ in range(count)
    ]
    responses = [regression.Response(row, [1], 0.0, number, False) for row, number in numbers]
    kept = regression.beside_draws(responses, 0)
    assert kept[20:].all()
    assert kept[:10].sum() == 4
    assert kept[10:20].all()  # no policy drew for that prompt
    assert (kept[:10] != regression.beside_draws(responses, 1)[:10]).any()
    # Those that were beside a round's draws stay beside the next one's.
    assert (kept[:10] >= regression.beside_draws(responses[:23], 0)[:10]).all()
    log_ratio = np.zeros((3, 24))
    log_ratio[1, :10], log_ratio[2, 23] = -1.0, 2.0
    found = regression.mixture_weights(regression.Pool(responses, log_ratio, kept))
    np.testing.assert_allclose(found[:10], 1 / (4 / 8 + 3 / 8 * np.exp(-1) + 1 / 8), rtol=1e-12)
    np.testing.assert_allclose(found[10:23], 1)
    np.testing.assert_allclose(found[23], 1 / (7 / 8 + np.exp(2) / 8), rtol=1e-12)


def test_a_beta_for_a_target_kl_is_that_of_the_tables_size():
    found = regression_rounds.beta_of(options(beta=0.0, target_kl=0.5, transform="exp:10"), 100)
    assert found == pytest.approx(0.3273, rel=0.01)
    assert regression_rounds.beta_of(options(beta=0.0, target_kl=0.5, transform="log"), 8) > 0
    with pytest.raises(ValueError, match="target_kl: expected a KL that the transform reaches on the 5 ranks"):
        regression_rounds.beta_of(options(beta=0.0, target_kl=2.5), 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "target_kl: expected either"),
        ({"target_kl": 0.5}, "target_kl: expected either"),
        ({"normaliser": "centred"}, "normaliser: expected centred with --loss square alone"),
        ({"normaliser": "centred", "loss": "square", "group": 1}, "group: expected at least 2"),
        ({"huber": 1.0}, "huber: expected with --loss square alone"),
        ({"beta": 0.0, "target_kl": 0.5, "bound": 1.0}, "bound: expected without --target-kl"),
        ({"beta": 0.0, "target_kl": 0.5, "transform": "bon_fp:4"}, "transform: expected without --target-kl"),
        ({"transform": "best"}, "transform: expected one of"),
        ({"refresh": 0}, "refresh: expected at least 1"),
        ({"beta": float("nan")}, "beta: expected a finite value"),
    ],
)
def test_options_that_do_not_go_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        check_regression_options(options(**change))


# Log-ratios


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_regression_R10_log_ratios_are_sums_over_ragged_responses_and_zero_at_the_start(dtype):
    lm, params = tiny_lm(dtype=dtype)
    _, other = tiny_lm(seed=1)
    texts = [([3, 4], [5, 6, 7]), ([3], [8]), ([9, 3, 4], [5, 9, 9, 9, 2])]  # the last has no end
    groups = [regression.Group(prompt, [response], [0.0], [1.0]) for prompt, response in texts]
    batch = regression.collating(16)(groups)
    score = jax.jit(regression.scoring(lm))
    np.testing.assert_array_equal(score((params, params), batch), 0)
    if dtype == "float32":
        found = np.asarray(score((params, other), batch))[:, 0]
        policy, width = policies.language_model(lm), max(len(r) for _, r in texts)
        tokens = jnp.asarray([r + [0] * (width - len(r)) for _, r in texts])
        mask = jnp.asarray([[j < len(r) for j in range(width)] for _, r in texts])
        prompts = prompt_batch([p for p, _ in texts])
        each = [
            decoding.log_prob(policy, p, jax.random.key(0), prompts, tokens, mask).log_prob for p in (params, other)
        ]
        np.testing.assert_allclose(found, np.where(mask, each[0] - each[1], 0).sum(axis=1), atol=2e-5)


# The job


def command(files, *more: str) -> list[str]:
    given = {"table": files / "table", "batch-size": 4, "steps": 4, "learning-rate": 1e-2, "max-length": 64}
    given |= {"validation": 0.3, "log-every": 1, "check-every": 2}
    return [*(text for name, value in given.items() for text in (f"--{name}", str(value))), *more]


@pytest.fixture(scope="module")
def fresh(files, tmp_path_factory) -> str:
    """A folder of other samples of the same base."""
    out = str(tmp_path_factory.mktemp("fresh") / "table")
    calibrate.main([*table_options(files), "--seed", "1", "--out", out])
    return out


def test_a_run_with_a_refresh_and_an_adapter_writes_a_model_and_says_what_it_reached(files, fresh, tmp_path, capsys):
    given = ("--transform", "exp:3", "--target-kl", "0.05", "--lora-rank", "2", "--refresh", "2", "--fresh", fresh)
    line = command(files, *given, "--refresh-samples", "2", "--out", str(tmp_path / "run"))
    regress.main(line)
    assert "next: python -m eval.decode" in capsys.readouterr().out.splitlines()[-1]
    _, params = models.load(str(tmp_path / "run/model"))
    before = models.load(str(files / "base/model"))[1]
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(before), strict=True)]
    assert max(moved) > 0
    assert (tmp_path / "run/adapter/adapter_config.json").exists()
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert {"kl_train", "kl_held_out", "win_rate_held_out", "held_out_loss_1", "held_out_loss_2", "beta"} <= set(
        summary
    )
    rows = logging.read(tmp_path / "run/metrics.jsonl")
    assert rows[0]["log_ratio"] == 0
    assert {"floored", "capped", "distance"} <= set(rows[0])
    # Of 2K samples of the base as many are learned from as the policy drew; a correction of beta draws as well.
    assert (summary["left_out_1"], summary["left_out_2"]) == (0, 5 * (2 * K - 2))
    assert summary["left_out_correction"] == 5 * (2 * K - 4)
    assert summary["drawn"] == 5 * (2 + 2)
    assert summary["corrected_beta"] == pytest.approx(summary["beta"] * (summary["kl_before_correction"] / 0.05) ** 0.5)
    second = logging.read(tmp_path / "run/rounds/2/metrics.jsonl")
    assert second[0]["log_ratio"] != 0
    best = json.loads((tmp_path / "run/best.json").read_text())
    assert best["ended"]
    assert best["step"] in (2, 4)
    # A job that lost the second round makes it again, to the same weights.
    (tmp_path / "run/summary.json").unlink()
    (tmp_path / "run/rounds/2/best.json").unlink()
    regress.main(line)
    again = models.load(str(tmp_path / "run/model"))[1]
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_a_centred_run_deals_the_samples_of_a_prompt_into_groups(files, tmp_path):
    given = ("--loss", "square", "--normaliser", "centred", "--group", "3", "--beta", "0.5", "--validation", "0")
    regress.main(command(files, *given, "--batch-size", "2", "--out", str(tmp_path / "run")))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["left_over"] == 8 * (K % 3)
    assert summary["steps"] == 4
    assert "kl_held_out" not in summary


def test_a_dry_run_reads_no_weights_and_writes_nothing(files, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        regress.main(command(files, "--beta", "0.5", "--dry-run", "--out", str(tmp_path / "run")))
    assert ended.value.code == 0
    assert "regress" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_the_rewards_weights_that_score_the_jobs_own_draws(files, tmp_path, monkeypatch):
    """A table of a program's rewards has none; a model's lie on the devices from the start to the end of the run."""
    weights = ({"lm_head": jax.ShapeDtypeStruct((1000, 50), jnp.bfloat16)},)
    known = rollouts.reward_shapes
    found = []
    for own in ((), weights):
        monkeypatch.setattr(rollouts, "reward_shapes", lambda spec, dtype, own=own: (known(spec, dtype=dtype)[0], own))
        with pytest.raises(dry_run.Told) as told:
            regress.main(command(files, "--beta", "0.5", "--dry-run", "--out", str(tmp_path / "run")))
        found.append(told.value.estimate)
    assert found[1].frozen - found[0].frozen == 2 * 1000 * 50
    assert found[1].total - found[0].total == 2 * 1000 * 50


def test_regression_R9_a_foreign_table_is_refused(files, tmp_path):
    lm, params = models.load(str(files / "base/model"))
    changed = jax.tree.map(lambda x: x + 0.01, params)
    tokenizer = models.tokenizer(str(files / "base/model"))
    models.save(tmp_path / "other", lm, changed, tokenizer=tokenizer)
    cases = {
        "table: expected a table of the same base": ("--model", str(tmp_path / "other")),
        "fresh: expected samples of another seed": ("--fresh", str(files / "table")),
        "table: expected a folder of train.calibrate": ("--table", str(tmp_path)),
    }
    for i, (message, more) in enumerate(cases.items()):
        with pytest.raises(ValueError, match=message):
            regress.main(command(files, "--beta", "0.5", *more, "--out", str(tmp_path / f"run{i}")))
