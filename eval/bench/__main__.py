"""python -m eval.bench NAME [options]; NAME is one of those below, NAME --help lists its options

Each benchmark runs the usual alternative beside ours in one process, on one set of random weights, alternating, and
prints medians and ratios. decode, args, transfer, train and rl need `pip install -e '.[bench]'` (torch, transformers'
torch models, TRL).
"""

from __future__ import annotations

import argparse
import sys

from . import args, blockwise, decode, genarm, ggro, recontrol, rl, score, shaping, train, transfer

BENCHMARKS = {
    "decode": decode,
    "args": args,
    "genarm": genarm,
    "blockwise": blockwise,
    "transfer": transfer,
    "recontrol": recontrol,
    "ggro": ggro,
    "score": score,
    "train": train,
    "rl": rl,
    "shaping": shaping,
}


def main(arguments: list[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m eval.bench",
        usage="python -m eval.bench NAME [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, module in BENCHMARKS.items():
        # The docstring is "python -m eval.bench NAME: what it measures".
        names.add_parser(name, help=(module.__doc__ or "").splitlines()[0].partition(": ")[2])
    # The rest belongs to the benchmark, which parses it with its own config.
    name = parser.parse_args(arguments[:1]).name
    BENCHMARKS[name].main(arguments[1:])


if __name__ == "__main__":
    main()
