"""python -m eval.frontier {tree,noise,samples,bound,world,language} [options]; NAME --help lists the options of one

Each study computes one claim about shaped rewards, prints its table and writes NAME.json and NAME.png to --out.
docs/stackelberg.md tells what they show. tree, noise, samples and bound are exact or nearly so and need no model; world
and language read the folder of a finished train.quickstart.
"""

from __future__ import annotations

import argparse
import sys

from eval.frontier import bound, language, noise, nudging, samples, trained, tree, world

STUDIES = {
    "tree": tree,
    "noise": noise,
    "samples": samples,
    "bound": bound,
    "world": world,
    "language": language,
    "trained": trained,
    "nudging": nudging,
}


def main(arguments: list[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m eval.frontier",
        usage="python -m eval.frontier NAME [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, module in STUDIES.items():
        # The docstring is "python -m eval.frontier NAME: what it shows".
        names.add_parser(name, help=(module.__doc__ or "").splitlines()[0].partition(": ")[2])
    name = parser.parse_args(arguments[:1]).name
    STUDIES[name].main(arguments[1:])


if __name__ == "__main__":
    main()
