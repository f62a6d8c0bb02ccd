"""python -m eval.studies NAME [options]; NAME is one of those below, NAME --help lists its options

Each study computes one claim about shaped or transformed rewards, prints its table and writes NAME.json and NAME.png to
--out.
docs/stackelberg.md and docs/infalign.md tell what they show. tree, noise, samples, bound and infalign are exact or
nearly so and need no model; world, language, trained and nudging read the folder of a finished train.quickstart. --NAME
is NAME.
"""

from __future__ import annotations

import argparse
import sys

from . import bound, infalign, language, noise, nudging, samples, trained, tree, world

STUDIES = {
    "tree": tree,
    "noise": noise,
    "samples": samples,
    "bound": bound,
    "infalign": infalign,
    "world": world,
    "language": language,
    "trained": trained,
    "nudging": nudging,
}


def main(arguments: list[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m eval.studies",
        usage="python -m eval.studies NAME [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, module in STUDIES.items():
        # The docstring is "python -m eval.studies NAME: what it shows".
        names.add_parser(name, help=(module.__doc__ or "").splitlines()[0].partition(": ")[2])
    if arguments and arguments[0].removeprefix("--") in STUDIES:
        arguments[0] = arguments[0].removeprefix("--")
    name = parser.parse_args(arguments[:1]).name
    STUDIES[name].main(arguments[1:])


if __name__ == "__main__":
    main()
