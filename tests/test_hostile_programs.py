"""Programs as rewards that give or do something else: numbers, or one line that says which program, where and what."""

from __future__ import annotations

import contextlib
import decimal
import fractions
import json
import os
import re
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import _time_limits, commands, decoding, models, rewards, tree
from jaxalign.data.tokenizers import word_level
from jaxalign.launch import time_limit
from tests.conftest import tiny_lm

PROCESS = tree.Tree(vocab_size=4, horizon=3)
BASE, PROMPTS = tree.policy(PROCESS), tree.prompts(2)
TEXTS = (jnp.ones((2, 3), jnp.int32), jnp.ones((2, 3), bool), jnp.ones(2, jnp.int32), jnp.asarray([0, 5]))


class Tensor:
    """A tensor of another library: numpy reads it, its dtype is not numpy's."""

    dtype = "float of another library"
    shape = (2,)

    def __init__(self, values, error=None):
        self.values, self.error = values, error

    def __array__(self, dtype=None, copy=None):
        if self.error is not None:
            raise self.error
        return np.asarray(self.values, dtype)


GIVEN = {
    "list": [1, 2.0],
    "tuple": (1.0, 2.0),
    "numpy": np.asarray([1, 2], np.int64),
    "float16": np.asarray([1, 2], np.float16),
    "jax": jnp.asarray([1.0, 2.0]),
    "numpy numbers": [np.float32(1), np.int8(2)],
    "jax numbers": [jnp.asarray(1.0), jnp.asarray(2.0)],
    "tensor": Tensor([1.0, 2.0]),
}
"""Two numbers, however they are given."""

REFUSED = {
    "strings": (["1.0", "2.0"], "shape (2,) of <U3 (['1.0', '2.0']"),
    "mixed": ([1.0, "2.0"], "shape (2,) of <U32 ([1.0, '2.0']"),
    "bytes": ([b"1", b"2"], "shape (2,) of |S1"),
    "string": ("12", "shape () of <U2 ('12'"),
    "complex": ([1 + 0j, 2.0], "shape (2,) of complex128 ([(1+0j), 2.0]"),
    "none": (None, "NoneType (None"),
    "nones": ([None, 1.0], "list ([None, 1.0]"),
    "booleans": ([True, False], "shape (2,) of bool ([True, False]"),
    "scalar": (1.0, "shape () of float64 (1.0"),
    "short": ([1.0], "shape (1,) of float64 ([1.0]"),
    "long": ([1.0, 2.0, 3.0], "shape (3,) of float64 ([1.0, 2.0, 3.0]"),
    "columns": ([[1.0], [2.0]], "shape (2, 1) of float64 ([[1.0], [2.0]]"),
    "ragged": ([[1.0], [1.0, 2.0]], "list (setting an array element with a sequence"),
    "generator": ((float(i) for i in range(2)), "generator (<generator object"),
    "dict": ({"a": 1.0, "b": 2.0}, "dict ({'a': 1.0, 'b': 2.0}"),
    "set": ({1.0, 2.0}, "set ({1.0, 2.0}"),
    "fractions": ([fractions.Fraction(1, 2), decimal.Decimal(1)], "list ([Fraction(1, 2), Decimal('1')]"),
    "huge": ([10**30, 1], "list ([1000000000000000000000000000000, 1]"),
    "dates": (np.asarray(["2020-01-01", "2020-01-02"], "M8[D]"), "shape (2,) of datetime64[D]"),
    "tensor that fails": (Tensor([1, 2], RuntimeError("it requires\ngrad")), "Tensor (it requires grad)"),
    "tensor of another shape": (Tensor([1.0]), "shape (1,) of float64"),
}
"""What a program gives in place of numbers, and how that is told."""


def raises(error):
    def f(prompts, responses):
        raise error

    return f


def gives(value):
    def f(prompts, responses):
        return value

    return f


def place(function, further=1):
    return f"({__file__}, line {function.__code__.co_firstlineno + further})"


def scored(prompts, responses):
    """The reward of the job below: what it does stands in the environment."""
    what = os.environ["WHAT_A_PROGRAM_DOES"]
    if what == "exit":
        sys.exit("the judge is down")
    if what == "sleep" and "sat" in prompts[0]:  # in the second batch
        time.sleep(60)
    return ["good"] * len(responses) if what == "words" else [1.0] * len(responses)


WAYS = {
    "text": lambda f: rewards.from_text(lambda ids: "x", f),
    "numpy": lambda f: rewards.from_numpy(lambda *arrays: f(None, None)),
    "between programs": lambda f: rewards.from_text(lambda ids: "x", f, between_programs=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GIVEN)
def test_numbers_are_taken_however_they_are_given(name, way):
    found = WAYS[way](gives(GIVEN[name]))(None, *TEXTS)
    np.testing.assert_array_equal(found, [1, 2])
    assert found.dtype == jnp.float32


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_number_is_told_in_one_line(name):
    value, told = REFUSED[name]
    f = gives(value)
    with pytest.raises(ValueError, match="expected one real number per text") as found:
        WAYS["text"](f)(None, *TEXTS)
    words = str(found.value)
    assert "\n" not in words
    assert f"gives.<locals>.f: expected one real number per text, shape (2,), found {told}" in words
    assert words.endswith(f" for 2 rows, of the prompts 0, 5 {place(f, 0)}")
    if name != "generator":
        with pytest.raises(ValueError, match="expected one real number per text"):
            WAYS["numpy"](gives(value))(None, *TEXTS)


@pytest.mark.parametrize(
    "error", [KeyError("tone"), SystemExit(3), RuntimeError("a\nb\n\nc"), StopIteration(), OSError(28, "x")]
)
def test_what_a_program_raises_is_told_in_one_line(error):
    f = raises(error)
    for way in WAYS:
        with pytest.raises(ValueError, match="expected one real number per text") as found:
            WAYS[way](f)(None, *TEXTS)
        words = str(found.value)
        assert "\n" not in words
        told = " ".join(f"found {type(error).__name__}: {error}".split())
        assert f"{told} for 2 rows, of the prompts 0, 5" in words
    with pytest.raises(KeyboardInterrupt):  # that of the user ends the run
        WAYS["text"](raises(KeyboardInterrupt()))(None, *TEXTS)


def sleeping(prompts, responses):
    time.sleep(60)


def spinning(prompts, responses):
    while True:
        pass


def holding(prompts, responses):
    while True:
        with contextlib.suppress(Exception):
            time.sleep(0.01)


@pytest.mark.parametrize("f", [sleeping, spinning, holding])
@pytest.mark.parametrize("way", ["text", "between programs", "compiled"])
def test_a_call_without_an_end_is_left(f, way):
    begun = time.perf_counter()
    if way == "compiled":
        reward = rewards.from_text(lambda ids: "x", f, timeout=0.2)
        table = {"policy": tree.random(jax.random.key(0), PROCESS)[0], "reward": None, "beta": 1.0, "bound": 1.0}

        def call():
            keys = jax.random.key(1)
            return decoding.rejection(BASE, reward, table, keys, PROMPTS, max_tries=2, max_new_tokens=2, eos_ids=(0,))

    else:
        reward = rewards.from_text(lambda ids: "x", f, timeout=0.2, between_programs=way == "between programs")
        call = lambda: reward(None, *TEXTS)  # noqa: E731
    with pytest.raises(ValueError, match=r"found no answer within 0\.2 s") as found:
        jax.block_until_ready(call())
    assert time.perf_counter() - begun < 30
    words = str(found.value)
    assert f"{f.__name__}: expected one real number per text" in words
    first = f.__code__.co_firstlineno
    assert any("(--reward-timeout) for " in words and f"line {first + k})" in words for k in range(1, 6))


def test_a_program_is_called_once():
    calls = []

    def f(prompts, responses):
        calls.append(len(responses))
        raise RuntimeError("down")

    with pytest.raises(ValueError, match="RuntimeError: down"):
        rewards.from_text(lambda ids: "x", f)(None, *TEXTS)
    assert calls == [2]


def test_an_alarm_of_ones_own_and_what_is_returned_in_time_are_left_as_they_are():
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 30)
        assert _time_limits.within(lambda: 5, 10) == 5
        left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
        assert 20 < left <= 30
        assert signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL
        found = []
        thread = threading.Thread(target=lambda: found.append(_time_limits.within(lambda: 6, 10)))
        thread.start()
        thread.join()
        assert found == [6]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_the_word_of_a_command_line():
    assert time_limit.take(["sft", "--x", "1"]) == (3600.0, ["sft", "--x", "1"])
    assert time_limit.take(["sft", "--reward-timeout", "5", "--x"]) == (5.0, ["sft", "--x"])
    assert time_limit.take(["--reward-timeout=0.5"]) == (0.5, [])
    for words in (
        ["--reward-timeout"],
        ["--reward-timeout", "soon"],
        ["--reward-timeout=-1"],
        ["--reward-timeout=nan"],
    ):
        with pytest.raises(ValueError, match=r"^reward-timeout: expected .*, found"):
            time_limit.take(words)
    with pytest.raises(ValueError, match="timeout: expected a finite number of seconds >= 0, found -1"):
        rewards.from_text(lambda ids: "x", sleeping, timeout=-1)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The arguments of a job that decodes four prompts, two at a time."""
    root = tmp_path_factory.mktemp("job")
    lm, params = tiny_lm(0, num_layers=1, eos_ids=(1,))
    models.save(root / "base", lm, params, tokenizer=word_level(["the", "cat", "sat", "dog", "ran", "on", "a", "mat"]))
    (root / "prompts.txt").write_text("the cat\na dog\nthe dog sat\nsat on\n")
    given = ["--model", str(root / "base"), "--prompts", str(root / "prompts.txt"), "--max-new-tokens", "2"]
    own = ["--batch-size", "2", "--method", "best_of_n@2", "--reward", f"{__name__}:scored", "--no-include-base"]
    return [*given, *own]


@pytest.mark.parametrize(
    ("what", "told"),
    [
        (
            "exit",
            r"scored: expected one real number .*found SystemExit: the judge is down for 4 rows, of the prompts 0, 1 ",
        ),
        ("words", r"scored: expected one real number .*found shape \(4,\) of <U4 \(\['good', .* of the prompts 0, 1 "),
        (
            "sleep",
            r"scored: expected one real number .*found no answer within 2 s \(--reward-timeout\) .* prompts 2, 3 ",
        ),
    ],
)
def test_a_job_ends_in_one_line_with_whole_files_and_goes_on(what, told, job, tmp_path, monkeypatch, capfd):
    from eval import decode

    out = str(tmp_path / "out")
    monkeypatch.setenv("WHAT_A_PROGRAM_DOES", what)
    monkeypatch.setenv("HF_TOKEN", "hf_a_key_of_mine")
    try:
        with pytest.raises(SystemExit) as ended:
            commands.execute(decode.main, ["--out", out, *job, "--reward-timeout", "2"])
        assert ended.value.code == commands.USAGE
        words = capfd.readouterr().err
        (line,) = [line for line in words.splitlines() if not line.startswith("note: ") and "%|" not in line]
        assert re.match(rf"error: .*{told}\({re.escape(__file__)}, line \d+\)", line), words
        partial = [*(tmp_path / "out").glob("*/responses.jsonl*")]
        lines = [json.loads(row) for path in partial for row in path.read_text().splitlines()]
        assert [row["index"] for row in lines] == ([0, 1] if what == "sleep" else [])
        monkeypatch.setenv("WHAT_A_PROGRAM_DOES", "numbers")
        decode.main(["--out", out, *job])  # goes on
        (whole,) = (tmp_path / "out").glob("*/responses.jsonl")
        assert [json.loads(row)["reward"] for row in whole.read_text().splitlines()] == [1.0] * 4
        kept = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
        assert not any(b"hf_a_key_of_mine" in content for content in kept)  # the environment is not dumped
    finally:
        _time_limits.set_default(0.0)
