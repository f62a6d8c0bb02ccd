"""python -m eval.bench preset: training, decoding and attention of 1B and 8B shapes on one GPU, as tables

python -m eval.bench --preset gpu --out DIR; with --tiny it runs on a CPU at toy sizes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any, Literal, NamedTuple

from jaxalign import _io, commands

GRACE = 60.0
"""Seconds after --seconds at which a benchmark that still runs is ended."""
MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
"""Of the environment of each benchmark, where it is not set: one process has the GPU for itself."""


class Benchmark(NamedTuple):
    """What runs in a process of its own."""

    part: str
    """Title of the table that its rows stand in."""
    function: str
    """Module of `eval.bench.gpu` and function, which gives the rows."""
    options: dict[str, str]
    """Of the function."""


BENCHMARKS = {
    "sft-full": Benchmark("training", "training.sft", {"remat": "full"}),
    "plain-1B": Benchmark("decoding", "decoding.plain", {"base": "1B"}),
    "lora": Benchmark("training", "training.lora", {"remat": "full"}),
    "plain-8B": Benchmark("decoding", "decoding.plain", {"base": "8B"}),
    "attention": Benchmark("attention", "attention.forms", {}),
    "methods-1B": Benchmark("decoding", "decoding.methods", {"base": "1B"}),
    "deterministic-1B": Benchmark("decoding", "decoding.deterministic", {"base": "1B"}),
    "leader": Benchmark("leader", "leader.gradient", {}),
    "sft-dots": Benchmark("training", "training.sft", {"remat": "dots"}),
    "sft-none": Benchmark("training", "training.sft", {"remat": "none"}),
    "methods-8B": Benchmark("decoding", "decoding.methods", {"base": "8B"}),
}
"""By name, in order of worth: what does not begin in time is left out."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of eval.bench --preset."""

    name: commands.Positional[Literal["gpu"]] = "gpu"
    """gpu: what one GPU of 80 GB or more does in six minutes, the compiler's time included."""
    seconds: float = 300.0
    """Rows that have not begun by then are left out and told; a minute later what still runs is ended."""
    only: tuple[str, ...] = ()
    """Names of BENCHMARKS; none for all of them."""
    tiny: bool = False
    """At toy sizes, for a CPU: it shows that everything runs, the figures say nothing."""
    out: str = ""
    """Folder for gpu.json, which is written anew after each benchmark; none is written when empty."""
    config: str = ""
    """JSON or TOML file of defaults for these options."""


def run(config: Config) -> dict[str, Any]:
    """Runs the benchmarks one after the other, each in a process of its own, and prints a Markdown table per part.

    What fails and what is left out is told; the rest goes on.

    RuntimeError: some failed, after the tables and the file.
    """
    unknown = sorted({*config.only} - {*BENCHMARKS})
    if unknown:
        raise ValueError(f"only: expected names of {tuple(BENCHMARKS)}, found {unknown}")
    if not config.seconds > 0:
        raise ValueError(f"seconds: expected more than 0, found {config.seconds}")
    began = time.time()
    found: dict[str, Any] = {"device": None, "jax": None, "commit": _commit(), "tiny": config.tiny, "seconds": 0.0}
    found |= {"parts": {}, "failed": {}, "left out": []}
    for name, benchmark in BENCHMARKS.items():
        if config.only and name not in config.only:
            continue
        begin = time.time()
        if begin > began + config.seconds:
            found["left out"].append(name)
            continue
        failed = len(found["failed"])
        _measure(name, benchmark, config, began + config.seconds, found)
        found["seconds"] = time.time() - began
        how = "failed" if len(found["failed"]) > failed else "done"
        print(f"{name}: {how} after {time.time() - begin:.0f} s", file=sys.stderr, flush=True)
        _write(config.out, found)
    _write(config.out, found)
    print(told(found), flush=True)
    if found["failed"]:
        raise RuntimeError(f"{len(found['failed'])} of the benchmarks failed: {', '.join(found['failed'])}")
    return found


def told(found: dict[str, Any]) -> str:
    """Gives the figures as text.

    Args:
      found: as `run` gives it.

    Returns:
      A heading and a Markdown table per part, then what failed and what was left out.
    """
    commit = (found["commit"] or "unknown")[:12]
    lines = [f"{found['device']}, jax {found['jax']}, commit {commit}, {found['seconds']:.0f} s"]
    for part, rows in found["parts"].items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines += ["", f"## {part}", "", _line(columns), "|" + "---|" * len(columns)]
        lines += [_line([_cell(row.get(column)) for column in columns]) for row in rows]
    lines += ["", *(f"failed: {name}: {why}" for name, why in found["failed"].items())]
    lines += [f"left out: {name}" for name in found["left out"]]
    return "\n".join(lines).rstrip()


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _measure(name: str, benchmark: Benchmark, config: Config, until: float, found: dict[str, Any]) -> None:
    """Runs a benchmark and adds its rows, its failures and what it left out to `found`."""
    asked = {"function": benchmark.function, "options": benchmark.options, "tiny": config.tiny, "until": until}
    program = f"import sys; from {__package__}.gpu import child; child.work(sys.argv[1])"
    try:
        process = subprocess.run(
            [sys.executable, "-c", program, json.dumps(asked)],
            env=MEMORY | os.environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=until + GRACE - time.time(),
        )
        printed, errors = process.stdout, process.stderr
        why = f"exit code {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired as ended:
        printed, errors = (_text(part) for part in (ended.stdout, ended.stderr))
        why = f"ended {GRACE:.0f} s after --seconds"
    for line in printed.splitlines():
        if not line.startswith("{"):
            continue
        values = json.loads(line)
        if "row" in values:
            found["parts"].setdefault(benchmark.part, []).append(values["row"])
        elif "failed" in values:
            found["failed"][f"{name}: {values['failed']}"] = values["why"]
        elif "left out" in values:
            found["left out"].append(f"{name}: {values['left out']}")
        else:
            found |= values
    if why:
        last = [line for line in errors.strip().splitlines() if line.strip()][-1:]
        found["failed"][name] = ": ".join([why, *last])[:300]
    if errors and config.out and (why or any(key.startswith(f"{name}: ") for key in found["failed"])):
        pathlib.Path(config.out).mkdir(parents=True, exist_ok=True)
        with open(pathlib.Path(config.out, "errors.txt"), "a", encoding="utf-8") as file:
            file.write(f"# {name}\n{errors[-5000:]}\n")


def _text(part: bytes | str | None) -> str:
    return part.decode(errors="replace") if isinstance(part, bytes) else part or ""


def _write(out: str, found: dict[str, Any]) -> None:
    """Writes gpu.json, whole or not at all. This process does not start jax: it would take memory of the GPU."""
    if not out:
        return
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    _io.write_text(folder / "gpu.json", json.dumps(found, indent=1) + "\n")


def _commit() -> str | None:
    """The commit of the clone that this file lies in; COMMIT of the environment, and None, where it is in none."""
    git = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT")
    return found


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))
