"""The best parameters of a round of train.regress by the loss on held-out prompts: best.json says what was read, best/
holds the parameters, and both agree after a kill at any moment."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxalign import _hosts, _io
from jaxalign.training import checkpoints
from jaxalign.training.hooks import Hooks
from jaxalign.training.regression_options import RegressionOptions
from jaxalign.types import Array, Params

FILE, FOLDER, CHECKPOINTS = "best.json", "best", "checkpoints"
NOTHING: dict[str, Any] = {"loss": None, "step": 0, "read": 0, "since": 0, "stop": False, "over": False, "ended": False}
"""What best.json holds before the first reading: the lowest loss and its step, the step of the last reading, readings
since the lowest, whether the round ends, whether the KL of what is kept was above the ceiling, whether it has ended."""


class Best(NamedTuple):
    """The parameters of the lowest loss on held-out prompts so far."""

    step: Array
    """[] int32, after which they were read."""
    params: Params
    """What is trained."""


class Reading(NamedTuple):
    """What is read of the held-out responses."""

    loss: float
    """The objective."""
    kl: float
    """KL(pi‖pi_ref) by importance weights: mean of rho·log rho − rho + 1 [nats]."""
    kl_95: float
    """Its 95 % half-width over prompts."""


class Watch(NamedTuple):
    """What a fit is given, and what it is asked for in the end."""

    hooks: list[Hooks]
    """Of `training.fit`."""
    ended: bool
    """Whether the round is over: there is nothing to fit."""
    steps: int
    """At which the fit ends."""
    save_every: int
    """Steps between its checkpoints."""
    best: Callable[[Params], tuple[Params, dict[str, Any]]]
    """The last parameters -> (the best ones, figures)."""


@contextlib.contextmanager
def watching(
    read: Callable[[Params], Reading] | None,
    folder: pathlib.Path,
    options: RegressionOptions,
    *,
    steps: int,
    save_every: int,
) -> Iterator[Watch]:
    """Watches the loss on held-out prompts.

    Args:
      read: reads it; None where no prompts are held out: the last parameters are then the best.
      folder: of the round.
      options: how often it is read, when the round ends, and the ceiling of the KL.
      steps: of the round, if it is not ended before.
      save_every: steps between the round's checkpoints.

    Returns:
      A context of a Watch.

    Raises:
      ValueError: a damaged best.json; best/ that was changed while the round was fitted.
    """
    if read is None:
        yield Watch([], False, steps, save_every, lambda last: (last, {"steps": steps}))
        return
    kept, ceiling = kept_of(folder, options.check_every, steps), options.target_kl
    taken, read_at, until = _newest(folder / CHECKPOINTS), kept["read"], steps
    # A reading ends the round when the metrics of its step are read: at once where a checkpoint is due, else one step
    # later. Of a run that was stopped there they are not read again.
    if kept["stop"] and taken >= (read_at if read_at % save_every == 0 else min(read_at + 1, steps)):
        until = taken
    elif kept["stop"] and taken == read_at:
        save_every = 1
    with checkpoints.opened(folder / FOLDER, keep=1) as manager:

        def keep() -> None:
            _io.write_json(folder / FILE, kept)

        def look(step: int, params: Params) -> None:
            found = read(params)
            # Steep transforms overshoot the KL and come back: a reading above it is none to keep, and no end.
            over = bool(ceiling) and found.kl - found.kl_95 > ceiling
            if (kept["loss"] is None or found.loss < kept["loss"]) and not (over and step < steps):
                checkpoints.save(manager, Best(jnp.asarray(step, jnp.int32), params), {})
                checkpoints.finish(manager)  # saves run in the background, and best.json speaks of what is on disk
                kept.update(loss=found.loss, step=step, since=0, over=over)
            else:
                kept["since"] += 1
            kept.update(stop=kept["since"] >= options.patience, read=step, kl=found.kl)
            keep()

        def after_step(step: int, state: Any) -> None:
            # A run that goes on has read some.
            if step % options.check_every == 0 and step > kept["read"] and not kept["stop"]:
                look(step, state.params)

        def stop(step: int, metrics: Any) -> bool:
            return bool(kept["stop"]) and step >= kept["read"]

        def best(last: Params) -> tuple[Params, dict[str, Any]]:
            if not kept["ended"]:
                kept["ended"] = True
                if kept["step"] == 0 or (not kept["stop"] and kept["read"] != steps):
                    look(steps, last)
                else:
                    keep()
            found = checkpoints.restore(manager, Best(jnp.zeros((), jnp.int32), last), {})
            if found is None or found[1] != kept["step"]:
                raise ValueError(
                    f"{FOLDER}: expected the parameters of step {kept['step']} in {folder / FOLDER}, found "
                    f"{'none' if found is None else f'those of step {found[1]}'}; the same command fits the round again"
                )
            return found[0].params, {"steps": kept["read"], "best_step": kept["step"], "held_out_loss": kept["loss"]}

        yield Watch([Hooks(after_step=after_step, stop=stop)], kept["ended"], until, save_every, best)


def kept_of(folder: pathlib.Path, every: int, steps: int) -> dict[str, Any]:
    """What best.json of a round holds, for a run that goes on. Where best/ does not hold what it says, or a reading is
    lacking, all of the round but its metrics is removed, and it is fitted again.

    Args:
      folder: of the round.
      every: steps between readings.
      steps: of the round; where they are more than before, the round has not ended.

    Returns:
      Each key of `NOTHING`, and "steps".

    Raises:
      ValueError: a damaged best.json.
    """
    text = ""
    with _hosts.together():  # of several processes the first looks, since it also writes
        if _hosts.is_first():
            kept = _read(folder)
            if why := _lacking(folder, kept, every, steps):
                print(f"regress: {why}; the round is fitted again", flush=True)
                # A kill in between leaves what is lacking as well.
                (folder / FILE).unlink(missing_ok=True)
                for name in (FOLDER, CHECKPOINTS):
                    shutil.rmtree(folder / name, ignore_errors=True)
                kept = dict(NOTHING)
            text = json.dumps(kept)
    found: dict[str, Any] = json.loads(_hosts.from_first(text))
    # A file without them is from before there were any.
    if steps > found.get("steps", steps if found["stop"] or not found["ended"] else found["read"]):
        if found["stop"]:
            found["since"] = 0
        if found["over"]:  # above the ceiling the last step alone is kept, and this is no more the last
            found |= {"loss": None, "step": 0, "over": False}
        found |= {"stop": False, "ended": False}
    return found | {"steps": steps}


def _read(folder: pathlib.Path) -> dict[str, Any]:
    """What best.json holds, `NOTHING` where there is none. ValueError for a damaged one."""
    path = folder / FILE
    then = f"remove it, and the round in {folder} is fitted again"
    try:
        found: dict[str, Any] = _io.read_json(path, then=then)
    except FileNotFoundError:
        return dict(NOTHING)
    kinds: dict[str, Any] = {"step": int, "read": int, "since": int, "stop": bool, "loss": float | int | None}
    kinds |= {name: kind for name, kind in {"over": bool, "ended": bool, "steps": int}.items() if name in found}
    for name, kind in kinds.items():
        value = found.get(name, "")
        wrong = isinstance(value, bool) if kind is not bool else False
        if wrong or not isinstance(value, kind) or (kind is int and value < 0):
            what = {int: "a number from 0", bool: "true or false"}.get(kind, "a number")
            shown = repr(value)[:40] if name in found else "none"
            raise ValueError(f"{FILE}: expected {what} as {name}, found {shown} in {path}; {then}")
    if found["step"] > found["read"] or (found["step"] > 0) != (found["loss"] is not None):
        pair = {name: found[name] for name in ("step", "loss", "read")}
        raise ValueError(f"{FILE}: expected the loss of a step that was read, found {pair} in {path}; {then}")
    return dict(NOTHING, **found)


def _lacking(folder: pathlib.Path, kept: dict[str, Any], every: int, steps: int) -> str:
    """What a round that goes on lacks, for a message; "" where it lacks nothing."""
    taken, newest, step = _newest(folder / CHECKPOINTS), _newest(folder / FOLDER), kept["step"]
    if newest and (why := checkpoints.damage(folder / FOLDER / str(newest))):
        return f"the best parameters, of step {newest} in {folder / FOLDER}, are damaged ({why})"
    # A kill before best.json was written leaves newer ones, which are read again when their step is taken again; the
    # last one is read at the end.
    if newest < step or (newest > step and (kept["ended"] or newest <= min(taken, steps - 1))):
        return f"{folder / FOLDER} holds {f'step {newest}' if newest else 'nothing'}, {FILE} says step {step}"
    due = min(taken, steps - 1) // every * every
    if not kept["stop"] and kept["read"] < due:
        return f"{FILE} of {folder} lacks the reading of step {due}"
    return ""


def _newest(folder: pathlib.Path) -> int:
    """The largest step of a folder of checkpoints, 0 without any."""
    return max((int(path.name) for path in folder.glob("[0-9]*") if path.name.isdecimal()), default=0)
