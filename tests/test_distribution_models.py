"""Heads of laws of rewards: the critic against its readings of the model's laws, folders, training."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, losses, models, policies, prompt_batch, rewards, testing
from jaxalign.critics import _reading, reads
from jaxalign.models import heads
from jaxalign.training import laws, objectives
from jaxalign.training.job import Data, StartedModel
from tests.conftest import EOS, VOCAB, tiny_lm

SUPPORT = tuple(np.linspace(-2, 2, 9).tolist())
PROMPTS = prompt_batch([[5, 6, 7], [8, 9]])


def with_laws(kind: str, **more) -> tuple[models.LanguageModel, dict]:
    """A model with a head of laws that are far from flat."""
    lm = models.with_head(
        tiny_lm(0)[0], models.Head(kind, hidden_size=16, distribution=models.Distribution(SUPPORT, rank=3, **more))
    )
    params = lm.init(jax.random.key(1))

    def scale(path, x):
        return x * 30 if any(name in jax.tree_util.keystr(path) for name in ("outer", "tokens", "own")) else x

    return lm, jax.tree_util.tree_map_with_path(scale, params)


@functools.partial(jax.jit, static_argnums=0)
def laws_after(lm: models.LanguageModel, params, text) -> jax.Array:
    """log p [V,K] after a text and each token: of a Q head read at the text's last token."""
    every = jnp.arange(VOCAB)
    if lm.config.head.kind == "value":
        rows = jnp.concatenate([jnp.broadcast_to(text, (VOCAB, len(text))), every[:, None]], axis=1)
        return lm.head(params, lm.hidden(params, rows))[:, -1]
    return lm.laws_after(params, lm.hidden(params, text[None])[:, -1], every[None])[0]


@pytest.mark.parametrize("kind", ["value", "q"])
def test_the_critic_weighs_the_laws_of_the_model(kind):
    """q of candidates and of the whole vocabulary, at the first token and after one, with a beta per prompt."""
    lm, params = with_laws(kind)
    beta, critic = np.array([0.5, 2.0]), critics.distribution(lm, reads.soft())
    given = critics.DistributionParams(params, {"beta": jnp.asarray(beta)})
    state = critic.init(given, jax.random.key(0), PROMPTS, 4)
    texts, output = [[5, 6, 7], [8, 9]], None
    for _ in range(2):
        expected = np.array(
            [
                np.log(np.exp(laws_after(lm, params, jnp.array(text)) + np.array(SUPPORT) / b).sum(axis=-1))
                for text, b in zip(texts, beta, strict=True)
            ]
        )
        whole, _ = critic.score(given, jax.random.key(0), state, output, None)
        np.testing.assert_allclose(whole, expected, atol=2e-5)
        candidates = jnp.array([[3, 1, 4], [2, 6, 5]])
        q, proposal = critic.score(given, jax.random.key(0), state, output, candidates)
        np.testing.assert_allclose(q, np.take_along_axis(expected, np.asarray(candidates), 1), atol=2e-5)
        state = critic.advance(given, proposal, jnp.array([2, 0]))
        texts = [[*texts[0], 4], [*texts[1], 2]]
    assert np.ptp(expected[0]) > 0.01  # the laws differ


@pytest.mark.parametrize(
    ("kind", "read", "numbers"),
    [("value", reads.follower(solve=True), {"beta": 1.0, "bound": 2.0}), ("q", reads.mean(), {})],
    ids=["value head, follower", "Q head, mean"],
)
def test_readings_keep_the_laws_of_critics(kind, read, numbers):
    lm, params = with_laws(kind)
    base, base_params = tiny_lm(2)
    testing.check_critic(
        critics.distribution(lm, read),
        critics.DistributionParams(params, numbers),
        PROMPTS,
        policy=policies.language_model(base),
        policy_params=base_params,
    )


@pytest.mark.parametrize(
    ("read", "numbers"),
    [
        (reads.soft(), {"beta": 0.1}),
        (reads.kl(), {"nats": 0.5}),
        (reads.chi_squared(), {"beta": 0.7}),
        (reads.follower(solve=True), {"beta": 0.5, "bound": 1.0}),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_rewards_far_from_zero_keep_the_digits_of_their_differences(read, numbers):
    """10,000 added to all rewards is a constant of the tilt: float32 would round it in steps of 0.008 at beta 0.1."""
    lm, params = with_laws("q")
    head = lm.config.head
    far = tuple(point + 10_000.25 for point in SUPPORT)
    moved = dataclasses.replace(head, distribution=dataclasses.replace(head.distribution, support=far))
    away = models.with_head(lm, moved)
    base, base_params = tiny_lm(2)
    given = policies.TiltParams(base_params, critics.DistributionParams(params, numbers), beta=1.0)
    found = [
        policies.tilt(policies.language_model(base), critics.distribution(model, read)).init(
            given, jax.random.key(0), PROMPTS, 2
        )[1]
        for model in (lm, away)
    ]
    np.testing.assert_allclose(found[1].log_prob, found[0].log_prob, atol=2e-5)
    np.testing.assert_allclose(found[1].log_norm, found[0].log_norm, atol=2e-4)
    assert _reading.origin(SUPPORT) == 0
    assert _reading.origin(far) == 10_000.25


def test_value_and_follower_read_a_head_of_laws():
    lm, params = with_laws("q")
    for critic, read, numbers in (
        (critics.value(lm), reads.mean(), {}),
        (critics.follower(lm, beta=0.5, bound=2.0), reads.follower(solve=True), {"beta": 0.5, "bound": 2.0}),
    ):
        full = critics.distribution(lm, read)
        own = critics.DistributionParams(params, numbers)
        one = critic.score(params, jax.random.key(0), critic.init(params, jax.random.key(0), PROMPTS, 2), None, None)[0]
        two = full.score(own, jax.random.key(0), full.init(own, jax.random.key(0), PROMPTS, 2), None, None)[0]
        np.testing.assert_array_equal(one, two)
        assert critic.beta == full.beta
    with pytest.raises(ValueError, match="expected beta and bound for a head of laws"):
        critics.follower(lm)
    with pytest.raises(ValueError, match="a head of width 9"):
        rewards.from_model(lm)
    with pytest.raises(ValueError, match="found one of laws"):
        objectives.value(lm, "fudge")


def test_distribution_D10_a_frontier_is_one_trace():
    """Five betas, three bounds, two thresholds, and one per prompt: the numbers are data."""
    lm, params = with_laws("q")
    base, base_params = tiny_lm(2)
    policy = policies.tilt(policies.language_model(base), critics.distribution(lm, reads.follower()))
    traces = []

    @jax.jit
    def draw(arguments, rng):
        traces.append(1)
        return decoding.sample(policy, arguments, rng, PROMPTS, max_new_tokens=3, eos_ids=EOS)

    def at(beta, bound, threshold):
        numbers = {"beta": beta, "bound": bound, "threshold": threshold}
        own = critics.DistributionParams(params, {name: jnp.asarray(x, jnp.float32) for name, x in numbers.items()})
        return policies.TiltParams(base_params, own, beta=jnp.asarray(1.0))

    for beta in (0.1, 0.3, 1.0, 3.0, 10.0):
        for bound in (1.0, 2.0, 4.0):
            for threshold in (0.0, 0.5):
                assert np.isfinite(draw(at(beta, bound, threshold), jax.random.key(0)).log_prob).all()
    assert len(traces) == 1
    mixed = draw(at([0.3, 3.0], [1.0, 4.0], [0.0, 0.5]), jax.random.key(0))
    assert len(traces) == 2  # of another shape, once
    for row, numbers in enumerate([(0.3, 1.0, 0.0), (3.0, 4.0, 0.5)]):
        alone = draw(at(*numbers), jax.random.key(0))
        np.testing.assert_array_equal(mixed.tokens[row], alone.tokens[row])
        np.testing.assert_allclose(mixed.log_norm[row], alone.log_norm[row], atol=1e-6)


@pytest.mark.parametrize("kind", ["value", "q"])
def test_distribution_D12_a_folder_keeps_every_bit(kind, tmp_path):
    lm, params = with_laws(kind)
    models.save(tmp_path / "laws", lm, params)
    again, loaded = models.load(tmp_path / "laws")
    assert again.config == lm.config
    jax.tree.map(np.testing.assert_array_equal, params, loaded)


@pytest.mark.parametrize("kind", ["value", "q"])
def test_the_loss_is_the_cross_entropy_of_each_prefix(kind):
    lm, params = with_laws(kind)
    prompt, response, reward = [5, 6], [7, 3, 1], 0.8
    tokens = jnp.asarray([[*prompt, *response, 0]])
    mask = jnp.asarray([[True] * 5 + [False]])
    batch = {"tokens": tokens, "mask": mask, "loss_mask": mask.at[0, :2].set(False), "reward": jnp.asarray([reward])}
    value, aux = laws.laws(lm)(params, batch, None)
    target = np.asarray(losses.two_hot(reward, support=SUPPORT))
    hidden = lm.hidden(params, tokens[:, :5])
    own = -np.asarray(lm.head(params, hidden))[0, 1:] @ target  # the prompt's, and after each token
    np.testing.assert_allclose(aux.metrics["cross_entropy"], own.mean(), rtol=1e-5)
    after = 0.0
    if kind == "q":
        texts = [[*prompt, *response[: i + 1]] for i in range(3)]
        after = -sum(laws_after(lm, params, jnp.array(text[:-1]))[text[-1]] @ target for text in texts) / 4
    np.testing.assert_allclose(value, own.mean() + after, rtol=1e-5)
    assert aux.weight == 4


def test_bellmans_target_is_the_mean_law_after_the_bases_next_tokens():
    lm, params = with_laws("q")
    base, base_params = tiny_lm(2)
    tokens = jnp.asarray([[5, 6, 7, 3]])
    mask = jnp.ones((1, 4), bool)
    batch = {"tokens": tokens, "mask": mask, "loss_mask": mask.at[0, :2].set(False), "reward": jnp.asarray([0.8])}
    _, aux = laws.laws(lm, base=base)(params, batch, base_params)
    probability = np.asarray(jax.nn.softmax(base.logits(base_params, base.hidden(base_params, tokens))))[0]
    means = [probability[t] @ np.exp(laws_after(lm, params, tokens[0, : t + 1])) for t in (1, 2)]
    target = np.stack([*means, losses.two_hot(0.8, support=SUPPORT)])
    own = np.asarray(lm.head(params, lm.hidden(params, tokens)))[0, 1:]
    np.testing.assert_allclose(aux.metrics["cross_entropy"], -(target * own).sum() / 3, rtol=1e-5)
    with pytest.raises(ValueError, match="expected a Q head for Bellman's equation, found a value head"):
        laws.laws(with_laws("value")[0], base=base)


def test_a_token_moves_the_law_that_the_tokens_of_a_state_share():
    lm, params = with_laws("q")
    head, hidden = params["head"], jax.random.normal(jax.random.key(3), (2, lm.config.hidden_size))
    features = jax.nn.silu(hidden @ head["inner"]["kernel"] + head["inner"]["bias"])
    shared = features @ head["outer"]["kernel"] + head["outer"]["bias"]
    x = np.linspace(-1, 1, len(SUPPORT))
    curves = 4 * np.stack([x, 2 * x**2 - 1, 4 * x**3 - 3 * x])
    ones = jnp.concatenate([features, jnp.ones((2, 1))], axis=1)
    tokens = jnp.array([[3, 1], [2, 7]])
    moves = jnp.einsum("bf,bkjf->bkj", ones, head["tokens"][tokens].reshape(2, 2, 3, -1))
    expected = jax.nn.log_softmax(shared[:, None] + moves @ curves)
    np.testing.assert_allclose(lm.laws_after(params, hidden, tokens), expected, atol=1e-5)
    for_all = lm.laws_after(params, hidden, tokens[0])
    each = lm.laws_after(params, hidden, jnp.broadcast_to(tokens[0], (2, 2)))
    np.testing.assert_allclose(for_all, each, atol=1e-6)
    # With as many moves as support points less one any two laws of one state are apart by one of them.
    every = np.vstack([np.ones(9), heads._curves(9, 8)])
    assert np.linalg.matrix_rank(every) == 9
    assert heads._curves(2, 1).tolist() == [[-4.0, 4.0]]


@pytest.mark.parametrize("kind", ["value", "q"])
def test_a_head_begins_as_the_law_of_all_rewards(kind):
    lm, params = with_laws(kind)
    given = np.array([-1.0, 0.0, 0.0, 3.0])
    started = laws.for_rewards(StartedModel(lm, params, None), given, bins=9)
    spec = started.lm.config.head.distribution
    assert (spec.support[0], spec.support[-1], spec.rank) == (-1.0, 3.0, 3)
    flat = dict(started.params["head"]) | {
        "outer": started.params["head"]["outer"] | {"kernel": 0 * params["head"]["outer"]["kernel"]}
    }
    law = np.exp(started.lm.head({"head": flat}, jnp.ones((1, lm.config.hidden_size))))[0]
    expected = np.asarray(losses.two_hot(given, support=spec.support)).mean(axis=0)
    if kind == "value":
        np.testing.assert_allclose(law, expected, atol=2e-3)
    else:
        np.testing.assert_allclose(
            np.asarray(started.params["head"]["outer"]["bias"])[-9:], np.log(expected + 1e-4), rtol=1e-5
        )


@pytest.mark.parametrize("read", [reads.soft(), reads.kl(), reads.quantile()], ids=lambda read: read.name)
def test_a_head_that_gives_no_numbers_is_seen_in_the_policy(read):
    """NaN in the head must not read as a row about which nothing is known, whose tilt is the base."""
    lm, params = with_laws("q")
    params = params | {"head": jax.tree.map(lambda x: x * jnp.nan, params["head"])}
    base, base_params = tiny_lm(2)
    policy = policies.tilt(policies.language_model(base), critics.distribution(lm, read))
    critic = {"head": params, "read": dict.fromkeys(read.numbers, 0.5)}
    given = {"policy": base_params, "critic": critic, "beta": 1.0}
    assert np.isnan(policy.init(given, jax.random.key(0), PROMPTS, 2)[1].log_prob).all()


def test_atoms_are_compared_in_the_type_of_rewards():
    assert laws.support_of([float(np.float32(0.1)), 0.9], bins=2, atoms=(0.1, 0.9)).support == (0.1, 0.9)


def test_a_law_without_the_rewards_that_there_are_is_measured_as_none():
    """exp((r − V)/beta) overflows where the law gives next to nothing to r: JSON has no number for it."""
    lm, params = with_laws("value")

    def aside(path, x):
        return (0 * x).at[..., 0].set(300.0) if path[-1].key == "bias" and x.shape == (len(SUPPORT),) else 0 * x

    params = params | {"head": jax.tree_util.tree_map_with_path(aside, params["head"])}

    def collate(rows):
        mask = np.ones((len(rows), 3), bool)
        response = mask & (np.arange(3) > 0)
        tokens, reward = np.full((len(rows), 3), 5), np.asarray(rows, np.float32)
        return {"tokens": tokens, "mask": mask, "loss_mask": response, "reward": reward}

    rows = [2.0, 1.9, 1.8]
    found = laws.measure(lm, params, Data([], rows, 0, []), collate, rewards=np.asarray(rows), rollouts=3, batch_size=3)
    ratios = list(found["mean_ratio"].values())
    assert ratios[:2] == [None, None]
    assert all(ratio > 1e4 for ratio in ratios[2:4])
    np.testing.assert_allclose(found["cross_entropy"], 300, rtol=1e-3)


def test_betas_of_rewards_of_a_small_spread_are_not_zero():
    found = laws.betas_of(np.array([1e-6, 3e-6]))
    np.testing.assert_allclose(found, [0.25e-6, 0.5e-6, 1e-6, 2e-6, 4e-6], rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: laws.support_of([1.0, 1.0], bins=5), "expected rewards that differ, found 1"),
        (lambda: laws.support_of([1.0, np.nan], bins=5), "expected finite rewards, found nan"),
        (lambda: laws.support_of([1.0, 2.0], bins=1), "bins: expected at least 2, found 1"),
        (
            lambda: laws.support_of([0.0, 0.5], bins=5, atoms=(0.0, 1.0)),
            r"expected rewards among \(0.0, 1.0\), found 0.5",
        ),
        (lambda: models.Distribution((0.0,)), "expected at least two points"),
        (lambda: models.Distribution((0.0, np.inf)), "expected finite points"),
        (lambda: models.Distribution((0.0, 0.0, 1.0)), "expected points that increase, inner ones at most twice"),
        (lambda: models.Distribution((0.0, 1.0), "other"), "mode: expected 'atoms' or 'grid', found 'other'"),
        (lambda: models.Distribution((0.0, 1.0), rank=0), "rank"),
        (lambda: models.Head("reward", distribution=models.Distribution((0.0, 1.0))), "expected a value or Q head"),
        (lambda: critics.distribution(tiny_lm(0, "value")[0], reads.soft()), "expected a head of laws"),
        (lambda: critics.distribution(with_laws("q")[0], "soft"), "expected a value of critics.reads"),
        (lambda: critics.laws(*tiny_lm(0), PROMPTS), "expected a head of laws"),
        (
            lambda: tiny_lm(0, "value")[0].laws_after({}, jnp.ones((1, 8)), jnp.ones((1, 1), int)),
            "expected a Q head with",
        ),
    ],
)
def test_distribution_D11_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("numbers", "beta", "message"),
    [
        ({"beta": -1.0}, 1.0, "beta: expected a value > 0"),
        ({}, 1.0, r"expected numbers \('beta',\) for soft"),
        ({"beta": 1.0, "n": 2}, 1.0, r"expected numbers \('beta',\) for soft"),
        ({"beta": [1.0, 2.0, 3.0]}, 1.0, "beta"),
        ({"beta": 1.0}, 2.0, "beta"),
    ],
)
def test_distribution_D11_numbers_are_checked_before_tracing(numbers, beta, message):
    lm, params = with_laws("q")
    base, base_params = tiny_lm(2)
    policy = policies.tilt(policies.language_model(base), critics.distribution(lm, reads.soft()))
    given = {name: jnp.asarray(x) for name, x in numbers.items()}
    arguments = policies.TiltParams(base_params, critics.DistributionParams(params, given), beta=beta)
    with pytest.raises(ValueError, match=message):
        decoding.sample(policy, arguments, jax.random.key(0), PROMPTS, max_new_tokens=2, eos_ids=EOS)


def test_a_laws_mean_is_the_value_that_other_code_reads():
    lm, params = with_laws("value")
    tokens = jnp.asarray([[5, 6, 7]])
    hidden = lm.hidden(params, tokens)
    found = objectives.values_of(lm, params, hidden, tokens)
    np.testing.assert_allclose(found, np.exp(lm.head(params, hidden)) @ np.array(SUPPORT), atol=1e-6)
    assert dataclasses.replace(lm.config.head, distribution=None).distribution is None
