"""The jobs that are killed (`tests.kill_jobs`): trainings, tables and decoding, on tiny models."""

from __future__ import annotations

from typing import NamedTuple

GOLD = "jaxalign.worlds.opinions:golds"


class Job(NamedTuple):
    """A job that is killed."""

    module: str
    """Which `python -m` starts."""
    words: tuple[str, ...]
    """Its options; {world}, {base}, {table} and {out} stand for folders."""
    places: tuple[str, ...]
    """Where it can be killed."""
    processes: int = 1
    """That do it together; one of them is killed."""


_FEW = "--max-length 48 --track none --log-every 1 --save-every 2 --batch-size 4 --validation 0"
SHORT = tuple(_FEW.split())
"""Options of a short training."""
_DRAWN = ("--max-new-tokens", "4", "--reward", GOLD, "--prompts", "{world}/held_out.jsonl")
_PAIRS = ("--data", "{world}/pairs.jsonl", "--model", "{base}", "--steps", "4", *SHORT)
_SHARDS = ("--base", "{base}", "--shard", "2", *_DRAWN)
_ALWAYS = ("start", "random", "file", "summary", "full", "TERM", "INT", "HUP")
_TRAINED = (*_ALWAYS, "checkpoint", "model")
JOBS = {
    "sft": Job("train.sft", ("--data", "{world}/texts.jsonl", "--model", "{base}", "--steps", "6", *SHORT), _TRAINED),
    "reward_model": Job("train.reward_model", _PAIRS, _TRAINED),
    "dpo": Job("train.dpo", _PAIRS, _TRAINED),
    "arm": Job("train.arm", (*_PAIRS, "--lora-rank", "2"), _TRAINED),
    "value": Job("train.value", ("--samples", "2", "--steps", "4", *SHORT, *_SHARDS), _TRAINED),
    "states": Job(
        "train.value",
        ("--objective", "td", "--frozen", "--samples", "2", "--steps", "4", *SHORT, *_SHARDS),
        _TRAINED,
    ),
    "rl": Job("train.rl", ("--model", "{base}", "--samples", "2", "--steps", "4", *SHORT, *_DRAWN), _TRAINED),
    "distil": Job(
        "train.distil",
        ("--model", "{base}", "--calibration", "{table}", "--n", "2", "--steps", "4", *SHORT),
        _TRAINED,
    ),
    "regress": Job(
        "train.regress",
        ("--table", "{table}", "--beta", "1", "--steps", "4", *SHORT, "--validation", "0.4", "--check-every", "1"),
        _TRAINED,
    ),
    "shaping": Job(
        "train.shaping",
        (
            "--model",
            "{base}",
            "--bound",
            "2",
            "--beta",
            "1",
            "--samples",
            "2",
            "--steps",
            "4",
            *SHORT,
            "--validation",
            "0.4",
            *_SHARDS,
        ),
        _TRAINED,
    ),
    "calibrate": Job("train.calibrate", ("--samples", "2", "--max-length", "48", *_SHARDS), _ALWAYS),
    "preferences": Job("train.preferences", ("--samples", "4", "--max-length", "48", *_SHARDS), _ALWAYS),
    "decode": Job(
        "eval.decode",
        ("--model", "{base}", "--method", "best_of_n@2", "--batch-size", "2", *_DRAWN),
        (*_ALWAYS, "partial"),
    ),
    "quickstart": Job("train.quickstart", ("--preset", "tiny"), ("random", "TERM", "INT", "HUP")),
}
"""Jobs by name."""

LONG = ("quickstart",)
"""Those that are killed where they are named."""

TABLE = Job("train.calibrate", ("--base", "{base}", "--samples", "4", "--max-length", "48", *_DRAWN), ())
"""What makes {table}."""

_TOGETHER = {"sft": ("--mesh", "data=2"), "calibrate": (), "decode": ()}
JOBS |= {
    f"{name} of two": JOBS[name]._replace(
        words=(*JOBS[name].words, *more),
        places=tuple(place for place in JOBS[name].places if place not in ("start", "model", "summary", "full")),
        processes=2,
    )
    for name, more in _TOGETHER.items()
}
