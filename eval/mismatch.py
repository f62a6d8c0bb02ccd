"""Measure how far a model's numbers are apart from one program to another, and which are the same to the bit:

python -m eval.mismatch --model DIR
python -m eval.mismatch --model DIR --dtype bfloat16 --rows 64 --max-new-tokens 128 --out runs/mismatch

Draws from the model on random prompts, in each type and at each batch size, and compares the log-probabilities of the
same tokens: the parallel scorer with the sampler that drew them, one batch size with another, and the programs of
`deterministic` decoding, whose tokens and bits have to be the same. Prints a table, writes mismatch.json with --out,
and ends with exit code 1 where a difference is above its bound (float32: 1e-5 nats a token; bfloat16: 0.05, and 0.005
in the mean; deterministic programs: none).
"""

from __future__ import annotations

import dataclasses
import pathlib

from jaxalign import _hosts, _io, commands
from jaxalign.evaluation import mismatch


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of eval.mismatch."""

    model: str
    """Folder of a language model."""
    dtype: commands.Repeated[tuple[str, ...]] = ()
    """Type to load it in, float32 or bfloat16; give the option again for another. Default: both."""
    batches: tuple[int, ...] = (1, 3, 8)
    """Batch sizes that are compared with --rows."""
    rows: int = 32
    """Prompts, and the largest batch."""
    length: int = 16
    """Tokens of the longest prompt; the shortest has half of it."""
    max_new_tokens: int = 32
    """Limit of a response [tokens]."""
    deterministic: int = 8
    """G, the rows of a chunk of deterministic decoding."""
    seed: int = 0
    """Seed of the prompts and of all draws."""
    out: str = ""
    """Folder for mismatch.json; "": none is written."""
    config: str = ""
    """JSON or TOML file of defaults for these options."""


def run(config: Config) -> list[mismatch.Row]:
    """The comparisons, which are printed."""
    _hosts.check_single("eval.mismatch")
    found = mismatch.run(
        config.model,
        dtypes=config.dtype or tuple(mismatch.BOUNDS),
        batches=config.batches,
        rows=config.rows,
        length=config.length,
        max_new_tokens=config.max_new_tokens,
        deterministic=config.deterministic,
        seed=config.seed,
    )
    print(mismatch.table(found))
    if config.out:
        path = pathlib.Path(config.out) / "mismatch.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        _io.write_json(path, [row._asdict() | {"holds": row.holds} for row in found])
        print(f"wrote {path}")
    above = [row for row in found if not row.holds]
    if above:
        worst = max(above, key=lambda row: row.largest)
        raise mismatch.MismatchError(
            f"mismatch: expected differences within their bounds, found {len(above)} of {len(found)} above, the "
            f"largest {worst.largest:.2g} nats ({worst.dtype}, {worst.compared}, batch {worst.batch})"
        )
    return found


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)
