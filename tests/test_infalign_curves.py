"""InfAlign's win rates against KL for rewards without ties: closed forms, and the reference tables (section 6.1)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxalign import gibbs, infalign


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def parse(text: str, n: int) -> infalign.Transform:
    """A transform, "power+" and "power-" being those of N."""
    return infalign.parse_transform({"power+": f"bon:{n}", "power-": f"won:{n}"}.get(text, text))


@functools.cache
def matched(text: str, n: int, kls: tuple[float, ...]) -> infalign.Curve:
    transform = parse(text, n)
    return infalign.tilted_curve(transform, beta=infalign.match_kl(transform, kl=jnp.array(kls)), n=n)


BESIDE = np.array([0.99, 1.01])


@functools.cache
def optimal(kind: str, n: int, betas: tuple[float, ...]) -> tuple[infalign.FixedPoint, infalign.Curve]:
    """At 0.99 and 1.01 of each beta, [beta, 2]."""
    solve = infalign.bon_fp if kind == "best" else infalign.won_fp
    found = solve(n, beta=jnp.array(betas)[:, None] * BESIDE)
    return found, infalign.curve(found.log_policy, n=n)


@jax.jit
def rates_of_outcomes(log_policy, log_base, rank) -> infalign.Curve:
    """Exact, over finitely many outcomes, N = 4."""
    procedures = infalign.none(), infalign.best_of(4), infalign.worst_of(4)
    policy, base = jnp.exp(log_policy), jnp.exp(log_base)
    won = (infalign.procedure_win_rate(policy, base=base, rank=rank, procedure=procedure) for procedure in procedures)
    return infalign.Curve(gibbs.kl(log_policy, log_base), *won)


# Closed forms

BETA = np.array([0.002, 0.05, 0.3, 1.0, 20.0])


def test_infalign_T4_identity_in_closed_form():
    found = infalign.tilted_curve(infalign.identity, beta=BETA)
    rate = 1 / -jnp.expm1(-1 / BETA) - BETA
    log_z = jnp.log(BETA) + 1 / BETA + jnp.log(-jnp.expm1(-1 / BETA))
    np.testing.assert_allclose(found.win_rate, rate, atol=1e-12)
    np.testing.assert_allclose(found.kl, rate / BETA - log_z, atol=1e-11)
    b = BETA[1:]
    other = ((1 / b - 1) * jnp.exp(1 / b) + 1) / jnp.expm1(1 / b) - jnp.log(b) - jnp.log(jnp.expm1(1 / b))
    np.testing.assert_allclose(found.kl[1:], other, atol=1e-11)


def test_infalign_T4_log_is_best_of_n_distillation_on_which_best_of_n_adds_nothing():
    """F = c^n, n = 1 + 1/beta, and the anchors of best-of-n: n/(n+1) at log n − (n−1)/n."""
    power = 1 + 1 / BETA
    c, log_base = infalign.grid()
    law = gibbs.log_policy(log_base, infalign.log(c), beta=BETA)
    np.testing.assert_allclose(infalign.distribution(jnp.exp(law)), c ** power[:, None], atol=1e-8)
    for n in (1, 2, 4, 32):
        found = infalign.tilted_curve(infalign.log, beta=BETA, n=n)
        np.testing.assert_allclose(found.kl, jnp.log(power) - (power - 1) / power, atol=1e-11)
        np.testing.assert_allclose(found.win_rate, power / (power + 1), atol=1e-12)
        np.testing.assert_allclose(found.best_of_n, power / (power + 1), atol=1e-12)


def test_infalign_T4_exponentials_by_the_exponential_integral():
    c, log_base = infalign.grid()
    for a, raw_beta in ((4.0, 3.0), (-4.0, 0.2)):
        sign = np.sign(a)
        integral = scipy.special.expi(sign * np.exp(a * np.asarray(c)) / raw_beta)
        start, stop = (scipy.special.expi(sign * np.exp(a * x) / raw_beta) for x in (0.0, 1.0))
        beta = raw_beta / abs(np.expm1(a))
        law = gibbs.log_policy(log_base, infalign.exponential(a)(c), beta=beta)
        np.testing.assert_allclose(infalign.distribution(jnp.exp(law)), (integral - start) / (stop - start), atol=1e-8)


def test_infalign_T4_fixed_points_in_the_limit_of_large_beta_and_at_n_1():
    c = infalign.grid().c
    bon, won = infalign.bon_fp(3, beta=1e6).reward, infalign.won_fp(3, beta=1e6).reward
    np.testing.assert_allclose(bon - bon[0], 9 / 5 * (c**5 - c[0] ** 5), atol=1e-5)
    np.testing.assert_allclose(won - won[-1], -9 / 5 * ((1 - c) ** 5 - (1 - c[-1]) ** 5), atol=1e-5)
    for make in (infalign.bon_fp, infalign.won_fp):
        one = make(1, beta=0.2).reward
        np.testing.assert_allclose(one - one[0], c - c[0], atol=1e-12)


def test_the_gradient_on_the_grid_is_the_integral():
    """−∫_v^1 g(c)·g(F(c)) dc for the base itself, F = c: −N²·(1 − v^(2N−1))/(2N−1)."""
    c, log_base = infalign.grid()
    for n in (2, 5):
        found = jax.grad(lambda p, n=n: infalign.curve_win_rate(p, infalign.best_of(n)))(jnp.exp(log_base))
        expected = n**2 / (2 * n - 1) * c ** (2 * n - 1)
        np.testing.assert_allclose(found - found[0], expected - expected[0], atol=1e-10)


def test_curves_are_differentiable_batched_and_right_in_float32():
    rate = lambda b: infalign.tilted_curve(infalign.identity, beta=b, n=3).best_of_n  # noqa: E731
    slope = (rate(0.3 + 1e-5) - rate(0.3 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(rate)(0.3), slope, rtol=1e-8)
    np.testing.assert_allclose(jax.jit(jax.vmap(rate))(BETA), rate(BETA), atol=1e-14)
    root = lambda kl: infalign.match_kl(infalign.identity, kl=kl)  # noqa: E731
    np.testing.assert_allclose(jax.grad(root)(0.5), (root(0.5 + 1e-5) - root(0.5 - 1e-5)) / 2e-5, rtol=1e-7)
    shape = lambda a: infalign.match_kl(lambda c: c**a, kl=0.5)  # noqa: E731
    np.testing.assert_allclose(jax.grad(shape)(2.0), (shape(2 + 1e-5) - shape(2 - 1e-5)) / 2e-5, rtol=1e-6)
    for text in ("log", "exp:10"):
        transform = infalign.parse_transform(text)
        double = infalign.tilted_curve(transform, beta=BETA[1:])
        single = infalign.tilted_curve(transform, beta=BETA[1:].astype(np.float32))
        for a, b in zip(single, double, strict=True):
            assert a.dtype == "float32"
            np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("beta: expected", lambda: infalign.tilted_curve(infalign.identity, beta=0.0)),
        ("n: expected", lambda: infalign.tilted_curve(infalign.identity, beta=1.0, n=0)),
        ("kl: expected a value > 0", lambda: infalign.match_kl(infalign.identity, kl=0.0)),
        ("kl: expected a KL that the transform reaches", lambda: infalign.match_kl(infalign.identity, kl=30.0)),
        ("kl: expected a KL that the transform reaches", lambda: infalign.match_kl(jnp.ones_like, kl=1.0)),
        ("beta: expected", lambda: infalign.bon_fp(2, beta=-1.0)),
        ("n: expected", lambda: infalign.won_fp(0, beta=1.0)),
    ],
)
def test_bad_input_is_named(field, call):
    with pytest.raises(ValueError, match=field):
        call()
    if "reaches" in field:
        assert np.isnan(jax.jit(lambda kl: infalign.match_kl(infalign.identity, kl=kl))(30.0))


# The reference tables

BON_COLUMNS = ("identity", "log", "exp:5", "exp:10", "exp:20", "power+")
BON = """
2  0.10  .6459    .6185  .6583  .6466  .6245  .6591   .6593              | .6166  .7342
2  0.25  .7198    .6902  .7386  .7249  .6963  .7384   .7393              | .6814  .4052
2  0.50  .7917    .7682  .8154  .8031  .7724  .8132   .8156              | .7497  .2340
2  1.00  .8733    .8631  .8964  .8905  .8650  .8911   .8969              | .8345  .1128
2  2.00  .9515    .9501  .9596  .9627  .9537  .9551   .9636              | .9238  .0368
4  0.10  .6562    .6185  .6994  .7057  .6947  .7050   .7059              | .5944  .8798
4  0.25  .7304    .6902  .7856  .7966  .7875  .7939   .7969              | .6467  .4342
4  0.50  .7998    .7682  .8566  .8715  .8680  .8665   .8733              | .7025  .2166
4  1.00  .8770    .8631  .9192  .9351  .9395  .9284   .9411              | .7737  .0830
4  2.00  .9520    .9501  .9635  .9731  .9806  .9680   .9838              | .8560  .0196
8  0.50  .8036    .7682  .8747  .9037  .9235  .9175   .9299              | .6543  .1698
8  1.00  .8787    .8631  .9268  .9482  .9646  .9590   .9760              | .7106  .0466
32 0.25  .7394    .6902  .8297  .8726  .9107  .9531   .9695              | .5592  .2038
32 0.50  .8063    .7682  .8854  .9196  .9478  .9769   .9928              | .5828  .0367
"""
WON_COLUMNS = ("identity", "log", "exp:-5", "exp:-10", "exp:-20", "power-")
WON = """
2  0.25  .7486    .7637  .7635  .7473  .7282  .7666        .7671 | .4942
2  0.50  .8403    .8559  .8587  .8509  .8391  .8596        .8603 | .2805
2  1.00  .9368    .9441  .9482  .9475  .9440  .9484        .9486 | .1028
4  0.25  .7847    .8364  .8539  .8563  .8461  .8572        .8583 | .5685
4  0.50  .8860    .9270  .9439  .9476  .9450  .9475        .9479 | .2084
4  1.00  .97446   .98588 .99121 .99267 .99287 .99289       .99295 | .0282
8  0.50  .9116    .9710  .9871  .9920  .9929  .9928        .9929 | .0568
32 0.25  .8261    .9712  .9829  .9990  .9998  .99987       .99987 | .0042
"""
WIN_RATE = {
    "identity": (0.6278, 0.6989, 0.7737, 0.8646, 0.9502),
    "log": (0.6185, 0.6902, 0.7682, 0.8631, 0.9501),
    "exp:5": (0.6113, 0.6756, 0.7461, 0.8390, 0.9422),
    "exp:10": (0.5922, 0.6479, 0.7117, 0.8010, 0.9150),
}
KLS = (0.1, 0.25, 0.5, 1.0, 2.0)


def read(text: str, n: int) -> np.ndarray:
    """The rows of one N: KL and the columns."""
    rows = [[float(x) for x in line.replace("|", " ").split()] for line in text.strip().splitlines()]
    return np.array([row[1:] for row in rows if row[0] == n])


def test_infalign_T7_win_rates_of_the_table():
    for text, expected in WIN_RATE.items():
        np.testing.assert_allclose(matched(text, 4, KLS).win_rate, expected, atol=2e-4)
        # Without a procedure identity is ahead at every KL (T6).
        assert (matched("identity", 4, KLS).win_rate >= matched(text, 4, KLS).win_rate).all()


@pytest.mark.parametrize("kind", ["best", "worst"])
@pytest.mark.parametrize("n", [2, 4, 8, 32])
def test_infalign_T6_T7_win_rates_under_a_procedure_of_the_tables_and_dominance_of_the_fixed_point(kind, n):
    table, columns = (BON, BON_COLUMNS) if kind == "best" else (WON, WON_COLUMNS)
    rows = read(table, n)
    kls = tuple(rows[:, 0])
    found = [getattr(matched(text, n, kls), f"{kind}_of_n") for text in columns]
    np.testing.assert_allclose(np.stack(found, -1), rows[:, 1:7], atol=2e-4)

    # The optimum at the table's KL, between the two betas beside the table's.
    betas = rows[:, -1]
    solution, ends = optimal(kind, n, tuple(betas))
    assert (solution.residual < 1e-8).all()
    share = (rows[:, 0] - ends.kl[:, 0]) / (ends.kl[:, 1] - ends.kl[:, 0])
    assert (np.abs(share - 0.5) < 1).all()  # betas have three digits at least two of them right
    at = {name: x[:, 0] + share * (x[:, 1] - x[:, 0]) for name, x in ends._asdict().items()}
    beta = betas * (0.99 + 0.02 * np.asarray(share))
    np.testing.assert_allclose(beta, betas, atol=1.5e-4)
    best = at[f"{kind}_of_n"]
    np.testing.assert_allclose(best, rows[:, 7], atol=2e-4)
    if kind == "best":
        np.testing.assert_allclose(at["win_rate"], rows[:, 8], atol=2e-4)
    # Nothing is ahead of it at its KL (T6); the chord is below the curve by less than 1e-6.
    assert (np.stack(found) <= best + 1e-6).all()


FURTHER = (1.012, 0.4226, 0.0067)


def test_infalign_T7_further_betas_of_the_fixed_point():
    kl = optimal("best", 8, FURTHER)[1].kl
    assert (kl[:, 0] > jnp.array([0.1, 0.25, 2.0])).all()
    assert (kl[:, 1] < jnp.array([0.1, 0.25, 2.0])).all()


def test_infalign_T7_powers_come_close_to_the_optimum():
    """Within .003 for KL <= .25 and N <= 4, .007 at N = 8."""
    for n, loss in ((2, 0.003), (4, 0.0032), (8, 0.0072)):
        betas = tuple(read(BON, n)[:, -1]) if n < 8 else FURTHER
        ends = jax.tree.map(lambda x: x[1], optimal("best", n, betas)[1])  # KL .25
        power = infalign.tilted_curve(parse("power+", n), beta=infalign.match_kl(parse("power+", n), kl=ends.kl), n=n)
        gap = ends.best_of_n - power.best_of_n
        assert (gap > 0).all()
        assert (gap < loss).all()


def test_infalign_T7_200_equal_levels_give_the_continuous_win_rates():
    log_base, rank = jnp.full(200, -jnp.log(200.0)), np.arange(200)
    c = infalign.mid_rank(jnp.exp(log_base), rank=rank)
    for kl, near in ((0.1, 1e-4), (0.25, 1e-4), (0.5, 1e-4), (1.0, 2e-4)):
        law = gibbs.log_policy(log_base, c, beta=gibbs.match_kl(log_base, c, kl=kl))
        smooth = infalign.tilted_curve(infalign.identity, beta=infalign.match_kl(infalign.identity, kl=kl), n=4)
        for found, expected in zip(rates_of_outcomes(law, log_base, rank), smooth, strict=True):
            np.testing.assert_allclose(found, expected, atol=near)


def test_infalign_T11_bases_and_rewards_without_ties_agree_up_to_their_largest_atom():
    betas = {"identity": 0.3, "exp:10": 0.3, "exp:-10": 0.3, "log": 0.8}
    for count in (100, 1000):
        rng = np.random.default_rng(count)
        base = jnp.asarray(rng.dirichlet(np.full(count, 2.0), 3))
        rank = infalign.ranks(rng.standard_cauchy((3, count)))
        c, limit = infalign.mid_rank(base, rank=rank), float(base.max())
        for text, beta in betas.items():
            transform = infalign.parse_transform(text)
            log_policy = gibbs.log_policy(jnp.log(base), transform(c), beta=beta)
            smooth = infalign.tilted_curve(transform, beta=beta, n=4)
            found = rates_of_outcomes(log_policy, jnp.log(base), rank)
            for name, value, expected in zip(smooth._fields, found, smooth, strict=True):
                np.testing.assert_allclose(value, expected, atol=limit, err_msg=f"{text} {name}")


@pytest.mark.parametrize(("name", "solved"), [("bon_fp:4", infalign.bon_fp), ("won_fp:4", infalign.won_fp)])
def test_a_fixed_point_by_its_name_is_the_optimum_for_its_beta(name, solved):
    transform = infalign.parse_transform(name, beta=0.2)
    assert infalign.parse_transform(f" {name} ", beta=0.2) is transform
    infalign.check_increasing(transform)
    found = infalign.curve(solved(4, beta=0.2).log_policy)
    np.testing.assert_allclose(infalign.tilted_curve(transform, beta=0.2), found, atol=1e-9)
    with jax.enable_x64(False):  # as a training run calls it
        np.testing.assert_allclose(infalign.tilted_curve(transform, beta=jnp.float32(0.2)), found, atol=2e-5)
    with pytest.raises(ValueError, match=r"found 'bon_fp:4' .it is solved for a beta"):
        infalign.parse_transform("bon_fp:4")


def test_a_fixed_point_as_a_transform_tilts_to_its_policy():
    found = infalign.bon_fp(4, beta=0.2)
    transform = infalign.tabulated(infalign.grid().c, found.reward)
    infalign.check_increasing(transform)
    np.testing.assert_allclose(infalign.tilted_curve(transform, beta=0.2), infalign.curve(found.log_policy), atol=1e-9)
    with jax.enable_x64(False):
        single = infalign.bon_fp(4, beta=jnp.float32(0.2))
        assert single.residual < 2e-4
        rates = infalign.curve(single.log_policy)
    np.testing.assert_allclose(rates, infalign.curve(found.log_policy), atol=2e-5)
