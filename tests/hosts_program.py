"""One of several processes that do jobs of the command line, one after the other.

python -m tests.hosts_program JOBS.json HOST:PORT N I

JOBS.json holds the words of each job after `jaxalign`. A job that fails is one line on stdout, "failed: …"; the next
one follows.
"""

from __future__ import annotations

import json
import pathlib
import sys

import tests.conftest  # noqa: F401  # the flags and the cache of compiled programs
from jaxalign import commands
from jaxalign.launch import processes


def main() -> None:
    jobs = json.loads(pathlib.Path(sys.argv[1]).read_text())
    joined, _ = processes.take(
        ["--coordinator", sys.argv[2], "--num-processes", sys.argv[3], "--process-id", sys.argv[4]]
    )
    shown = sys.stdout
    processes.start(joined)
    for words in jobs:
        try:
            commands.start(words)
        except ValueError as error:
            print(f"failed: {error}", file=shown, flush=True)


if __name__ == "__main__":
    main()
