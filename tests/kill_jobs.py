"""Kills jobs at any moment, starts them again, and compares what they leave with an uninterrupted run, byte for byte:

python -m tests.kill_jobs --kills 200

Each trial takes a job and a place: at the start, at a random moment, inside the write of a checkpoint, of a file (a
shard, a table, JSON) or of a partial file, inside the model's folder, between model and summary, with storage that is
full, or by a signal that asks to end; some trials kill the next start too. A fault is a byte that differs,
something left behind, a start that fails, an output of more than one line of error, or another exit code than is
promised. Prints a table, and exits with 1 where there is a fault. Jobs are forked from one process that has loaded all
modules and no device.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
GOLD = "jaxalign.worlds.opinions:golds"
PLACES = ("start", "random", "checkpoint", "file", "partial", "model", "summary", "full", "TERM", "INT", "HUP")
"""Where a job is killed."""

PROMISED = {"TERM": 143, "INT": 130, "HUP": 129}


class Job(NamedTuple):
    """A job that is killed."""

    module: str
    """Which `python -m` starts."""
    words: tuple[str, ...]
    """Its options; {world}, {base} and {out} stand for folders."""
    places: tuple[str, ...]
    """Where it can be killed."""


_SHORT = (
    "--max-length",
    "48",
    "--track",
    "none",
    "--log-every",
    "1",
    "--save-every",
    "2",
    "--batch-size",
    "4",
    "--validation",
    "0",
)
_DRAWN = ("--max-new-tokens", "4", "--reward", GOLD, "--prompts", "{world}/held_out.jsonl")
_ALWAYS = ("start", "random", "file", "summary", "full", "TERM", "INT", "HUP")
JOBS = {
    "sft": Job(
        "train.sft",
        ("--data", "{world}/texts.jsonl", "--model", "{base}", "--steps", "6", *_SHORT),
        (*_ALWAYS, "checkpoint", "model"),
    ),
    "value": Job(
        "train.value",
        ("--base", "{base}", "--samples", "2", "--shard", "2", "--steps", "4", *_SHORT, *_DRAWN),
        (*_ALWAYS, "checkpoint", "model"),
    ),
    "rl": Job(
        "train.rl",
        ("--model", "{base}", "--samples", "2", "--steps", "4", *_SHORT, *_DRAWN),
        (*_ALWAYS, "checkpoint", "model"),
    ),
    "calibrate": Job(
        "train.calibrate",
        ("--base", "{base}", "--samples", "2", "--shard", "2", "--max-length", "48", *_DRAWN),
        _ALWAYS,
    ),
    "preferences": Job(
        "train.preferences",
        ("--base", "{base}", "--samples", "4", "--shard", "2", "--max-length", "48", *_DRAWN),
        _ALWAYS,
    ),
    "decode": Job(
        "eval.decode",
        ("--model", "{base}", "--method", "best_of_n@2", "--batch-size", "2", *_DRAWN),
        (*_ALWAYS, "partial"),
    ),
}


# A job in a process of its own ----------------------------------------------------------------------------------------


def start(job: Job, words: list[str], log: pathlib.Path, arm: Callable[[], None] = lambda: None) -> int:
    """Forks a process that does a job. Its streams go to `log`.out and `log`.err.

    Args:
      job: which.
      words: its options.
      log: of the streams.
      arm: called in the process first, to have it killed.

    Returns:
      Its number.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where this runs in the background,
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # or under nohup
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(log.with_suffix(f".{name}"), os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        sys.argv = ["-m"]
        module = __import__(job.module, fromlist=["main"])
        from jaxalign import commands

        arm()
        commands.execute(module.main, words)
    except SystemExit as end:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        os._exit(70)


def wait(pid: int) -> int:
    """The exit code of a process, minus the signal that killed it."""
    status = os.waitpid(pid, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def die() -> None:
    """Kills this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(
    owner: Any, name: str, number: int, *, after: bool = False, when: Callable[..., bool] | None = None
) -> None:
    """Kills the process at the call of a function with that number, before it or after."""
    inner, seen = getattr(owner, name), [0]

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        seen[0] += when is None or when(*args, **kwargs)
        now = seen[0] == number and (when is None or when(*args, **kwargs))
        if now and not after:
            die()
        found = inner(*args, **kwargs)
        if now:
            die()
        return found

    setattr(owner, name, outer)


def in_file(rng: random.Random) -> None:
    """Kills the process inside a file's write: when it is open, half written, written, synced or renamed."""
    from jaxalign import _io

    number, stage, inner, seen = rng.randint(1, 12), rng.randrange(4), _io.whole_file, [0]

    @contextlib.contextmanager
    def outer(path: pathlib.Path) -> Iterator[Any]:
        seen[0] += 1
        mine = seen[0] == number
        with inner(path) as sink:
            if mine and stage == 0:
                die()
            yield sink
            if mine and stage == 1:
                sink.flush()
                os.truncate(sink.fileno(), sink.tell() // 2)
                die()
            if mine and stage == 2:
                sink.flush()
                die()
        if mine:
            die()

    _io.whole_file = outer


def in_partial(rng: random.Random) -> None:
    """Kills the process inside a batch of a partial file: some lines are there, and a half."""
    number, inner, seen = rng.randint(1, 4), pathlib.Path.open, [0]

    def outer(self: pathlib.Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        sink = inner(self, mode, *args, **kwargs)
        if mode == "a" and ".partial" in self.name:
            whole = sink.writelines

            def half(lines: Any) -> None:
                seen[0] += 1
                text = "".join(lines)
                if seen[0] == number:
                    sink.write(text[: rng.randrange(len(text))])
                    sink.flush()
                    die()
                whole([text])

            class Sink:
                writelines = staticmethod(half)
                flush = staticmethod(sink.flush)

                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *_: Any) -> None:
                    sink.close()

            return Sink()
        return sink

    pathlib.Path.open = outer  # type: ignore[method-assign]


def later(seconds: float, number: int) -> None:
    """Sends this process a signal after a while."""
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), number))
    timer.daemon = True
    timer.start()


def arming(place: str, seconds: float, seed: int) -> Callable[[], None]:
    """What has a process killed at a place.

    Args:
      place: one of `PLACES`.
      seconds: that the job takes.
      seed: of what is drawn.
    """

    def arm() -> None:
        rng = random.Random(seed)
        from jaxalign import _io
        from jaxalign.models.hf import writing
        from jaxalign.training import checkpoints

        if place == "start":
            later(rng.random() * 0.3 * seconds, signal.SIGKILL)
        elif place == "random":
            later(rng.random() * seconds, signal.SIGKILL)
        elif place in PROMISED:
            later(rng.random() * seconds, getattr(signal, f"SIG{place}"))
        elif place == "checkpoint":
            name = rng.choice(("save", "_seal_written"))
            at_call(checkpoints, name, rng.randint(1, 3), after=rng.random() < 0.5)
            if name == "save" and rng.random() < 0.5:  # some time into it
                inner = checkpoints.save
                checkpoints.save = lambda *args: (later(rng.random() * 0.05, signal.SIGKILL), inner(*args))[1]
        elif place == "file":
            in_file(rng)
        elif place == "partial":
            in_partial(rng)
        elif place == "model":
            at_call(writing, "_write_file", 1, after=rng.random() < 0.5)
        elif place == "summary":
            at_call(_io, "write_own_json", 1, when=lambda path, values: path.name == "summary.json")
        elif place == "full":
            size = int(2 ** rng.uniform(11, 15))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            if rng.random() < 0.3:
                later(rng.random() * seconds, signal.SIGKILL)

    return arm


# What is left ---------------------------------------------------------------------------------------------------------


def left(out: pathlib.Path) -> dict[str, str]:
    """Digest of each file that depends on the run alone: models, roll-outs, tables, responses, pairs, metrics."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if not path.is_file() or "checkpoints/" in name or path.suffix == ".png":
            continue
        if path.name in ("config.json", "inputs.json", "versions.json") and path.parent.name != "model":
            continue
        data = path.read_bytes()
        if path.suffix in (".json", ".jsonl") and path.parent.name != "model":
            text = json.dumps([_untimed(json.loads(line)) for line in _lines(path)])
            data = text.encode()
        found[name] = hashlib.blake2b(data, digest_size=8).hexdigest()
    return found


def _lines(path: pathlib.Path) -> list[str]:
    text = path.read_text()
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _untimed(v) for k, v in value.items() if "per_second" not in k and k != "mfu"}
    return [_untimed(one) for one in value] if isinstance(value, list) else value


def odd(out: pathlib.Path) -> list[str]:
    """Files that a finished run should not hold: half-written ones, hidden copies, locks."""
    names = (str(path.relative_to(out)) for path in out.rglob("*"))
    return [name for name in names if ".tmp" in name or ".lock" in name or ".partial" in name or ".old" in name]


class Row(NamedTuple):
    """A row of the table."""

    kills: int = 0
    missed: int = 0
    """Of these, jobs that were done before they were killed."""
    faults: tuple[str, ...] = ()


def trial(
    name: str,
    job: Job,
    places: list[str],
    folder: pathlib.Path,
    given: dict[str, str],
    whole: dict[str, str],
    seconds: float,
    seed: int,
) -> Row:
    """Kills a job at the places, start after start, does it, and compares."""
    rng, faults, kills, missed = random.Random(seed), list[str](), 0, 0
    out, log = folder / "out", folder / "log"
    words = [word.format(**given, out=out) for word in (*job.words, "--out", "{out}")]
    place = ", ".join(places)
    for number, where in enumerate(places):
        own = log.with_name(f"log{number}")
        code = wait(start(job, words, own, arming(where, seconds, rng.randrange(2**31))))
        kills += 1
        missed += code == 0
        said = own.with_suffix(".err").read_text(errors="replace")
        bad = [line for line in said.splitlines() if line.startswith("Traceback") or "Error" in line[:40]]
        expected = {0, -9, PROMISED.get(where, 0), *((1,) if where == "full" else ())}
        if code not in expected:
            faults.append(f"{name}, {where}: exit code {code}: {said.strip()[-300:]}")
        if bad and code != 1:
            faults.append(f"{name}, {where}: {bad[0][:200]}")
        if code not in (0, -9) and len([x for x in said.splitlines() if _told(x)]) > 1:
            faults.append(f"{name}, {where}: more than one line: {said.strip()[-600:]}")
    code = wait(start(job, words, log.with_name("last")))
    if code:
        said = log.with_name("last.err").read_text(errors="replace")
        return Row(kills, missed, (*faults, f"{name}, {place}: it does not go on, exit code {code}: {said[-400:]}"))
    found = left(out)
    for path in sorted(set(found) | set(whole)):
        if found.get(path) != whole.get(path):
            faults.append(f"{name}, {place}: {path} differs ({whole.get(path)}, {found.get(path)})")
    faults += [f"{name}, {place}: left behind {path}" for path in odd(out)]
    return Row(kills, missed, tuple(faults))


def _told(line: str) -> bool:
    """Whether a line on stderr is neither of a progress bar nor of what a job tells beside errors."""
    beside = ("it/s", "/s]", "?", "note:", "compilation cache", "stopping: ", "s/")
    return bool(line.strip()) and not any(word in line for word in beside)


def run(
    kills: int, *, seed: int, folder: pathlib.Path, jobs: list[str], places: list[str], starts: int, until: float
) -> dict[Any, Row]:
    """Makes the inputs and the uninterrupted runs, and the trials.

    Args:
      kills: how many.
      seed: of what is drawn.
      folder: to work in.
      jobs, places: names of those that are tried.
      starts: most starts that are killed one after the other.
      until: time after which no trial begins.

    Returns:
      (job, place) -> its row; the faults of a trial count at its first place.
    """
    given = {"world": str(folder / "world"), "base": str(folder / "made/model")}
    small = (
        "--texts",
        "24",
        "--pairs",
        "4",
        "--held-out",
        "6",
        "--layers",
        "1",
        "--width",
        "8",
        "--out",
        given["world"],
    )
    made = (
        "--data",
        "{world}/texts.jsonl",
        "--architecture",
        "{world}/config.json",
        "--tokenizer",
        "{world}/tokenizer",
    )
    first = [word.format(**given) for word in (*made, "--steps", "1", *_SHORT, "--out", str(folder / "made"))]
    for module, words in (("train.world", list(small)), ("train.sft", first)):
        code = wait(start(Job(module, (), ()), words, folder / "made-log"))
        assert code == 0, (folder / "made-log.err").read_text()
    whole, seconds = {}, {}
    for name in jobs:
        job, out = JOBS[name], folder / name
        words = [word.format(**given, out=out) for word in (*job.words, "--out", "{out}")]
        begin = time.perf_counter()
        code = wait(start(job, words, folder / f"{name}-log"))
        seconds[name] = time.perf_counter() - begin
        assert code == 0, (folder / f"{name}-log.err").read_text()
        whole[name] = left(out)
        assert len(whole[name]) > 2, whole
    rng, rows = random.Random(seed), dict[Any, Row]()
    every = [(name, place) for place in places for name in jobs if place in JOBS[name].places]
    rng.shuffle(every)
    done = 0
    while done < kills and time.time() < until:
        name = every[0][0]
        mine = [pair for pair in every if pair[0] == name][: min(rng.randint(1, starts), kills - done)]
        every = [pair for pair in every if pair not in mine] + mine  # those that were not yet come first
        here = pathlib.Path(tempfile.mkdtemp(dir=folder))
        killed = [place for _, place in mine]
        row = trial(name, JOBS[name], killed, here, given, whole[name], seconds[name], rng.randrange(2**31))
        shutil.rmtree(here, ignore_errors=True)
        done += row.kills
        for i, pair in enumerate(mine):
            before = rows.get(pair, Row())
            new = Row(1, row.missed, row.faults) if i == 0 else Row(1)
            rows[pair] = Row(*(a + b for a, b in zip(before, new, strict=True)))  # type: ignore[operator]
        for fault in row.faults:
            print(f"FAULT {fault}", flush=True)
    return rows


def show(rows: dict[Any, Row]) -> None:
    """Prints kills, and faults where there are any, by job and place."""
    places = [place for place in PLACES if any(p == place for _, p in rows)]
    print(f"{'job':12}" + "".join(f"{place:>12}" for place in places) + f"{'faults':>8}")
    for name in JOBS:
        mine = {place: row for (job, place), row in rows.items() if job == name}
        if mine:
            cells = "".join(f"{mine[place].kills if place in mine else '-':>12}" for place in places)
            print(f"{name:12}{cells}{sum(len(row.faults) for row in mine.values()):>8}")
    kills, missed = sum(row.kills for row in rows.values()), sum(row.missed for row in rows.values())
    faults = sum(len(row.faults) for row in rows.values())
    print(f"{kills} kills, {missed} of them of jobs that were done before; {faults} faults", flush=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--starts", type=int, default=2, help="most starts that are killed one after the other")
    parser.add_argument("--minutes", type=float, default=1e6, help="after which no trial begins")
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--places", default=",".join(PLACES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAXALIGN_TEST_CACHE", f"{folder}/programs")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        for job in JOBS.values():
            __import__(job.module)
        __import__("orbax.checkpoint")
        __import__("transformers")
        names, places = options.jobs.split(","), options.places.split(",")
        more = {"seed": options.seed, "starts": options.starts, "until": time.time() + 60 * options.minutes}
        rows = run(options.kills, folder=pathlib.Path(folder), jobs=names, places=places, **more)
    show(rows)
    return int(any(row.faults for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
