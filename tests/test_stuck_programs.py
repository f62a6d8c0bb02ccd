"""Programs that leave by ways of their own, that nothing gets out of, or that change the folder: a job still ends in
one line, or goes on."""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxalign import _time_limits, rewards
from jaxalign.evaluation.records import add_coherence
from tests.stuck_program import once, told
from tests.test_eval_decode import arguments, folders, methods
from tests.test_hostile_programs import TEXTS, WAYS, gives, place, raises

__all__ = ["folders"]  # a fixture


class Panic(BaseException):
    """As an extension in another language raises."""


LEAVES = [Panic("at the disco"), GeneratorExit(), asyncio.CancelledError("late")]


@pytest.mark.parametrize("error", LEAVES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("way", WAYS)
def test_a_program_that_leaves_by_no_exception_is_named(way, error):
    f = raises(error)
    with pytest.raises(ValueError, match="expected one real number per text") as found:
        WAYS[way](f)(None, *TEXTS)
    told = " ".join(f"found {type(error).__name__}: {error}".split())
    assert f"{told} for 2 rows, of the prompts 0, 5 {place(f)}" in str(found.value)


def panicking(given):
    raise Panic("at the disco")


def panics_late(given):
    def draw(rng, prompts):
        raise GeneratorExit

    return draw


@pytest.mark.parametrize(("name", "found"), [("panicking", "Panic: at the disco"), ("panics_late", "GeneratorExit:")])
def test_a_method_that_leaves_by_no_exception_is_named(name, found, folders, tmp_path):
    from eval import decode

    with pytest.raises(ValueError, match=rf":{name}: expected .*found {found}.*stuck_programs.py, line"):
        decode.main(arguments(folders, tmp_path / "out", *methods(f"{__name__}:{name}")))


def test_a_module_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    for i, line in enumerate(("import sys; sys.exit('no')", "1 / 0", "raise BaseException('a\\nb')", "def")):
        (tmp_path / f"own_{i}.py").write_text(f"\n{line}\n")
        with pytest.raises(ValueError, match=rf"^reward: expected MODULE:FUNCTION, found 'own_{i}:f' \(") as found:
            rewards.program(f"own_{i}:f")
        assert len(str(found.value).splitlines()) == 1
        assert f"{tmp_path / f'own_{i}.py'}, line 2" in str(found.value) or f"own_{i}.py" in str(found.value)


# What takes its end for an error --------------------------------------------------------------------------------------


def started(*words):
    command = [sys.executable, "-m", "tests.stuck_program", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("words", [("once",), ("told",), ("always",), ("always", "between")], ids="-".join)
def test_a_program_that_takes_its_limit_for_an_error_ends_the_job(words):
    job = started(*words, "--reward-timeout", "1")
    out, err = job.communicate(timeout=120)
    assert job.returncode == 2, err
    (line,) = err.splitlines()
    assert f"{words[0]}: expected one real number per text" in line
    assert "found no answer within 1 s (--reward-timeout) for 2 rows, of the prompts 0, 5 (" in line
    assert "stuck_program.py, line " in line
    assert "went on" not in out


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("program", ["once", "told", "always"])
def test_a_program_that_takes_a_signal_for_an_error_ends_with_it(program, number):
    job = started(program)
    assert job.stdout is not None
    assert job.stdout.readline() == "begun\n"
    job.send_signal(number)
    out, err = job.communicate(timeout=120)
    name = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    assert (job.returncode, err) == (128 + number, f"{name}; the same command goes on from what is saved\n")
    assert "went on" not in out


@pytest.mark.parametrize("f", [once, told])
def test_a_limit_that_was_passed_counts_outside_jobs(f):
    with pytest.raises(ValueError, match=r"found no answer within 0\.2 s"):
        rewards.from_text(lambda ids: "x", f, timeout=0.2)(None, *TEXTS)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert _time_limits.within(lambda: 5, 10) == 5


# The folder -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_a_program_that_changes_the_folder_leaves_it_as_it_was(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()

    def f(prompts, responses):
        os.chdir("other")
        return [] if fails else [1.0, 2.0]

    for way in WAYS:
        if fails:
            with pytest.raises(ValueError, match="expected one real number per text"):
                WAYS[way](f)(None, *TEXTS)
        else:
            WAYS[way](f)(None, *TEXTS)
        assert pathlib.Path.cwd() == tmp_path


def moved(given):
    from jaxalign import decoding

    os.chdir("/")

    def draw(rng, prompts):
        os.chdir("/")
        return decoding.sample(given.policy, given.params, rng, prompts, **given.limits)

    return draw


def test_a_job_of_relative_folders_goes_on_after_a_method_that_moves(folders, tmp_path, monkeypatch):
    from eval import decode

    monkeypatch.chdir(tmp_path)
    decode.main(arguments(folders, pathlib.Path("out"), *methods(f"{__name__}:moved")))
    assert (tmp_path / "out" / "results.json").is_file()


def test_a_module_that_changes_the_folder_leaves_it_as_it_was(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moving_module.py").write_text("import os\nos.chdir('/')\ndef f(prompts, responses): ...\n")
    rewards.program("moving_module:f")
    assert pathlib.Path.cwd() == tmp_path


# Numbers that are none ------------------------------------------------------------------------------------------------

OWN = {"text": WAYS["text"], "between": WAYS["between programs"]}
MASKED = {
    "every": np.ma.array([1.0, 2.0], mask=True),
    "one": np.ma.array([1, 2], mask=[False, True]),
    "list": [1.0, np.ma.masked],
}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("way", OWN)
def test_a_masked_number_is_none(way, name):
    f = gives(MASKED[name])
    with pytest.raises(
        ValueError, match=r"f: expected one real number per text, shape .*found [12] masked for"
    ) as found:
        OWN[way](f)(None, *TEXTS)
    assert str(found.value).endswith(f" for 2 rows, of the prompts 0, 5 {place(f, 0)}")


@pytest.mark.parametrize("way", OWN)
def test_an_array_with_no_masked_number_is_one_of_numbers(way):
    found = OWN[way](gives(np.ma.array([1.0, 2.0], mask=[False, False])))(None, *TEXTS)
    np.testing.assert_array_equal(found, [1, 2])


def test_a_masked_vector_of_an_embedding_is_none():
    records = [{"prompt": "a", "response": "b", "index": 3}]
    with pytest.raises(ValueError, match=r"embedding: expected finite vectors .*, found none for prompts \[3\]"):
        add_coherence(records, lambda texts: np.ma.array([[1.0, 2.0]], mask=True))


@pytest.mark.parametrize("value", [[1e300, 1.0], np.asarray([1.0, -1e39])])
@pytest.mark.parametrize("way", OWN)
def test_a_number_beyond_float32_is_told_as_it_came(way, value):
    f = gives(value)
    with pytest.raises(ValueError, match=r"f: expected .* that float32 holds, found -?1e\+") as found:
        OWN[way](f)(None, *TEXTS)
    assert str(found.value).endswith(f" for 2 rows, of the prompts 0, 5 {place(f, 0)}")
