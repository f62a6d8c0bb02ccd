"""Benchmarks: the usual alternative beside ours, in one process, on one set of random weights, alternating

python -m eval.bench NAME [options]; NAME is one of those below, NAME --help lists its options. Medians and ratios are
printed. decode, args, transfer, train and rl need `pip install -e '.[bench]'` (torch, transformers' torch models, TRL).
"""

from __future__ import annotations

from jaxalign import commands


def main(args: list[str] | None = None) -> None:
    commands.choose(__package__ or "eval.bench", args)


if __name__ == "__main__":
    commands.execute(main)
