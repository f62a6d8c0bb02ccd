"""One of several processes that do jobs of the command line, one after the other.

python -m tests.hosts_program JOBS.json HOST:PORT N I

JOBS.json holds the words of each job after `jaxalign`; PROCESS in a word stands for I. The ValueErrors of jobs go to
I.json beside it, "" for a job without; the next one follows.
"""

from __future__ import annotations

import gc
import json
import pathlib
import sys

import tests.conftest  # noqa: F401  # the flags and the cache of compiled programs
from jaxalign import commands
from jaxalign.launch import processes

NAMES = ("coordinator", "num-processes", "process-id")


def main() -> None:
    jobs = pathlib.Path(sys.argv[1])
    joined, _ = processes.take([f"--{name}={value}" for name, value in zip(NAMES, sys.argv[2:], strict=True)])
    processes.start(joined)
    gc.disable()  # a tenth of the time; the process is short
    errors = []
    for words in json.loads(jobs.read_text()):
        try:
            commands.start([word.replace("PROCESS", sys.argv[4]) for word in words])
            errors.append("")
        except ValueError as error:
            errors.append(str(error))
    jobs.with_name(f"{sys.argv[4]}.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main()
