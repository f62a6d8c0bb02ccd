"""Compare a folder's model with transformers' own:

python -m eval.parity --model DIR
python -m eval.parity --model REWARD_DIR --texts "How are you? Fine." "How are you? Go away."

Reads the folder twice in float32, once into this library and once into transformers' class (torch is needed), and
prints the largest difference of logits, or of rewards of a …ForSequenceClassification, on random tokens under either
padding and on the texts. Ends with an error where it is larger than --tolerance times the largest number.
"""

from __future__ import annotations

import dataclasses
import math

from jaxalign import _hosts, commands
from jaxalign.evaluation import parity


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of eval.parity."""

    model: str
    """Folder of a language model or of a reward model, whole; not an adapter's."""
    texts: tuple[str, ...] = ()
    """Texts to be read besides random tokens."""
    rows: int = 4
    """Rows of random tokens."""
    length: int = 64
    """Tokens of the longest row. A length beyond a sliding window or the original context compares these too."""
    tolerance: float = 2e-4
    """The largest difference that is taken for rounding, in units of the largest number."""
    seed: int = 0
    """Seed of the random tokens."""
    config: str = ""
    """JSON or TOML file of defaults for these options."""


def check(config: Config) -> None:
    """ValueErrors before anything is loaded."""
    if config.rows < 1:
        raise ValueError(f"rows: expected at least 1, found {config.rows}")
    if not 0 < config.tolerance < math.inf:
        raise ValueError(f"tolerance: expected a finite value > 0, found {config.tolerance}")
    parity.check_torch()


def run(config: Config) -> list[parity.Difference]:
    """The differences, which are printed."""
    _hosts.check_single("eval.parity")
    check(config)
    found = parity.run(config.model, texts=config.texts, rows=config.rows, length=config.length, seed=config.seed)
    for each in found:
        same = "" if each.kind == "rewards" else f"; same most probable token at {each.agreement:.1%}"
        print(
            f"{each.tokens}: {each.kind} differ by at most {each.largest:.2e} ({each.relative:.1e} of the largest, "
            f"{each.scale:.3g}){same}"
        )
    worst = max(found, key=lambda each: each.relative)
    if not worst.relative <= config.tolerance:
        raise ValueError(
            f"parity: expected differences of at most {config.tolerance:g} times the largest number, found "
            f"{worst.relative:.2e} on {worst.tokens}"
        )
    print(f"agrees with transformers: the largest difference is {worst.relative:.1e} of the largest number")
    return found


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)
