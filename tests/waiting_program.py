"""One of two processes of which one is done, or waits in a shared computation, while the other is still at work:

python -m tests.waiting_program FOLDER BUSY done|shared --coordinator HOST:PORT --num-processes 2 --process-id I

Process BUSY sleeps. Each writes an empty file named by its number into the folder first.
"""

from __future__ import annotations

import pathlib
import time

import tests.conftest  # noqa: F401  # the flags
from jaxalign import _hosts, commands


def main(words: list[str]) -> None:
    folder, busy, other = words
    (pathlib.Path(folder) / str(_hosts.index())).touch()
    if _hosts.index() == int(busy):
        time.sleep(100)
    elif other == "shared":
        _hosts.gather_texts("")


if __name__ == "__main__":
    commands.execute(main)
