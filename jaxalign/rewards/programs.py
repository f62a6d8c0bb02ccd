"""Rewards that are programs on the host: functions of numpy arrays or of text."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _hosts
from jaxalign._builders import cached
from jaxalign._checks import is_concrete, is_traced
from jaxalign._programs import called, for_callback, naming, of_prompts
from jaxalign._time_limits import check_seconds
from jaxalign.rewards.text_models import SourceReward
from jaxalign.rewards.values import check_range, function_name, host_values, on_host
from jaxalign.shapes import RewardValues, TextIndex, TextLength, TextMask, TextTokens
from jaxalign.tokens import Text, Tokenizer, decode_text
from jaxalign.types import Array, CheckedReward, Params, Reward, TextReward

Ints = np.ndarray[Any, np.dtype[np.int32]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]
Numbers = np.ndarray[Any, np.dtype[Any]]


class NumpyReward(Protocol):
    """A reward of host arrays: (tokens [N,L], mask [N,L], prompt_length [N], index [N]) -> [N] numbers."""

    def __call__(self, tokens: Ints, mask: Bools, prompt_length: Ints, index: Ints, /) -> Numbers: ...


@cached
def from_numpy(f: NumpyReward, *, between_programs: bool = False, timeout: float | None = None) -> Reward:
    """Builds a Reward of a program on host arrays.

    It works under jit through a callback and has no gradient. Its numbers are float32, or float64 where jax has that
    enabled.

    Args:
      f: f(tokens [N,L], mask [N,L], prompt_length [N], index [N]) -> [N] numbers, all numpy arrays.
      between_programs: whether it is called between compiled programs in place of through a callback in one, as it has
        to be where the rows lie across processes: each process then scores its share of them.
      timeout: seconds that a call may take; None: what --reward-timeout says in a job, no limit elsewhere; 0: no limit.

    Returns:
      A Reward whose params are None.

    Raises:
      ValueError: when it is used, f raises or returns anything but one real number per row, or does not return in time.
    """
    check_timeout(timeout)

    def numbers(tokens: Ints, mask: Bools, prompt_length: Ints, index: Ints) -> Numbers:
        return _numbers(f, lambda: f(tokens, mask, prompt_length, index), index, timeout)

    return _called_on_host(numbers, f) if between_programs else _in_program(numbers)


def check_timeout(timeout: float | None) -> None:
    """ValueError for what is no time to wait [s]."""
    if timeout is not None:
        check_seconds(timeout, "timeout")


def _in_program(numbers: NumpyReward) -> Reward:
    """The Reward of a checked function of host arrays, which compiled programs call back."""

    def dtype() -> np.dtype[Any]:
        return np.dtype(jnp.result_type(float))

    def call(tokens: Any, mask: Any, prompt_length: Any, index: Any) -> Numbers:
        found = numbers(*(np.asarray(a) for a in (tokens, mask, prompt_length, index)))
        return np.asarray(found, dtype())

    in_program = for_callback(call)

    def reward(
        params: Params, tokens: TextTokens, mask: TextMask, prompt_length: TextLength, index: TextIndex
    ) -> RewardValues:
        given = (tokens, mask, prompt_length, index)
        if is_concrete(given):  # outside compiled programs, where an error is simply raised
            return jnp.asarray(call(*given))
        shape = np.empty(prompt_length.shape, dtype())
        found: Array = jax.pure_callback(in_program, shape, *given, vmap_method="sequential")
        return found

    return reward


@cached
def from_text(
    decode: Tokenizer | Callable[[Sequence[int]], str],
    f: TextReward | SourceReward,
    *,
    sources: Sequence[Text] | None = None,
    rendered: Callable[[Sequence[int]], str] | None = None,
    between_programs: bool = False,
    timeout: float | None = None,
) -> Reward:
    """Builds a Reward of a program on text, or of a reward model with another tokenizer (`text_model`).

    What f receives in place of the prompts goes by the name of its first parameter:

    - `messages`: chats; a plain text is one user's turn;
    - `sources`: the prompts as they were given, texts or chats;
    - `rendered`: the prompts' text with its special tokens, as the model reads it;
    - any other name: the prompts' text without special tokens.

    Args:
      decode: a tokenizer, whose text is taken without special tokens; or a function that turns token ids into text
        (the method `decode` of transformers' tokenizers keeps special tokens, so give the tokenizer itself).
      f: f(prompts, responses) -> one number per response; responses are text without special tokens.
      sources: the prompts as they were given, which a prompt's index counts; f's that ask for them need it.
      rendered: turns token ids into text with special tokens, for f's that ask for it.
      between_programs, timeout: as in `from_numpy`.

    Returns:
      A Reward whose params are None.

    Raises:
      ValueError: f asks for what was not given; when it is used, a prompt's index outside `sources`, or f raises or
        returns anything but one real number per response, or does not return in time.
    """
    check_timeout(timeout)
    if hasattr(decode, "decode"):
        to_text: Callable[[Sequence[int]], str] = functools.partial(decode_text, decode)
    else:
        to_text = decode
    wants = _first_parameter(f)
    if wants in ("messages", "sources") and sources is None:
        raise ValueError(f"sources: expected the prompts as they were given, which {function_name(f)} asks for")
    if wants == "rendered" and rendered is None:
        raise ValueError(f"rendered: expected a function that keeps special tokens, which {function_name(f)} asks for")

    def prompts_of(rows: list[list[int]], lengths: list[int], index: Ints) -> list[Any]:
        if wants in ("messages", "sources"):
            assert sources is not None
            outside = sorted({int(i) for i in index if not 0 <= i < len(sources)})
            if outside:
                raise ValueError(f"index: expected below {len(sources)}, one of the prompts given, found {outside}")
            given = [sources[int(i)] for i in index]
            if wants == "sources":
                return given
            return [[{"role": "user", "content": x}] if isinstance(x, str) else x for x in given]
        read = rendered if wants == "rendered" and rendered is not None else to_text
        return texts(read, [row[:n] for row, n in zip(rows, lengths, strict=True)])

    def texts(read: Callable[[Sequence[int]], str], rows: list[list[int]]) -> list[str]:
        with naming(read, function_name(read), "a text of token ids"):
            return [read(row) for row in rows]

    def score(tokens: Ints, mask: Bools, prompt_length: Ints, index: Ints) -> Numbers:
        rows = [row[real].tolist() for row, real in zip(tokens, mask.astype(bool), strict=True)]
        lengths = prompt_length.tolist()
        responses = texts(to_text, [row[n:] for row, n in zip(rows, lengths, strict=True)])
        given = prompts_of(rows, lengths, index)
        return _numbers(f, lambda: f(given, responses), index, timeout)

    return _called_on_host(score, f) if between_programs or on_host(f) else _in_program(score)


def _numbers(f: Any, call: Callable[[], Any], index: Ints, timeout: float | None) -> Numbers:
    """The numbers of a program, read within its time. Errors name it, its place, the rows and what came."""
    shape, rows = index.shape, of_prompts(index.tolist())

    def read() -> Numbers:
        found: Numbers = host_values(call(), shape, function=f, rows=rows)
        check_range(found, function=f, rows=rows)
        return found

    expected = f"one real number per text, shape {shape}"
    return called(f, read, name=function_name(f), expected=expected, rows=rows, timeout=timeout)


def _called_on_host(numbers: NumpyReward, named: NumpyReward | TextReward | SourceReward) -> Reward:
    """A Reward of a host function that is called between compiled programs, since it may run some of its own."""

    def scored(*arrays: np.ndarray) -> Numbers:
        return numbers(*arrays)

    def reward(
        params: Params, tokens: TextTokens, mask: TextMask, prompt_length: TextLength, index: TextIndex
    ) -> RewardValues:
        if is_traced(tokens, mask, prompt_length, index):
            raise ValueError(
                f"reward: expected to be called outside jit, since {function_name(named)} reads texts by programs of "
                "its own; decoding.best_of_n, text.score and the commands do so"
            )

        given = (tokens, mask, prompt_length, index)
        arrays = _hosts.host_value(given)
        # Of rows that lie across processes each scores its share, unless its model does so too.
        across = any(map(_hosts.is_spread, given)) and not getattr(named, "across", False)
        return jnp.asarray(_hosts.in_shares(scored, *arrays) if across else scored(*arrays), dtype=float)

    return CheckedReward(reward, on_host=True)


def _first_parameter(f: TextReward | SourceReward) -> str:
    try:
        parameters = inspect.signature(f).parameters
    except (TypeError, ValueError):  # of a builtin
        return ""
    return next(iter(parameters), "")
