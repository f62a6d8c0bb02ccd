"""Readings of a distributional critic as texts: soft, follower(bound=3), calibrated(exp:5), best_of, kl, mean, …"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

from jaxalign import infalign
from jaxalign.critics import _reading, reads


class Reading(NamedTuple):
    """A reading as a method names it."""

    read: reads.Read
    """What is read of the laws."""
    numbers: dict[str, float]
    """The numbers that the text gives."""
    strength: str | None
    """The number that stands after @; None where the text gives it, and for a reward reading, whose strength is the
    beta of the tilt."""


PRIMARY = {
    "soft": "beta",
    "follower": "beta",
    "calibrated": "beta",
    "chi_squared": "beta",
    "best_of": "n",
    "worst_of": "n",
    "kl": "nats",
}
"""The number of each log-weight reading that a method's strengths are values of."""
SIMPLE: dict[str, Callable[[], reads.Read]] = {
    "soft": reads.soft,
    "best_of": reads.best_of,
    "worst_of": reads.worst_of,
    "chi_squared": reads.chi_squared,
    "kl": reads.kl,
    "mean": reads.mean,
    "exceedance": reads.exceedance,
    "expected_max": reads.expected_max,
    "quantile": reads.quantile,
    "cvar": reads.cvar,
}
NAMES = (*SIMPLE, "follower", "calibrated")


def parse_reading(text: str) -> Reading:
    """Reads NAME or NAME(NUMBER=VALUE, …), or calibrated(TRANSFORM) with a transform of `infalign.parse_transform`.

    Args:
      text: as "follower(bound=3)"; its threshold is solved for each prompt unless the text gives one.

    Returns:
      The Reading.

    Raises:
      ValueError: another name or number, a number that is missing or no number.
    """
    match = re.fullmatch(r"(\w+)(?:\((.*)\))?", text.strip())
    if match is None or match[1] not in NAMES:
        raise ValueError(f"method: expected a reading among {NAMES}, as in distribution:DIR:soft@1, found {text!r}")
    name, inside = match[1], [part.strip() for part in (match[2] or "").split(",") if part.strip()]
    if name == "calibrated":
        transform = inside[0] if inside and "=" not in inside[0] else "identity"
        inside = inside[1:] if inside and "=" not in inside[0] else inside
        read = reads.calibrated(infalign.parse_transform(transform))
    numbers = {}
    for part in inside:
        key, sign, value = part.partition("=")
        try:
            numbers[key.strip()] = float(value)
        except ValueError as error:
            raise ValueError(f"method: expected NUMBER=VALUE in the reading, found {part!r}") from error
        if not sign or not math.isfinite(numbers[key.strip()]):
            raise ValueError(f"method: expected NUMBER=VALUE in the reading, found {part!r}")
    if name == "follower":
        read = reads.follower(solve="threshold" not in numbers)
    elif name in SIMPLE:
        read = SIMPLE[name]()
    wanted = set(read.numbers)
    primary = PRIMARY.get(name)
    strength = primary if primary not in numbers else None
    missing = sorted(wanted - set(numbers) - {strength})
    unknown = sorted(set(numbers) - wanted)
    if missing or unknown:
        found = f"also {unknown}" if unknown else f"no {missing}"
        raise ValueError(f"method: expected the numbers {sorted(wanted)} of {name}, found {found} in {text!r}")
    _reading.check_numbers(read, numbers | ({} if strength is None else {strength: 1.0}))
    return Reading(read, numbers, strength)
