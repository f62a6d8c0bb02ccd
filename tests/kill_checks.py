"""What is wrong with a job that was killed: how its processes ended, and what it left (`tests.kill_jobs`)."""

from __future__ import annotations

import hashlib
import json
import pathlib
import signal
from typing import Any

from tests.kill_places import HUNG, PROMISED, Process

# What is left ---------------------------------------------------------------------------------------------------------


TIMES = (".png", ".html", ".blake2b")
"""Suffixes of files that show times or paths; digests are checked by whoever reads the file beside."""


def left(out: pathlib.Path) -> dict[str, str]:
    """Digest of each file that depends on the run alone: models, roll-outs, tables, responses, pairs, metrics."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if not path.is_file() or path.suffix in TIMES or path.name == "timings.json":
            continue
        if {"checkpoints", "best", "tensorboard"} & set(path.relative_to(out).parts):
            continue
        if path.name in ("config.json", "inputs.json", "versions.json") and path.parent.name != "model":
            continue
        data = path.read_bytes()
        if path.suffix in (".json", ".jsonl") and path.parent.name != "model":
            text = json.dumps([_untimed(json.loads(line)) for line in _lines(path)])
            data = text.replace(json.dumps(str(out))[1:-1], "OUT").encode()
        found[name] = hashlib.blake2b(data, digest_size=8).hexdigest()
    return found


def _lines(path: pathlib.Path) -> list[str]:
    text = path.read_text()
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _untimed(v) for k, v in value.items() if "second" not in k and k != "mfu"}
    return [_untimed(one) for one in value] if isinstance(value, list) else value


def odd(out: pathlib.Path) -> list[str]:
    """Files that a finished run should not hold: half-written ones, hidden copies, locks."""
    names = (str(path.relative_to(out)) for path in out.rglob("*"))
    return [name for name in names if ".tmp" in name or ".lock" in name or ".partial" in name or ".old" in name]


# How it ended ---------------------------------------------------------------------------------------------------------


JAX_TELLS = (
    "coordination service",
    "Additional GRPC error information",
    "Error received from peer",
    ":Stream removed",
    "Source Location Trace",
    "external/xla",
    "preemption_sync_manager",
)
"""Parts of what jax prints where process 0 is gone."""


def judged(label: str, place: str, running: list[Process], codes: list[int], victim: int) -> tuple[str, ...]:
    """What is wrong with how the processes of a start ended."""
    faults = []
    for i, (process, code) in enumerate(zip(running, codes, strict=True)):
        who, said = label + f", process {i} of {len(running)}" * (len(running) > 1), process.told()
        first_killed = i != victim == 0 and place not in PROMISED
        if first_killed and code == -signal.SIGABRT:
            continue  # jax has noticed first that process 0 is gone, and says so in its own lines
        if first_killed:  # jax says so beside us, also to a process that is done
            said = "\n".join(line for line in said.splitlines() if not any(part in line for part in JAX_TELLS))
        bad = [line for line in said.splitlines() if line.startswith("Traceback") or "Error" in line[:40]]
        expected = {0, PROMISED.get(place, -9 if i == victim else 1), *((1, -9) if place == "full" else ())}
        if code == HUNG:
            faults.append(f"{who}: it does not end")
        elif code not in expected:
            faults.append(f"{who}: exit code {code}: {said.strip()[-6000:]}")
        if bad and (code != 1 or any(line.startswith("Traceback") for line in bad)):
            faults.append(f"{who}: {bad[0][:200]}")
        if code not in (0, -9, HUNG) and len([line for line in said.splitlines() if _told(line)]) > 1:
            faults.append(f"{who}: more than one line: {said.strip()[-6000:]}")
    return tuple(faults)


def _told(line: str) -> bool:
    """Whether a line on stderr is neither of a progress bar nor of what a job tells beside errors."""
    beside = ("it/s", "/s]", "?", "note:", "compilation cache", "stopping: ", "s/", "[Gloo]")
    return bool(line.strip()) and not any(word in line for word in beside)
