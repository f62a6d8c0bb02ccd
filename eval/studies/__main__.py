"""Studies: each computes one claim about shaped or transformed rewards

python -m eval.studies NAME [options]; NAME is one of those below, NAME --help lists its options; --NAME is NAME. A
study prints its table and writes NAME.json and NAME.png to --out; docs/stackelberg.md, docs/infalign.md,
docs/bilevel.md and docs/results.md say what they show. tree, noise, samples, bound, conformal, infalign and bilevel are
exact or nearly so and need no model; world, language, trained, nudging and over_optimisation read the folder of a
finished train.quickstart; followers reads its world and its base, or makes them.
"""

from __future__ import annotations

from jaxalign import commands


def main(args: list[str] | None = None) -> None:
    commands.choose(__package__ or "eval.studies", args)


if __name__ == "__main__":
    commands.execute(main)
