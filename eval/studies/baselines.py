"""Policies that eval.studies trained sets beside those of train.rl: from preference pairs, and from base samples."""

from __future__ import annotations

import pathlib
from typing import Any

from jaxalign import commands

CURVES = {"dpo": "identity", "ipo": "identity", "bonbon": "log", "vbon": "log"}
"""Baseline -> the transform whose closed form it is held against. bonbon and vbon distil best-of-n, whose law is the
logarithm's tilt. dpo and ipo have another aim, the utility behind the pairs; the identity's curve is the most that any
policy wins alone at their KL."""


def train(name: str, *, base: str, pairs: pathlib.Path, table: pathlib.Path, n: int, seed: int, out: str) -> str:
    """Trains dpo, ipo (from the pairs) or bonbon (from the table's samples) for one pass, or goes on; gives the folder
    of the policy."""
    shared: dict[str, Any] = {
        "model": base,
        "out": out,
        "seed": seed,
        "batch_size": 64,
        "max_length": 128,
        "epochs": 1.0,
        "learning_rate": 3e-4,
        "log_every": 20,
        "save_every": 100,
    }
    if name == "bonbon":
        commands.run("distil", **shared, calibration=str(table), n=n)
    elif name == "dpo":
        commands.run("dpo", **shared, data=str(pairs), beta=0.3)
    else:
        commands.run("dpo", **shared, data=str(pairs), loss="ipo", beta=0.5)
    return str(pathlib.Path(out) / "model")
