"""python -m eval.bench {decode,args,genarm} [--out DIR]

Times our decoding against the usual alternative, on one set of random weights, alternating, and prints medians and
ratios. Needs `pip install -e '.[bench]'` (torch and transformers' torch models) for decode and args.
"""

from __future__ import annotations

import tyro

from eval.bench import args, decode, genarm


def main() -> None:
    tyro.extras.subcommand_cli_from_dict(
        {"decode": decode.main, "args": args.main, "genarm": genarm.main},
        prog="python -m eval.bench",
        description="Each benchmark runs the alternative beside ours in the same process and prints the ratio.",
    )


if __name__ == "__main__":
    main()
