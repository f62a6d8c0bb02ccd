"""Gives each reader many cases, on several cores, and prints a table of those that were taken wrongly:

python -m tests.fuzz --cases 2000 --workers 14 --minutes 30 --seed 1 --out fuzz.md

Cases are searched in parts of 250, each with a number of its own. Faults are printed as rows of JSON, as
tests/fuzz/corpus.jsonl has them. Exits with 1 where there is a fault, or where time was up before all cases.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import sys
import time

from tests.fuzz.search import READERS, Found, search_part

PART = 250
"""Cases of a part."""


def table(found: dict[str, list[Found]], wanted: int) -> str:
    """Cases and faults of each reader."""
    lines = ["| reader | cases | faults |", "|---|---|---|"]
    for reader, every in found.items():
        lines.append(f"| {reader} | {sum(x.cases for x in every)} | {sum(len(x.faults) for x in every)} |")
    cases = sum(x.cases for every in found.values() for x in every)
    faults = sum(len(x.faults) for every in found.values() for x in every)
    return "\n".join([*lines, f"{cases} cases of {wanted * len(found)}; {faults} faults"])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="of each reader")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e6, help="from now, after which no case begins")
    parser.add_argument("--seed", type=int, default=1, help="at least 1")
    parser.add_argument("--readers", default=",".join(READERS))
    parser.add_argument("--out", default="", help="file for the table and the faults")
    options = parser.parse_args()
    until, readers = time.time() + 60 * options.minutes, options.readers.split(",")
    parts = [
        (reader, min(PART, options.cases - first), 10_000 * options.seed + first)
        for first in range(0, options.cases, PART)  # all readers come before the second part of any
        for reader in readers
    ]
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    found: dict[str, list[Found]] = {reader: [] for reader in readers}
    context = multiprocessing.get_context("spawn")  # a fork of a process in which jax has run may hang
    with concurrent.futures.ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        running = [(reader, pool.submit(search_part, reader, *rest, until)) for reader, *rest in parts]
        for reader, future in running:
            found[reader].append(future.result())
    told = table(found, options.cases)
    faults = [json.dumps(fault._asdict()) for every in found.values() for x in every for fault in x.faults]
    print("\n".join([*faults, told]), flush=True)
    if options.out:
        pathlib.Path(options.out).write_text("\n".join([told, *faults]) + "\n")
    cases = sum(x.cases for every in found.values() for x in every)
    return int(bool(faults) or (time.time() > until and cases < options.cases * len(readers)))


if __name__ == "__main__":
    sys.exit(main())
