"""A method of a comparison as text, KIND[:DIR][@STRENGTHS]: its parts, and what is wrong with them."""

from __future__ import annotations

import math
import pathlib
import re
from typing import NamedTuple

PLAIN = ("base", "best_of_n", "ggro", "quest", "cards")
CRITICS = ("args", "value", "follower", "autoregressive")
FOLDER = ("policy", "transfer", "edit", *CRITICS)
NESTED = ("blockwise", "smc")
WHOLE = ("best_of_n", "blockwise", "ggro")  # strengths that count


class Spec(NamedTuple):
    """kind: how to decode; critic: of a nested kind, "" for none; folder: "" for none; strengths: beta, K, n, …"""

    text: str
    kind: str
    critic: str
    folder: str
    strengths: tuple[float, ...]

    @property
    def name(self) -> str:
        """KIND[:DIR], the method's name in tables."""
        return _halves(self.text)[0]

    @property
    def slug(self) -> str:
        """A name for its folder."""
        path = pathlib.PurePath(self.folder)
        folder = path.parent.name if path.name == "model" else path.name
        parts = [self.kind, self.critic, folder, "_".join(f"{s:g}" for s in self.strengths)]
        return re.sub(r"[^\w.=-]+", "_", "_".join(part for part in parts if part))


def _halves(text: str) -> tuple[str, str]:
    """What stands before and after the last @; a folder's name may hold one, if it has a separator behind it."""
    head, at, tail = text.rpartition("@")
    return (head, tail) if at and "/" not in tail else (text, "")


def parse(text: str) -> Spec:
    """The parts of KIND[:DIR][@STRENGTHS]. ValueError that says what is wrong with it."""
    head, tail = _halves(text)
    kind, _, rest = head.partition(":")
    if kind not in (*PLAIN, *FOLDER, *NESTED):
        raise ValueError(f"method: expected a kind among {(*PLAIN, *FOLDER, *NESTED)}, found {text!r}")
    critic, folder = "", rest
    if kind in NESTED and rest:
        critic, _, folder = rest.partition(":")
        if critic not in CRITICS:
            raise ValueError(f"method: expected {kind}:CRITIC:DIR with CRITIC among {CRITICS}, found {text!r}")
    needs = kind in FOLDER or kind == "blockwise" or critic
    if (kind in PLAIN and rest) or (needs and not folder):
        wanted = "no folder" if kind in PLAIN else "a folder"
        raise ValueError(f"method: expected {wanted} for {kind}, found {text!r}")
    try:
        strengths = tuple(float(part) for part in tail.split(",")) if tail else ()
    except ValueError as error:
        raise ValueError(f"method: expected numbers after @, found {text!r}") from error
    if bool(strengths) == (kind in ("base", "policy", "follower")):
        wanted = "no strength" if strengths else "@ and strengths"
        raise ValueError(f"method: expected {wanted} for {kind}, found {text!r}")
    if any(not 0 < s < math.inf or (kind in WHOLE and s != int(s)) for s in strengths):
        raise ValueError(f"method: expected positive strengths, whole numbers for {WHOLE}, found {text!r}")
    if len(set(strengths)) < len(strengths):
        raise ValueError(f"method: expected each strength once, found {text!r}")
    if kind in ("best_of_n", "blockwise") and min(strengths) < 2:
        raise ValueError(f"method: expected at least 2 to choose from, found {text!r}")
    return Spec(text, kind, critic, folder, strengths)
