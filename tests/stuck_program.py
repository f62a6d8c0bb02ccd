"""A job whose program takes everything that would end it for an error of its own:

python -m tests.stuck_program once|always|told [--reward-timeout SECONDS]
"""

from __future__ import annotations

import contextlib
import time

import tests.conftest  # noqa: F401  # the flags
from jaxalign import commands, rewards
from tests.test_hostile_programs import TEXTS


def once(prompts, responses):
    """Takes one signal or alarm for an error in a text, as a bare except does."""
    with contextlib.suppress(BaseException):
        print("begun", flush=True)
        time.sleep(60)
    return [0.0] * len(responses)


def always(prompts, responses):
    while True:
        with contextlib.suppress(BaseException):
            print("begun", flush=True)
            while True:
                time.sleep(0.01)


def told(prompts, responses):
    try:
        print("begun", flush=True)
        time.sleep(60)
    except BaseException as error:
        raise RuntimeError("the judge is down") from error


def main(words: list[str]) -> None:
    rewards.from_text(lambda ids: "x", globals()[words[0]], between_programs=words[1:] == ["between"])(None, *TEXTS)
    print("went on", flush=True)


if __name__ == "__main__":
    commands.execute(main)
