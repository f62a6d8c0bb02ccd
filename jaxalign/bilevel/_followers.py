"""Which followers have a derivative, by which estimators, and in which of their parameters."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from jaxalign import decoding
from jaxalign._checks import check_count, entries_of
from jaxalign._parts import check_critic_argument, check_same_vocabulary
from jaxalign.decoding import resampling
from jaxalign.types import Critic, Decoded, Params, Policy, Reward

Estimator: TypeAlias = Literal[
    "score", "all_tokens", "togo", "covariance", "closed_form", "smc", "smc_law", "best_of_score", "soft_pick"
]
"""A scalar of `jaxalign.shaping` that is differentiated; closed_form is `leader_utility` on base samples."""
Follower: TypeAlias = Policy | functools.partial[Decoded[Any]]
"""A Policy, sampled by tokens, or a decoder bound to its policy and reward: partial(decoding.smc, policy, reward)."""

_FITS: dict[Any, tuple[str, ...]] = {
    decoding.rejection: ("covariance", "closed_form"),
    decoding.smc: ("smc", "smc_law"),
    decoding.best_of_n: ("best_of_score", "soft_pick"),
}
_TABLE = (
    "score fits a Policy, and with values of the utility all_tokens and togo; covariance and closed_form "
    "partial(decoding.rejection, policy, reward); smc and smc_law partial(decoding.smc, policy, reward); best_of_score "
    "and soft_pick partial(decoding.best_of_n, policy, judge)"
)
_WITH_VALUES = ("all_tokens", "togo")
_MOVED = {
    "covariance": ("reward", "beta"),
    "closed_form": ("reward", "beta"),
    "smc": ("reward", "beta"),
    "smc_law": ("policy", "reward", "beta"),
    "best_of_score": ("policy",),
    "soft_pick": ("reward",),
}


class Parts(NamedTuple):
    """What a follower is made of; hashable."""

    decoder: Any
    """A function of `jaxalign.decoding`; None for a Policy."""
    policy: Policy
    """What the responses are drawn from."""
    reward: Reward | None
    """What the decoder weighs or picks by; None for a Policy."""
    group: int
    """n of best-of-n, and with smc_law the particles of a population; else 1."""
    values: Critic | None = None
    """Of the utility after each token, for all_tokens and togo."""


def open_follower(follower: Follower, estimator: Estimator, samples: int, values: Critic | None = None) -> Parts:
    """Tells the parts of a follower and checks them.

    Args:
      follower: a Policy, or a decoder bound by functools.partial.
      estimator: by which it is to be differentiated.
      samples: draws of each prompt.
      values: of the utility after each token, with all_tokens and togo.

    Returns:
      Its Parts.

    Raises:
      ValueError: a follower without a derivative, an estimator that does not fit it, too few samples, values that are
        missing, are no level critic, or are not asked for.
    """
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator: expected one of {', '.join(get_args(Estimator))}, found {estimator!r} ({_TABLE})")
    if values is not None and estimator not in _WITH_VALUES:
        raise ValueError(f"values: expected with all_tokens or togo, found some with {estimator}")
    if isinstance(follower, Policy):
        if estimator in _WITH_VALUES:
            if values is None:
                raise ValueError(f"values: expected a Critic of the utility with {estimator}, found None")
            check_critic_argument("values", values)
            if values.kind != "level":
                raise ValueError(f"values: expected a level critic, whose score is a value, found one of {values.kind}")
            check_same_vocabulary("leader_gradient", follower, values)
        elif estimator != "score":
            raise ValueError(f"estimator: expected score for a Policy, found {estimator} ({_TABLE})")
        check_count("samples", samples, least=2)
        return Parts(None, follower, None, 1, values)
    if not isinstance(follower, functools.partial):
        raise ValueError(f"follower: expected a Policy or a functools.partial of a decoder, found {follower!r:.80}")
    decoder: Any = follower.func
    name = getattr(follower.func, "__name__", repr(follower.func))
    if decoder is decoding.sample:
        raise ValueError(
            "follower: expected the Policy itself in place of decoding.sample, found a partial of it "
            "(a temperature is policies.temperature; greedy decoding has no derivative)"
        )
    if decoder not in _FITS:
        raise ValueError(f"follower: expected one with a derivative, found decoding.{name} ({_TABLE})")
    if estimator not in _FITS[decoder]:
        raise ValueError(
            f"estimator: expected {' or '.join(_FITS[decoder])} for decoding.{name}, found {estimator} ({_TABLE})"
        )
    if len(follower.args) != 2 or not isinstance(follower.args[0], Policy):
        raise ValueError(
            f"follower: expected partial(decoding.{name}, policy, reward), found {len(follower.args)} by position"
        )
    group = 1
    if decoder is decoding.best_of_n:
        check_count("num_samples", follower.keywords.get("num_samples"), least=1)
        group = int(follower.keywords["num_samples"])
        if follower.keywords.get("drop"):
            raise ValueError("follower: expected best-of-n without drop, which has no estimator here")
    if estimator == "smc_law":
        others = sorted(set(follower.keywords) - {"num_particles", "scheme"})
        scheme = follower.keywords.get("scheme", resampling.multinomial)
        if others or scheme is not resampling.multinomial:
            raise ValueError(
                "follower: expected partial(decoding.smc, policy, reward, num_particles=N) with smc_law, which draws "
                f"ancestors one by one (resampling.multinomial), found {', '.join(others) or scheme}"
            )
        check_count("num_particles", follower.keywords.get("num_particles"), least=1)
        group = int(follower.keywords["num_particles"])
        check_count("samples", samples, least=2 * group)
    check_count("samples", samples, least=max(2, group))
    if samples % group:
        name = "best-of-n's" if decoder is decoding.best_of_n else "a population's"
        raise ValueError(f"samples: expected a multiple of {name} {group}, found {samples}")
    return Parts(decoder, *follower.args, group)


def check_paths(params: Params, paths: tuple[str, ...], estimator: Estimator) -> None:
    """Checks what is to be differentiated.

    Args:
      params: the follower's.
      paths: of the entries, such as "policy/critic".
      estimator: by which.

    Raises:
      ValueError: no path, an entry that there is not, one that the estimator holds fixed.
    """
    if not paths:
        raise ValueError("wrt: expected at least one entry of the follower's params, found none")
    for path in paths:
        first = path.split("/")[0]
        moved = _MOVED.get(estimator)
        if estimator == "best_of_score" and first == "reward":
            raise ValueError(
                f"wrt: expected entries of the policy that draws, found {path!r}: a hard pick has derivative 0 in the "
                "scores that it picks by almost everywhere and jumps at ties (soft_pick has one)"
            )
        if moved is not None and first not in moved:
            raise ValueError(
                f"wrt: expected entries under {' or '.join(moved)}, which {estimator} differentiates, found {path!r}"
            )
        entry_at(params, path)


def entry_at(params: Params, path: str) -> Params:
    """Gives an entry of nested params.

    Args:
      params: dicts and NamedTuples.
      path: names joined by "/"; "" is the whole.

    Returns:
      The entry.

    Raises:
      ValueError: naming the path, where there is no such entry.
    """
    found = params
    for name in path.split("/") if path else ():
        entries = entries_of(found)
        if entries is None or name not in entries:
            listed = type(found).__name__ if entries is None else ", ".join(entries)
            raise ValueError(
                f"wrt: expected a path of the follower's params, found {path!r}: {name!r} is not in {listed}"
            )
        found = entries[name]
    return found


def with_entry(params: Params, path: str, value: Params) -> Params:
    """Gives nested params with another entry.

    Args:
      params: dicts and NamedTuples.
      path: as `entry_at`.
      value: takes the entry's place.

    Returns:
      Params of the same form.
    """
    if not path:
        return value
    first, _, rest = path.partition("/")
    inner = with_entry(entry_at(params, first), rest, value)
    if isinstance(params, tuple):
        named_tuple: Any = params
        return named_tuple._replace(**{first: inner})
    return {**params, first: inner}
