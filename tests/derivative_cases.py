"""Functions that claim a derivative, with the points at which it is compared with differences."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import critics, gibbs, infalign, losses, policies, shaping, tree
from tests import exact

N = 6
RNG = np.random.default_rng(0)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def positive(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.3, 1.5, shape)


def law(seed: int, *shape: int) -> np.ndarray:
    x = np.exp(normal(seed, *shape))
    return x / x.sum(axis=-1, keepdims=True)


BASE, REWARD, UTILITY = np.log(law(1, 3, N)), normal(2, 3, N), normal(3, 3, N)
RANK = np.array([0, 2, 1, 3, 3, 4])
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
TOKENS = (3, 4)
WEIGHTS = normal(9, 3, N)  # makes one number of a table, in which no direction is special

Case = tuple[Callable[..., Any], tuple[Any, ...]]


def weighed(x: jax.Array) -> jax.Array:
    return (jnp.resize(jnp.asarray(np.cos(np.arange(1, 1 + x.size))), x.shape) * x).sum()


def normalised(f: Callable[..., Any]) -> Callable[..., Any]:
    """f of log weights that are normalised first, so that differences stay on the simplex."""
    return lambda log_base, *more: f(jax.nn.log_softmax(log_base), *more)


def of_laws(f: Callable[..., Any]) -> Callable[..., Any]:
    """f of laws that are normalised first."""
    return lambda *laws: f(*(p / p.sum() for p in laws))


GIBBS: dict[str, Case] = {
    "log_policy": (lambda l, r, b: gibbs.log_policy(l, r, beta=b), (BASE, REWARD, positive(4, 3))),
    "log_partition": (lambda l, r, b: gibbs.log_partition(l, r, beta=b), (BASE, REWARD, positive(4, 3))),
    "kl": (gibbs.kl, (np.log(law(5, 3, N)), BASE)),
    "utility": (gibbs.utility, (BASE, UTILITY)),
    "match_kl": (lambda l, r, k: gibbs.match_kl(l, r, kl=k), (BASE, REWARD, np.array([0.05, 0.3, 0.6]))),
    "match_kl of a small budget": (lambda l, r, k: gibbs.match_kl(l, r, kl=k), (BASE, REWARD, np.full(3, 1e-5))),
}


def transforms(c: jax.Array, a: jax.Array) -> jax.Array:
    """Every transform that claims to be differentiable."""
    table = infalign.tabulated(np.array([0.0, 0.3, 1.0]), jnp.stack([a * 0, a, a**2 + 1]))
    named = [infalign.identity, infalign.log, infalign.exponential(3.0), infalign.exponential(-40.0), table]
    named += [infalign.best_of_n_power(3), infalign.worst_of_n_power(2)]
    return jnp.stack([f(c) for f in named])


def steep(c: jax.Array, a: jax.Array) -> jax.Array:
    return -((1 - c) ** a)


def rule_of_ranks(drawn: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.asarray(RANK)[drawn] * 1.0, axis=-1)


def fixed(procedure: infalign.Procedure, field: str) -> Callable[..., Any]:
    return lambda l, b: getattr(infalign.optimal_reward(l, rank=RANK, procedure=procedure, beta=b), field)


def of_phi(prob: jax.Array, phi: jax.Array) -> jax.Array:
    """A win rate with parameters of its own."""
    return 1 - ((1 - prob) ** 2 * jax.nn.softmax(phi)).sum()


def curve_of(v: jax.Array) -> jax.Array:
    """The curve of a law on the grid that is no tilt by an increasing transform."""
    c, log_base = infalign.grid()
    return jnp.stack(infalign.curve(gibbs.log_policy(log_base, jnp.cos(v * c), beta=0.3)))


CALIBRATED = (normal(6, 4), normal(7, 5), np.array(0.7))

INFALIGN: dict[str, Case] = {
    "calibrate": (lambda r, s, w: infalign.calibrate(r, reference=s, width=w), CALIBRATED),
    "calibrate, smooth": (lambda r, s, w: infalign.calibrate(r, reference=s, width=w, smooth=True), CALIBRATED),
    "transforms": (transforms, (np.array([0.05, 0.4, 0.97]), np.array(0.6))),
    "match_kl in kl": (lambda k: infalign.match_kl(infalign.identity, kl=k), (np.array([0.05, 0.5, 3.0]),)),
    "match_kl in the transform": (
        lambda k, a: infalign.match_kl(functools.partial(steep, a=a), kl=k),
        (np.array([0.1, 0.5]), np.array(5.0)),
    ),
    "match_kl of a very steep transform": (
        lambda k, a: jnp.log(infalign.match_kl(functools.partial(steep, a=a), kl=k)),
        (np.array([0.5]), np.array(63.0)),
    ),
    "tilted_curve": (
        lambda b, a: jnp.stack(infalign.tilted_curve(lambda c: c**a, beta=b, n=3)),
        (np.array([0.2, 1.0]), np.array(1.5)),
    ),
    "curve": (curve_of, (np.array(2.0),)),
    "mid_rank": (of_laws(lambda p: infalign.mid_rank(p, rank=RANK)), (law(8, N),)),
    "selected": (of_laws(lambda p: infalign.selected(p, rank=RANK, procedure=infalign.best_of(4))), (law(8, N),)),
    "win_rate": (of_laws(lambda p, q: infalign.win_rate(p, against=q, rank=RANK)), (law(8, N), law(9, N))),
    "procedure_win_rate": (
        of_laws(lambda p, b: infalign.procedure_win_rate(p, base=b, rank=RANK, procedure=infalign.worst_of(3))),
        (law(8, N), law(9, N)),
    ),
    "procedure_win_rate, ranks of another reward": (
        of_laws(
            lambda p, b: infalign.procedure_win_rate(
                p, base=b, rank=RANK, procedure=infalign.best_of(3), selection_rank=RANK[::-1].copy()
            )
        ),
        (law(8, N), law(9, N)),
    ),
    "win_rate_gradient": (
        of_laws(lambda p, b: infalign.win_rate_gradient(p, base=b, rank=RANK, procedure=infalign.best_of(3))),
        (law(8, N), law(9, N)),
    ),
    "enumerated": (of_laws(lambda p: infalign.enumerated(p, rule_of_ranks, 3)), (law(8, N),)),
    "rule_win_rate": (
        of_laws(lambda p, b: infalign.rule_win_rate(p, base=b, rank=RANK, rule=rule_of_ranks, n=2)),
        (law(8, N), law(9, N)),
    ),
    "solve in the win rate's parameters": (
        lambda l, phi, b: infalign.solve(of_phi, l, phi, beta=b).reward,
        (normal(10, N), normal(11, N), np.array(0.4)),
    ),
    "solve from its own solution": (
        lambda l, b: (
            infalign.solve(
                of_phi,
                l,
                np.zeros(N),
                beta=b,
                start=infalign.solve(of_phi, BASE[0], np.zeros(N), beta=0.4, tolerance=1e-14).log_policy,
                tolerance=1e-14,
            ).log_policy
        ),
        (BASE[0], np.array(0.4)),
    ),
    "optimal_reward, reward": (fixed(infalign.best_of(3), "reward"), (BASE[0], np.array([0.2, 0.5]))),
    "optimal_reward, policy": (fixed(infalign.worst_of(2), "log_policy"), (BASE[0], np.array([0.5, 0.9]))),
    "optimal_reward, objective": (fixed(infalign.best_of(3), "objective"), (BASE[0], np.array([0.2, 0.5]))),
}

GAIN = np.array([0.05, 0.7, 4.0])


def leader(bound: jax.Array, beta: jax.Array, utility: jax.Array) -> jax.Array:
    return shaping.solve_leader(BASE[0], utility=utility, bound=bound, beta=beta, steps=5, step_size=0.01).reward


SHAPING: dict[str, Case] = {
    "optimal_threshold": (lambda u, l, g: shaping.optimal_threshold(u, log_base=l, gain=g), (UTILITY, BASE, GAIN)),
    "optimal_threshold of samples": (lambda u, g: shaping.optimal_threshold(u, gain=g), (UTILITY, GAIN)),
    "optimal_threshold, capped": (
        lambda u, g: shaping.optimal_threshold(u, gain=g, max_gain=0.7 + 1e-3),
        (UTILITY, np.array([0.05, 0.6, 4.0])),
    ),
    "threshold_reward in the bound": (
        lambda b: shaping.threshold_reward(UTILITY, threshold=0.1, bound=b),
        (positive(1, 3),),
    ),
    "soft_threshold_reward": (
        lambda u, m, b, s: shaping.soft_threshold_reward(u, threshold=m, bound=b, sharpness=s),
        (UTILITY, normal(4, 3), positive(5, 3), positive(6, 3)),
    ),
    "kl_bound": (shaping.kl_bound, (np.array([0.01, 0.0999, 0.11, 3.0, 50.0]),)),
    "mixture in the gain": (
        lambda g: jnp.stack(shaping.mixture(UTILITY, log_base=BASE, threshold=0.1, gain=g)[::2]),
        (GAIN,),
    ),
    "exceedance_log_weight": (lambda x, g: shaping.exceedance_log_weight(x, gain=g), (normal(4, 3), GAIN)),
    "exceedance_soft_value": (
        lambda p, b, beta: shaping.exceedance_soft_value(p, bound=b, beta=beta),
        (law(4, 3), positive(5, 3), positive(6, 3)),
    ),
    "expectile_loss": (
        lambda m, u, g: shaping.expectile_loss(m, utility=u, gain=g),
        (normal(4, 3), normal(5, 3), GAIN),
    ),
    "leader_utility": (
        lambda l, r, u, b: shaping.leader_utility(l, r, utility=u, beta=b),
        (BASE, REWARD, UTILITY, positive(4, 3)),
    ),
    "effective_samples": (lambda r, b: shaping.effective_samples(r, beta=b), (REWARD, positive(4, 3))),
    "excess_kl": (
        normalised(lambda l, r, b, k: shaping.excess_kl(l, r, beta=b, budget=k)),
        (BASE, REWARD, positive(4, 3), np.array([0.01, 0.02, 9.0])),
    ),
    "solve_leader": (leader, (np.array(2.0), np.array(0.7), UTILITY[0])),
    "score_function": (lambda l: shaping.score_function(l, utility=UTILITY), (BASE,)),
    "stackelberg, soft": (
        lambda u, b: shaping.stackelberg(u, reference=UTILITY, bound=b, beta=0.5, sharpness=2.0),
        (REWARD, np.array(1.3)),
    ),
    "minmax": (lambda u, r, b: shaping.minmax(u, reference=r, bound=b), (UTILITY, REWARD, np.array(2.0))),
    "meanstd": (lambda u, r: shaping.meanstd(u, reference=r), (UTILITY, REWARD)),
    "meanstd of its own samples": (lambda u: shaping.meanstd(u, reference=u), (UTILITY,)),
    "cap": (lambda u, r, b: shaping.cap(u, reference=r, bound=b), (UTILITY, REWARD, np.array(2.0))),
    "mean_sigmoid": (
        lambda u, r, b: shaping.mean_sigmoid(u, reference=r, bound=b, sharpness=2.0),
        (UTILITY, REWARD, np.array(2.0)),
    ),
    "log_sigmoid": (lambda u, r: shaping.log_sigmoid(u, reference=r), (UTILITY, REWARD)),
    "preference_as_reward": (lambda u, r: shaping.preference_as_reward(u, reference=r), (UTILITY, REWARD)),
    "statistics": (lambda r: jnp.concatenate([x.reshape(-1) for x in shaping.statistics(r)]), (REWARD,)),
}

PAIR = (normal(1, 3), normal(2, 3), normal(3, 3), normal(4, 3))


def of_pairs(loss: Callable[..., Any], **more: Any) -> Callable[..., Any]:
    return lambda w, l, w_ref, l_ref, beta: loss(
        w, l, chosen_log_prob_ref=w_ref, rejected_log_prob_ref=l_ref, beta=beta, **more
    )


LOSSES: dict[str, Case] = {
    "language_model": (lambda x: losses.language_model(x, mask=MASK), (normal(1, *TOKENS),)),
    "bradley_terry": (losses.bradley_terry, PAIR[:2]),
    "autoregressive_reward": (lambda w, l, b: losses.autoregressive_reward(w, l, beta_r=b), (*PAIR[:2], np.array(0.3))),
    "dpo": (of_pairs(losses.dpo, label_smoothing=0.1), (*PAIR, np.array(0.3))),
    "ipo": (of_pairs(losses.ipo), (*PAIR, np.array(0.3))),
    "fudge": (lambda v, r: losses.fudge(v, reward=r, mask=MASK), (normal(1, *TOKENS), normal(2, 3))),
    "expected_next": (lambda q, l: losses.expected_next(q, log_prob_ref=l), (REWARD, BASE)),
    "soft_value": (
        lambda v, r, b: losses.soft_value(v, reward=r, mask=MASK, beta=b),
        (normal(1, *TOKENS), normal(2, 3), np.array(0.5)),
    ),
    "soft_value beyond the largest exponent": (
        lambda v, r, b: losses.soft_value(v, reward=r, mask=MASK, beta=b, max_exponent=1.0),
        (normal(1, *TOKENS), 9 + normal(2, 3), np.array(0.5)),
    ),
    "exceedance": (
        lambda x: losses.exceedance(x, utility=UTILITY[:, 0], threshold=np.zeros(3), mask=MASK),
        (normal(1, *TOKENS),),
    ),
    "last_and_pairs": (
        lambda v, r: losses.last_and_pairs(v, reward=r, mask=MASK, pair_weight=0.3),
        (normal(1, *TOKENS), normal(2, 3)),
    ),
    "policy_gradient": (
        lambda x, a: losses.policy_gradient(x, old_log_prob=normal(1, *TOKENS), advantage=a, mask=MASK, clip=0.2),
        (normal(1, *TOKENS) + 0.3 * normal(4, *TOKENS), normal(2, *TOKENS)),
    ),
    "policy_gradient, whole": (
        lambda x, a: losses.policy_gradient(
            x, old_log_prob=normal(1, *TOKENS), advantage=a, mask=MASK, clip=0.2, whole=True
        ),
        (normal(1, *TOKENS) + 0.05 * normal(4, *TOKENS), normal(2, 3)),
    ),
    "clipped_value": (
        lambda v, r: losses.clipped_value(v, old_value=normal(1, *TOKENS), returns=r, mask=MASK, clip=0.2),
        (normal(2, *TOKENS), normal(3, *TOKENS)),
    ),
    "kl_penalty k2": (
        lambda x, y: losses.kl_penalty(x, log_prob_ref=y, mask=MASK, estimator="k2"),
        (normal(1, *TOKENS), normal(2, *TOKENS)),
    ),
    "kl_penalty k3": (
        lambda x, y: losses.kl_penalty(x, log_prob_ref=y, mask=MASK, estimator="k3"),
        (normal(1, *TOKENS), normal(2, *TOKENS)),
    ),
}

TREE = tree.Tree(3, 2, eos_id=0)
LEAVES, STATES = TREE.num_responses, (TREE.num_states, TREE.vocab_size)
TREE_BASE, Q = np.log(law(1, *STATES)), normal(2, *STATES)


def scored(policy: Any, *names: str) -> Callable[..., Any]:
    """Records of `decoding.log_prob` of all responses, one after the other, as a function of the policy's params."""

    def records(params: Any) -> jax.Array:
        found = exact.completions(TREE, policy, params)
        return jnp.stack([getattr(found, name) for name in names or ("log_prob",)])

    return records


LEVEL = policies.tilt(tree.policy(TREE), tree.critic(TREE, "level"))
NESTED = policies.tilt(LEVEL, tree.critic(TREE, "increment"), top_k=3)
TILT = {"policy": TREE_BASE, "critic": Q, "beta": np.array(0.7)}
NEST = {"policy": TILT, "critic": normal(3, *STATES), "beta": np.array(1.3)}
SHAPED = policies.tilt(
    tree.policy(TREE),
    critics.shaped_over_candidates(tree.critic(TREE, "level"), beta=0.7, sharpness=2.0),
)
SHAPED_PARAMS = {"policy": TREE_BASE, "critic": {"critic": Q, "bound": np.array(1.1)}, "beta": np.array(0.7)}
SUM = policies.tilt(tree.policy(TREE), critics.weighted_sum([tree.critic(TREE, "level")] * 2))
SUM_PARAMS = {
    "policy": TREE_BASE,
    "critic": {"critics": [Q, normal(3, *STATES)], "weights": np.array([0.3, 0.9])},
    "beta": np.array(0.7),
}

PROCESS: dict[str, Case] = {
    "tree.value": (lambda l, r: tree.value(TREE, l, r), (TREE_BASE, normal(3, LEAVES))),
    "tree.soft_value": (
        lambda l, r, b: tree.soft_value(TREE, l, r, beta=b),
        (TREE_BASE, normal(3, LEAVES), np.array(0.5)),
    ),
    "tree.optimal_policy": (
        lambda l, r, b: tree.optimal_policy(TREE, l, r, beta=b),
        (TREE_BASE, normal(3, LEAVES), np.array(0.5)),
    ),
    "tree.optimal_log_prob": (
        lambda l, r, b: tree.optimal_log_prob(TREE, l, r, beta=b),
        (TREE_BASE, normal(3, LEAVES), np.array(0.5)),
    ),
    "log_prob, log_norm and kl of a tilt": (scored(LEVEL, "log_prob", "log_norm", "kl"), (TILT,)),
    "log_prob and log_norm of nested tilts": (scored(NESTED, "log_prob", "log_norm"), (NEST,)),
    "log_prob of a weighted sum": (scored(SUM), (SUM_PARAMS,)),
    "log_prob of shaped candidates": (scored(SHAPED), (SHAPED_PARAMS,)),
    "log_prob of a temperature": (
        scored(policies.temperature(LEVEL)),
        ({"policy": TILT, "temperature": np.array(0.6)},),
    ),
}


def in_scan(f: Callable[..., Any], wrap: Callable[..., Any] = lambda body: body) -> Callable[..., Any]:
    """f at a number that the carry of a scan drives: where jax splits a scan for reverse mode, custom rules go."""

    def run(x: jax.Array) -> jax.Array:
        body = wrap(lambda c, _: (c + 0.1 * jnp.sin(f(0.3 + 0.2 * jnp.tanh(c))), None))
        outer = wrap(lambda c, _: jax.lax.scan(body, c, length=2))
        return jax.lax.scan(outer, x, length=2)[0]

    return run


ROOTS: dict[str, Callable[..., Any]] = {
    "match_kl": lambda k: gibbs.match_kl(BASE[0], REWARD[0], kl=k),
    "infalign.match_kl": lambda k: infalign.match_kl(infalign.identity, kl=k),
    "optimal_threshold": lambda g: shaping.optimal_threshold(UTILITY[0], log_base=BASE[0], gain=g),
}
SCANNED: dict[str, Case] = {}
for _root, _f in ROOTS.items():
    SCANNED[_root] = (in_scan(_f), (np.array(0.5),))
    SCANNED[f"{_root}, rematerialised"] = (in_scan(_f, jax.checkpoint), (np.array(0.5),))

CASES = {
    f"{room}.{name}": case
    for room, cases in {
        "gibbs": GIBBS,
        "infalign": INFALIGN,
        "shaping": SHAPING,
        "losses": LOSSES,
        "process": PROCESS,
        "scan": SCANNED,
    }.items()
    for name, case in cases.items()
}
