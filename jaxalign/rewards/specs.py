"""Rewards as command lines name them: a folder, a program MODULE:FUNCTION, or a weighted sum of such, "DIR - 0.1 *
MODULE:FUNCTION". The one place that reads and builds them."""

from __future__ import annotations

import functools
import importlib
import inspect
import pathlib
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from jaxalign._programs import in_folder, words_of
from jaxalign._signals import Stopped
from jaxalign.models import source_folders
from jaxalign.rewards.combinators import weighted_sum
from jaxalign.rewards.folders import Reader, split_label
from jaxalign.rewards.params import WeightedSumParams
from jaxalign.rewards.programs import from_text
from jaxalign.types import Params, Reward, TextReward


class Term(NamedTuple):
    """A term of a weighted sum of rewards."""

    weight: float
    """Finite, not 0."""
    source: str
    """The folder of a reward model, or MODULE:FUNCTION."""


class Open(Protocol):
    """Opens the reward model of a folder: (reward, params). role is what errors call it, label which of its labels."""

    def __call__(self, role: str, folder: str, label: str | None, /) -> tuple[Reward, Params]: ...


class Program(Protocol):
    """A function that a text names. What it takes and gives depends on what the text is for: of a reward it is a
    `types.TextReward`."""

    def __call__(self, *arguments: Any) -> Any: ...


def program(spec: str, *, name: str = "reward") -> Program:
    """Imports the function that MODULE:FUNCTION names.

    Args:
      spec: "MODULE:FUNCTION"; of a reward, f(prompts, responses) -> one number per response.
      name: the field that errors name.

    Returns:
      The function.

    Raises:
      ValueError: there is none, or the module's code raises.
    """
    module, _, function = spec.partition(":")
    try:
        with in_folder():
            found = getattr(importlib.import_module(module), function)
    except (KeyboardInterrupt, Stopped):
        raise
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}: expected MODULE:FUNCTION, found {spec!r} ({error})") from error
    except BaseException as error:  # the module's code raises what it likes
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if isinstance(error, SyntaxError) else f" at {last.filename}, line {last.lineno}"
        raise ValueError(f"{name}: expected MODULE:FUNCTION, found {spec!r} ({words_of(error)}{place})") from error
    if not callable(found):
        raise ValueError(f"{name}: expected MODULE:FUNCTION, found {spec!r}, a {type(found).__name__}")
    function_found: Program = found
    return function_found


def program_files(spec: str, *, name: str = "reward") -> tuple[str, ...]:
    """Names the source files of a program, on which everything that it computed depends.

    Args:
      spec: "MODULE:FUNCTION".
      name: the field that errors name.

    Returns:
      The file of MODULE, and that of the function's own module where MODULE only imports it; () for what has no file,
      as a builtin or a function typed at the prompt.

    Raises:
      ValueError: of `program`.
    """
    function: Any = program(spec, name=name)
    while isinstance(function, functools.partial):
        function = function.func
    modules = (spec.partition(":")[0], getattr(inspect.unwrap(function), "__module__", None))
    found = (getattr(sys.modules.get(module or ""), "__file__", None) for module in modules)
    return tuple(dict.fromkeys(str(file) for file in found if file))


def is_program(spec: str) -> bool:
    """Tells whether a term names a program, MODULE:FUNCTION, and not a folder.

    Args:
      spec: one term of a sum of rewards.

    Returns:
      True for a program.
    """
    return bool(re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec)) and not pathlib.Path(spec).exists()


def parse_reward(spec: str, *, name: str = "reward") -> tuple[Term, ...]:
    """Reads the terms of a reward.

    Args:
      spec: "DIR", "DIR#LABEL" for one of several labels, "MODULE:FUNCTION", or a weighted sum with spaces about its
        signs, "0.5 * DIR + DIR2 - 0.1 * MODULE:FUNCTION".
      name: the field that errors name.

    Returns:
      The terms, at least one, in their order.

    Raises:
      ValueError: a term is empty or holds a sign that is not one of the sum's, or a weight is not a finite number other
        than 0.
    """
    if spec and pathlib.Path(spec).exists():
        return (Term(1.0, spec),)
    first, *rest = re.split(r"\s([+-])\s", spec)
    out = []
    for sign, term in zip(["+", *rest[::2]], [first, *rest[1::2]], strict=True):
        weight, times, found = term.rpartition(" * ")
        found = found.strip()
        try:
            value = float(weight) if times else 1.0
        except ValueError as error:
            raise ValueError(f"{name}: expected WEIGHT * REWARD, found {term.strip()!r} in {spec!r}") from error
        if not found or not 1e-30 < abs(value) < 1e30:  # beyond, a float32 would be 0 or infinite
            raise ValueError(f"{name}: expected a weight other than 0 and a reward, found {term.strip()!r} in {spec!r}")
        if re.search(r"\*|^[+-]\s|\s[+-]", found) and not pathlib.Path(found).exists():
            raise ValueError(f"{name}: expected spaces about each sign and a reward after it, found {spec!r}")
        out.append(Term(value if sign == "+" else -value, found))
    return tuple(out)


def _single(terms: Sequence[Term]) -> bool:
    """True for one reward of weight 1, which is built as it is."""
    return len(terms) == 1 and terms[0].weight == 1


def _role(terms: Sequence[Term], source: str, name: str) -> str:
    return name if _single(terms) else f"{name} {source}"


def reward_roles(spec: str, *, name: str = "reward") -> dict[str, str]:
    """Names the reward models of a spec.

    Args:
      spec: as `parse_reward` reads it; "" for none.
      name: the field that errors name.

    Returns:
      Role -> folder: {name: folder} of one reward, "name folder" for each of a sum; programs have none.

    Raises:
      ValueError: of `parse_reward`.
    """
    terms = parse_reward(spec, name=name) if spec else ()
    models_ = (term.source for term in terms if not is_program(term.source))
    return {_role(terms, source, name): split_label(source)[0] for source in models_}


def reward_inputs(spec: str, *, name: str = "reward") -> tuple[str, ...]:
    """Names what the numbers of a reward depend on: the inputs of each run that reads it.

    Args:
      spec: as `parse_reward` reads it; "" for none.
      name: the field that errors name.

    Returns:
      The folders of its models (of an adapter, its base's too) and the source files of its programs, in the order of
      the terms.

    Raises:
      ValueError: of `parse_reward` and `program`.
    """
    terms = parse_reward(spec, name=name) if spec else ()
    files = (
        program_files(t.source, name=name) if is_program(t.source) else source_folders(split_label(t.source)[0])
        for t in terms
    )
    return tuple(file for found in files for file in found)


def build_reward(
    spec: str, *, open_model: Open, reader: Reader, name: str = "reward", between_programs: bool = False
) -> tuple[Reward, Params]:
    """Builds the Reward of a spec.

    Args:
      spec: as `parse_reward` reads it.
      open_model: open_model(role, folder, label) -> (reward, params), roles as in `reward_roles`; called once per
        reward model. `open_reward` does so for a folder.
      reader: gives programs the texts of token ids and the prompts as they were given.
      name: the field that errors name.
      between_programs: of its programs, as in `from_text`.

    Returns:
      (reward, params): the one reward itself where there is one, of weight 1, else a `weighted_sum`.

    Raises:
      ValueError: of `parse_reward`, `program` and open_model.
    """
    terms = parse_reward(spec, name=name)
    sources = None if reader.sources is None else tuple(reader.sources)

    def build(source: str) -> tuple[Reward, Params]:
        role = _role(terms, source, name)
        if is_program(source):
            f = cast(TextReward, program(source, name=role))
            options: dict[str, Any] = {"sources": sources, "rendered": reader.rendered}
            return from_text(reader.decode, f, between_programs=between_programs, **options), None
        return open_model(role, *split_label(source))

    built = {source: build(source) for source in dict.fromkeys(term.source for term in terms)}
    each = [built[term.source] for term in terms]
    if _single(terms):
        return each[0]
    weights = np.asarray([term.weight for term in terms], np.float32)
    return weighted_sum([reward for reward, _ in each]), WeightedSumParams(tuple(params for _, params in each), weights)
