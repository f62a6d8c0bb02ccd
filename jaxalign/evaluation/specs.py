"""A method as text, KIND[:DIR][@STRENGTHS]: its parts, and what is wrong with them.

The names of methods and critics and what each takes stand in `KINDS` and `CRITICS`; how each is built stands in
`methods.METHODS` and `methods.CRITICS` under the same names.
"""

from __future__ import annotations

import math
import pathlib
import re
from typing import Literal, NamedTuple

from jaxalign import rewards
from jaxalign.evaluation.readings import parse_reading
from jaxalign.models import split_source


class Kind(NamedTuple):
    """What a kind of method takes, as DIR, as strengths and as options."""

    takes: Literal["nothing", "folder", "critics", "critics or nothing", "function"]
    """The text after KIND and a colon."""
    strengths: Literal["none", "any", "beta", "count", "choice"]
    """The text after @: nothing; anything or nothing; positive numbers; integers; integers of at least 2."""
    reads: tuple[str, ...] = ()
    """Options that this kind alone reads; every kind reads the others."""
    needs_reward: bool = False
    """Whether the method maximises --reward."""
    draws: Literal["any", "several", "untempered"] = "any"
    """Temperatures that it allows: any; > 0, since it keeps one of several draws; 1 alone."""


KINDS: dict[str, Kind] = {
    "base": Kind("nothing", "none", ("draft", "draft_tokens")),
    "policy": Kind("folder", "none", ("draft", "draft_tokens")),
    "tilt": Kind("critics", "beta", ("top_k", "draft", "draft_tokens")),
    "best_of_n": Kind("nothing", "choice", ("drop",), needs_reward=True, draws="several"),
    "blockwise": Kind("critics", "choice", ("block_size",), draws="several"),
    "beam": Kind("critics", "count", ("block_size", "continuations"), draws="several"),
    "re_control": Kind("folder", "beta", ("gradient_steps",)),
    "ggro": Kind("nothing", "count", ("entropy_threshold", "top_k"), needs_reward=True),
    "smc": Kind("critics or nothing", "beta", ("num_particles", "top_k"), needs_reward=True, draws="untempered"),
    "quest": Kind("nothing", "beta", ("num_steps", "num_samples"), needs_reward=True, draws="several"),
    "cards": Kind(
        "nothing", "beta", ("entropy_threshold", "reward_threshold", "max_tries"), needs_reward=True, draws="several"
    ),
    "function": Kind("function", "any"),
}
"""A tilt is written as its critics alone, "args:DIR@1"; a function of the user's as "MODULE:FUNCTION@1"."""

CRITICS: dict[str, Kind] = {
    "args": Kind("folder", "beta"),
    "value": Kind("folder", "beta"),
    "follower": Kind("folder", "none"),
    "distribution": Kind("folder", "beta"),
    "genarm": Kind("folder", "beta"),
    "transfer": Kind("folder", "beta", ("rollouts", "lookahead"), needs_reward=True),
}
PREFIXES = tuple(kind for kind in KINDS if kind not in ("tilt", "function"))
"""Kinds that a method's text may begin with, besides critics."""


class Term(NamedTuple):
    """A critic of a weighted sum."""

    weight: float
    """The weight of the critic [1]."""
    critic: str
    """A name among CRITICS."""
    folder: str
    """The folder of its model."""
    reading: str = ""
    """Of a distributional critic, what is read (`readings.parse_reading`); "" of another."""

    @property
    def role(self) -> str:
        """CRITIC:DIR, the name of its model in messages."""
        return f"{self.critic}:{self.folder}"


class Spec(NamedTuple):
    """A method, read from its text."""

    text: str
    """The text as given."""
    kind: str
    """A name among KINDS."""
    terms: tuple[Term, ...]
    """The critics of the method; () for kinds without."""
    target: str
    """The folder of the method, or the MODULE:FUNCTION of a user's method; "" for neither."""
    strengths: tuple[float, ...]
    """beta, K, n, …; () for none."""

    @property
    def name(self) -> str:
        """The text without strengths: the method's name in tables."""
        return _halves(self.text)[0]

    @property
    def folders(self) -> dict[str, str]:
        """Role -> folder of the models that it loads beside the base and the rewards."""
        own = {self.name: self.target} if KINDS[self.kind].takes == "folder" else {}
        return own | {term.role: term.folder for term in self.terms}

    @property
    def reads(self) -> set[str]:
        """Options that it reads and some other kinds do not."""
        return {name for kind in self._parts for name in kind.reads}

    @property
    def needs_reward(self) -> bool:
        """Whether the method maximises --reward."""
        return any(kind.needs_reward for kind in self._parts)

    @property
    def _parts(self) -> list[Kind]:
        return [KINDS[self.kind], *(CRITICS[term.critic] for term in self.terms)]

    @property
    def slug(self) -> str:
        """A name for the method's folder."""
        parts = [] if self.kind in ("tilt", "function") else [self.kind]
        for term in self.terms:
            parts += [f"{term.weight:g}"] * (term.weight != 1) + [term.critic, _short(term.folder), term.reading]
        parts.append(self.target if self.kind == "function" else _short(self.target))
        parts.append("_".join(f"{s:g}" for s in self.strengths))
        return re.sub(r"[^\w.=-]+", "_", "_".join(part for part in parts if part))


def _short(folder: str) -> str:
    path = pathlib.PurePath(split_source(folder)[0])
    return path.parent.name if path.name == "model" else path.name


def _halves(text: str) -> tuple[str, str]:
    """What stands before and after the last @. The one of ADAPTER_DIR@BASE_DIR, or of a folder's own name, is not
    followed by strengths: there is a separator behind it, or a folder of that name."""
    head, at, tail = text.rpartition("@")
    folder = "/" in tail or (pathlib.Path(tail).is_dir() and not re.fullmatch(r"[\d.,e+-]+", tail))
    return (head, tail) if at and not folder else (text, "")


def parse_method(text: str) -> Spec:
    """Reads KIND[:DIR][@STRENGTHS], a weighted sum of critics "CRITIC:DIR + 0.5 * CRITIC:DIR@STRENGTHS", also behind
    "blockwise:", "beam:" or "smc:", or MODULE:FUNCTION[@STRENGTHS].

    Raises:
      ValueError: says what is wrong with it.
    """
    head, tail = _halves(text)
    kind, _, rest = head.partition(":")
    terms: tuple[Term, ...] = ()
    target = ""
    if kind in PREFIXES:
        takes = KINDS[kind].takes
        if takes == "folder":
            target = rest
        elif takes != "nothing" and (rest or takes == "critics"):
            terms = _terms(rest, text, f"{kind}:")
        missing = takes == "folder" and not rest
        if missing or (takes == "nothing" and rest):
            raise ValueError(f"method: expected {'a' if missing else 'no'} folder for {kind}, found {text!r}")
    elif kind not in CRITICS and rewards.is_program(head):
        kind, target = "function", head
    else:
        kind, terms = "tilt", _terms(head, text, "")
    spec = Spec(text, kind, terms, target, _strengths(text, tail))
    _check_strengths(spec)
    return spec


def _terms(body: str, text: str, prefix: str) -> tuple[Term, ...]:
    """The critics of a weighted sum, which stands behind `prefix`."""
    critic, _, folder = body.partition(":")
    alone = _split_reading(critic, folder)[0]
    whole = critic in CRITICS and alone and pathlib.Path(alone).exists()  # a name that may hold signs
    out = []
    for weight, part in ((1.0, body),) if whole or not body.strip() else rewards.parse_reward(body, name="method"):
        critic, _, folder = part.partition(":")
        if critic not in CRITICS and prefix:
            raise ValueError(
                f"method: expected {prefix}CRITIC:DIR with CRITIC among {tuple(CRITICS)}, or a weighted sum of such, "
                f"found {text!r}"
            )
        if critic not in CRITICS:
            raise ValueError(
                f"method: expected a kind among {(*PREFIXES, *CRITICS)}, or MODULE:FUNCTION, found {text!r}"
            )
        folder, reading = _split_reading(critic, folder)
        if not folder:
            raise ValueError(f"method: expected a folder for {prefix}{critic}, found {text!r}")
        if critic == "distribution":
            parse_reading(reading)
        out.append(Term(weight, critic, folder, reading))
    return tuple(out)


def _split_reading(critic: str, rest: str) -> tuple[str, str]:
    """DIR:READING of a distributional critic as (DIR, READING); the folder of another critic."""
    if critic != "distribution":
        return rest, ""
    folder, colon, reading = rest.rpartition(":")
    inside = re.fullmatch(r"(.*):(\w+\([^()]*\))", rest)  # a reading may hold a colon itself, calibrated(exp:5)
    if inside is not None:
        return inside[1], inside[2]
    return (folder, reading) if colon else (rest, "")


def _strengths(text: str, tail: str) -> tuple[float, ...]:
    try:
        strengths = tuple(float(part) for part in tail.split(",")) if tail else ()
    except ValueError as error:
        raise ValueError(f"method: expected numbers after @, found {text!r}") from error
    if len(set(strengths)) < len(strengths):
        raise ValueError(f"method: expected each strength once, found {text!r}")
    return strengths


def _brings_strength(term: Term) -> bool:
    """Whether a reading's text holds what would stand after @."""
    reading = parse_reading(term.reading)
    return reading.read.log_omega is not None and reading.strength is None


def _check_strengths(spec: Spec) -> None:
    wanted, found = KINDS[spec.kind].strengths, spec.strengths
    given = [term for term in spec.terms if term.critic == "distribution" and _brings_strength(term)]
    if spec.kind == "tilt" and (given or any(CRITICS[term.critic].strengths == "none" for term in spec.terms)):
        wanted = "none"  # a follower's head was trained for one beta, which it brings
    name = spec.terms[0].critic if spec.kind == "tilt" else spec.kind
    if wanted != "any" and bool(found) == (wanted == "none"):
        raise ValueError(
            f"method: expected {'no strength' if found else '@ and strengths'} for {name}, found {spec.text!r}"
        )
    if wanted == "any":
        if not all(math.isfinite(s) for s in found):
            raise ValueError(f"method: expected finite strengths, found {spec.text!r}")
    elif not all(0 < s < math.inf for s in found) or (wanted in ("count", "choice") and any(s % 1 for s in found)):
        whole = tuple(kind for kind in KINDS if KINDS[kind].strengths in ("count", "choice"))
        raise ValueError(f"method: expected positive strengths, whole numbers for {whole}, found {spec.text!r}")
    if wanted == "choice" and min(found) < 2:
        raise ValueError(f"method: expected at least 2 to choose from, found {spec.text!r}")
