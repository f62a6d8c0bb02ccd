"""Kills jobs at any moment, starts them again, and compares what they leave with an uninterrupted run, byte for byte:

python -m tests.kill_jobs --kills 400 --workers 14 --seed 3 --minutes 30 --out kills.md

Each trial takes a job and a place (`tests.kill_places`): at the start, at a random moment, inside the write of a
checkpoint, of a file (a shard, a table, JSON) or of a partial file, inside the model's folder, between model and
summary, with storage that is full, or by a signal that asks to end; some trials kill the next start too. Of two
processes one is killed, and the other has to end by itself. A start that ended before its kill came is tried again with
an earlier moment, and counted as missed. A fault is a byte that differs, something left behind, a start that fails, an
output of more than one line of error, another exit code than is promised, a process that does not end, or a place at
which no kill came. Prints a table, and exits with 1 where there is a fault. Jobs are forked from one process that has
loaded all modules and no device.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time
import traceback
from typing import Any, NamedTuple

from tests.kill_checks import judged, left, odd
from tests.kill_places import HUNG, PLACES, PROMISED, Process, arming, begin, end
from tests.killed_jobs import JOBS, LONG, SHORT, TABLE, Job

TRIES = 8
"""Most starts for one kill: the first half goes on with what the trial has left, the others begin again."""

LATE = 45.0
"""Seconds after the last begin of a trial in which each worker has to end."""

SURVIVOR = 60.0
"""Seconds in which every process of a job has to end, once one of several has ended."""


# Trials ---------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """Of one job and place, or of a start."""

    kills: int = 0
    """Kills that came."""
    missed: int = 0
    """Starts that ended before their kill came."""
    faults: tuple[str, ...] = ()


class Whole(NamedTuple):
    """An uninterrupted run of a job."""

    files: dict[str, str]
    """As `left` gives them."""
    seconds: float
    """That it took."""


def added(one: Row, two: Row) -> Row:
    """The sums of two rows."""
    return Row(one.kills + two.kills, one.missed + two.missed, one.faults + two.faults)


def filled(job: Job, given: dict[str, str], out: pathlib.Path) -> list[str]:
    """The words of a job that writes to a folder."""
    return [word.format(**given, out=out) for word in (*job.words, "--out", "{out}")]


def killed_start(
    name: str, place: str, folder: pathlib.Path, given: dict[str, str], seconds: float, rng: random.Random
) -> Row:
    """Starts a job that is killed at a place; where the kill does not come, again with an earlier moment."""
    job, out, before = JOBS[name], folder / "out", folder / "before"
    row, reach = Row(), 1.0
    if out.exists():
        shutil.copytree(out, before)
    for attempt in range(TRIES):
        if attempt:
            shutil.rmtree(out, ignore_errors=True)
            if attempt < TRIES // 2 and before.exists():
                shutil.copytree(before, out)
        log, victim = folder / f"log-{place}-{attempt}", rng.randrange(job.processes)
        arm = arming(place, seconds, rng.randrange(2**31), reach, joined=job.processes > 1)
        since = time.perf_counter()
        running = begin(job, filled(job, given, out), log, arm, victim=victim)
        codes = end(running, after_first=SURVIVOR)
        row = added(row, Row(faults=judged(f"{name}, {place}", place, running, codes, victim)))
        if codes[victim] == PROMISED.get(place, -9) or (place == "full" and codes[victim] == 1):
            row = added(row, Row(kills=1))
            break
        row, reach = added(row, Row(missed=1)), reach * 0.7
        seconds = min(seconds, time.perf_counter() - since)
    shutil.rmtree(before, ignore_errors=True)
    return row


def trial(
    name: str, places: list[str], folder: pathlib.Path, given: dict[str, str], whole: Whole, seed: int
) -> dict[str, Row]:
    """Kills a job at the places, start after start, does it, and compares: place -> its row. What is wrong in the end
    counts at the first."""
    rng, job, out = random.Random(seed), JOBS[name], folder / "out"
    rows = {place: killed_start(name, place, folder, given, whole.seconds, rng) for place in places}
    label, faults = f"{name}, {', '.join(places)}", []
    last = begin(job, filled(job, given, out), folder / "last")
    codes = end(last)
    if any(codes):
        said = "".join(process.told()[-400:] for process in last)
        faults.append(f"{label}: it does not go on, exit code {codes}: {said}")
    else:
        found = left(out)
        for path in sorted(set(found) | set(whole.files)):
            if found.get(path) != whole.files.get(path):
                faults.append(f"{label}: {path} differs ({whole.files.get(path)}, {found.get(path)})")
        faults += [f"{label}: left behind {path}" for path in odd(out)]
    rows[places[0]] = added(rows[places[0]], Row(faults=tuple(faults)))
    for row in rows.values():
        for fault in row.faults:
            print(f"FAULT {fault}", flush=True)
    return rows


def prepare(folder: pathlib.Path, jobs: list[str], *, at_once: int) -> tuple[dict[str, str], dict[str, Whole]]:
    """Makes the inputs and the uninterrupted runs.

    Args:
      folder: to work in.
      jobs: names of those that are run.
      at_once: how many run at the same time.

    Returns:
      (word in braces -> folder of an input, job -> its run).
    """
    given = {"world": str(folder / "world"), "base": str(folder / "made/model"), "table": str(folder / "table")}
    small = "--texts 24 --pairs 4 --held-out 6 --layers 1 --width 8 --out {world}"
    step = "--data {world}/texts.jsonl --architecture {world}/config.json --tokenizer {world}/tokenizer --steps 1"
    first = [*step.format(**given).split(), *SHORT, "--out", str(folder / "made")]
    made = [("train.world", small.format(**given).split()), ("train.sft", first)]
    if any("{table}" in JOBS[name].words for name in jobs):
        made.append((TABLE.module, filled(TABLE, given, folder / "table")))
    for module, words in made:
        one = begin(Job(module, (), ()), words, folder / "made-log")
        assert end(one) == [0], one[0].told()
    whole: dict[str, Whole] = {}
    own = [name for name in jobs if same_as(name) not in jobs]
    for some in [own[i : i + at_once] for i in range(0, len(own), at_once)]:
        since, every = time.perf_counter(), {}
        for name in some:
            every[name] = begin(JOBS[name], filled(JOBS[name], given, folder / name), folder / f"{name}-log")
        for name, running in every.items():
            codes = end(running)
            assert not any(codes), (name, codes, [process.told()[-2000:] for process in running])
            whole[name] = Whole(left(folder / name), time.perf_counter() - since)
            assert len(whole[name].files) > 2, whole
    return given, whole | {name: whole[same_as(name)] for name in jobs if same_as(name) in jobs}


def same_as(name: str) -> str:
    """The job of one process that leaves the same bytes as one of two, which each have devices of their own; ""."""
    one = name.removesuffix(" of two")
    return one if one != name and "--mesh" not in JOBS[name].words else ""


Rows = dict[tuple[str, str], Row]


def trials(
    kills: int,
    every: list[tuple[str, str]],
    folder: pathlib.Path,
    given: dict[str, str],
    whole: dict[str, Whole],
    *,
    seed: int,
    starts: int,
    until: float,
    kept: pathlib.Path | None = None,
) -> Rows:
    """Does trials.

    Args:
      kills: how many kills.
      every: pairs of job and place, those that come first first.
      folder: to work in.
      given, whole: as `prepare` gives them.
      seed: of what is drawn.
      starts: most starts that are killed one after the other.
      until: time after which no trial begins.
      kept: file that holds the rows after each trial.

    Returns:
      (job, place) -> its row.
    """
    rng, rows, done = random.Random(seed), Rows(), 0
    while done < kills and time.time() < until:
        name = every[0][0]
        mine = [pair for pair in every if pair[0] == name][: min(rng.randint(1, starts), kills - done)]
        every = [pair for pair in every if pair not in mine] + mine  # those that were not yet come first
        here = pathlib.Path(tempfile.mkdtemp(dir=folder))
        found = trial(name, [place for _, place in mine], here, given, whole[name], rng.randrange(2**31))
        shutil.rmtree(here, ignore_errors=True)
        done += sum(row.kills for row in found.values())
        for place, row in found.items():
            rows[name, place] = added(rows.get((name, place), Row()), row)
        if kept is not None:
            new = kept.with_suffix(".new")
            new.write_text(json.dumps([[*pair, *row] for pair, row in rows.items()]))
            new.replace(kept)
    return rows


def planned(plan: str, folder: pathlib.Path, given: dict[str, str], whole: dict[str, Whole], *, seed: int) -> Rows:
    """Does the trials of a plan, "JOB: PLACE PLACE …; JOB: …", each job's places in their order."""
    rows = Rows()
    for number, (name, places) in enumerate(read_plan(plan)):
        here = folder / f"planned-{number}"
        here.mkdir()
        for place, row in trial(name, places, here, given, whole[name], seed + number).items():
            rows[name, place] = added(rows.get((name, place), Row()), row)
    return rows


def read_plan(plan: str) -> list[tuple[str, list[str]]]:
    """The jobs of a plan and their places."""
    return [(name.strip(), places.split()) for name, _, places in (part.partition(":") for part in plan.split(";"))]


def in_workers(workers: int, kills: int, every: list[tuple[str, str]], *args: Any, seed: int, **options: Any) -> Rows:
    """`trials` in so many forks of this process: each does its share of the kills, beginning elsewhere."""
    if workers == 1:
        return trials(kills, every, *args, seed=seed, **options)
    folder, running, rows = args[0], [], Rows()
    for k in range(workers):
        at, own = k * len(every) // workers, folder / f"worker-{k}"
        running.append(Process(os.fork(), own))
        if running[-1].pid == 0:
            code = 1
            try:
                own.mkdir()
                share = (k + 1) * kills // workers - k * kills // workers
                mine, kept = every[at:] + every[:at], folder / f"worker-{k}.json"
                trials(share, mine, own, *args[1:], seed=1000 * seed + k, kept=kept, **options)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
    codes = end(running, seconds=options["until"] + LATE - time.time())
    for k, code in enumerate(codes):
        path = folder / f"worker-{k}.json"
        for name, place, count, missed, faults in json.loads(path.read_text()) if path.exists() else []:
            rows[name, place] = added(rows.get((name, place), Row()), Row(count, missed, tuple(faults)))
        if code:
            fault = f"worker {k}: {'it did not end' if code == HUNG else 'it failed'}"
            rows[every[0]] = added(rows.get(every[0], Row()), Row(faults=(fault,)))
    return rows


# The table ------------------------------------------------------------------------------------------------------------


def never(rows: Rows) -> list[str]:
    """The jobs and places at which no kill came, of those that were tried."""
    return [f"{name}, {place} ({row.missed} starts)" for (name, place), row in rows.items() if row.kills == 0]


def table(rows: Rows) -> str:
    """Kills by job and place: "–" where a job has no such place, "0" where it was not tried, "none of N" where none of
    N starts was killed; then all starts that ended before their kill came, and faults."""
    places = [place for place in PLACES if any(p == place for _, p in rows)]
    lines = [f"| job | {' | '.join(places)} | missed | faults |", "|" + "---|" * (len(places) + 3)]
    for name, job in JOBS.items():
        mine = {place: row for (own, place), row in rows.items() if own == name}
        if mine:
            each = [_cell(mine.get(place, Row())) if place in job.places else "–" for place in places]
            missed, faults = sum(row.missed for row in mine.values()), sum(len(row.faults) for row in mine.values())
            lines.append(f"| {name} | {' | '.join(each)} | {missed} | {faults} |")
    kills, missed = sum(row.kills for row in rows.values()), sum(row.missed for row in rows.values())
    faults = sum(len(row.faults) for row in rows.values()) + len(never(rows))
    lines += [f"never killed: {pair}" for pair in never(rows)]
    lines.append(f"{kills} kills, {missed} starts that ended before; {faults} faults")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    return f"none of {row.missed}" if row.missed and not row.kills else str(row.kills)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--starts", type=int, default=2, help="most starts that are killed one after the other")
    parser.add_argument("--minutes", type=float, default=1e6, help="from now, after which no trial begins")
    parser.add_argument("--workers", type=int, default=1, help="trials at the same time")
    parser.add_argument("--jobs", default=",".join(name for name in JOBS if name not in LONG))
    parser.add_argument("--places", default=",".join(PLACES))
    parser.add_argument("--plan", default="", help="trials in place of drawn ones: JOB: PLACE PLACE ...; JOB: ...")
    parser.add_argument("--out", default="", help="file for the table and the faults")
    options = parser.parse_args()
    until, names = time.time() + 60 * options.minutes, options.jobs.split(",")
    if options.plan:
        names = list(dict.fromkeys(name for name, _ in read_plan(options.plan)))
    with tempfile.TemporaryDirectory(prefix="kills-", ignore_cleanup_errors=True) as made:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAXALIGN_TEST_CACHE", f"{made}/programs")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        for module in (*(job.module for job in JOBS.values()), "orbax.checkpoint", "transformers"):
            __import__(module)
        folder = pathlib.Path(made)
        given, whole = prepare(folder, names, at_once=options.workers)
        places = options.places.split(",")
        every = [(name, place) for place in places for name in names if place in JOBS[name].places]
        random.Random(options.seed).shuffle(every)
        more = {"seed": options.seed, "starts": options.starts, "until": until}
        if options.plan:
            rows = planned(options.plan, folder, given, whole, seed=options.seed)
        else:
            rows = in_workers(options.workers, options.kills, every, folder, given, whole, **more)
    found = table(rows)
    print(found, flush=True)
    if options.out:
        faults = [f"FAULT {fault}" for row in rows.values() for fault in row.faults]
        pathlib.Path(options.out).write_text("\n".join([found, *faults]) + "\n")
    return int(any(row.faults for row in rows.values()) or bool(never(rows)))


if __name__ == "__main__":
    sys.exit(main())
